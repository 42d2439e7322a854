"""Costs of the kinds of result, for the forecast: one file per kind, without torch."""
