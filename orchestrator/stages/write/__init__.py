"""Writing of the checkpoint and its report."""
