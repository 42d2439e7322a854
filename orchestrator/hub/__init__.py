"""Publication of a compressed checkpoint on a model hub, with its model card."""
