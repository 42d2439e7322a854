"""Forecast of a run from shapes and rates alone, before any machine is used."""
