"""Training of the whole compressed model."""
