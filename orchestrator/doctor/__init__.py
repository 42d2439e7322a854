"""Check of a machine: facts are gathered first, and judged by functions of the facts alone."""

from orchestrator.doctor.checks import Finding as Finding
from orchestrator.doctor.checks import judge
from orchestrator.doctor.facts import gather


def examine(address: str | None = None) -> list[Finding]:
    """Examine this machine; starts no process.

    Args:
        address: host:port of the head of a Ray cluster; None means the usual one of this machine.
    """
    return judge(gather(address))
