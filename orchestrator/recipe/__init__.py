"""Recipe of a run, presets, and checks of values."""
