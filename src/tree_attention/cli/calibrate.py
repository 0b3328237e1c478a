"""`tree-attention calibrate`: measures this machine's constants and writes the file that `plan --machine` reads."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from ..bench.calibration import measure_machine
from ..cost.machine import Calibration, save_calibration
from ..errors import InputError
from . import environment
from .launch import run_on_ranks
from .options import CalibrateOptions
from .records import print_table
from .terminal import under_torchrun


def calibrate(options: CalibrateOptions) -> int:
    """Measure on the ranks of this host, print and write the constants. Returns the exit code."""
    output, nproc = options.output, options.nproc
    if nproc is None and not under_torchrun():
        gpus = torch.cuda.device_count() if options.device != "cpu" else 0
        if gpus == 1:
            raise InputError("calibrate measures a link between GPUs, found one GPU: --device cpu measures the CPU")
        nproc = max(gpus, 2)
    if nproc is not None and nproc < 2:
        raise InputError(f"calibrate measures a link and needs at least 2 ranks, got {nproc}")
    environment.disable_multicast()
    return run_on_ranks(_on_rank, nproc, options.device, output)


def _on_rank(output: Path, device: torch.device) -> None:
    if dist.get_world_size() != int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())):
        raise InputError("calibrate measures one host, got ranks on several: start it on each host alone")
    machine = measure_machine(device)
    if dist.get_rank() != 0:
        return
    hardware = machine.name if device.type == "cuda" else environment.cpu_name()
    found = Calibration(machine, f"{dist.get_world_size()} x {hardware}", environment.date())
    save_calibration(found, output)
    gpu, link = machine.gpu, machine.inside
    rows = (
        ("memory", f"{gpu.memory_bytes / 1e9:.1f} GB"),
        ("streaming read", f"{gpu.read_bytes_per_s / 1e9:.1f} GB/s"),
        ("matrix product", f"{gpu.matmul_flops_per_s / 1e12:.2f} TFLOP/s"),
        ("fixed cost of a decode step", f"{1e6 * gpu.launch_s:.2f} µs"),
        ("small kernel", f"{1e6 * gpu.kernel_s:.2f} µs"),
        ("link", f"{link.bytes_per_s / 1e9:.1f} GB/s"),
        ("small message", f"{1e6 * link.latency_s:.2f} µs"),
        ("small collective", f"{1e6 * link.collective_s:.2f} µs"),
        ("between nodes", f"{machine.across.name}, not measured"),
    )
    print_table(("", ""), rows, f"{found.hardware}, {found.date}: {output}")
