"""Pipeline over shards that trains a whole model: schedule, commands and the workers' part."""
