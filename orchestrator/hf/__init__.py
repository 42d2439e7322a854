"""Importing this makes transformers load compressed checkpoints: `from_pretrained` as ever."""

from orchestrator.hf.latent_attention import latent_attention
from orchestrator.hf.latent_cache import LatentCache, latent_cache
from orchestrator.hf.loading import load
from orchestrator.hf.quantizer import OrchestratorConfig, OrchestratorQuantizer, register
from orchestrator.hf.recovery import recovery_targets

__all__ = [
    "LatentCache",
    "OrchestratorConfig",
    "OrchestratorQuantizer",
    "latent_attention",
    "latent_cache",
    "load",
    "recovery_targets",
    "register",
]

register()
