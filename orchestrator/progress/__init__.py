"""Progress of a run: measured calls, and the time that is left by them and by the forecast."""
