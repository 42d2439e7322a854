"""Architectures whose tensors follow from the config by formula, so that no survey is needed."""

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import InputError
from orchestrator.forecast.shapes import HEAD, from_config
from orchestrator.models.checkpoint.headers import Headers, quoted
from orchestrator.models.survey.config import FORMS_KEYS, check_config, check_not_quantised
from orchestrator.store.places import Place

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Class of the language model of each of `shapes.FAMILIES`."""
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FLOATS = ("F64", "F32", "F16", "BF16")


def check_bare_config(path: Place, config: Mapping[str, Any]) -> None:
    """Check a config without weights beside it, as far as it decides what a survey says.

    Raises:
        InputError: It describes weights of another form, has a number that is not finite, or is of
            another class than the language model of its family.
    """
    check_not_quantised(path, config)
    check_config(path, config)
    expected, found = _class_of(config), config.get("architectures")
    if expected and found not in (None, [expected]):
        raise InputError(f"{path}: architectures is {quoted(found)}; {expected} is needed")


def has_known_architecture(headers: Headers) -> bool:
    """Test if a checkpoint has exactly the tensors that the formulas of its family give.

    Reads config and headers, without torch. A survey accepts such a model; it may accept others.

    Raises:
        InputError: A number in the config is missing, not allowed or not finite.
    """
    config, path = headers.config, headers.directory / "config.json"
    check_config(path, config)
    is_known_config = (
        config.get("architectures") == [_class_of(config)]
        and all(config.get(key) is None for key in FORMS_KEYS)
        and config.get("hidden_act", "silu") == "silu"
        and all(map(_is_known_rope, (config.get("rope_scaling"), config.get("rope_parameters"))))
    )
    if not is_known_config:
        return False
    expected = _tensors(config, str(path))
    heads = config["num_attention_heads"]
    return (
        {name: entry.shape for name, entry in headers.entries.items()} == expected
        and all(entry.code in FLOATS for entry in headers.entries.values())
        and heads % (config.get("num_key_value_heads") or heads) == 0
    )


def _class_of(config: Mapping[str, Any]) -> str:
    """Class of the language model of the config's family; empty if the family is not known."""
    family = config.get("model_type")
    return CLASSES.get(family, "") if isinstance(family, str) else ""


def _is_known_rope(rope: Any) -> bool:
    if not isinstance(rope, dict):
        return rope is None
    return rope.get("rope_type", rope.get("type", "default")) in ROPES


def _tensors(config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a family's language model."""
    shapes = from_config(config, where)
    table = shapes.vocabulary, shapes.hidden
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (shapes.hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        found[HEAD] = table
    for linear in shapes.linears:
        found[f"{linear.name}.weight"] = linear.out_features, linear.in_features
        if linear.has_bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    for block in range(shapes.num_blocks):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = (shapes.hidden,)
        if shapes.model_type == "qwen3":
            channels = shapes.attention // config["num_attention_heads"]
            for norm in ("q_norm", "k_norm"):
                found[f"{prefix}.self_attn.{norm}.weight"] = (channels,)
    return found
