"""All of transformers: surveying, running and writing models."""
