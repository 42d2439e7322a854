"""Costs of stages that are not chosen by a recipe: calibration, scoring, learning, writing."""
