"""Version of the package, for reports, environments and checkpoints."""

__version__ = "0.1.0"
