"""Bytes that a token takes in the cache of keys and values, full or as latents, from a report."""

from collections.abc import Mapping
from typing import Any

from orchestrator.plan.forms import FORMS

LATENT_KEYS = ("Gemma2", "Llama", "Mistral", "Mixtral", "OPT", "Qwen2", "Qwen3", "Qwen3Moe")
"""Families of transformers whose keys are k_proj's outputs, normalised by k_norm if there is one,
and rotated by the decoder's rotation if there is one."""
LATENT_VALUES = (*LATENT_KEYS, "Gemma3")
"""Families whose values are v_proj's outputs."""
UNROTATED = ("OPT",)
"""Families whose keys are not rotated, so that a cache needs no positions."""
POSITION_BYTES = 4
"""Bytes of a token's position in a block with latent keys, int32."""


def cache_bytes(report: Mapping[str, Any]) -> dict[str, int]:
    """Return bytes a token and sequence of the model's caches, by kind; empty if they are unknown.

    `full` is the cache of transformers, `values` one with latents of values, `latent` one with
    latents of keys too, and positions: `orchestrator.hf.latent_cache`, without and with
    `latent_attention`. A linear of low rank R has R latents, another one its outputs; the cache has
    the dtype of the written values. Of a block of which one linear alone is targeted both have the
    same number of outputs, and a block without any is as the others.

    It is that of a token in full attention: layers with a sliding window stay as they are.
    """
    family = report.get("architecture", "").removesuffix("ForCausalLM")
    values, sizes = report.get("values", {}), report.get("bytes", {})
    entries = {name: each for name, each in report.get("linears", {}).items() if _part(name)}
    is_complete = all("shape" in each and "form" in each for each in entries.values())
    dense_bytes, dense_values = sizes.get("dense_linears"), values.get("dense_linears")
    if family not in LATENT_VALUES or not (
        entries and is_complete and dense_bytes and dense_values
    ):
        return {}
    itemsize = dense_bytes // dense_values
    outputs = next(each["shape"][0] for each in entries.values())
    names = [*entries, *filter(_part, report.get("not_targeted", ()))]
    total = dict.fromkeys(("full", "values", "latent"), 0)
    for name in names:
        entry = entries.get(name)
        full = itemsize * (outputs if entry is None else entry["shape"][0])
        is_cut = entry is not None and entry["form"] in FORMS and FORMS[entry["form"]].is_factored
        latent = itemsize * entry["rank"] if is_cut and entry is not None else full
        is_key = _part(name) == "k_proj"
        has_position = is_key and is_cut and family not in UNROTATED
        with_position = latent + (POSITION_BYTES if has_position else 0)
        total["full"] += full
        total["values"] += full if is_key else latent
        total["latent"] += with_position if family in LATENT_KEYS or not is_key else full
    return total


def cache_texts(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the smaller cache as text, and an explanation; None if there is none."""
    found = cache_bytes(report)
    if not found or found["latent"] >= found["full"]:
        return None
    latent, values, full = (f"{found[kind]:,}" for kind in ("latent", "values", "full"))
    says = f"with latents of keys and values; {values} with those of values alone, {full} in full"
    return f"{latent} bytes", says


def _part(name: str) -> str:
    """Return the last part of the name of keys or values, `k_proj`; empty for other linears."""
    part = name.rpartition(".")[2]
    return part if part in ("k_proj", "v_proj") else ""
