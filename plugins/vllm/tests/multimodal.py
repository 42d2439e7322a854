"""Serves a model with images, on text: python multimodal.py REFERENCE

vLLM's class of the model imports torchvision, whose build in the registry is for GPUs: importing it
beside torch for CPUs fails on two operators that it expects. They are declared here, never called.
The directory with torchvision is the second path of PYTHONPATH.
"""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401 # sets the environment that vLLM reads
import torch

DECLARED = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    DECLARED.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

if __name__ == "__main__":
    from serving import check_answers, served

    reference = json.loads(Path(sys.argv[1]).read_text())
    with served(reference["model"], limit_mm_per_prompt={"image": 0}) as llm:
        check_answers(llm, reference)
