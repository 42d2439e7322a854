"""Lets SGLang run on a CPU: imported first in each of its processes.

The releases that a registry has are for GPUs. Two things are in the way of torch's own operators,
which SGLang otherwise takes on a machine without one:

- torchvision expects two operators of its own. They are declared here, never called.
- SGLang's CPU mode needs `sgl_kernel` in a build for CPUs, which no registry has, and without that
  mode rotary embeddings import kernels of vLLM. The mode is set for rotary embeddings alone.
"""

import torch

DECLARED = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    DECLARED.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import sglang.srt.layers.rotary_embedding.base as rotary  # noqa: E402 # needs the operators

rotary._is_cpu = True
