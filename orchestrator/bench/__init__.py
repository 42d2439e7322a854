"""Speed of a compressed model: measured beside the dense one and the limits of the machine."""
