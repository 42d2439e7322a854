"""Writes two texts that share no paragraph, out of the language reference that Python carries.

`pydoc_data.topics` is half a megabyte of English about Python. Its topics overlap, so a paragraph
is held out for evaluation wherever it stands once a topic that is held out contains it.
"""

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 4
"""Of so many topics, in the order of their names, one is held out."""


def split_topics() -> tuple[str, str]:
    """The calibration text and the evaluation text; every paragraph stands once at most."""
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
