"""Losses of the model under whole plans, among which the best one is searched."""
