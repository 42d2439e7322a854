"""Experiment trackers that follow the events of a run; each needs an extra of the package."""
