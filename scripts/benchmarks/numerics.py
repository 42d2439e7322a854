"""Times of the numerics of one block, compared with the published algorithm and FLOPs.

One thread. Without arguments it makes a block with the shapes of SmolLM2-135M and inputs whose
energies fall by 1e5; with --model and --text it uses a block of a real model and its inputs on that
text.

    python scripts/benchmarks/numerics.py [--model DIRECTORY --text FILE] [--block 8]

Shape suffixes: T tokens, O outputs, I inputs, R rank.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import InputGram, OutputGram, decompose

QUANTUM = 512
"""Tokens per update of a Gram."""
TOKENS = 16 * QUANTUM


@dataclass(frozen=True)
class NumericsProblem:
    """One linear to decompose, with the second moment of its inputs."""

    name: str
    weight_OI: Tensor
    gram_II: Tensor
    output_gram_OO: Tensor | None
    """W H W^T, if it is the smaller statistic and no other linear has the same inputs."""

    @property
    def break_even(self) -> int:
        return self.weight_OI.numel() // sum(self.weight_OI.shape)

    def loss(self, left_OR: Tensor, right_RI: Tensor) -> float:
        """Compute the squared error of the outputs, in float64."""
        gap_OI = self.weight_OI.double() - left_OR.double() @ right_RI.double()
        return float((gap_OI @ self.gram_II * gap_OI).sum())


def published(problem: NumericsProblem) -> tuple[Tensor, Tensor]:
    """Compute factors to break-even rank as in the code of SVD-LLM (arXiv:2403.07378).

    A float64 Cholesky factor of H, shifted if H is not positive definite, and its inverse, for
    every linear; both rounded to float32 for a full SVD of the whitened weight.
    """
    lower_II, failed = torch.linalg.cholesky_ex(problem.gram_II)
    if failed:
        shift = 1e-6 - float(torch.linalg.eigvalsh(problem.gram_II)[0])
        identity_II = torch.eye(len(problem.gram_II), dtype=torch.float64)
        lower_II = torch.linalg.cholesky(problem.gram_II + shift * identity_II)
    inverse_II = torch.linalg.inv(lower_II).float()
    whitened_OI = problem.weight_OI @ lower_II.float()
    left_OK, sigma_K, right_KI = torch.linalg.svd(whitened_OI, full_matrices=False)
    rank = problem.break_even
    root_R = sigma_K[:rank].sqrt()
    return left_OK[:, :rank] * root_R, root_R[:, None] * (right_KI[:rank] @ inverse_II)


def ours(problem: NumericsProblem, *, output_gram: bool) -> tuple[Tensor, Tensor]:
    statistic: InputGram | OutputGram = InputGram(problem.gram_II)
    if output_gram and problem.output_gram_OO is not None:
        statistic = OutputGram(problem.output_gram_OO)
    result = decompose(problem.weight_OI, statistic, problem.break_even)
    return result.weight_OR, result.down_RI


def make_problems(
    weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> list[NumericsProblem]:
    """Make problems with the Grams of a calibration; inputs are given by site."""
    sites = {
        "q": "qkv",
        "k": "qkv",
        "v": "qkv",
        "o": "o",
        "gate": "mlp",
        "up": "mlp",
        "down": "down",
    }
    grams = {site: Gram(rows.shape[1]).update(rows).matrix() for site, rows in inputs.items()}
    problems = []
    for name, weight_OI in weights.items():
        output_gram_OO = None
        if name == "down":
            outputs_TO = inputs[sites[name]] @ weight_OI.T
            output_gram_OO = Gram(len(weight_OI)).update(outputs_TO).matrix()
        problems.append(NumericsProblem(name, weight_OI, grams[sites[name]], output_gram_OO))
    return problems


def synthetic_block() -> list[NumericsProblem]:
    """Make a block with the shapes of SmolLM2-135M; few input directions have most of the
    energy."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def rows(n: int) -> Tensor:
        scale_I = torch.logspace(0, -2.5, n)
        scale_I[:2] *= 10
        return gaussian(TOKENS, n) * scale_I @ torch.linalg.qr(gaussian(n, n))[0]

    hidden, intermediate, key_value = 576, 1536, 192
    shapes = {
        "q": (hidden, hidden),
        "k": (key_value, hidden),
        "v": (key_value, hidden),
        "o": (hidden, hidden),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    weights = {name: gaussian(*shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    inputs = {"qkv": rows(hidden), "o": rows(hidden), "mlp": rows(hidden)}
    return make_problems(weights, inputs | {"down": rows(intermediate)})


def real_block(model_directory: Path, text_file: Path, block: int) -> list[NumericsProblem]:
    """Calibrate a block of a Llama-like model in float32 on the first windows of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    text = text_file.read_text(errors="ignore")[: 20 * TOKENS]
    windows = torch.tensor(tokenizer(text)["input_ids"][:TOKENS]).split(QUANTUM)
    layer = model.model.layers[block]
    attention, mlp = layer.self_attn, layer.mlp
    sites = {"qkv": attention.q_proj, "o": attention.o_proj, "mlp": mlp.up_proj}
    inputs: dict[str, list[Tensor]] = {}
    for site, module in (sites | {"down": mlp.down_proj}).items():
        gathered = inputs[site] = []
        module.register_forward_pre_hook(lambda _, args, out=gathered: out.append(args[0][0]))
    with torch.no_grad():
        for window in windows:
            model.model(window[None])
    weights = {name: getattr(attention, f"{name}_proj").weight for name in "qkvo"}
    weights |= {name: getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
    return make_problems(
        {name: weight.detach() for name, weight in weights.items()},
        {site: torch.cat(rows) for site, rows in inputs.items()},
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare_times(problems: Sequence[NumericsProblem], repeats: int) -> None:
    """Print the time of all linears relative to the published algorithm, measured in turns."""
    ways: dict[str, Callable[[], object]] = {
        "published": lambda: [published(problem) for problem in problems],
        "ours": lambda: [ours(problem, output_gram=True) for problem in problems],
        "ours, input Grams only": lambda: [ours(p, output_gram=False) for p in problems],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way))
    base = statistics.median(times["published"])
    for name, spent in times.items():
        median = statistics.median(spent)
        print(f"block numerics, {name}: {median * 1e3:.0f} ms, ratio {median / base:.3f}")


def compare_errors(problems: Sequence[NumericsProblem]) -> None:
    """Print for each linear the loss relative to the published algorithm, and both excess
    losses."""
    for problem in problems:
        gram_II, weight_OI = problem.gram_II, problem.weight_OI.double()
        energies = torch.linalg.eigvalsh(weight_OI @ gram_II @ weight_OI.T).flip(0)
        left_OR, right_RI = ours(problem, output_gram=True)
        their_left_OR, their_right_RI = published(problem)
        for rank in (problem.break_even // 8, problem.break_even // 2, problem.break_even):
            best = float(energies[rank:].sum())
            loss = problem.loss(left_OR[:, :rank], right_RI[:rank])
            their_loss = problem.loss(their_left_OR[:, :rank], their_right_RI[:rank])
            print(
                f"error, {problem.name} rank {rank}: ours / published - 1 = "
                f"{loss / their_loss - 1:+.1e}; above the optimum by {loss / best - 1:.1e}, "
                f"published {their_loss / best - 1:.1e}"
            )


def time_grams(repeats: int) -> None:
    """Print the time of Gram updates relative to n^2 multiply-adds per token in a float32 GEMM."""
    side = 1024
    square = torch.randn(side, side)
    rate = 2 * side**3 / statistics.median(seconds(lambda: square @ square) for _ in range(9))
    print(f"float32 GEMM: {rate / 1e9:.0f} GFLOP/s")
    for n in (192, 576, 1536):
        rows_TI = torch.randn(QUANTUM, n)
        updates = 2 * TOKENS // QUANTUM

        def gather(rows_TI: Tensor = rows_TI, n: int = n, updates: int = updates) -> None:
            gram = Gram(n)
            for _ in range(updates):
                gram.update(rows_TI)

        spent = statistics.median(seconds(gather) for _ in range(repeats))
        ideal = 2 * n * n * QUANTUM * updates / rate
        print(f"Gram of {n} channels: {spent * 1e3:.0f} ms, ratio {spent / ideal:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a Llama-like model")
    parser.add_argument("--text", type=Path, help="text to calibrate it on")
    parser.add_argument("--block", type=int, default=8, help="its block, counted from 0")
    parser.add_argument("--repeats", type=int, default=7, help="runs to take the median of")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    torch.set_num_threads(1)
    if options.model is None:
        problems = synthetic_block()
    else:
        problems = real_block(options.model, options.text, options.block)
    compare_times(problems, options.repeats)
    compare_errors(problems)
    time_grams(options.repeats)


if __name__ == "__main__":
    main()
