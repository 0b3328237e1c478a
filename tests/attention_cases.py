"""Inputs, expected values and error bounds for the tests of `attend` on every backend.

`pytest -m gpu` runs all that needs a CUDA device. Without one, "triton" runs in the interpreter, on float16 alone (its
tl.dot of bfloat16 is wrong) and on few shapes (a call takes half a second there).
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tree_attention.local.selection import select
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
ON_CUDA = torch.cuda.is_available()
HALVES = (torch.bfloat16, torch.float16)
CPU = ("reference", "cpu_flash")
CUDA = ("cudnn", "cuda_flash", "efficient", *(["triton"] if ON_CUDA else []))
SMALL = (*CPU, "triton")  # what tests of a few numbers run
ANY_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MASKED = ("reference", "cpu_flash", "triton", "efficient")  # the backends that take masks
DTYPES = {
    "reference": (torch.float64, torch.float32, *HALVES),
    "cpu_flash": (torch.float64, torch.float32, *HALVES),
    "triton": HALVES if ON_CUDA else (torch.float16,),
    "cudnn": HALVES,
    "cuda_flash": HALVES,
    "efficient": (torch.float32, *HALVES),
}
ONE_HEAD_DIM = {  # for all backends
    "MHA": {"S": 37, "H": 5, "H_kv": 5, "D": 32},
    "GQA": {"S": 64, "H": 6, "H_kv": 2, "D": 64},
    "MQA": {"S": 131, "H": 7, "H_kv": 1, "D": 40},
    "many keys": {"B": 1, "S": 2500, "H": 6, "H_kv": 2, "D": 16},
    "wide": {"B": 3, "S": 9, "H": 2, "H_kv": 1, "D": 128},
    "two keys": {"B": 5, "S": 2, "H": 3, "H_kv": 3, "D": 8},
}
TWO_HEAD_DIMS = {
    "D > D_v": {"S": 37, "H": 6, "H_kv": 2, "D": 40, "D_v": 24},
    "D < D_v": {"S": 37, "H": 6, "H_kv": 2, "D": 24, "D_v": 40},
}
ODD_HEAD_DIMS = {
    "D = D_v = 3": {"B": 3, "S": 13, "H": 9, "H_kv": 3, "D": 3},
    "D = 5, D_v = 1": {"B": 7, "S": 7, "H": 3, "H_kv": 1, "D": 5, "D_v": 1},
    "one key": {"B": 3, "S": 1, "H": 4, "H_kv": 2, "D": 7},
}
SHAPES = ONE_HEAD_DIM | TWO_HEAD_DIMS | ODD_HEAD_DIMS
FITTING = dict.fromkeys(CPU, SHAPES) | dict.fromkeys(("efficient", "triton"), ONE_HEAD_DIM | TWO_HEAD_DIMS)
if not ON_CUDA:
    FITTING["triton"] = ("many keys", "D > D_v")
CAPPED = ("reference", "triton")  # the backends that have a softcap
CHOICES = ("plain", "scale", "softcap")
HIDDEN = (
    "ragged", "ragged queries", "causal", "causal rows", "window", "mask", "mask for all heads", "one mask",
    "late keys", "everything",
)  # fmt: skip


def marked(backend, *others):
    name = "-".join([backend, *(str(other).removeprefix("torch.") for other in others)])
    interpreted = pytest.mark.slow if backend == "triton" else ()  # the interpreter takes seconds per case
    return pytest.param(backend, *others, marks=GPU if backend in CUDA else interpreted, id=name)


def runs(backends):
    """(backend, dtype, shape) for all that each of `backends` is meant for."""
    return [
        marked(backend, dtype, shape)
        for backend in backends
        for dtype in DTYPES[backend]
        for shape in FITTING.get(backend, ONE_HEAD_DIM)
    ]


def inputs(backend, dtype=None, **shape):
    """On the backend's device; without a dtype in its first, the one it is most exact in."""
    device = "cuda" if backend in CUDA else "cpu"
    return peaked_inputs(**shape, dtype=dtype or DTYPES[backend][0], device=device)


def tokens(backend, *several):
    """How many query tokens to try: all, or the last where the interpreter runs."""
    return several[-1:] if backend == "triton" and not ON_CUDA else several


def choices(name, q, k):
    """What `attend` is told beside the tensors. In most of HIDDEN some query sees no key, in none do all."""
    (B, T, H), S = q.shape[:3], k.shape[1]
    here = {"device": q.device}
    rows, keys = torch.arange(B, **here)[:, None], torch.arange(S, **here)
    lengths = torch.tensor([S // 2 + 1, 0, S, 1, 0, S, S], **here)[:B]
    mask = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(5)).to(q.device) < 0.4
    mask[..., S // 2] = True
    mask[-1, :, -1] = B * T == 1
    across = torch.tensor([S, 0, 2 * S, 5, S // 2], **here)[:T]  # this rank has every other key
    by_row = torch.tensor([S // 2, 3, -1, S, 0], **here)[:T] - rows  # row b has b keys more of padding
    by_row = {"q_positions": by_row, "k_positions": keys - 2 * rows}
    scale = 0.7 * q.shape[-1] ** -0.5
    return {
        "plain": {},
        "scale": {"scale": scale},
        "softcap": {"softcap": 2.5},
        "ragged": {"local_seqlens": lengths.int()},
        "ragged queries": {"local_seqlens": (lengths[:, None] + torch.arange(1 - T, 1, **here)).clamp(min=0)},
        "causal": {"q_positions": across, "k_positions": 2 * keys + 1},
        "causal rows": by_row,
        "window": {"q_positions": across, "k_positions": 2 * keys + 1, "window": S // 3 + 2},
        "mask": {"mask": mask},
        "mask for all heads": {"mask": mask[:, :1]},
        "one mask": {"mask": mask[:1, :1]},
        "late keys": {"mask": (keys >= S - 2).expand(1, 1, T, S)},  # whole tiles of a kernel see nothing
        "everything": {"local_seqlens": lengths, "mask": mask[:1], "scale": scale} | by_row | {"window": S // 2 + 1},
    }[name]


def poisoned(cache, local_seqlens):
    """The same, with NaN behind the lengths."""
    lengths = local_seqlens if local_seqlens.ndim == 1 else local_seqlens[:, -1]
    unused = torch.arange(cache.shape[1], device=cache.device) >= lengths[:, None]
    return cache.masked_fill(unused[:, :, None, None], math.nan)


def plain_attention(q, k, v, *, softcap=None, scale=None, **how):
    """PyTorch's own, in the inputs' dtype and on their device; it has no softcap, so that one is written out."""
    visible = select(q, k, **how).visible(q, k)
    G = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)))
    if softcap is None:
        with sdpa_kernel(ANY_BUT_CUDNN):
            return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale).transpose(1, 2)
    scores = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def lse_bound(backend, dtype, D=128):
    """Largest error of the lse of scores up to some 20, where plain float32 sums would do: 1e-5.

    Tensor cores multiply exactly (16-bit numbers, or float32 in three parts) but cut off what they add: 3 D / 8 times
    2^-23 of a score at most, so 1e-4. PyTorch's exp for 16 bits on the CPU (fexp_u20, a cubic) is 1.07e-4 bits off, so
    7.4e-5. Our kernel calculates in base 2, where 20 is 29: four roundings more (the factor, the product, the
    logarithm, the way back) of 2^-24 times 32 at most, 8e-6 in base 2 and so 5e-6; with 256 products instead of 128,
    whose errors add up like a random walk, 2e-5 in all. Scores, scaled queries or an lse that were themselves rounded
    to 16 bits would be off by 2e-3 and more.
    """
    if dtype == torch.float64:
        return 1e-12
    if backend in CUDA:
        return 1e-4 * max(D / 128, 1)
    if backend == "triton":
        return 2e-5
    return 1e-4 if backend == "cpu_flash" and dtype in HALVES else 1e-5


def compare(backend, actual, q, k, v, exact=None, shift=0.0, **how):
    """Check all of `actual` but the rounding of out; for that return actual, exact and plain where a key is seen.

    exact, shift: what to expect instead of the oracle's answer to these inputs.
    """
    exact = exact or oracle(q, k, v, **how)
    kept_in = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert actual.out.dtype == actual.lse.dtype == kept_in
    assert actual.out.shape == exact.out.shape == (*q.shape[:-1], v.shape[-1])
    assert actual.lse.shape == exact.lse.shape == q.shape[:-1]
    sees = exact.lse > -math.inf
    assert (actual.out[~sees] == 0).all()
    assert (actual.lse[~sees] == -math.inf).all()
    bound = lse_bound(backend, q.dtype, q.shape[-1])
    torch.testing.assert_close(actual.lse[sees].double(), exact.lse[sees] + shift, atol=bound, rtol=0)
    if backend == "reference":  # float32 throughout, 16-bit inputs or not
        q, k, v = q.to(kept_in), k.to(kept_in), v.to(kept_in)
    return actual.out[sees], exact.out[sees], plain_attention(q, k, v, **how)[sees]


def assert_right(compared):
    """Of all cases together: the largest error of a few numbers says too little about plain PyTorch's."""
    actual, exact, plain = (torch.cat(rows) for rows in zip(*compared, strict=True))
    if actual.dtype == torch.float64:  # the oracle is no better than the others
        torch.testing.assert_close(actual, exact, atol=1e-13, rtol=0)
    else:
        assert_within_rounding(actual, exact, plain)
