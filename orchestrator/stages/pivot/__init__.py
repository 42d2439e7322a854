"""Pivoted storage of factors."""
