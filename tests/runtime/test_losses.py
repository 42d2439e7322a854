"""Classification of exceptions as out of memory or failed GPU, by PyTorch's messages."""

import errno
import pickle

import pytest
import torch

from orchestrator.errors import InputError, WorkerError
from orchestrator.runtime.calls import Call, Finish
from orchestrator.runtime.losses import cause_of_loss, summary
from orchestrator.runtime.policy import Cause
from orchestrator.runtime.pool import LocalPool
from orchestrator.store.chunks import MissingChunk

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
"""Text after every error of CUDA's runtime."""
BACKEND = (
    " If you keep seeing this error, you may use `torch.backends.cuda.preferred_linalg_library()`"
)
OUT_OF_MEMORY = [
    MemoryError(),
    MemoryError("cannot allocate 7 GB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`."
        f"{BACKEND}"
    ),
    RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(handle)`"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"),
]
SICK = [
    torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: device-side assert triggered{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: unspecified launch failure{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: unknown error{ADVICE}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `syevd`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    RuntimeError("No CUDA GPUs are available"),
]
OF_THE_PROGRAM = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    ValueError("rank is 0"),
    OSError(errno.ENOSPC, "No space left on device"),
    torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `potrf`"),
    InputError("text.txt: line 3 says CUDA error: out of memory"),
    MissingChunk(2, 1),
]


def words(error):
    return repr(error).partition("\\n")[0]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=words)
def test_every_way_to_run_out_of_memory(error):
    """Errors of the host, of CUDA's allocator and runtime, and of its libraries are recognized."""
    assert cause_of_loss(error) is Cause.OUT_OF_MEMORY


def test_the_error_that_torch_raises_for_the_host():
    """The error that PyTorch raises here for a huge allocation is recognized."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert cause_of_loss(raised.value) is Cause.OUT_OF_MEMORY


@pytest.mark.parametrize("error", SICK, ids=words)
def test_a_sick_gpu_is_a_dead_worker(error):
    """Any failure of a GPU costs its worker; the message leaves out CUDA's advice."""
    assert cause_of_loss(error) is Cause.DIED
    assert "\n" not in summary(error)
    assert summary(error).startswith(type(error).__name__)


@pytest.mark.parametrize("error", OF_THE_PROGRAM, ids=words)
def test_what_any_worker_would_raise_costs_none(error):
    """Errors of the program, of its input and of solvers that do not converge cost no worker."""
    assert cause_of_loss(error) is None


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *SICK], ids=words)
def test_they_mean_the_same_in_another_process(error):
    """Causes stay the same if Ray pickles the exception, or replaces it by its traceback."""
    assert cause_of_loss(pickle.loads(pickle.dumps(error))) is cause_of_loss(error)
    lines = f"Exception torch isn't serializable.\nTraceback:\n  line 3\n{type(error)}: {error}"
    if str(error) and not isinstance(error, MemoryError | OSError):
        assert cause_of_loss(RuntimeError(lines)) is cause_of_loss(error)


@pytest.mark.parametrize(
    ("error", "cause", "ends"),
    [
        (OUT_OF_MEMORY[8], Cause.OUT_OF_MEMORY, None),
        (SICK[0], None, WorkerError),
        (OF_THE_PROGRAM[0], None, RuntimeError),
    ],
    ids=["memory", "gpu", "program"],
)
def test_a_pool_in_this_process_tells_them_apart(error, cause, ends):
    """Out of memory costs the worker; a failed GPU ends the run, which can be resumed."""

    class RaisingWorker:
        def __init__(self, task):
            pass

        def measured(self, command, record):
            raise error

    pool = LocalPool(RaisingWorker, "task", "nonce")
    pool.start(Call(0, Finish(1), "block 1, finish"), None)
    (outcome,) = pool.wait(0)
    assert (outcome.lost is not None) == (cause is not None)
    assert outcome.cause is (cause or Cause.DIED)
    assert type(outcome.error) is (ends or type(None))
    assert str(error).splitlines()[0] in outcome.log
    if ends is WorkerError:
        assert outcome.error.exit_code == 1
        assert "the same command resumes" in str(outcome.error)
        assert outcome.error.__cause__ is error
