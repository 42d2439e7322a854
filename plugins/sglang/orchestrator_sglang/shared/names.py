# Copy of plugins/vllm/orchestrator_vllm/names.py, by scripts/vendor_forms.py; change that file.
"""Names of the linears behind a layer, and checks of a config that need no layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator_sglang.shared.forms.base import StoredForm
from orchestrator_sglang.shared.forms.config import EXPERTS, read_forms
from orchestrator_sglang.shared.forms.errors import InputError

AFFINE = "affine"
"""Form whose bias the layers of a server have no place for."""


def read_served(config: Mapping[str, Any]) -> dict[str, StoredForm]:
    """Read the form of every compressed linear from the field `quantization_config`.

    Raises:
        InputError: A field is wrong, the format is one that this version does not read, experts are
            compressed, or a linear has a bias of its own.
    """
    forms = read_forms(config)
    if EXPERTS in config:
        raise InputError(
            f"config.json: quantization_config.{EXPERTS}: compressed experts are not served yet; "
            "serve the dense export"
        )
    for name, form in forms.items():
        if form.form == AFFINE:
            raise InputError(
                f"config.json: quantization_config.modules[{name!r}]: found {AFFINE}, a linear "
                "with a bias of its own, which is not served; load the checkpoint with transformers"
            )
    check_bases(forms)
    return forms


def stored_names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the linears of the checkpoint that a layer holds, in their order.

    Args:
        prefix: Name of the layer, `model.layers.0.self_attn.qkv_proj`.
        packed: Names in a layer of a name: `q_proj`, `k_proj` and `v_proj` in `qkv_proj`.
    """
    parent, _, child = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(child, [child])]


def check_bases(forms: Mapping[str, StoredForm]) -> None:
    """Check that every shared basis is that of a linear of the same rank.

    Raises:
        InputError: It is not.
    """
    for name, form in forms.items():
        where = f"config.json: quantization_config.modules[{name!r}]"
        basis = forms.get(form.basis)
        if form.basis and (basis is None or basis.basis or basis.form != form.form):
            raise InputError(
                f"{where}: found basis {form.basis!r}, need a {form.form} linear with its own"
            )
        if basis is not None and basis.rank != form.rank:
            raise InputError(
                f"{where}: found rank {form.rank}, its basis {form.basis} has rank {basis.rank}"
            )


def materialized(forms: Mapping[str, StoredForm]) -> list[str]:
    """Return the names of the linears that are served dense."""
    return [name for name, form in forms.items() if form.nonzeros]
