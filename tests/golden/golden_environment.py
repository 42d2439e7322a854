"""The environment of a golden record: versions, kernels, and what they compute."""

import hashlib
from importlib.metadata import version
from typing import Any

HEX = 16
"""Digits of a key or a SHA-256 that are recorded."""
VERSION = "0.1.0"
"""Version of the package in every file and unit of the record, whatever that of the sources is."""


def pin_version() -> None:
    """Set the package's version to `VERSION`, before any module takes it from its place.

    Reports, cards and environments state it, and it decides nothing else: a release leaves the
    record as it is.
    """
    from orchestrator import version as package

    package.__version__ = VERSION


def environment() -> dict[str, Any]:
    """Versions, kernels and threads, and the digest of what they compute."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    built = torch.__config__.show()
    return {
        **{name: version(name) for name in packages},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "blas": next((w for w in built.replace(",", " ").split() if w.startswith("BLAS_")), ""),
        "threads": torch.get_num_threads(),
        "probe": probe(),
    }


def probe() -> str:
    """Digest of what products, decompositions and functions give of fixed numbers."""
    import numpy as np
    import torch
    from golden_models import values

    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        one, two = (values(name, torch.Size([33, 48])).to(dtype) for name in ("one", "two"))
        results += [one @ two.T, one.softmax(-1), one.exp(), torch.rsqrt(one.square().sum(-1))]
        results += [torch.nn.functional.silu(one), one.sin(), one.log_softmax(-1)]
        if dtype.itemsize >= 4:
            gram = one @ one.T
            results += [*torch.linalg.eigh(gram), *torch.linalg.svd(two), torch.linalg.inv(gram)]
            results += [torch.linalg.qr(one).R, torch.linalg.cholesky(gram)]
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    wide = values("wide", torch.Size([999])).double().numpy()
    for array in (np.exp(wide), np.log1p(wide**2), np.cumsum(wide), wide @ wide, np.sqrt(wide**2)):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:HEX]
