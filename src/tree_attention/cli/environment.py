"""Describes the machine and the installed packages, for `info` and for the records of benchmarks."""

import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl


def disable_multicast() -> None:
    """Turn NVLink multicast off for NCCL and symmetric memory, in this process and the ranks it starts."""
    os.environ.update({"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"})


def date() -> str:
    """Today's date, UTC, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def package_versions(*packages: str) -> dict[str, str]:
    """The version of each package, or "not installed"."""
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def nccl_version() -> str:
    """The version of NCCL. Requires CUDA."""
    return ".".join(map(str, nccl.version()))


def cpu_name() -> str:
    """The model name of the CPU, or its architecture if the system does not give one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peer_access(count: int) -> dict[tuple[int, int], bool]:
    """For each pair of the first `count` GPUs: True if they can access each other's memory."""
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return {pair: torch.cuda.can_device_access_peer(*pair) for pair in pairs}


def gpu_environment(count: int) -> dict[str, Any]:
    """Names, links, driver and libraries of the first `count` GPUs."""
    drivers = set(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split())
    gpus = {"gpus": [torch.cuda.get_device_name(i) for i in range(count)], "links": _link_names(count)}
    versions = {"driver": ", ".join(sorted(drivers)), "cuda": torch.version.cuda}
    return gpus | versions | {"nccl": nccl_version(), "cudnn": torch.backends.cudnn.version()}


def _link_names(count: int) -> str:
    """The links in the topology matrix of nvidia-smi, such as NV18 (18 NVLinks); else whether there is peer access."""
    lines = [line for line in _nvidia_smi("topo", "-m").splitlines() if re.match(r"(\x1b\[\d*m)*GPU\d+\s", line)]
    found = sorted(set(re.findall(r"\bNV\d+\b", "\n".join(lines))))
    return ", ".join(found) or ("peer access" if all(peer_access(count).values()) else "no peer access")


def _nvidia_smi(*arguments: str) -> str:
    command = shutil.which("nvidia-smi")
    return subprocess.run([command, *arguments], capture_output=True, text=True).stdout if command else ""
