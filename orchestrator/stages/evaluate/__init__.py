"""Evaluation of models on a text."""
