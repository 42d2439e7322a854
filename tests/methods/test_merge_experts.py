"""Merging of experts: clusters, means of weights, checkpoints and other sizes."""

from collections import defaultdict

import pytest
import torch
from compressed import logits
from moe.families import BLOCKS, EXPERTS, make_moe
from pipeline import add_tokenizer, run, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator import retarget, verify
from orchestrator.hf.export import export_dense
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.forms.tied import TiedLinear
from orchestrator.pages.experts import experts_map
from orchestrator.pages.linears import entries

PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A tiny Qwen3-MoE whose experts 1 and 3 of every block are equal."""
    model = make_moe("qwen3_moe")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data[3] = parameter.data[1]
    directory = tmp_path_factory.mktemp("twins") / "dense"
    model.save_pretrained(directory)
    return add_tokenizer(directory)


@pytest.fixture(scope="module")
def merged(twins, tmp_path_factory):
    """The result with three of four experts in every block."""
    root = tmp_path_factory.mktemp("merged")
    return run(
        twins, root / "out", write_text(root / "text.txt"), method="merge-experts", keep=0.75
    )


def clusters_of(result):
    """Experts by block and first expert of their cluster."""
    found = defaultdict(set)
    for name, assignment in result.plan.assignments.items():
        block, expert = int(name.split(".")[2]), int(name.split(".")[-2])
        first = int((assignment.basis or name).split(".")[-2])
        found[block, first].add(expert)
    return found


def test_equal_experts_merge_without_loss(merged, twins):
    """Twins are the closest, their mean is exact, and their values are stored once."""
    expected = {(block, e): {e} for block in range(BLOCKS) for e in (0, 2)}
    expected |= {(block, 1): {1, 3} for block in range(BLOCKS)}
    assert clusters_of(merged) == expected
    assert merged.plan.stored_values * EXPERTS == merged.plan.budget_values / 0.75 * 3
    dense = AutoModelForCausalLM.from_pretrained(twins)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(merged.out)), logits(replaced(dense))
    )


def replaced(model):
    """The model with its experts one by one, whose order of computation is that of the result."""
    replace_experts(model)
    return model


def test_a_checkpoint_is_sound_and_saved_again(merged, twins, tmp_path):
    """Verification finds no problem; saving keeps names and ties, the export is the dense model."""
    assert verify(merged.out, against=twins)["problems"] == []
    model = AutoModelForCausalLM.from_pretrained(merged.out)
    model.save_pretrained(tmp_path / "again")
    files = [load_file(each / "model.safetensors") for each in (merged.out, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    experts = model.model.layers[0].mlp.experts
    assert experts.get_submodule("3.up").weight is experts.get_submodule("1.up").weight
    export_dense(merged.out, tmp_path / "dense")
    exported, dense = (
        load_file(each / "model.safetensors") for each in (tmp_path / "dense", twins)
    )
    assert exported.keys() == dense.keys()
    assert all(torch.equal(exported[name], dense[name]) for name in dense)


def test_the_map_names_the_expert_that_has_the_weights(merged):
    """An expert without weights of its own is not taken for a dropped one."""
    page = str(experts_map(merged.report, entries(merged.report)))
    name = "model.layers.2.mlp.experts.3"
    tokens = merged.report["experts"]["tokens"][name]
    assert f"{name}: has the weights of expert 1, {tokens:,} tokens" in page


def test_weights_are_means_by_tokens(merged, twins, tmp_path):
    """Each weight is that of its cluster; another size needs the run alone."""
    half = retarget(merged.run_dir, tmp_path / "half", keep=0.5, executor="local")
    tokens = half.report["experts"]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(half.out)
    dense = replaced(AutoModelForCausalLM.from_pretrained(twins))
    names = {name for name, m in model.named_modules() if isinstance(m, TiedLinear)}
    found = clusters_of(half)
    assert len(names) == 3 * sum(len(each) for each in found.values() if len(each) > 1)
    for (block, first), members in found.items():
        module = f"model.layers.{block}.mlp.experts"
        weights = [tokens[f"{module}.{each}"] for each in sorted(members)]
        for part in PARTS if len(members) > 1 else ():
            each = [dense.get_submodule(f"{module}.{e}.{part}").weight for e in sorted(members)]
            expected = sum(w * t.double() for w, t in zip(weights, each, strict=True)) / sum(
                weights
            )
            assert torch.equal(
                model.get_submodule(f"{module}.{first}.{part}").weight, expected.float()
            )
