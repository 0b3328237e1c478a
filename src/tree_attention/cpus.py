"""The CPUs that this process may use."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Number of CPUs that this process may use: its affinity, or its control group's quota if that is less."""
    return max(min(len(os.sched_getaffinity(0)), _quota()), 1)


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
