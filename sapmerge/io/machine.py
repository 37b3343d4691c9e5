"""What the machine has."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["at_terminal", "memory_of"]


def at_terminal() -> bool:
    """Whether stderr is a terminal; a process without a console may have no stderr at all."""
    stream: Any = sys.stderr
    return stream is not None and bool(stream.isatty())


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory, swap included; None where it cannot be told."""
    if device.type == "cuda":
        from torch import cuda

        return int(cuda.get_device_properties(device).total_memory)  # pyright: ignore
    found: list[int] = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
        found.append(sizes["MemTotal"] + sizes.get("SwapTotal", 0))
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            found.append(int(file.read()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(found, default=None)
