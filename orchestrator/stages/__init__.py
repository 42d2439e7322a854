"""The stages of a run, each in a folder of its own, and the driver."""
