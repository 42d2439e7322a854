"""Run directory: request, status, finished units and results."""
