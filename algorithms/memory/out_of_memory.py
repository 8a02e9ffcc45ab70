"""Telling a failed allocation, which a smaller batch may cure, from every other error."""

import torch

# An allocation that fails outside torch's own CUDA allocator is a plain RuntimeError, which only
# its text tells apart: c10/core/impl/alloc_cpu.cpp, the CUDA driver, cuBLAS and cuDNN.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, of the device's memory or of the host's.

    True for torch.OutOfMemoryError, MemoryError (Python's and NumPy's), and the RuntimeErrors
    of torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN.
    """
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
