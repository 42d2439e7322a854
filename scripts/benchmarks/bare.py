"""Two processes that perform only the numerics of a compression: no Ray, no store.

Each takes half of the work, every second shard of the actors' schedule. The inputs of its shards
are in memory before the clock starts. It loads the weights of a shard, passes every chunk through
forward and Grams, and decomposes the linears to break-even rank, with the same classes as the
workers. There is no waiting, hashing, writing or sending, so this is an upper bound for the same
numerics.
"""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from orchestrator.device.malloc import keep_freed_memory
from orchestrator.methods import METHODS
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.forms import LOW_RANK
from orchestrator.stages.context.tokens import TokenArrays, first_chunk

METHOD = METHODS["svd-llm"]


class BareProcesses:
    """Processes that are started and wait; `work` lets each do its part once."""

    def __init__(
        self,
        model: Path,
        text: Path,
        parts: Sequence[Sequence[range]],
        *,
        samples: int,
        sequence_length: int,
    ) -> None:
        self._arguments = [(model, text, part) for part in parts]
        self._sizes = {"samples": samples, "sequence_length": sequence_length}

    def __enter__(self) -> "BareProcesses":
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for arguments in self._arguments:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, *arguments), kwargs=self._sizes, daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        for end in self._ends:
            end.recv()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> set[int]:
        return {process.pid for process in self._processes if process.pid is not None}

    def work(self) -> float:
        """Return the seconds until the last process is done."""
        start = time.perf_counter()
        for end in self._ends:
            end.send("go")
        for end in self._ends:
            end.recv()
        return time.perf_counter() - start


def _serve(
    end: Connection,
    model: Path,
    text: Path,
    part: Sequence[range],
    *,
    samples: int,
    sequence_length: int,
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    lazy_model = LazyModel.open(model, dtype=torch.float32)
    inputs = _inputs(lazy_model, text, part, samples=samples, sequence_length=sequence_length)
    try:
        while True:
            end.send("ready")
            end.recv()
            for blocks in part:
                _calibrate_and_decompose(lazy_model, blocks, inputs[blocks.start])
    except EOFError:
        return


def _inputs(
    lazy_model: LazyModel, text: Path, part: Sequence[range], *, samples: int, sequence_length: int
) -> dict[int, list[Chunk]]:
    """Compute all chunks at the first block of every shard of the part."""
    tokenizer = load_tokenizer(lazy_model.directory)
    tokens = load_tokens(
        str(text), tokenizer=tokenizer, samples=samples, sequence_length=sequence_length
    )
    arrays = TokenArrays(tokens.ids.astype(np.int32), tokens.mask)
    chunks = [first_chunk(arrays, index) for index in range(samples)]
    inputs, done = {}, 0
    for blocks in part:
        if blocks.start > done:
            with lazy_model.shard(range(done, blocks.start)) as shard:
                chunks = [shard.forward(chunk) for chunk in chunks]
            done = blocks.start
        inputs[done] = chunks
    return inputs


def _calibrate_and_decompose(lazy_model: LazyModel, blocks: range, chunks: Sequence[Chunk]) -> None:
    with lazy_model.shard(blocks) as shard:
        calibration = Calibration(shard, shard.linears, METHOD.side)
        for chunk in chunks:
            calibration.forward(chunk)
        for linear in shard.linears:
            weight_OI = dense_weight(shard.module(linear.name))
            METHOD.decompose(weight_OI, calibration.statistic(linear), LOW_RANK.break_even(linear))
            calibration.forget([linear])
        calibration.close()
