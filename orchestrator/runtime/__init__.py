"""Execution of typed calls on workers: schedules, failures, scaling; knows no model."""
