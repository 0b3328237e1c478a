"""Peers of our decode: other kernels and exchanges, each written as its users would write it.

LOCAL_PEERS      attention over one GPU's own shard: cudnn, flash2, flash3, flashinfer
SPREAD_PEERS     attention over the shards of all ranks: three_all_reduce (the paper's reference), all_gather, ring
streaming_read   the ceiling: every byte is read once, nothing is computed

No peer falls back to another kernel. All steps run on one stream and never wait for the device, so each can be captured
in a CUDA graph, after some eager steps that create plans and communicators.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..reduce.collectives import gather

Step = Callable[[], Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

PAGE_TOKENS = 16
WORKSPACE_BYTES = 384 << 20  # of FlashInfer, the size that serving engines use
aten = torch.ops.aten


@dataclass(frozen=True)
class Peer:
    """A contestant for q `[B, 1, H, D]` and this rank's k, v `[B, S_local, H_kv, D]`, NHD or HND in memory.

    obstacle: (q, k, v) -> why it cannot run these tensors here, or None. prepare: (q, k, v, group) -> step, after the
    one-time work of a user (plans, buffers). Only `step()` is timed. It returns the attention `[B, 1, H, D]` over this
    rank's keys (LOCAL_PEERS, group unused) or over all keys (SPREAD_PEERS). SPREAD_PEERS also take `local=`, the kernel
    for one shard, with the result of `cudnn_partial`, the default.
    """

    obstacle: Callable[[Tensor, Tensor, Tensor], str | None]
    prepare: Callable[..., Step]


def streaming_read(
    tensor: Tensor, block_bytes: int = 32768, programs_per_sm: int = 4, num_warps: int = 8, num_stages: int = 1
) -> Step:
    """Return a step that reads `tensor` once and returns int64 sums, whose total is that of its int32 words mod 2^32.

    tensor: dense in memory, not empty, a multiple of 4 bytes. On the CPU only under TRITON_INTERPRET=1. block_bytes: a
    power of two. With one stage, each thread has `block_bytes / (512 * num_warps)` 16-byte loads in flight; with more,
    the compiler keeps `num_stages - 1` blocks in flight in shared memory.
    """
    from .read_kernels import read

    words = _dense(tensor).view(-1).view(torch.int32)
    cores = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    sums = torch.empty(programs_per_sm * cores, dtype=torch.int64, device=tensor.device)
    block = block_bytes // 4
    rounds = len(words) // (len(sums) * block)
    launch: Any = read[(len(sums),)]

    def step() -> Tensor:
        launch(words, sums, len(words), ROUNDS=rounds, BLOCK=block, STAGES=num_stages, num_warps=num_warps)
        return sums

    return step


def cudnn_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's attention with its own GQA: out `[B, 1, H, D]` in q's dtype, natural-log lse `[B, 1, H]` in float32."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, scale=q.shape[3] ** -0.5)[:2]
    return out.transpose(1, 2), lse.reshape(out.shape[0], 1, -1)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup | None = None) -> Step:
    return lambda: cudnn_partial(q, k, v)[0]


def _flash2(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup | None = None) -> Step:
    """The query heads of each KV head become query tokens, so that the keys are read once."""
    packed = q.view(q.shape[0], k.shape[2], -1, q.shape[3])  # [B, H_kv, G, D]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    flash = aten._scaled_dot_product_flash_attention
    return lambda: flash(packed, keys, values, scale=q.shape[3] ** -0.5)[0].reshape_as(q)


def _flash3(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup | None = None) -> Step:
    """Without cache_seqlens, since all keys count: that saves the launch that schedules ragged batches."""
    from fa3_fwd_interface import flash_attn_with_kvcache  # pyrefly: ignore[missing-import]

    return lambda: flash_attn_with_kvcache(q, k, v, num_splits=0)  # 0: FlashAttention's own heuristic


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup | None = None) -> Step:
    """Batch 1 uses the single-request kernel; larger batches are read as pages of `PAGE_TOKENS`, planned here."""
    import flashinfer  # pyrefly: ignore[missing-import]

    B, S, H_kv, D = k.shape
    if B == 1:
        layout = "NHD" if k.is_contiguous() else "HND"
        query, keys, values = q[0, 0], _dense(k)[0], _dense(v)[0]
        decode = flashinfer.single_decode_with_kv_cache
        return lambda: decode(query, keys, values, kv_layout=layout, use_tensor_cores=True).view_as(q)
    pages, workspace = S // PAGE_TOKENS, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    starts, page_ids = (torch.arange(n, dtype=torch.int32, device=q.device) for n in (B + 1, B * pages))
    full = torch.full((B,), PAGE_TOKENS, dtype=torch.int32, device=q.device)
    wrapper.plan(starts * pages, page_ids, full, q.shape[2], H_kv, D, PAGE_TOKENS, q_data_type=q.dtype)
    cache = k.view(-1, PAGE_TOKENS, H_kv, D), v.view(-1, PAGE_TOKENS, H_kv, D)
    return lambda: wrapper.run(q[:, 0], cache).view_as(q)


def _three_all_reduce(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, *, local: Kernel = cudnn_partial) -> Step:
    """Algorithm 3 of arXiv 2408.04093: all-reduce the maximum, then the numerator, then the denominator, in float32."""

    def step() -> Tensor:
        out, lse = local(q, k, v)
        peak = lse.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        denominator = (lse - peak).exp_()
        numerator = out * denominator.unsqueeze(-1)
        dist.all_reduce(numerator, dist.ReduceOp.SUM, group)
        dist.all_reduce(denominator, dist.ReduceOp.SUM, group)
        return numerator.div_(denominator.unsqueeze(-1))

    return step


def _all_gather(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, *, local: Kernel = cudnn_partial) -> Step:
    """One all-gather of float32 (out, lse), merged in rank order."""
    packed = torch.empty((*q.shape[:3], v.shape[3] + 1), dtype=torch.float32, device=q.device)

    def step() -> Tensor:
        _store(packed, *local(q, k, v))
        return _merge(gather(packed, group))

    return step


def _ring(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, *, local: Kernel = cudnn_partial) -> Step:
    """Ring attention: each shard makes P - 1 hops and is sent on while the attention over it is computed.

    There are two receive buffers (one if P is 2). The P results are merged once, in rank order. Shards may differ in
    length, not in memory layout.
    """
    rank, size = group.rank(), group.size()
    sources = [(rank - hop) % size for hop in range(size)]  # the owner of the shard that is here after each hop
    about = torch.tensor([k.shape[1], int(k.is_contiguous())], device=q.device)
    lengths, contiguous = zip(*gather(about, group).tolist(), strict=True)
    B, _, H_kv, D = k.shape
    tokens_first = all(contiguous)  # a shard of one key is contiguous in both layouts
    buffers = k.new_empty((min(size - 1, 2), 2, B * max(lengths) * H_kv * D))
    shards: list[Sequence[Tensor]] = [(k, v) if tokens_first else (k.transpose(1, 2), v.transpose(1, 2))]
    for hop in range(1, size):
        S = lengths[sources[hop]]
        shape = (B, S, H_kv, D) if tokens_first else (B, H_kv, S, D)
        shards.append([half[: B * S * H_kv * D].view(shape) for half in buffers[hop % len(buffers)]])
    hops = [
        [dist.P2POp(dist.isend, t, group=group, group_peer=(rank + 1) % size) for t in here]
        + [dist.P2POp(dist.irecv, t, group=group, group_peer=(rank - 1) % size) for t in following]
        for here, following in pairwise(shards)
    ]
    parts = torch.empty((size, *q.shape[:3], D + 1), dtype=torch.float32, device=q.device)

    def step() -> Tensor:
        for hop, pair in enumerate(shards):
            works = dist.batch_isend_irecv(hops[hop]) if hop < len(hops) else []
            keys, values = pair if tokens_first else (t.transpose(1, 2) for t in pair)
            _store(parts[sources[hop]], *local(q, keys, values))
            for work in works:  # with NCCL, only the stream waits
                work.wait()
        return _merge(parts)

    return step


def _store(packed: Tensor, out: Tensor, lse: Tensor) -> None:
    packed[..., :-1].copy_(out)
    packed[..., -1].copy_(lse)


def _merge(packed: Tensor) -> Tensor:
    """Merge `[P, ..., D + 1]` -> `[..., D]` with fewer launches than `partial.merge`: peers always have keys."""
    return (packed[..., -1:].softmax(0) * packed[..., :-1]).sum(0)


def _dense(tensor: Tensor) -> Tensor:
    """The contiguous view of a tensor that is NHD or HND in memory."""
    return tensor if tensor.is_contiguous() else tensor.transpose(1, 2)


def _obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"runs on CUDA tensors, got {q.device.type}"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)):
        return f"needs bfloat16 or float16 throughout, got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[1] != 1 or not q.is_contiguous() or k.shape[1] == 0:
        return f"needs one query token, contiguous, and at least one key, got {tuple(q.shape)} and {tuple(k.shape)}"
    if k.shape != v.shape or k.stride() != v.stride() or not _dense(k).is_contiguous():
        return "needs k and v of one shape and one layout, NHD or HND"
    if q.shape[3] not in (64, 128, 256):
        return f"is measured with head dims 64, 128 and 256, got {q.shape[3]}"
    return None


def _cudnn_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    return _obstacle(q, k, v) or (None if torch.backends.cudnn.is_available() else "needs cuDNN")


def _flash3_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    found = _obstacle(q, k, v) if find_spec("fa3_fwd_interface") else "needs the package fa3-fwd"
    if found is None and (q.dtype != torch.bfloat16 or torch.cuda.get_device_capability(q.device)[0] != 9):
        return f"is built for bfloat16 on Hopper (sm_90), got {q.dtype} on {torch.cuda.get_device_name(q.device)}"
    return found


def _flashinfer_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    found = _obstacle(q, k, v) if find_spec("flashinfer") else "needs the package flashinfer-python"
    if found is None and k.shape[0] > 1 and not (k.is_contiguous() and k.shape[1] % PAGE_TOKENS == 0):
        return f"reads a batch as pages: needs NHD and a multiple of {PAGE_TOKENS} keys"
    return found


LOCAL_PEERS = {"cudnn": Peer(_cudnn_obstacle, _cudnn), "flash2": Peer(_obstacle, _flash2)}
LOCAL_PEERS |= {"flash3": Peer(_flash3_obstacle, _flash3), "flashinfer": Peer(_flashinfer_obstacle, _flashinfer)}
_EXCHANGES = {"three_all_reduce": _three_all_reduce, "all_gather": _all_gather, "ring": _ring}
SPREAD_PEERS = {name: Peer(_cudnn_obstacle, prepare) for name, prepare in _EXCHANGES.items()}
