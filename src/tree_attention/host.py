"""The CPUs and the memory that this process may use."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Number of CPUs that this process may use: its affinity, or its control group's quota if that is less."""
    return max(min(len(os.sched_getaffinity(0)), _quota()), 1)


def free_bytes() -> int:
    """Memory that new processes can get: what the host has available, or the rest of the control group's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))  # the kernel frees these pages when it must
    except (OSError, ValueError, KeyError):  # there is no such file, or it says "max"
        return free


def _quota() -> int:
    """CPUs of the control group, rounded up; of version 2, or 1."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
            if int(quota) > 0:
                return math.ceil(int(quota) / int(period))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return os.cpu_count() or 1
