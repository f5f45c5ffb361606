"""The highest memory use of this process within a stretch of time."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_FORGET_PEAK = "5"  # proc(5): resets the peak resident set size of the process


def forget_peak() -> None:
    """Let :func:`peak_bytes` begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _trim()
        Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)


def peak_bytes() -> int:
    """The most since :func:`forget_peak`: of the resident set on a CPU, of allocated memory on an accelerator."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _of_status("VmHWM")


def present_bytes() -> int:
    """What :func:`peak_bytes` is the highest value of."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    _trim()
    return _of_status("VmRSS")


def _trim() -> None:
    """Have glibc give back what it keeps of freed memory, or what takes its place later would not show."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _of_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
