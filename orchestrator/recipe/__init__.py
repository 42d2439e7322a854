"""The recipe of a run, its presets, and the checks of its values."""
