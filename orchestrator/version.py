"""Version of the package, stated here only, for reports, environments, checkpoints and builds."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"
LIBRARIES = ("ray", "torch", "transformers")
"""Libraries on which results and messages depend most."""


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Read the versions of distributions from their metadata, without importing them.

    Returns:
        Version by name; None for a distribution that is not installed.
    """
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def version_lines() -> list[str]:
    """Return the versions of this package, of Python and of `LIBRARIES`, one line each."""
    libraries = installed_versions(LIBRARIES)
    return [
        f"orchestrator {__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {found or 'not installed'}" for name, found in libraries.items()),
    ]
