"""Serves a checkpoint and compares the answers with the reference: python answering.py REFERENCE

SGLang starts its processes anew, and each imports this file first.
"""

import json
import sys
from pathlib import Path
from typing import Any

import on_cpu  # noqa: F401 # first: imports of SGLang need it

TOLERANCE = 1e-4


def check(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Check that tokens are equal, and log-probabilities up to rounding in float32."""
    assert len(found) == len(expected["prompts"])
    rows = zip(found, expected["continued"], expected["scores"], expected["chosen"], strict=True)
    for answer, continued, scores, chosen in rows:
        assert answer["output_ids"] == continued, (answer["output_ids"], continued)
        meta = answer["meta_info"]
        given = [each[0] for each in meta["input_token_logprobs"][1:]]
        given += [each[0] for each in meta["output_token_logprobs"]]
        differences = [abs(a - b) for a, b in zip(given, scores + chosen, strict=True)]
        assert max(differences) < TOLERANCE, max(differences)
        print(f"largest difference {max(differences):.1e}")


def main() -> None:
    import sglang

    expected = json.loads(Path(sys.argv[1]).read_text())
    engine = sglang.Engine(
        model_path=expected["model"],
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        mem_fraction_static=0.2,
        max_total_tokens=2048,
        log_level="warning",
    )
    try:
        length = len(expected["continued"][0])
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        found = engine.generate(
            input_ids=expected["prompts"],
            sampling_params=sampling,
            return_logprob=True,
            logprob_start_len=0,
        )
        check(found, expected)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
