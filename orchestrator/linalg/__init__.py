"""Numerics: tensors in, tensors out. Knows nothing of names, linears, models or clusters."""
