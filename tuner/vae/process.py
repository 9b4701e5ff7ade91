"""How a process that trains is set up: one core, memory kept, no denormal numbers."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 1 << 30  # bytes


def settle() -> None:
    """Set this process up to train small networks; to be called before it trains.

    - One thread: networks this small gain little from more, and numbers then don't depend on how many cores there are.
    - glibc hands freed activations back to the kernel and takes them again, page by page, at every step; kept, a step
      takes three quarters of the time. Elsewhere nothing is changed.
    - The moments of weights that get no gradient any more decay to denormal numbers, on which a CPU is slow: zeros.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEEP)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP)
