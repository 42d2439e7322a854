"""Packages that serve checkpoints: copies of sources, names and limits."""

import tomllib
from pathlib import Path

import pytest
import vendor_forms

import orchestrator_sglang.release
from orchestrator_vllm.forms.base import StoredForm
from orchestrator_vllm.forms.config import read_forms
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.names import check_bases, materialized, read_served, stored_names
from orchestrator_vllm.release import SERVED, refusal

PROJECT, FOR_SGLANG = (
    tomllib.loads((Path(vendor_forms.ROOT) / f"plugins/{server}/pyproject.toml").read_text())
    for server in ("vllm", "sglang")
)


def test_the_copies_are_the_sources():
    """After a change of a form: `python scripts/vendor_forms.py --write`."""
    assert vendor_forms.different() == []


def test_copies_import_neither_this_package_nor_transformers():
    """The server's environment has other releases, or none."""
    for name, text in vendor_forms.vendored().items():
        imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in imports if "transformers" in line], name
        assert not [line for line in imports if "orchestrator." in line], name
        other = "orchestrator_vllm" if "sglang" in name else "orchestrator_sglang"
        assert not [line for line in imports if other in line], name


def test_shared_sources_use_no_server():
    """The package for SGLang has copies of them."""
    folder = Path(vendor_forms.ROOT) / vendor_forms.VLLM
    for name in vendor_forms.SHARED:
        text = (folder / f"{name}.py").read_text()
        assert not [line for line in text.splitlines() if line.startswith("from vllm")], name


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
def test_the_release_it_is_written_for_is_served(version):
    """Any patch of the minor release."""
    assert refusal(version) == ""


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_another_release_is_refused(version):
    """The sentence has both versions."""
    assert f"found vLLM {version}" in refusal(version)
    assert "0.32" in refusal(version)


def test_the_dependency_is_the_release():
    """One minor release of vLLM and nothing else."""
    major, minor = SERVED
    assert PROJECT["project"]["dependencies"] == [f"vllm>={major}.{minor},<{major}.{minor + 1}"]


def test_sglang_is_one_release():
    """Its interfaces change between patches."""
    served = orchestrator_sglang.release.SERVED
    assert FOR_SGLANG["project"]["dependencies"] == [f"sglang=={served}"]
    assert orchestrator_sglang.release.refusal(served) == ""
    assert orchestrator_sglang.release.refusal(f"{served}+cpu") == ""
    for other in ("0.5.24", "0.5.23.post1", "0.6.0"):
        sentence = orchestrator_sglang.release.refusal(other)
        assert f"found SGLang {other}" in sentence
        assert served in sentence


def test_a_layer_has_the_names_of_its_linears():
    """Packed layers have several; others their own."""
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = stored_names("model.layers.0.self_attn.qkv_proj", packed)
    assert names == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert stored_names("lm_head", packed) == ["lm_head"]
    assert stored_names("qkv_proj", packed) == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("basis", "found"),
    [
        (StoredForm(form="pivoted", rank=3), "found basis 'a'"),
        (StoredForm(form="low_rank", rank=3, basis="c"), "found basis 'a'"),
        (StoredForm(form="low_rank", rank=4), "found rank 3, its basis a has rank 4"),
        (None, "found basis 'a'"),
    ],
)
def test_a_basis_is_that_of_a_linear_of_the_same_rank(basis, found):
    """Another one is refused before weights are read."""
    forms = {"a": basis, "b": StoredForm(form="low_rank", rank=3, basis="a")}
    forms["c"] = StoredForm(form="low_rank", rank=3)
    with pytest.raises(InputError, match=found):
        check_bases({name: form for name, form in forms.items() if form is not None})


def test_linears_with_entries_are_served_dense():
    """They are named, so that the log can say so."""
    forms = {
        "a": {"form": "sparse", "nonzeros": 3, "index": "bitmask"},
        "b": {"form": "low_rank", "rank": 2},
        "c": {"form": "low_rank_sparse", "rank": 2, "nonzeros": 3, "index": "bitmask"},
    }
    config = {"quant_method": "orchestrator", "format_version": 1, "modules": forms}
    assert materialized(read_forms(config)) == ["a", "c"]
    with pytest.raises(InputError, match="format_version: found 4"):
        read_served(config | {"format_version": 4})


def test_a_bias_of_factors_is_refused():
    """Before a weight is read, in one line that names the linear."""
    modules = {"a": {"form": "low_rank", "rank": 1}, "b.q_proj": {"form": "affine", "rank": 2}}
    config = {"quant_method": "orchestrator", "format_version": 1, "modules": modules}
    with pytest.raises(InputError, match=r"modules\['b.q_proj'\]: found affine"):
        read_served(config)


def test_compressed_experts_are_refused():
    """By the config, before any layer is made."""
    experts = {"layers.0.experts": {"up": {"form": "low_rank", "rank": [2, 0]}}}
    config = {"quant_method": "orchestrator", "modules": {}}
    assert read_served(config | {"format_version": 1}) == {}
    with pytest.raises(InputError, match="experts: compressed experts are not served yet; serve"):
        read_served(config | {"format_version": 2, "experts": experts})
