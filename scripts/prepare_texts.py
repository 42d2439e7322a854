"""Write two texts without common paragraphs, from the language reference included in Python.

`pydoc_data.topics` is half a megabyte of English about Python. Its topics overlap, so a paragraph
of a held-out topic is held out everywhere.
"""

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 4
"""Every `HELD_OUT`-th topic, in the order of names, is held out."""


def split_topics() -> tuple[str, str]:
    """Return the calibration text and the evaluation text; every paragraph occurs at most once."""
    names = sorted(topics)
    held_out = set(names[::HELD_OUT])
    evaluation = dict.fromkeys(p for name in names if name in held_out for p in paragraphs(name))
    calibration = dict.fromkeys(
        p for name in names for p in paragraphs(name) if p not in evaluation
    )
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def paragraphs(name: str) -> list[str]:
    return [p.strip("\n") for p in re.split(r"\n[ \t]*\n", topics[name]) if p.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = split_topics()
    (directory / "calibration.txt").write_text(calibration, encoding="utf-8")
    (directory / "evaluation.txt").write_text(evaluation, encoding="utf-8")


if __name__ == "__main__":
    main()
