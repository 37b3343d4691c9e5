"""What a process holds in memory."""

from __future__ import annotations

import resource

__all__ = ["memory"]


def memory(kind: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process, in bytes.
    Elsewhere than on Linux: ru_maxrss for both.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith(kind))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
