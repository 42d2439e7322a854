"""Statistics of activations and gradients, gathered as chunks pass."""
