"""Fixtures of several test files."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed import compress, mixed_plan
from families import FAMILIES, write_model
from forking import fork_processes
from hypothesis import settings
from image_text.families import IMAGE_FAMILIES, IMAGE_MOE_FAMILIES
from object_store import ObjectStore, object_store

from orchestrator.device.strict import CUDA_ENVIRONMENT
from orchestrator.plan.result import Result

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        # also of the processes that tests start: several of them share the cores
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # idle processes that no actor here can use, as its environment differs
        "RAY_prestart_worker_first_driver": "0",
        # of the object store on this machine, which lets everybody in
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
)

# no test is timed: beside others an example may take long
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# as workers compute: what is compared to the bit here must not depend on how a BLAS shares its work
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exclude all imported modules from garbage collection: workers collect after every stage, and
    a pass over the objects of torch, transformers and pytest takes a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Let the workers of xdist be forked, if there is a server."""
    os.environ["FORKED"] = "next"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint, written once a session; not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    makers = FAMILIES | IMAGE_FAMILIES | IMAGE_MOE_FAMILIES
    return cache(lambda family: write_model(makers[family], root / family))


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a mixture-of-experts family's tiny checkpoint; not to be changed."""
    from moe.families import write_moe

    root = tmp_path_factory.mktemp("moe")
    return cache(lambda family: write_moe(family, root / family))


@pytest.fixture(scope="session")
def compressed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The directory of a family's checkpoint with every form in it; not to be changed."""
    root = tmp_path_factory.mktemp("compressed")

    def make(family: str) -> Path:
        return compress(checkpoint(family), root / family, make_plan=mixed_plan).directory

    return cache(make)


@pytest.fixture
def run_dir(half: Result, tmp_path: Path) -> str:
    """Copy of the run directory of a module's shared run, its fixture `half`."""
    return str(shutil.copytree(half.run_dir, tmp_path / "run"))


@pytest.fixture
def cuda_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that workers are started with."""
    for name, value in CUDA_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the session's one Ray: no dashboard, eight CPUs that it may pretend to have.

    Drivers in this process use it as it is, drivers in processes of their own join it.
    """
    import ray

    fork_processes()
    with tempfile.TemporaryDirectory(prefix="or-", ignore_cleanup_errors=True) as directory:
        context = ray.init(
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _temp_dir=directory,
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """A real S3 server on this machine, with one bucket; each test takes prefixes of its own."""
    with object_store() as store:
        yield store
