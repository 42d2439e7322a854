"""Training of compressed blocks and models, and compensation for changed inputs."""
