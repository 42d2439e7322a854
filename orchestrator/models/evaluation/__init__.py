"""Scores, decoding speed and verification of a model, and the rates of a machine."""
