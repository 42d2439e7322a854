"""Compressed checkpoints in fresh processes: with and without this package, exported, and split
over two ranks of one machine with transformers' own `tp_plan`.

They are in one file because its processes are forked from one that has imported transformers.
"""

import json
import socket

import pytest
import torch
from compressed import TOKENS, affine_plan, compress, half_plan, logits, mixed_plan, plan_of
from families import write_checkpoint
from image_text.inputs import image_inputs
from moe.stored import assert_same, store_moe
from transformers import AutoModelForCausalLM

import orchestrator.hf
from orchestrator.hf.export import export_dense
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Survey
from orchestrator.plan.plan import Assignment, Plan

# the package can be imported or not as the first argument says
PROGRAM = """
import sys

package, trust, directory, result, *resaved = sys.argv[1:]

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "orchestrator":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if package == "imported":
    import orchestrator.hf
else:
    sys.meta_path.insert(0, Blocker())

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig

def load(directory):
    options = {"trust_remote_code": True} if trust == "trusted" else {}
    return auto_class.from_pretrained(directory, **options)

auto_class = AutoModelForCausalLM
if directory.endswith("llava/out"):
    auto_class = transformers.AutoModelForImageTextToText

if trust == "trusted":
    # lm-evaluation-harness and others read the config alone first
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    AutoQuantizationConfig.from_dict(config.quantization_config)

inputs = torch.load(result + ".inputs")
model = load(directory)
found = {"class": type(model).__module__, "loss": model.loss_type}
with torch.no_grad():
    found["logits"] = model(**inputs).logits
    if resaved:
        model.save_pretrained(resaved[0])
        again = load(resaved[0])
        found["again"] = again(**inputs).logits
        found["generated"] = again.generate(**inputs, max_new_tokens=3, do_sample=False)
torch.save(found, result)
"""


@pytest.fixture
def run_program(fork, tmp_path):
    """Run PROGRAM in a process of its own."""
    torch.save({"input_ids": TOKENS}, tmp_path / "result.inputs")

    def run(*arguments):
        (done,) = fork(PROGRAM, *arguments, directory=tmp_path)
        return done

    return run


@pytest.mark.parametrize(
    ("package", "trust"),
    [("imported", "not trusted"), ("imported", "trusted"), ("blocked", "trusted")],
)
def test_package_or_trust_is_enough(made, expected, run_program, tmp_path, package, trust):
    """With our package, with remote code, or with both, the logits are exact; with remote code the
    config alone makes the format known."""
    result = tmp_path / "result"
    resaved = [tmp_path / "resaved"] if package == "blocked" else []
    done = run_program(package, trust, made.directory, result, *resaved)
    assert done.returncode == 0, done.stderr
    found = torch.load(result)
    assert torch.equal(found["logits"], expected)
    assert found["class"].startswith(
        "transformers_modules" if trust == "trusted" else "transformers."
    )
    assert found["loss"] == "ForCausalLM"
    if resaved:
        assert torch.equal(found["again"], expected)
        assert found["generated"][0, TOKENS.shape[1]] == expected[0, -1].argmax()
        config = json.loads((resaved[0] / "config.json").read_bytes())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (resaved[0] / "modeling_orchestrator.py").is_file()


def test_the_checkpoint_brings_every_form_with_it(run_program, tmp_path):
    """Sparse weights and shared bases load, save and run without the package."""
    dense = write_checkpoint("gpt2", tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=mixed_plan, max_shard_bytes=20_000)
    expected = logits(AutoModelForCausalLM.from_pretrained(made.directory))
    result, resaved = tmp_path / "result", tmp_path / "resaved"
    done = run_program("blocked", "trusted", made.directory, result, resaved)
    assert done.returncode == 0, done.stderr
    found = torch.load(result)
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["again"], expected)
    assert found["generated"][0, TOKENS.shape[1]] == expected[0, -1].argmax()


@pytest.mark.parametrize("package", ["imported", "blocked"])
def test_a_model_of_images_and_text_needs_the_package_or_trust(
    compressed_images, run_program, tmp_path, package
):
    """Either loads it by `AutoModelForImageTextToText`, and what is saved then loads as well."""
    tokens_BT, inputs = image_inputs("llava")
    out, result, resaved = compressed_images("llava"), tmp_path / "result", tmp_path / "resaved"
    with torch.no_grad():
        expected = orchestrator.load(out)(input_ids=tokens_BT, **inputs).logits
    trust = "trusted" if package == "blocked" else "not trusted"
    torch.save({"input_ids": tokens_BT, **inputs}, tmp_path / "result.inputs")
    done = run_program(package, trust, out, result, resaved)
    assert done.returncode == 0, done.stderr
    found = torch.load(result)
    assert torch.equal(found["logits"], expected)
    assert torch.equal(found["again"], expected)
    assert found["generated"][0, tokens_BT.shape[1]] == expected[0, -1].argmax()


def test_the_checkpoint_brings_its_experts_with_it(run_program, tmp_path):
    """Experts with linears of their own load, save and run without the package."""
    made = store_moe("mixtral", tmp_path / "out")
    expected = logits(made.model)
    result, resaved = tmp_path / "result", tmp_path / "resaved"
    done = run_program("blocked", "trusted", made.directory, result, resaved)
    assert done.returncode == 0, done.stderr
    found = torch.load(result)
    assert_same(found["logits"], expected)
    assert_same(found["again"], expected)
    assert found["generated"][0, TOKENS.shape[1]] == expected[0, -1].argmax()


def test_neither_package_nor_trust_fails_loudly(made, run_program, tmp_path):
    """No model comes out if the package cannot be imported and no code is trusted."""
    done = run_program("blocked", "not trusted", made.directory, tmp_path / "result")
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr
    assert not (tmp_path / "result").exists()


def test_an_export_loads_where_this_package_is_unknown(fork, tmp_path):
    """The directory has no file of ours, and stock transformers loads it without a warning."""
    dense = write_checkpoint("gpt2", tmp_path / "dense")
    (dense / "LICENSE").write_bytes(b"a licence")
    (dense / "tokenizer.json").write_bytes(b"{}")
    made = compress(dense, tmp_path / "out")
    export = tmp_path / "export"
    export_dense(made.directory, export)
    names = {"LICENSE", "tokenizer.json", "config.json", "generation_config.json"}
    assert {path.name for path in export.iterdir()} == names | {"model.safetensors"}
    assert (export / "config.json").read_bytes() != (made.directory / "config.json").read_bytes()
    config = json.loads((export / "config.json").read_bytes())
    assert config == json.loads((dense / "config.json").read_bytes())
    program = (
        "import sys; sys.modules['orchestrator'] = None\n"
        "from transformers import AutoModelForCausalLM as M\n"
        "_, info = M.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(sorted(map(len, info.values())))"
    )
    (done,) = fork(program, export, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout) <= set("[0, ]\n")


RANKS = 2

PROGRAM_OF_RANKS = """
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
    # transformers adds to an output of Llama 4 in place, which autograd forbids over ranks
    if model.config.model_type != "llama4_text":
        model(tokens, labels=tokens).loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    found = {"logits": logits, "gradients": gradients, "held": held, "error": ""}
    if getattr(model, "ep_plan", None):
        both = DistributedConfig(tp_size=2, ep_size=2)
        try:
            AutoModelForCausalLM.from_pretrained(directory, distributed_config=both)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{directory}/rank{dist.get_rank()}.pt")
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
    "llama, affine": ("llama", affine_plan),
    "qwen2 with biases, every form": ("qwen2", mixed_plan),
}
MOE_CASES = {
    "qwen3_moe, every form of experts": "qwen3_moe",
    "deepseek_v3, with shared experts": "deepseek_v3",
    "llama4, with dense blocks between": "llama4",
}
ALL_CASES = [*CASES, *MOE_CASES]
TRAINED = [case for case in ALL_CASES if MOE_CASES.get(case) != "llama4"]


@pytest.fixture(scope="module")
def loaded(fork, tmp_path_factory):
    """Results of two ranks, and of one process, for each case."""
    root = tmp_path_factory.mktemp("ranks")
    torch.save(TOKENS, root / "tokens.pt")
    found = {}
    for number, (case, (family, make_plan)) in enumerate(CASES.items()):
        dense = root / f"dense{number}"
        made = compress(write_checkpoint(family, dense), root / f"out{number}", make_plan=make_plan)
        found[case] = made.directory
    for case, family in MOE_CASES.items():
        found[case] = store_moe(family, root / family).directory
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    arguments = root / "tokens.pt", *found.values()
    for ran in fork(PROGRAM_OF_RANKS, *arguments, directory=root, environments=ranks):
        assert ran.returncode == 0, ran.stderr[-4000:]
    return {
        case: [torch.load(out / f"rank{rank}.pt") for rank in range(RANKS)]
        + [AutoModelForCausalLM.from_pretrained(out)]
        for case, out in found.items()
    }


@pytest.mark.parametrize("case", ALL_CASES)
def test_two_ranks_give_what_one_process_does(loaded, case):
    *ranks, model = loaded[case]
    expected = model(TOKENS).logits.detach()
    # sums over ranks have another order, by which a router's weights differ too
    tolerance = 2e-6 * float(expected.abs().max()) if case in MOE_CASES else 1e-6
    for rank in ranks:
        assert torch.allclose(rank["logits"], expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("case", TRAINED)
def test_gradients_are_those_of_one_process(loaded, case):
    *ranks, model = loaded[case]
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {name: each.grad for name, each in model.named_parameters()}
    for rank in ranks:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            found = rank["gradients"][name]
            # an expert without a token has none
            assert (found is None) == (gradient is None), name
            assert found is None or torch.allclose(found, gradient, rtol=1e-4, atol=1e-6), name


def test_a_rank_holds_a_part(loaded):
    """Either factor of a low-rank linear is split, so a rank holds less than the whole model."""
    *ranks, model = loaded["llama, low rank"]
    whole = sum(each.numel() for each in model.parameters())
    assert all(rank["held"] < 0.75 * whole for rank in ranks)


@pytest.mark.parametrize("case", [case for case in MOE_CASES if case in TRAINED])
def test_expert_parallelism_is_refused(loaded, case):
    """A plan for it stops with our sentence when it is applied; Llama 4 has none."""
    *ranks, _ = loaded[case]
    sentence = "InputError: expert parallelism (ep_size) does not split compressed experts"
    for rank in ranks:
        assert rank["error"].startswith(sentence)
