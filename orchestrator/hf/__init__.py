"""Importing this makes transformers load compressed checkpoints: `from_pretrained` as ever."""

from orchestrator.hf.loading import load
from orchestrator.hf.quantizer import OrchestratorConfig, OrchestratorQuantizer, register
from orchestrator.hf.recovery import recovery_targets

__all__ = ["OrchestratorConfig", "OrchestratorQuantizer", "load", "recovery_targets", "register"]

register()
