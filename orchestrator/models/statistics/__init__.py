"""Statistics of activations and gradients, accumulated over chunks."""
