"""Rates of products and copies: the ceilings to which other figures are compared."""

import torch
from benchmarks.gpu.bench import Bench, PartResult

from orchestrator.linalg.speeds import product_rate
from orchestrator.linalg.tensor_cores import tensor_cores

HALF = torch.bfloat16


def measure(bench: Bench) -> PartResult:
    rates = product_rates(bench)
    copies = {"device": bandwidth(bench)} | (host_copies(bench) if bench.is_cuda else {})
    in_words = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    line = f"TFLOP/s: {in_words}; copies on the device {copies['device'] / 1e12:.3g} TB/s"
    if bench.is_cuda:
        from_host = [copies[f"to_device_{kind}"] / 1e9 for kind in ("pageable", "pinned")]
        line += ", from the host {:.1f} GB/s pageable, {:.1f} pinned".format(*from_host)
    return PartResult(line, {"product_rates": rates, "bytes_a_second": copies})


def product_rates(bench: Bench) -> dict[str, float]:
    """FLOPs a second by the names of `orchestrator.forecast.rates.Rates`."""
    size = bench.size(8192, 256)
    rates = {
        "half": product_rate(HALF, bench.device, size),
        "single": product_rate(torch.float32, bench.device, size),
        "double": product_rate(torch.float64, bench.device, size),
    }
    with tensor_cores(HALF):
        rates["tf32"] = product_rate(torch.float32, bench.device, size)
    return rates


def bandwidth(bench: Bench) -> float:
    """Bytes a second of a copy on the device, read and written bytes added."""
    source = torch.ones(bench.size(2**31, 2**24), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.median_seconds(lambda: target.copy_(source))


def host_copies(bench: Bench) -> dict[str, float]:
    """Bytes a second between host and device, from memory of both kinds."""
    there = torch.ones(bench.size(2**29, 2**22), dtype=torch.int8, device=bench.device)
    found = {}
    for kind in ("pageable", "pinned"):
        here = torch.ones(there.shape, dtype=torch.int8, pin_memory=kind == "pinned")
        to_device = bench.median_seconds(lambda here=here: there.copy_(here))
        to_host = bench.median_seconds(lambda here=here: here.copy_(there))
        found[f"to_device_{kind}"] = there.nbytes / to_device
        found[f"to_host_{kind}"] = there.nbytes / to_host
    return found
