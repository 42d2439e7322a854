"""Compensation in a walk: its definition, and that no linear is made worse."""

import shutil
from functools import cache

import pytest
import torch
from pipeline import run, token_chunks
from transformers import AutoModelForCausalLM

import orchestrator

SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def seen(model, names, chunks):
    """Inputs of a whole model's linears for the chunks' tokens inside the mask, float64."""
    rows = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for chunk in chunks:
            model(input_ids=chunk.tokens, attention_mask=chunk.mask.long())
    for hook in hooks:
        hook.remove()
    masks = [chunk.mask for chunk in chunks]
    return {
        name: torch.cat([s[m] for s, m in zip(rows[name], masks, strict=True)]).detach().double()
        for name in names
    }


@torch.no_grad()
def by_definition(dense, model, chunks, *, beta, basis, damping=0.01):
    """Compensate a whole compressed model in place, with every token's input in memory."""
    sites = [[f"model.layers.{b}.{role}" for role in site] for b in range(4) for site in SITES]
    inputs = seen(dense, [names[0] for names in sites], chunks)
    for names in sites:
        x, z = inputs[names[0]], seen(model, names[:1], chunks)[names[0]]
        target, ridge = (1 - beta) * z + beta * x, damping * float((z.T @ z).diagonal().mean())
        eye = torch.eye(z.shape[1], dtype=torch.float64)
        turn = torch.linalg.solve(z.T @ z + ridge * eye, z.T @ target + ridge * eye).T
        for name in names:
            factors, weight = model.get_submodule(name), dense.get_submodule(name).weight
            down, left = factors.down.weight.double() @ turn, factors.weight.double()
            if basis == "new":
                outputs = z @ (weight.double() @ turn).T
                left = torch.linalg.svd(outputs.T, full_matrices=False).U[:, : factors.rank]
                down = left.T @ (weight.double() @ turn)
            factors.weight.data, factors.down.weight.data = left.float(), down.float()


@pytest.fixture(scope="module")
def packed(llama, text, tmp_path_factory):
    """Run without compensation; the run directory is to be copied."""
    return run(llama, tmp_path_factory.mktemp("packed") / "out", text)


@pytest.mark.parametrize(
    ("objective", "basis", "beta", "layout"),
    [
        ("anchored", "new", 1.0, "packed"),
        ("anchored", "kept", 1.0, "packed"),
        ("blend", "new", 0.5, "padded"),
        ("input", "new", 0.0, "packed"),
    ],
)
def test_compensation_is_what_the_definition_says(
    objective, basis, beta, layout, llama, text, documents, packed, tmp_path
):
    """The result equals plain torch on whole models with all inputs in memory, to 1e-5."""
    source = text if layout == "packed" else documents
    shared = {"run_dir": str(tmp_path / "run"), "layout": layout}
    if layout == "packed":
        plain = packed
        shutil.copytree(packed.run_dir, tmp_path / "run")
    else:
        plain = run(llama, tmp_path / "plain", source, **shared)
    options = {"compensation": {"basis": basis}}
    done = run(llama, tmp_path / "out", source, compensate=objective, options=options, **shared)
    model = orchestrator.load(plain.out)
    dense = AutoModelForCausalLM.from_pretrained(llama)
    chunks = token_chunks(llama, source, layout)
    by_definition(dense, model, chunks, beta=beta, basis=basis)
    found = orchestrator.load(done.out)
    for name, inputs in seen(model, done.plan.assignments, chunks).items():
        ends = (each.get_submodule(name).dense_weight().detach() for each in (model, found))
        expected, outputs = (inputs @ weight.double().T for weight in ends)
        assert float((outputs - expected).norm() / expected.norm()) < 2e-5
    with torch.no_grad():
        expected, logits = (each(chunks[0].tokens).logits for each in (model, found))
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert done.plan == plain.plan


CASES = {
    "low_rank": {},
    "pivoted": {"storage": "pivoted"},
    "two-sided": {"method": "two-sided", "storage": "pivoted"},
    "low_rank_sparse": {"method": "cap", "options": {"cap": {"stage2": False}}},
}


@pytest.fixture(scope="module")
def uncompensated(llama3, text, tmp_path_factory):
    """Result of a case without compensation; the run directory is to be copied."""

    def make(case):
        return run(llama3, tmp_path_factory.mktemp("plain") / "out", text, **CASES[case])

    return cache(make)


@pytest.mark.parametrize("basis", ["kept", "new"])
@pytest.mark.parametrize("case", CASES)
def test_no_linear_of_any_form_is_made_worse(case, basis, uncompensated, llama3, text, tmp_path):
    """Errors of linears never rise, nearly all fall; the model is nearer to the dense one."""
    plain = uncompensated(case)
    fields = CASES[case] | {"run_dir": str(shutil.copytree(plain.run_dir, tmp_path / "run"))}
    options = fields.pop("options", {}) | {"compensation": {"basis": basis}}
    result = run(llama3, tmp_path / "out", text, compensate="anchored", options=options, **fields)
    assert result.plan == plain.plan
    blocks = result.report["walk"]["blocks"].values()
    linears = [each for entry in blocks for each in entry["linears"].values()]
    assert len(linears) == sum(each.rank > 0 for each in result.plan.assignments.values())
    assert sum(each["taken"] for each in linears) > 0.8 * len(linears)
    if case != "two-sided" or basis == "new":
        # a basis kept for the loss is compared in the loss's norm
        assert all(each["after"] <= each["before"] for each in linears)
    dense = AutoModelForCausalLM.from_pretrained(llama3)
    gaps = []
    for out in (plain.out, result.out):
        model = orchestrator.load(out)
        chunks = token_chunks(llama3, text)
        with torch.no_grad():
            pairs = [(model(c.tokens).logits, dense(c.tokens).logits) for c in chunks]
        gaps.append(sum(float((one - other).square().sum()) for one, other in pairs))
    assert gaps[1] < gaps[0]


def test_sites_come_in_the_order_of_their_calls(llama2, text, tmp_path):
    """In every block q, k, v, then o, then gate and up, then down."""
    result = run(llama2, tmp_path / "out", text, compensate="anchored")
    for block, entry in result.report["walk"]["blocks"].items():
        expected = [f"model.layers.{block}.{role}" for site in SITES for role in site]
        assert list(entry["linears"]) == expected
