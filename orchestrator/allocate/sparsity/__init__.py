"""Allocations to entries, and to entries beside directions (CAP)."""
