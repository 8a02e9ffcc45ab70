"""Out-of-memory errors are told from others, on the errors that allocators really raise."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cfgrl_gym.algorithms.memory.micro_batches import is_out_of_memory

PETABYTE = 10**15
LIMITED = """
import resource
import torch
from cfgrl_gym.algorithms.memory.micro_batches import is_out_of_memory

layer = torch.nn.Linear(64, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    layer(torch.ones(2**22, 64)).sum().backward()
except Exception as error:
    print(type(error).__name__, is_out_of_memory(error))
print(layer(torch.ones(8, 64)).shape[0])
"""


def raised_by(work: Any) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError, ValueError, TypeError)) as caught:
        work()
    return caught.value


def test_torchs_cpu_allocator() -> None:
    assert is_out_of_memory(raised_by(lambda: torch.empty(PETABYTE, dtype=torch.uint8)))


def test_numpys_and_pythons_allocator() -> None:
    assert is_out_of_memory(raised_by(lambda: np.ones(PETABYTE, np.uint8)))
    assert is_out_of_memory(raised_by(lambda: bytearray(PETABYTE)))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")
def test_a_process_at_its_limit_recovers_with_a_smaller_batch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RuntimeError", "True", "8"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_cuda_allocator() -> None:
    error = raised_by(lambda: torch.empty(PETABYTE, dtype=torch.uint8, device="cuda"))
    assert is_out_of_memory(error)


def test_libraries_on_the_device() -> None:
    # Their wording, as torch passes it on: they can't be provoked without a GPU.
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))


def test_other_errors_are_not_mistaken_for_it() -> None:
    assert not is_out_of_memory(raised_by(lambda: torch.ones(2, 3) @ torch.ones(2, 3)))
    assert not is_out_of_memory(raised_by(lambda: torch.ones(3).view(2)))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(KeyboardInterrupt())
