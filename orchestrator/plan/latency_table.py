"""Table of measured times of a model's linears on one device, dense and at some ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.errors import InputError
from orchestrator.plan.linear import Linear
from orchestrator.store.files import digest_json, parse_json, read_bytes
from orchestrator.store.places import parse_place

FORMAT_VERSION = 1
MOST_SECONDS = 3600.0
"""Longest time of one product; a longer one is damage."""
LARGEST = 2**31
"""Largest size of a linear; a larger one is damage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTimes:
    """Seconds of one shape of linear, all tokens of a pass together."""

    dense: float
    forms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Ranks, ascending, int64, and their seconds, float64, by the name of the form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Times of linears by their shape [outputs, inputs], as `bench --latency-table` writes them."""

    file: str
    device: str
    dtype: str
    threads: int
    """Threads of a CPU."""
    tokens: int
    """Tokens of each product."""
    shapes: Mapping[tuple[int, int], LinearTimes]
    digest: str
    """Hash of all of it: tables with equal contents give equal plans."""

    @property
    def about(self) -> str:
        """Conditions of the measurement as text."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}, "
        tokens = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        return f"{self.device}, {threads if self.device == 'cpu' else ''}{self.dtype}, {tokens}"

    def times(self, linear: Linear) -> LinearTimes:
        """Return the times of a linear's shape.

        Raises:
            InputError: It was not measured.
        """
        found = self.shapes.get((linear.out_features, linear.in_features))
        if found is None:
            raise InputError(
                f"latency_table: {self.file} has no linear of {linear.out_features} x "
                f"{linear.in_features}, that of {linear.name}; measure those of this model: "
                f"orchestrator bench MODEL --latency-table {self.file}"
            )
        return found


def read_latency_table(file: str) -> LatencyTable:
    """Read a table from a local file or a store.

    Raises:
        InputError: The file cannot be read, or is no table.
    """
    place = parse_place(file).expanduser()
    try:
        value = parse_json(read_bytes(place))
    except FileNotFoundError:
        raise InputError(
            f"latency_table: {file} does not exist; `orchestrator bench MODEL --latency-table "
            f"{file}` measures one"
        ) from None
    except OSError as error:
        raise InputError(f"latency_table: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"latency_table: {file} is not valid JSON: {error}") from error
    try:
        return parse_latency_table(value, file)
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        said = repr(str(error)[:200])
        raise InputError(
            f"latency_table: {file} is not one of `bench --latency-table`: a field is missing or "
            f"wrong: {said}"
        ) from error


def parse_latency_table(value: Mapping[str, Any], file: str) -> LatencyTable:
    """Make a table of its JSON.

    Raises:
        LookupError, TypeError, ValueError: It is none.
    """
    if value["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {value['format_version']!r}, not {FORMAT_VERSION}")
    decisive = {"device", "dtype", "threads", "tokens", "linears"}
    return LatencyTable(
        file=file,
        device=str(value["device"]),
        dtype=str(value["dtype"]),
        threads=_whole(value["threads"]),
        tokens=_whole(value["tokens"]),
        shapes={_shape(entry["shape"]): _times(entry) for entry in value["linears"]},
        digest=digest_json({name: value[name] for name in sorted(decisive)}),
    )


def _shape(value: Any) -> tuple[int, int]:
    outputs, inputs = map(_whole, value)
    return outputs, inputs


def _times(entry: Mapping[str, Any]) -> LinearTimes:
    forms = {}
    for name, rows in entry["forms"].items():
        ranks = np.array([_whole(rank) for rank, _ in rows], dtype=np.int64)
        if np.any(ranks[1:] <= ranks[:-1]):
            raise ValueError(f"ranks of {name} do not ascend")
        forms[str(name)] = ranks, np.array([_seconds(took) for _, took in rows])
    return LinearTimes(dense=_seconds(entry["dense_seconds"]), forms=forms)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < LARGEST:
        raise ValueError(f"{value!r:.40} is no whole number of 1 or above")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < MOST_SECONDS:
        raise ValueError(f"{value!r:.40} is no number of seconds")
    return float(value)
