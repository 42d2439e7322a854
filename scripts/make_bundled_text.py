"""Write the bundled calibration text, `orchestrator/models/inputs/bundled.jsonl`, and its licence.

It is made once, from the Python that runs this, and committed, so that it is the same everywhere:
English of the language reference, documentation and sources of the standard library, Python's
licence and its Zen. Paragraphs that `prepare_texts` holds out are left out. Documents of all kinds
are interleaved, so that a beginning of the text is mixed too.
"""

import ast
import codecs
import contextlib
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from platform import python_version
from pydoc_data.topics import topics

from prepare_texts import HELD_OUT, paragraphs, split_topics

LIBRARY = Path(sysconfig.get_path("stdlib"))
OUTPUT = Path(__file__).parents[1] / "orchestrator" / "models" / "inputs" / "bundled.jsonl"
DOCUMENTED = """
abc argparse ast asyncio/events asyncio/tasks base64 bdb cmd codecs collections/__init__
configparser contextlib copy csv ctypes/util datetime decimal difflib dis enum functools
gzip hashlib hmac imaplib inspect ipaddress json/__init__ locale mailbox pathlib pickle
pprint queue random sched selectors shelve shutil smtplib socket sqlite3/dbapi2 statistics
subprocess tarfile tempfile threading timeit tokenize traceback types typing unittest/case
urllib/parse urllib/request uuid warnings weakref zipfile zipapp
"""
"""Modules of the standard library whose docstrings are taken."""
SOURCES = ["bisect", "heapq", "textwrap", "graphlib", "reprlib", "string", "sched", "copy"]
"""Modules whose source is taken: all are the PSF's."""
SHORTEST = 80
"""Characters of the shortest docstring."""
LONGEST = 2500
"""Characters of the docstrings of a module."""
LONGEST_TOPIC = 12_000
NOTE = """\
bundled.jsonl is a selection, made by scripts/make_bundled_text.py, of texts of Python {version}:
topics of its language reference, docstrings and sources of its standard library, its Zen, and the
licence below, under which all of them are distributed. Changes: paragraphs that
scripts/prepare_texts.py holds out are left out, long topics and docstrings are cut, docstrings are
taken out of their modules, and documents are put into JSON.

"""


def topic_documents() -> Iterator[str]:
    """Every fourth topic of the language reference, none of which is held out."""
    for number, name in enumerate(sorted(topics)):
        if number % HELD_OUT == 1:
            yield "\n\n".join(paragraphs(name))[:LONGEST_TOPIC].rpartition("\n")[0]


def docstring_documents() -> Iterator[str]:
    """The docstrings of each module, as one document."""
    for name in DOCUMENTED.split():
        tree = ast.parse((LIBRARY / f"{name}.py").read_text(encoding="utf-8"))
        owners = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        )
        found = dict.fromkeys(ast.get_docstring(owner) or "" for owner in owners)
        long = [each for each in found if len(each) >= SHORTEST]
        if long:
            yield "\n\n".join(long)[:LONGEST].rpartition("\n")[0]


def source_documents() -> Iterator[str]:
    for name in SOURCES:
        yield (LIBRARY / f"{name}.py").read_text(encoding="utf-8")


def other_documents() -> Iterator[str]:
    """The Zen and the licence."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    yield codecs.decode(this.s, "rot13")
    yield licence()


def licence() -> str:
    return (LIBRARY / "LICENSE.txt").read_text(encoding="utf-8")


def mixed(kinds: list[list[str]]) -> list[str]:
    """Interleave documents so that each kind advances evenly by characters."""
    totals = [sum(map(len, kind)) for kind in kinds]
    order = []
    for kind, total in zip(kinds, totals, strict=True):
        before = 0
        for document in kind:
            order.append(((before + len(document) / 2) / total, document))
            before += len(document)
    return [document for _, document in sorted(order)]


def main() -> None:
    kinds = [topic_documents, docstring_documents, source_documents, other_documents]
    _, evaluation = split_topics()
    held_out = set(evaluation.split("\n\n"))
    documents = [
        "\n\n".join(part for part in document.split("\n\n") if part.strip("\n") not in held_out)
        for document in mixed([list(kind()) for kind in kinds])
    ]
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    OUTPUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    note = NOTE.format(version=python_version())
    OUTPUT.with_suffix(".LICENSE").write_text(note + licence(), encoding="utf-8")


if __name__ == "__main__":
    main()
