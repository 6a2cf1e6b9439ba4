"""Bytes: what this process and its device hold now, and have held at most."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from pathlib import Path

import torch


def used_bytes(device: torch.device) -> int:
    """Held now: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Held at most since the start: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of giving it back to the system; elsewhere nothing happens.

    A training step frees and takes the same tens of megabytes again and again; giving them back means a page fault for
    every 4 KiB the next time. Documented in mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
