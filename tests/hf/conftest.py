"""A compressed model, and fresh processes forked from one that has imported torch and
transformers, which takes seconds."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from compressed import Compressed, compress, logits, reference
from drivers import start
from moe.stored import MadeMoe, store_moe
from torch import Tensor

SECONDS = 300
"""Time after which a process ends."""

# the process that is forked: it has not imported orchestrator, which its children can
STEM = """
import json, os, signal, sys, traceback
from pathlib import Path

import torch
import torch.distributed.tensor
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

assert not any(name.partition(".")[0] == "orchestrator" for name in sys.modules)

def asked():
    for line in sys.stdin:
        request, pids = json.loads(line), []
        for number, variables in enumerate(request["environments"]):
            pid = os.fork()
            if not pid:
                return request, number, variables
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
    sys.exit()

request, number, variables = asked()
signal.alarm(request["seconds"])
os.environ.update(variables)
os.chdir(request["directory"])
for name, descriptor in (("stdout", 1), ("stderr", 2)):
    with open(f"{name}{number}", "wb") as file:
        os.dup2(file.fileno(), descriptor)
transformers.dynamic_module_utils.HF_MODULES_CACHE = str(Path("modules").absolute())
sys.argv[1:] = request["arguments"]
exec(compile(request["program"], "program", "exec"), {"__name__": "__main__"})
"""

Fork = Callable[..., list[CompletedProcess[str]]]


@pytest.fixture(scope="session")
def fork() -> Iterator[Fork]:
    """Run a program in processes of its own, at the same time, one for each environment.

    Their working directory is given; it also holds what they print and their cache of modules that
    checkpoints bring.
    """
    stem = start("-c", STEM, stdin=subprocess.PIPE)

    def run(
        program: str,
        *arguments: object,
        directory: Path,
        environments: Sequence[Mapping[str, str]] = ({},),
    ) -> list[CompletedProcess[str]]:
        request = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "directory": str(directory),
            "environments": [*map(dict, environments)],
            "seconds": SECONDS,
        }
        print(json.dumps(request), file=stem.stdin, flush=True)
        codes = json.loads(stem.stdout.readline())
        return [
            CompletedProcess(
                program,
                code,
                (directory / f"stdout{number}").read_text(),
                (directory / f"stderr{number}").read_text(),
            )
            for number, code in enumerate(codes)
        ]

    with stem:
        yield run
        stem.stdin.close()


@pytest.fixture(scope="session")
def halved(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Compressed]:
    """A family's checkpoint with low rank in several files; not to be changed."""
    root = tmp_path_factory.mktemp("halved")
    return cache(lambda family: compress(checkpoint(family), root / family, max_shard_bytes=40_000))


@pytest.fixture(scope="session")
def stored_moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MadeMoe]:
    """A family's checkpoint with random forms of its experts; not to be changed."""
    root = tmp_path_factory.mktemp("moe")
    return cache(lambda family: store_moe(family, root / family))


@pytest.fixture(scope="session")
def made(halved: Callable[[str], Compressed]) -> Compressed:
    """A tiny compressed Llama in three files."""
    return halved("llama")


@pytest.fixture(scope="session")
def expected(made: Compressed) -> Tensor:
    return logits(reference(made))
