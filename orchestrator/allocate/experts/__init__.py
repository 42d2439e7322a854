"""Allocations of whole experts: of their number, and of one threshold that may drop some."""
