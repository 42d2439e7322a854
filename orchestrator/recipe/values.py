"""Parsing, checking, formatting and writing of values from flags and TOML."""

import re
import tomllib
from collections.abc import Iterable
from decimal import Decimal
from pathlib import PurePath
from typing import Any, get_args

from orchestrator.errors import UsageError

TYPE_NAMES = {bool: "true or false", float: "a number", int: "a whole number", str: "a string"}
WORKERS = re.compile(r"([0-9]{1,19})(?:\.\.([0-9]{1,19}))?")
BETWEEN_SELECTORS = re.compile(r",(?![^\[]*\])")
"""Comma that is not between brackets."""
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
SIZE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_option(text: str) -> tuple[str, str, Any]:
    """Parse `mgaa.t=0.5` to name, option and value; a value that is not TOML is a string.

    Raises:
        UsageError: The text has another form.
    """
    path, separator, written = text.partition("=")
    name, dot, option = path.strip().partition(".")
    if not (separator and dot and name and BARE_KEY.fullmatch(option)):
        raise UsageError(f"option is {text!r}; write it like mgaa.t=0.5")
    return name, option, parse_value(written)


def parse_value(written: str) -> Any:
    """Parse a TOML value; other text is a string."""
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except (ValueError, RecursionError):
        return written.strip()


def fraction(written: str) -> float | tuple[float, ...]:
    """Parse one fraction, or several separated by commas; 80% is 0.8.

    Raises:
        ValueError: A part is neither a number nor a percentage.
    """
    sizes = tuple(map(percentage, written.split(",")))
    return sizes if len(sizes) > 1 else sizes[0]


def percentage(written: str) -> float:
    """Parse 0.8 or 80%, which is the same double.

    Raises:
        ValueError: The text is neither.
    """
    text = written.strip()
    if not text.endswith("%"):
        return float(text)
    try:
        return float(Decimal(text[:-1]) / 100)
    except ArithmeticError as error:
        raise ValueError(f"{written!r} is not a percentage") from error


def check_fraction(name: str, value: float) -> None:
    """Raise UsageError unless the number is above 0 and at most 1; 80 may be meant as 80%,
    while 1.2 is too near to 1 for a guess."""
    if 0 < value <= 1:
        return
    meant = f"; did you mean {value / 100:g} or {value:g}%?" if 2 <= value <= 100 else ""
    raise UsageError(f"{name} is {value:g}; it must be above 0 and at most 1{meant}")


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Parse `storage=plain,pivoted` or `mgaa.t=0.5,1` to a name and values, as TOML if possible.

    Raises:
        UsageError: The text has another form.
    """
    name, separator, written = text.partition("=")
    values = [value.strip() for value in written.split(",")]
    if not separator or not name.strip() or not all(values):
        raise UsageError(f"vary is {text!r}; write it like storage=plain,pivoted or mgaa.t=0.5,1")
    return name.strip(), [parse_value(value) for value in values]


def split_selectors(selectors: Iterable[str]) -> tuple[str, ...]:
    """Split `*.q_proj,*.k_proj` into two selectors; commas of `re:REGEX`, and between brackets of a
    glob, are parts of it."""
    found: list[str] = []
    for text in selectors:
        before, regex, after = text.partition("re:")
        is_list = not before.strip() or before.rstrip().endswith(",")
        globs, regex = (before, regex + after) if regex and is_list else (text, "")
        found += [each.strip() for each in BETWEEN_SELECTORS.split(globs) if each.strip()]
        found += [regex] if regex else []
        if not text.strip():
            found.append(text)
    return tuple(found)


def parse_workers(workers: int | str | None) -> tuple[int, int] | None:
    """Parse `2..8` or 4 to the minimum and maximum number of workers; None gives None.

    Raises:
        UsageError: The value has another form or order, or is below one.
    """
    if workers is None:
        return None
    found = WORKERS.fullmatch(str(workers))
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(
            f"workers is {brief(workers)}; it must be a number of 1 or above, or MIN..MAX, "
            "1..8 for example"
        )
    return least, most


def check_rank_multiple(multiple: int | str | None) -> None:
    """Raise UsageError unless the value is `auto` or a number of 1 or above; None is not given."""
    is_number = isinstance(multiple, int) and multiple >= 1
    if not (is_number or multiple in ("auto", None)):
        raise UsageError(
            f"rank_multiple is {brief(multiple)}; it must be auto, or a number of 1 or above"
        )


def check_expert_groups(groups: int | str | None) -> None:
    """Raise UsageError unless the value is `auto` or a number of 1 or above; None is not given."""
    is_number = isinstance(groups, int) and groups >= 1
    if not (is_number or groups in ("auto", None)):
        raise UsageError(
            f"expert_groups is {brief(groups)}; it must be auto, or a number of 1 or above"
        )


def size_in_bytes(text: str) -> int:
    """Parse "5GB", "200MB", "1.5 GiB" or "4096" to bytes; KB is 1000 bytes, KiB 1024.

    Raises:
        UsageError: The text is not a size, or below one byte.
    """
    stripped = text.strip().upper()
    digits = stripped.rstrip("BKMGTI ")
    unit = stripped[len(digits) :].strip() or "B"
    try:
        size = int(float(digits) * SIZE_UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(f'size is {text!r}; write it like "5GB", "200MB" or "1.5GiB"')
    return size


def check_options(options: Any) -> None:
    """Raise UsageError unless the options are tables of plain values, with names that TOML can
    write."""
    if not isinstance(options, dict):
        raise UsageError(f"options is {brief(options)}; it must be tables of options")
    for name, table in options.items():
        if not isinstance(table, dict):
            found = f"{written_name(name)} is {brief(table)}"
            raise UsageError(f"options: {found}; it must be a table of options")
        for option, value in table.items():
            where = f"options: {written_name(name)}.{written_name(option)}"
            if not BARE_KEY.fullmatch(str(option)):
                raise UsageError(f"{where}: must be a name of letters, digits and underscores")
            if not isinstance(value, bool | int | float | str) or value != value:
                found = brief(value)
                raise UsageError(f"{where} is {found}; it must be a number, a word or a boolean")
            check_plain(where, value)


def of_type(name: str, kind: Any, value: Any) -> Any:
    """Convert the value to its field's type: a list to a tuple, a path to a string, an integer to a
    float if required."""
    if kind == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            for item in value:
                check_plain(name, item)
            return tuple(value)
        raise UsageError(f"{name} is {brief(value)}; it must be a list of strings")
    if isinstance(value, PurePath) and str in (kind, *get_args(kind)):
        value = str(value)
    check_plain(name, value)
    if float in (kind, *get_args(kind)) and type(value) is int:
        return float(value)
    is_disguised_bool = isinstance(value, bool) and kind is not bool
    if is_disguised_bool or not isinstance(value, kind):
        (wanted, *_) = get_args(kind) or (kind,)
        raise UsageError(f"{name} is {brief(value)}; it must be {TYPE_NAMES[wanted]}")
    return value


def check_plain(where: str, value: Any) -> None:
    """Raise UsageError if TOML cannot represent the number or the string."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"{where} is {brief(value)}; whole numbers go to 2^63 - 1")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{where} is {brief(value)}; it must be valid Unicode") from error


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_string(item) for item in value)}]"
    return repr(value)


def _toml_string(text: str) -> str:
    """Write a basic string, in which quotes, backslashes and control characters are escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'


def written_name(name: object) -> str:
    return str(name) if BARE_KEY.fullmatch(str(name)) else brief(name)


def brief(value: Any) -> str:
    """Format a value for a message, with limited length."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
