"""Losses of models with one linear cut."""
