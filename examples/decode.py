"""One decode step over keys that are spread over the ranks, checked against PyTorch's own on one process.

    torchrun --nproc-per-node 2 examples/decode.py [KEYS]

On GPUs if there is one for each rank, otherwise on the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from tree_attention import Layout, tree_decode
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs


def main(keys: int) -> None:
    device = join()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # Every rank makes the same numbers here, to have something to compare with; an engine never has the whole.
    q, k, v = peaked_inputs(B=1, S=keys, H=32, H_kv=8, D=128, device=str(device))
    mine = Layout(world_size, block=16).slots(0, keys, rank, device=device)

    out = tree_decode(q, k[:, mine], v[:, mine])

    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    plain = scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)  # all keys, this process alone
    exact = oracle(q, k, v).out  # float64
    errors = [float((x - exact).abs().max()) for x in (out, plain)]
    line = f"rank {rank}: {len(mine)} of {keys} keys, error {errors[0]:.1e}; one process {errors[1]:.1e}\n"
    sys.stdout.write(line)  # in one piece: torchrun's ranks write at the same time, and print writes the end by itself
    dist.destroy_process_group()
    assert_within_rounding(out, exact, plain)


def join() -> torch.device:
    """Become one of torchrun's ranks; returns this rank's device."""
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
