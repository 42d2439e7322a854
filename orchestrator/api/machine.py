"""Check of the machine."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.doctor import Finding


def doctor(*, address: str | None = None) -> "list[Finding]":
    """Check versions, devices, Ray, disks and memory of this machine; starts no process.

    Takes the time in which torch, transformers and Ray are imported.

    Args:
        address: host:port of the head of a Ray cluster to look for; None means `RAY_ADDRESS`, or
            the cluster that was started on this machine.

    Returns:
        One finding per item: ok, warning or missing, with a remedy. `fails` is true for a missing
        item without which no model can be compressed.
    """
    from orchestrator.doctor import examine

    return examine(address)
