"""Single calls on a simulated CUDA device: the CPU's bits, and no host read per linear or token.

See `pretend`; whole jobs are in `test_devices`.
"""

from collections import Counter
from dataclasses import fields, is_dataclass

import pytest
import torch
from compressed import compress, plan_of
from families import VOCABULARY, _llama, write_model
from matrices import of_model
from pretend import TO_HOST, on_host, pretended_device
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.linalg.compensate import DriftGram, Factors, compensate, input_map
from orchestrator.linalg.cosine import Cosine
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, decompose
from orchestrator.linalg.pivot import pivot
from orchestrator.linalg.ranked import rank_parts
from orchestrator.linalg.refit import refit
from orchestrator.linalg.scaled import decompose_scaled
from orchestrator.linalg.sparsity.fit_entries import correlations, fit_entries, second_moment_of
from orchestrator.linalg.sparsity.magnitude import Magnitude
from orchestrator.linalg.sparsity.rpca import rpca
from orchestrator.linalg.sparsity.sparse import sort_within_rows
from orchestrator.linalg.sparsity.two_sided_sparse import sparse_low_rank
from orchestrator.linalg.two_sided import decompose_two_sided
from orchestrator.models.evaluation.scoring import draw_label_gradient, score
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.training.compensation import Reader
from orchestrator.models.training.distill import LossWeights, TopK, distill
from orchestrator.models.training.refine import Refinement
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.models.training.train import Training
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.plan import Assignment
from orchestrator.randomness import Randomness

pytestmark = pytest.mark.usefixtures("cuda_environment")

PADDINGS = (0, 3)
"""Numbers of padding tokens at which the reads of a pass are counted."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Llama of two blocks."""
    directory = tmp_path_factory.mktemp("llama") / "dense"
    config = LlamaConfig(**_llama(num_hidden_layers=2))
    return write_model(lambda: LlamaForCausalLM(config), directory)


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory):
    """The same model, with every form in each block."""
    out = tmp_path_factory.mktemp("forms") / "out"
    return compress(dense, out, make_plan=every_form).directory


def every_form(survey):
    """Assign sparse, low rank with entries, low rank and pivoted forms to linears in turn."""
    assignments = {}
    for turn, linear in enumerate(survey.linears):
        half = LOW_RANK.break_even(linear) // 2
        assignments[linear.name] = (
            Assignment(form="sparse", nonzeros=linear.values // 2),
            Assignment(form="low_rank_sparse", rank=half, nonzeros=linear.values // 9),
            Assignment(form="low_rank", rank=half),
            Assignment(form="pivoted", rank=half),
        )[turn % 4]
    return plan_of(survey, assignments)


def plain(result):
    """Convert a result to dicts, lists, numbers and tensors."""
    if is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in fields(result)}
    if isinstance(result, dict):
        return {name: plain(value) for name, value in result.items()}
    if isinstance(result, list | tuple):
        return [plain(value) for value in result]
    return result


def same(one, other):
    """Return True if two trees are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Case:
    """Arguments on a device: a weight, its input rows, second moments, logits."""

    def __init__(self, device, outputs=40, inputs=24):
        specimen = of_model(outputs, inputs)
        random = torch.Generator().manual_seed(1)
        self.device = torch.device(device)
        self.weight_OI = self.put(specimen.weight_OI.float())
        self.rows_TI = self.put(specimen.inputs_TI.float())
        self.moment_II = self.put(specimen.gram_II)
        gradients_TO = torch.randn(96, outputs, generator=random, dtype=torch.float64)
        self.bend_OO = self.put(gradients_TO.T @ gradients_TO)
        weight_OI = specimen.weight_OI
        bend = weight_OI.T @ (gradients_TO.T @ gradients_TO) @ weight_OI
        self.bend_KK = self.put(bend) if outputs > inputs else self.bend_OO
        self.output_OO = self.put(weight_OI @ specimen.gram_II @ weight_OI.T)
        logits_BTV = torch.randn(2, 9, VOCABULARY, generator=random)
        self.logits_BTV = self.put(logits_BTV)
        self.against_BTV = self.put(logits_BTV.roll(1, 2) / 2)
        self.tokens_BT = self.put(torch.randint(VOCABULARY, (2, 9), generator=random))
        mask_BT = torch.ones(2, 9, dtype=torch.bool)
        mask_BT[1, 6:] = False
        self.mask_BT = self.put(mask_BT)

    def put(self, tensor):
        return tensor.to(self.device)

    @property
    def statistic(self):
        return InputGram(self.moment_II, curvature=Curvature(self.bend_KK, 96))

    @property
    def whole_statistic(self):
        """The statistic with the curvature [O, O] of the outputs."""
        return InputGram(self.moment_II, curvature=Curvature(self.bend_OO, 96))


def _gram(case):
    gram = Gram(case.rows_TI.shape[1], case.device).update(case.rows_TI)
    return gram.merge(Gram(gram.n, case.device).update(case.rows_TI.bfloat16())).matrix()


def _drift(case):
    gram = DriftGram(case.rows_TI.shape[1], case.device)
    return gram.update(case.rows_TI, case.rows_TI.flip(0)).drift()


def _compensate(basis):
    def call(case):
        found = decompose(case.weight_OI, case.statistic, 8)
        factors = Factors(left_OR=found.weight_OR, down_RI=found.down_RI, rest_OI=None)
        drift = _drift(case)
        turn = input_map(drift, 0.5, 0.01)
        return compensate(case.weight_OI, factors, drift, turn, beta=0.5, basis=basis)

    return call


def _refit(case):
    found = decompose(case.weight_OI, case.statistic, 8)
    return refit(case.weight_OI, found.weight_OR, found.down_RI, case.moment_II * 2)


def _pivot(case):
    found = decompose(case.weight_OI, case.statistic, 8)
    return pivot(found.weight_OR, found.down_RI)


def _ranked(case):
    parts = rpca(case.weight_OI)
    return parts, rank_parts(
        case.weight_OI, parts, case.statistic, utility="activation", buckets=16
    )


def _sparse(case):
    return sort_within_rows(case.weight_OI, case.weight_OI.abs(), case.statistic)


def _fit_entries(case):
    positions_N = case.put(torch.arange(0, case.weight_OI.numel(), 3))
    found_N = fit_entries(case.weight_OI, positions_N, case.bend_OO, case.moment_II, steps=4)
    root_I = case.moment_II.diagonal().sqrt()
    return found_N, second_moment_of(root_I, correlations(case.moment_II))


def _scaled(case):
    scale_I = case.moment_II.diagonal().sqrt()
    return decompose_scaled(case.weight_OI, case.statistic, 12, scale_I)


def _label_gradient(case):
    generator = torch.Generator(case.device).manual_seed(3)
    return draw_label_gradient(case.logits_BTV, case.mask_BT, generator)


def _distill(keep):
    def call(case):
        targets = TopK.of(case.against_BTV, keep, 2.0) if keep else case.against_BTV
        weights = LossWeights(divergence=0.1, cross_entropy=0.2)
        given = case.logits_BTV, case.tokens_BT, case.mask_BT, targets
        return targets, distill(*given, temperature=2.0, weights=weights)

    return call


CALLS = {
    "Gram": _gram,
    "Magnitude": lambda case: (
        Magnitude(len(case.rows_TI.T), case.device).update(case.rows_TI).mean()
    ),
    "Cosine": lambda case: Cosine().update(case.rows_TI, case.rows_TI.flip(0)).mean,
    "DriftGram": _drift,
    "decompose": lambda case: decompose(case.weight_OI, case.statistic, 12),
    "decompose exactly": lambda case: decompose(
        case.weight_OI, case.statistic, 12, precision="exact"
    ),
    "decompose by outputs": lambda case: decompose(case.weight_OI, OutputGram(case.output_OO), 12),
    "decompose_scaled": _scaled,
    "decompose_two_sided": lambda case: decompose_two_sided(
        case.weight_OI, case.statistic, 12, damping=0.01
    ),
    "sparse_low_rank": lambda case: sparse_low_rank(
        case.weight_OI, case.whole_statistic, (0, 0.2, 0.4), 0.3, damping=0.01, fits=True
    ),
    "sort_within_rows": _sparse,
    "rpca and rank_parts": _ranked,
    "fit_entries": _fit_entries,
    "pivot": _pivot,
    "refit": _refit,
    "compensate kept": _compensate("kept"),
    "compensate new": _compensate("new"),
    "score": lambda case: score(case.tokens_BT, case.mask_BT, case.logits_BTV, None),
    "score against": lambda case: score(
        case.tokens_BT, case.mask_BT, case.logits_BTV, case.against_BTV
    ),
    "draw_label_gradient": _label_gradient,
    "TopK and distill": _distill(8),
    "distill": _distill(0),
}


@pytest.mark.parametrize("sizes", [(40, 24), (24, 40)])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, sizes):
    """Every function gives the CPU's bits, from a tall weight and from a wide one."""
    expected = plain(CALLS[name](Case("cpu", *sizes)))
    with pretended_device():
        found = on_host(plain(CALLS[name](Case("cuda", *sizes))))
    assert same(found, expected)


def of_inputs(linear, site):
    return "input"


def of_outputs(linear, site):
    return "output"


class Passes:
    """All kinds of passes of one chunk through a shard of both blocks.

    Each is a generator that opens the shard, yields, and performs the pass.
    """

    def __init__(self, dense, compressed):
        self._dense, self._compressed = dense, compressed

    def _shard(self, directory):
        return LazyModel.open(directory, dtype=torch.float32, device=torch.device("cuda")).shard(
            range(2)
        )

    def forward(self, chunk, linears):
        with self._shard(self._dense) as shard:
            yield
            shard.forward(chunk)

    def forms(self, chunk, linears):
        with self._shard(self._compressed) as shard:
            yield
            shard.forward(chunk)

    def logits(self, chunk, linears):
        with self._shard(self._compressed) as shard:
            yield
            shard.logits(chunk)

    def statistics(self, chunk, linears):
        with self._shard(self._dense) as shard:
            found = Calibration(shard, shard.linears[:linears], of_inputs, magnitudes=True)
            yield
            found.forward(chunk)

    def outputs(self, chunk, linears):
        with self._shard(self._dense) as shard:
            found = Calibration(shard, shard.linears[:linears], of_outputs)
            yield
            found.forward(chunk)

    def curvature(self, chunk, linears):
        with self._shard(self._dense) as shard:
            shard.freeze()
            found = Calibration(shard, shard.linears[:linears], of_inputs, curvature=True)
            yield
            found.backward(chunk, torch.ones_like)

    def compensation(self, chunk, linears):
        with self._shard(self._dense) as shard, Reader(shard, shard.linears[-1].name) as reader:
            yield
            reader.read(chunk)

    def training(self, chunk, linears):
        lazy_model = LazyModel.open(
            self._compressed, dtype=torch.float32, device=torch.device("cuda")
        )
        with lazy_model.shard(range(2)) as shard:
            training = Training(
                shard, range(2), lazy_model.disk_names, mode="all", weight_decay=0.01
            )
            yield
            shard.backward(chunk, torch.ones_like)
            training.collect()

    def refinement(self, chunk, linears):
        with self._shard(self._compressed) as shard:
            chunks = [Chunk(index, chunk.tokens, chunk.mask) for index in range(2)]
            targets = [shard.forward(each) for each in chunks]
            options = RefineOptions(epochs=1, batches=1)
            with Refinement(
                shard, chunks, targets, options=options, randomness=Randomness(0)
            ) as refinement:
                yield
                refinement.slice(0, 0, 0)


KINDS = [name for name in vars(Passes) if name[0] != "_"]


def waits(run, *, tokens, padding, linears):
    """Host reads and copies to the host in one pass, by line."""
    tokens_BT = torch.arange(tokens)[None] * 7 % VOCABULARY
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, tokens - padding :] = False
    with pretended_device() as device:
        steps = run(Chunk(0, tokens_BT, mask_BT), linears)
        next(steps)
        device.clear()
        assert next(steps, None) is None
        copies = [each for each in device.copies if each.direction == TO_HOST]
        return Counter(str(each.site) for each in [*device.reads, *copies])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_waits_for_no_linear_and_no_token(kind, padding, dense, compressed):
    """The number of reads is equal for one linear and for fourteen, and for eight tokens and
    sixteen."""
    run = getattr(Passes(dense, compressed), kind)
    one = waits(run, tokens=8, padding=padding, linears=1)
    assert waits(run, tokens=8, padding=padding, linears=14) == one
    assert waits(run, tokens=16, padding=padding, linears=14) == one
    assert sum(one.values()) <= 3
