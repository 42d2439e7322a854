"""Adapters on compressed models: where they go, what merging keeps, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import recover
import torch
from compressed import TOKENS, compress, logits, mixed_plan, plan_of
from families import write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from pipeline import with_tokenizer, write_text
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from orchestrator.errors import InputError, UsageError
from orchestrator.hf import load, recovery_targets
from orchestrator.plan.plan import Assignment

pytestmark = [
    # peft asks transformers for an attribute under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # it remarks on plain linears and GPT-2's transposed ones side by side
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every form in one Llama; q of blocks 0 and 1, and of blocks 2 and 3, share a basis."""
    root = tmp_path_factory.mktemp("recovery")
    return compress(write_checkpoint("llama", root / "dense"), root / "out", make_plan=mixed_plan)


def targets_of(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    return {"target_modules": kind} if kind == "all-linear" else recovery_targets(model, kind)


def adapt(model: PreTrainedModel, targets: dict[str, Any]) -> PeftModel:
    """The model with adapters that change it, as if they had been trained."""
    adapted = get_peft_model(model, LoraConfig(r=2, **targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapted.eval()


def places(adapted: PeftModel) -> set[str]:
    """Names of the modules that have an adapter."""
    names = [name for name, _ in adapted.get_base_model().named_parameters()]
    return {name.partition(".lora_A.")[0] for name in names if ".lora_A." in name}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of one file stores."""
    return load_file(directory / "model.safetensors")


def stored_alike(one: Path, other: Path) -> bool:
    """Return True if two checkpoints store tensors of the same names, shapes and dtypes."""
    first, second = (
        {name: (each.shape, each.dtype) for name, each in tensors(d).items()} for d in (one, other)
    )
    configs = [json.loads((d / "config.json").read_bytes()) for d in (one, other)]
    fields = ("architectures", "dtype", "quantization_config")
    return first == second and all(configs[0][f] == configs[1][f] for f in fields)


def test_adapters_stand_on_the_factor_that_is_asked_for(made):
    """On `weight` of every linear with two factors, on `down` of each that has its own."""
    assignments = made.plan.assignments.items()
    linears = {name for name, each in assignments if each.rank}
    dense = {name for name, each in assignments if each.form == "dense"}
    shared = {f"model.layers.{block}.self_attn.q_proj" for block in range(4)}
    own = {f"{name}.down" for name in linears - shared}
    found = {}
    for kind in ("weight", "down", "all-linear"):
        model = load(made.directory)
        found[kind] = places(adapt(model, targets_of(model, kind)))
    assert found == {"weight": linears, "down": own, "all-linear": own | dense}
    assert shared < linears
    forms = {made.plan.assignments[name].form for name in linears}
    assert forms == {"low_rank", "pivoted", "low_rank_sparse"}


@pytest.mark.parametrize("kind", ["weight", "down", "all-linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_keeps_function_and_form(family, kind, compressed, tmp_path):
    """Unmerged, reloaded and merged logits agree, and the same tensors are stored as before."""
    directory = compressed(family)
    model = load(directory)
    before = logits(model)
    adapted = adapt(model, targets_of(model, kind))
    unmerged = logits(adapted)
    assert (unmerged - before).abs().max() > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert torch.equal(logits(again), unmerged)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    assert stored_alike(tmp_path / "merged", directory)


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    """Merged in float32 and cast, it stores the rounded sums in the form that it had."""
    dense = write_checkpoint("llama_tied", tmp_path / "dense", dtype=torch.bfloat16)
    made = compress(dense, tmp_path / "out", make_plan=mixed_plan)
    model = load(made.directory, dtype=torch.float32)
    merged = adapt(model, recovery_targets(model, "weight")).merge_and_unload()
    exact = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    stored = tensors(tmp_path / "merged")
    assert all(torch.equal(stored[name], exact[name].to(stored[name].dtype)) for name in stored)
    assert stored_alike(tmp_path / "merged", made.directory)
    load(tmp_path / "merged")


def test_one_factor_after_the_other_is_trained(made, tmp_path):
    """Each step lowers the loss, and changes its own factor of the linears and nothing else."""
    model = load(made.directory)
    shared = {f"model.layers.{block}.self_attn.q_proj.down.weight" for block in range(4)}
    linears = [name for name, each in made.plan.assignments.items() if each.rank]
    for factor in ("weight", "down"):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapted = get_peft_model(model, LoraConfig(r=2, **recovery_targets(model, factor)))
        losses = train(adapted, steps=12)
        assert losses[-1] < losses[0]
        model = adapted.merge_and_unload()
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        child = {"weight": "weight", "down": "down.weight"}[factor]
        assert changed == {f"{name}.{child}" for name in linears} - shared
    model.save_pretrained(tmp_path)
    assert stored_alike(tmp_path, made.directory)


def train(model: torch.nn.Module, *, steps: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_shared_basis_takes_no_adapter(made):
    """Asked for by name, as module or as parameter, it is an error before anything is merged."""
    name = "model.layers.1.self_attn.q_proj.down"
    with pytest.raises(ValueError, match=r"SharedBasis.*is not supported"):
        get_peft_model(load(made.directory), LoraConfig(target_modules=[name]))
    targets = {"target_modules": [], "target_parameters": [f"{name}.weight"]}
    with pytest.raises(InputError, match="several linears share was adapted for one of them"):
        logits(adapt(load(made.directory), targets))


def test_a_model_is_not_saved_inside_its_adapters(made, tmp_path):
    """Not unmerged, and not after both factors at once, of which peft merges but one."""
    model = load(made.directory)
    adapted = adapt(model, recovery_targets(model, "weight"))
    with pytest.raises(InputError, match="cannot be saved inside an adapter; merge it"):
        adapted.get_base_model().save_pretrained(tmp_path)
    model = load(made.directory)
    both = recovery_targets(model, "weight") | {"target_modules": "all-linear"}
    merged = adapt(model, both).merge_and_unload()
    with pytest.raises(InputError, match="one factor at a time"):
        merged.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_transformers_own_adapters_work(made, tmp_path):
    """`add_adapter` trains and saves the adapter alone, and the pair loads again."""
    model = load(made.directory)
    model.add_adapter(LoraConfig(r=2, **recovery_targets(model, "down")))
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = load(made.directory)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("has_adapters", [False, True])
def test_the_trainer_takes_a_compressed_model(made, tmp_path, has_adapters):
    """With adapters and without: transformers does not mistake it for one of integers."""
    model = load(made.directory)
    if has_adapters:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4
    Trainer(model, arguments, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_has_no_factors_is_refused(tmp_path, made):
    """A sparse model has nothing to adapt by halves, and there are two factors, not three."""
    with pytest.raises(UsageError, match="factor is 'up'; it must be weight or down"):
        recovery_targets(load(made.directory), "up")

    def sparse(survey):
        halves = {e.name: Assignment(form="sparse", nonzeros=e.values // 2) for e in survey.linears}
        return plan_of(survey, halves)

    dense = write_checkpoint("llama", tmp_path / "dense")
    model = load(compress(dense, tmp_path / "out", make_plan=sparse).directory)
    with pytest.raises(InputError, match="no linear has a factor weight"):
        recovery_targets(model, "weight")


@pytest.mark.parametrize("flags", [[], ["--all-linear"]])
def test_the_script_writes_what_it_trained(checkpoint, tmp_path, monkeypatch, flags):
    """Another model in the same form, with its tokenizer; run again, the same bytes."""
    dense = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=mixed_plan)
    text = write_text(tmp_path / "text.txt")
    sizes = ["--steps", "2", "--batch", "2", "--sequence-length", "32", "--rank", "2"]
    outs = tmp_path / "one", tmp_path / "two"
    for out in outs:
        words = ["recover", made.directory, out, "--text", text, *sizes, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        recover.main()
        assert stored_alike(out, made.directory)
        assert (out / "tokenizer.json").is_file()
    assert not torch.equal(logits(load(outs[0])), logits(load(made.directory)))
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
