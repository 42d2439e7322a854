"""Durations, sizes and counts as text."""


def duration(seconds: float) -> str:
    """Format a duration: 0.4s, 12s, 3m05s, 2h07m."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: float) -> str:
    """Format bytes in powers of 1000: 512 B, 3.5 MB, 140 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(count: int, one: str, several: str = "") -> str:
    """Format a count with its noun: 1 unit, 2 units; `several` is a plural without `s`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
