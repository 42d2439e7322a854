"""The release of vLLM that this package is written for."""

SERVED = (0, 32)
"""Minor release: the interfaces that are used change between minor releases."""


def refusal(found: str) -> str:
    """Return the sentence about another release of vLLM; empty if it is the one.

    Args:
        found: Version of vLLM, `0.32.1`. The number alone counts: CPU builds are `0.32.0+cpu`.
    """
    numbers = tuple(found.split(".")[:2])
    wanted = tuple(map(str, SERVED))
    if numbers == wanted:
        return ""
    release = ".".join(wanted)
    return (
        f"orchestrator-vllm: found vLLM {found}, this version serves with vLLM {release}; install "
        f"vllm {release}, or another version of orchestrator-vllm"
    )
