"""Calibration text: documents, tokenizer, token sequences."""
