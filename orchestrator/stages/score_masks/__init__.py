"""Choice of kept candidates by losses of masked models."""
