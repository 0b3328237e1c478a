"""One decode step over keys that are spread over the ranks, checked against one process's attention.

    torchrun --nproc-per-node 2 examples/decode.py [KEYS]

On GPUs if there is one for each rank, otherwise on the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from tree_attention import Layout, tree_decode
from tree_attention.testing import peaked_inputs


def main(keys: int) -> None:
    device = join()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    # Every rank makes the same numbers here, to have something to compare with; an engine never has the whole.
    q, k, v = peaked_inputs(B=1, S=keys, H=32, H_kv=8, D=128, device=str(device))
    mine = Layout(world_size, block=16).slots(0, keys, rank, device=device)

    out = tree_decode(q, k[:, mine], v[:, mine])

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # PyTorch has the heads first
    whole = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    error = float((out - whole).abs().max())
    print(f"rank {rank} of {world_size}: {len(mine)} of {keys} keys, largest difference {error:.1e}", flush=True)
    dist.destroy_process_group()
    assert error < 1e-5


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
