"""The release of SGLang that this package is written for."""

SERVED = "0.5.23"


def refusal(found: str) -> str:
    """Return the sentence about another release of SGLang; empty if it is the one.

    Args:
        found: Version of SGLang, `0.5.23`. The number alone counts, `0.5.23+local` is the same.
    """
    if found.partition("+")[0] == SERVED:
        return ""
    return (
        f"orchestrator-sglang: found SGLang {found}, this version serves with SGLang {SERVED}; "
        f"install sglang {SERVED}, or another version of orchestrator-sglang"
    )
