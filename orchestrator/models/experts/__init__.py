"""Experts of mixture-of-experts models as ordinary linears, for any fused module of transformers.

The files import torch, `orchestrator.errors` and this package only: their texts become part of the
file that loads a checkpoint without orchestrator (`orchestrator.hf.bootstrap`), so the names of
classes and functions in them are in no other file of that source.
"""
