"""Training of compressed blocks and models, and compensation of their inputs."""
