"""PyTorch devices: copies, determinism, GPU diagnosis, memory of the process."""
