"""Allocators of whole experts."""
