"""Compressed checkpoints split over two ranks of one machine, with transformers' own `tp_plan`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed import TOKENS, compress, half_plan, mixed_plan, plan_of
from families import write_checkpoint
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # transformers knows the format then
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Assignment, Plan

ROOT = Path(__file__).parents[2]
RANKS = 2

PROGRAM = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import orchestrator.hf

torch.set_num_threads(1)
tokens = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, distributed_config=DistributedConfig(tp_size=2)
    )
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel()
               for p in model.parameters())
    with torch.no_grad():
        logits = model(tokens).logits
    model(tokens, labels=tokens).loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    torch.save({"logits": logits, "gradients": gradients, "held": held},
               f"{directory}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def pivoted_plan(survey: Survey) -> Plan:
    """As pivoted storage leaves a model: some blocks dense, the others of different ranks."""
    assignments = {}
    for linear in survey.linears:
        rank = LOW_RANK.break_even(linear) + linear.block
        pivoted = Assignment(form="pivoted", rank=rank)
        assignments[linear.name] = Assignment(form="dense") if linear.block == 1 else pivoted
    return plan_of(survey, assignments)


def shared_plan(survey: Survey) -> Plan:
    """Every two blocks share all bases: those of linears that are split by inputs too."""
    assignments = {}
    for first in range(0, survey.num_blocks, 2):
        pairs = zip(survey.of_block(first), survey.of_block(first + 1), strict=True)
        for one, two in pairs:
            assignments[one.name] = Assignment(form="low_rank", rank=LOW_RANK.break_even(one))
            assignments[two.name] = Assignment(
                form="low_rank", rank=LOW_RANK.break_even(one), basis=one.name
            )
    return plan_of(survey, assignments)


CASES = {
    "llama, low rank": ("llama", half_plan),
    "llama, pivoted and dense": ("llama", pivoted_plan),
    "llama, shared bases": ("llama", shared_plan),
    "llama, every form": ("llama", mixed_plan),
    "qwen2 with biases, every form": ("qwen2", mixed_plan),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What two ranks found, and one process, for each case."""
    root = tmp_path_factory.mktemp("ranks")
    torch.save(TOKENS, root / "tokens.pt")
    (root / "program.py").write_text(PROGRAM)
    found = {}
    for number, (case, (family, make_plan)) in enumerate(CASES.items()):
        dense = root / f"dense{number}"
        made = compress(write_checkpoint(family, dense), root / f"out{number}", make_plan=make_plan)
        found[case] = made.directory
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(RANKS), str(root / "program.py")]
    ran = subprocess.run(
        [*launcher, str(root / "tokens.pt"), *map(str, found.values())],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {
        case: [torch.load(out / f"rank{rank}.pt") for rank in range(RANKS)]
        + [AutoModelForCausalLM.from_pretrained(out)]
        for case, out in found.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_what_one_process_does(loaded, case):
    *ranks, model = loaded[case]
    expected = model(TOKENS).logits.detach()
    for rank in ranks:
        assert torch.allclose(rank["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(loaded, case):
    *ranks, model = loaded[case]
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {name: each.grad for name, each in model.named_parameters()}
    for rank in ranks:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            found = rank["gradients"][name]
            assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6), name


def test_a_rank_holds_a_part(loaded):
    """Of low-rank linears either factor is split, so a rank holds less than the whole model."""
    *ranks, model = loaded["llama, low rank"]
    whole = sum(each.numel() for each in model.parameters())
    assert all(rank["held"] < 0.75 * whole for rank in ranks)
