"""Devices of PyTorch: copies, determinism, diagnosis of a GPU, memory of the process."""
