"""Timing, processes, Ray, synthetic models and tables, shared by the benchmarks."""
