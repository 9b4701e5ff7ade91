"""How a process that trains or scores is set up, and the device that it does so on."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 1 << 30  # bytes
CPU = torch.device("cpu")


def device_of(gpus: Sequence[object]) -> torch.device:
    """The one rule: whatever trains, fits or scores does so on the GPU that its process was given, else on the CPU.

    `gpus` are what the process was given, not what it sees: Ray hides none from those that asked for none.
    """
    return torch.device("cuda") if gpus and torch.cuda.is_available() else CPU


def settle() -> None:
    """Set this process up to train small networks; to be called before it trains.

    - One thread: networks this small gain little from more, and numbers then don't depend on how many cores there are.
    - glibc hands freed activations back to the kernel and takes them again, page by page, at every step; kept, a step
      takes three quarters of the time. Elsewhere nothing is changed.
    - The moments of weights that get no gradient any more decay to denormal numbers, on which a CPU is slow: zeros.
    - On a GPU convolutions are in full float32, as matrix products are by default, so that scores are the CPU's.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEEP)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP)


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let a GPU round what it multiplies to 10 bits, which is several times faster; nothing is scored so."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
