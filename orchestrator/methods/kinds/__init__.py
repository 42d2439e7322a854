"""Kinds of result of a method: the facts, the stored tensors, the way back, and the errors."""
