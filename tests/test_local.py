"""One rank's keys, on every backend: right to rounding in every dtype and shape, and clear about what it refuses.

`pytest -m gpu tests/test_local.py` runs all that needs a CUDA device. Without one, "triton" runs in the interpreter,
on float16 alone (its tl.dot of bfloat16 is wrong) and on few shapes (a call takes half a second there).
"""

import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tree_attention import InputError, Partial, Unavailable, Unsupported, attend, explain, merge
from tree_attention.local import BACKENDS, check_call, choose_backend
from tree_attention.local.selection import select
from tree_attention.partial import stack
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
    "ragged", "causal", "causal rows", "window", "mask", "mask for all heads", "one mask", "late keys", "everything"
)  # fmt: skip


def marked(backend, *others):
    name = "-".join([backend, *(str(other).removeprefix("torch.") for other in others)])
    return pytest.param(backend, *others, marks=GPU if backend in CUDA else (), id=name)


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
    unused = torch.arange(cache.shape[1], device=cache.device) >= local_seqlens[:, None]
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


@pytest.mark.parametrize(("backend", "dtype", "shape"), runs(BACKENDS))
def test_all_keys_visible(backend, dtype, shape):
    compared = []
    for T in tokens(backend, 1, 2, 5):
        q, k, v = inputs(backend, dtype, T=T, **SHAPES[shape])
        for name in CHOICES if backend in CAPPED else CHOICES[:2]:
            how = choices(name, q, k)
            actual = attend(q, k, v, **how, backend=backend)
            compared.append(compare(backend, actual, q, k, v, **how))
    assert_right(compared)


@pytest.mark.parametrize(("backend", "dtype", "shape"), runs(MASKED))
def test_hidden_keys(backend, dtype, shape):
    compared = []
    for T in tokens(backend, 1, 2, 5):
        q, k, v = inputs(backend, dtype, T=T, **SHAPES[shape])
        for name in HIDDEN:
            how = choices(name, q, k)
            lengths = how.get("local_seqlens")
            held = (k, v) if lengths is None else (poisoned(k, lengths), poisoned(v, lengths))
            actual = attend(q, *held, **how, backend=backend)
            compared.append(compare(backend, actual, q, k, v, **how))
    assert_right(compared)


def paged(cache, lengths, page_tokens, table):
    """cache `[B, S, H_kv, D]` as the pages of `table`, where it says so; everything else NaN."""
    pages = cache.new_full((int(table.max()) + 2, page_tokens, *cache.shape[2:]), math.nan)
    for row, length in enumerate(lengths.tolist()):
        for s in range(length):
            pages[table[row, s // page_tokens], s % page_tokens] = cache[row, s]
    return pages


def scattered_pages(lengths, page_tokens):
    """A table `[B, pages + 2]` in which no two pages of a row follow each other; unused entries point anywhere."""
    counts = (-(-lengths // page_tokens)).tolist()
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3))
    table = torch.full((len(counts), max(counts) + 2), -1, dtype=torch.long)
    for row, pages in enumerate(order.split(counts)):
        table[row, : len(pages)] = pages
    return table, table.where(table >= 0, torch.tensor([10**6, -5, 2**31 - 1])[torch.arange(table.shape[1]) % 3])


@pytest.mark.parametrize("page_tokens", [1, 5, 16])
@pytest.mark.parametrize(("backend", "dtype"), [(marked(b, d)) for b in MASKED for d in DTYPES[b]])
def test_pages(backend, dtype, page_tokens):
    compared = []
    for T in tokens(backend, 1, 3):
        q, k, v = inputs(backend, dtype, B=4, T=T, S=43, H=6, H_kv=2, D=16, D_v=24)
        lengths = torch.tensor([43, 0, 17, 32])
        used, table = scattered_pages(lengths, page_tokens)
        pages = [paged(t, lengths, page_tokens, used) for t in (k, v)]
        slots = torch.arange(table.shape[1] * page_tokens, device=q.device)
        causal = {"q_positions": 2 * torch.arange(30, 30 + T, device=q.device), "k_positions": 2 * slots + 1}
        mask = torch.rand(4, 6, T, len(slots), generator=torch.Generator().manual_seed(5)).to(q.device) < 0.4
        integers = torch.int32 if page_tokens == 5 else torch.int64
        where = {"page_table": table.to(q.device, integers), "local_seqlens": lengths.to(q.device, integers)}
        for how in ({}, causal | {"window": 25, "mask": mask, "scale": 0.3}):
            actual = attend(q, *pages, **where, **how, backend=backend)
            dense = how | {name: how[name][..., :43] for name in ("k_positions", "mask") if name in how}
            dense["local_seqlens"] = where["local_seqlens"]
            compared.append(compare(backend, actual, q, k, v, **dense))
    assert_right(compared)


def test_pages_of_larger_buffers():
    """Pages of all layers lie in one buffer, say: any strides, and more pages than rows."""
    q, k, v = inputs("triton", B=2, S=20, H=4, H_kv=2, D=16)
    lengths = torch.tensor([20, 9], device=q.device)
    used, table = scattered_pages(lengths.cpu(), 8)
    pages = torch.stack([paged(t, lengths, 8, used) for t in (k, v)], 2).transpose(1, 3)  # [pages, H_kv, 2, 8, D]
    k_pages, v_pages = pages.contiguous().transpose(1, 3).unbind(2)
    assert not k_pages.is_contiguous()
    where = {"page_table": table.to(q.device), "local_seqlens": lengths}
    actual = attend(q, k_pages, v_pages, **where, backend="triton")
    assert_right([compare("triton", actual, q, k, v, local_seqlens=lengths)])


@pytest.mark.parametrize("backend", [marked(backend) for backend in MASKED])
def test_no_pages(backend):
    q, k, v = inputs(backend, B=2, S=8, H=4, H_kv=2, D=16)
    lengths = torch.zeros(2, dtype=torch.int32, device=q.device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=q.device)
    for k_pages, v_pages, page_table in ((k, v, table[:, :0]), (k[:0], v[:0], table)):
        partial = attend(q, k_pages, v_pages, local_seqlens=lengths, page_table=page_table, backend=backend)
        assert (partial.out == 0).all()
        assert (partial.lse == -math.inf).all()


def test_lengths_and_pages_of_any_strides():
    q, k, v = inputs("triton", B=2, S=20, H=4, H_kv=2, D=16)
    wide = torch.tensor([[20, 3], [9, 4]], device=q.device)
    used, table = scattered_pages(wide[:, 0].cpu(), 8)
    pages = [paged(t, wide[:, 0], 8, used) for t in (k, v)]
    across = table.t().contiguous().t().to(q.device)
    actual = attend(q, k, v, local_seqlens=wide[:, 0], backend="triton")
    in_pages = attend(q, *pages, local_seqlens=wide[:, 0], page_table=across, backend="triton")
    assert_right([compare("triton", partial, q, k, v, local_seqlens=wide[:, 0]) for partial in (actual, in_pages)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes 4 GB of addresses, of which the CPU touches little")
def test_keys_far_apart():
    """More numbers than 32 bits count between a tile's first and last key, as in a cache `[S, layers, B, H, D]`."""
    q, k, v = inputs("triton", B=1, S=66, H=2, H_kv=1, D=16)
    far = torch.empty(66 << 25, dtype=k.dtype).as_strided((1, 66, 1, 16), (16, 1 << 25, 16, 1)).copy_(k)
    one_page = {"page_table": torch.zeros(1, 1, dtype=torch.int32), "local_seqlens": torch.tensor([66])}
    for how in ({}, one_page):
        assert_right([compare("triton", attend(q, far, v, **how, backend="triton"), q, k, v)])


LARGEST = {
    "64 rows": {"B": 1, "T": 16, "S": 256, "H": 4, "H_kv": 1, "D": 64},
    "64 rows of 256": {"B": 1, "T": 4, "S": 40, "H": 16, "H_kv": 1, "D": 256, "D_v": 64},
    "64 heads": {"B": 1, "T": 1, "S": 90, "H": 64, "H_kv": 1, "D": 24},
    "D = 256": {"B": 2, "T": 1, "S": 70, "H": 2, "H_kv": 1, "D": 256, "D_v": 128},
    "D_v = 256": {"B": 1, "T": 2, "S": 128, "H": 3, "H_kv": 1, "D": 64, "D_v": 256},
    "D = 192": {"B": 1, "T": 1, "S": 65, "H": 2, "H_kv": 2, "D": 192, "D_v": 136},
    "D = 8": {"B": 2, "T": 3, "S": 20, "H": 4, "H_kv": 2, "D": 8},
}


@pytest.mark.parametrize(("backend", "dtype"), [marked("triton", dtype) for dtype in DTYPES["triton"]])
@pytest.mark.parametrize("shape", LARGEST)
def test_the_largest_shapes(backend, dtype, shape):
    q, k, v = inputs(backend, dtype, **LARGEST[shape])
    compared = []
    S = k.shape[1]
    lengths = torch.tensor([S - 1, S // 2], device=q.device)[: q.shape[0]]
    for how in ({}, {"local_seqlens": lengths, "softcap": 2.5}):
        actual = attend(q, k, v, **how, backend=backend)
        compared.append(compare(backend, actual, q, k, v, **how))
    assert_right(compared)


def other_strides(name, q, k, v):
    """The same numbers, otherwise laid out in memory."""
    match name:
        case "heads first":  # how a Hugging Face cache lies
            return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        case "in a larger buffer":
            held = [torch.cat([t, torch.full_like(t, math.nan)], 1).transpose(1, 2).contiguous() for t in (k, v)]
            return q, *(t.transpose(1, 2)[:, : k.shape[1]] for t in held)
        case "packed":  # k and v as one projection gives them
            return q, *torch.cat([k, v], 3).split([k.shape[3], v.shape[3]], 3)
        case "every other number":
            return [torch.stack([t, torch.full_like(t, math.nan)], -1).flatten(-2)[..., ::2] for t in (q, k, v)]


@pytest.mark.parametrize("strides", ["heads first", "in a larger buffer", "packed", "every other number"])
@pytest.mark.parametrize("backend", [marked(backend) for backend in BACKENDS])
def test_any_strides(backend, strides):
    compared = []
    for T in tokens(backend, 1, 3):
        q, k, v = inputs(backend, T=T, **SHAPES["GQA"])
        others = other_strides(strides, q, k, v)
        assert not all(tensor.is_contiguous() for tensor in others)
        actual = attend(*others, backend=backend)
        compared.append(compare(backend, actual, q, k, v))
    assert_right(compared)


def by_definition(q, k, v, sees=lambda *_: True, scale=None, softcap=None):
    """Row by row in float64, from the formula alone; sees(b, h, t, s) says whether a query may see a key."""
    (B, T, H, D), (S, H_kv) = q.shape, k.shape[1:3]
    q, k, v = (tensor.double().cpu() for tensor in (q, k, v))
    out, lse = torch.zeros(B, T, H, v.shape[-1], dtype=q.dtype), torch.full((B, T, H), -math.inf, dtype=q.dtype)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, H))).tolist():
        keys = [s for s in range(S) if sees(b, h, t, s)]
        if keys:
            scores = k[b, keys, h // (H // H_kv)] @ q[b, t, h] * (D**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weight = scores.exp() / scores.exp().sum()
            out[b, t, h] = weight @ v[b, keys, h // (H // H_kv)]
            lse[b, t, h] = scores.exp().sum().log()
    return Partial(out, lse)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_reference_is_the_definition(scale, softcap):
    q, k, v = inputs("reference", B=2, T=3, S=11, H=4, H_kv=2, D=6, D_v=5)
    how = {
        "local_seqlens": torch.tensor([9, 6]),
        "q_positions": torch.tensor([[3, 12, -1], [8, 10, 2]]),
        "k_positions": torch.stack([torch.arange(11), torch.arange(11).flip(0)]),
        "window": 8,
        "mask": torch.rand(2, 4, 3, 11, generator=torch.Generator().manual_seed(0)) < 0.7,
    }

    def sees(b, h, t, s):
        in_window = 0 <= how["q_positions"][b, t] - how["k_positions"][b, s] < 8
        return s < how["local_seqlens"][b] and in_window and how["mask"][b, h, t, s]

    held = poisoned(k, how["local_seqlens"]), poisoned(v, how["local_seqlens"])
    actual = attend(q, *held, **how, scale=scale, softcap=softcap, backend="reference")
    exact = by_definition(q, k, v, sees, scale, softcap)
    assert 0 < (exact.lse == -math.inf).sum() < exact.lse.numel() / 2
    torch.testing.assert_close(actual, exact, atol=1e-13, rtol=0)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("backend", [marked(backend) for backend in BACKENDS])
def test_lse_is_the_natural_logarithm_of_the_sum_of_exponentials(backend, T):
    q, k, v = inputs(backend, B=2, T=T, S=21, H=4, H_kv=2, D=16)
    exact = by_definition(q, k, v)
    actual = attend(q, k, v, backend=backend)
    torch.testing.assert_close(actual.lse.cpu().double(), exact.lse, atol=lse_bound(backend, q.dtype), rtol=0)


@pytest.mark.parametrize("backend", [marked(backend) for backend in BACKENDS])
def test_no_keys_are_zero_and_minus_infinity(backend):
    for dtype in DTYPES[backend]:
        q, k, v = inputs(backend, dtype, T=3, S=5, H=4, H_kv=2, D=16, D_v=16)
        partial = attend(q, k[:, :0], v[:, :0], backend=backend)
        assert partial.out.dtype == partial.lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert partial.out.shape == (2, 3, 4, 16)
        assert partial.lse.shape == (2, 3, 4)
        assert partial.out.device == partial.lse.device == q.device
        assert (partial.out == 0).all()
        assert (partial.lse == -math.inf).all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("backend", [marked(backend) for backend in MASKED])
def test_no_visible_keys_are_zero_and_minus_infinity(backend, T):
    for dtype in DTYPES[backend]:
        q, k, v = inputs(backend, dtype, T=T, S=20, H=4, H_kv=2, D=16)
        here = {"device": q.device}
        future = {"q_positions": torch.arange(T, **here), "k_positions": torch.arange(20, **here) + T}
        nothing = torch.zeros(2, 4, T, 20, dtype=torch.bool, **here)
        for how in ({"local_seqlens": torch.zeros(2, dtype=torch.int32, **here)}, future, {"mask": nothing}):
            held = poisoned(k, how["local_seqlens"]) if "local_seqlens" in how else k
            partial = attend(q, held, v, **how, backend=backend)
            assert (partial.out == 0).all()
            assert (partial.lse == -math.inf).all()


@pytest.mark.parametrize("backend", [marked(backend) for backend in SMALL])
def test_no_queries_and_no_rows(backend):
    q, k, v = inputs(backend, T=2, S=5, H=4, H_kv=2, D=8, D_v=16)
    assert attend(q[:, :0], k, v, backend=backend).out.shape == (2, 0, 4, 16)
    lengths = torch.zeros(0, dtype=torch.int32, device=q.device)
    assert attend(q[:0], k[:0], v[:0], local_seqlens=lengths, backend=backend).lse.shape == (0, 2, 4)


@pytest.mark.parametrize("shape", ["GQA", "MHA", "one token", "D < D_v"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [marked(backend, dtype) for backend in ("reference", "cpu_flash", "cudnn", "cuda_flash", "efficient")
     for dtype in DTYPES[backend]],
)  # fmt: skip
def test_causal_is_equal_positions(backend, dtype, shape):
    shape = {"S": 1, "H": 4, "H_kv": 2, "D": 16} if shape == "one token" else SHAPES[shape]
    if backend in ("cudnn", "cuda_flash") and "D_v" in shape:
        return
    q, k, v = inputs(backend, dtype, T=shape["S"], **shape)
    keys = torch.arange(shape["S"], device=q.device)
    actual = attend(q, k, v, causal=True, backend=backend)
    assert_right([compare(backend, actual, q, k, v, q_positions=keys, k_positions=keys)])


def test_causal_with_another_rule():
    q, k, v = peaked_inputs(T=9, S=9)
    lengths, keys = torch.tensor([4, 9]), torch.arange(9)
    expected = attend(q, k, v, q_positions=keys, k_positions=keys, local_seqlens=lengths)
    for backend in CPU:
        actual = attend(q, k, v, causal=True, local_seqlens=lengths, backend=backend)
        torch.testing.assert_close(actual.out, expected.out, atol=1e-5, rtol=0)
        torch.testing.assert_close(actual.lse, expected.lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", [marked(backend) for backend in SMALL])
def test_positions_of_all_rows_at_once(backend):
    q, k, v = inputs(backend, T=3, S=8, H=4, H_kv=2, D=8)
    queries, keys = torch.tensor([2, 0, 5], device=q.device), torch.arange(8, device=q.device)
    expected = attend(q, k, v, q_positions=queries.expand(2, 3), k_positions=keys.expand(2, 8), backend=backend)
    for one, other in ((queries, keys), (queries[None], keys.int()), (queries.int(), keys.expand(2, 8))):
        partial = attend(q, k, v, q_positions=one, k_positions=other, backend=backend)
        assert torch.equal(partial.out, expected.out)
        assert torch.equal(partial.lse, expected.lse)


@pytest.mark.parametrize("backend", [marked(backend) for backend in SMALL])
def test_a_window_reaches_below_zero(backend):
    q, k, v = inputs(backend, T=3, S=40, H=4, H_kv=2, D=8)
    queries, keys = torch.tensor([5, 6, 7], device=q.device), torch.arange(40, device=q.device)
    for window, dtype in (
        (10, torch.uint8),
        (40_000, torch.int16),
        (1 << 32, torch.int32),
        ((1 << 63) - 1, torch.int64),
    ):
        narrow = {"q_positions": queries.to(dtype), "k_positions": keys.to(dtype)}
        actual = attend(q, k, v, **narrow, window=window, backend=backend)
        assert_right([compare(backend, actual, q, k, v, q_positions=queries, k_positions=keys)])


ALL_RUNS = [marked(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]


@pytest.mark.parametrize(("backend", "dtype"), ALL_RUNS)
def test_split_keys_merge_to_the_whole(backend, dtype):
    compared = []
    for T in tokens(backend, 1, 3):
        q, k, v = inputs(backend, dtype, T=T, **SHAPES["GQA"])
        sizes = (5, 0, 32, 27)
        pieces = zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
        merged = merge(stack([attend(q, *piece, backend=backend) for piece in pieces]))
        compared.append(compare(backend, merged, q, k, v))
    assert_right(compared)


@pytest.mark.parametrize(("backend", "dtype"), ALL_RUNS)
def test_the_order_of_keys_does_not_matter(backend, dtype):
    compared = []
    for T in tokens(backend, 1, 3):
        q, k, v = inputs(backend, dtype, T=T, **SHAPES["GQA"])
        order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(0)).to(k.device)
        actual = attend(q, k[:, order], v[:, order], backend=backend)
        compared.append(compare(backend, actual, q, k, v))
    assert_right(compared)


@pytest.mark.parametrize(("backend", "dtype"), ALL_RUNS)
def test_a_constant_added_to_all_scores_shifts_lse_only(backend, dtype):
    compared = []
    for added in (-12.0, 8.0):  # by 8 more dims, of which one counts
        q, k, v = inputs(backend, dtype, T=2, S=40, H=6, H_kv=2, D=24, D_v=32)
        exact = oracle(q, k, v, scale=0.25)
        one = torch.eye(8, dtype=dtype, device=q.device)[0]
        longer = (torch.cat([t, (by * one).expand(*t.shape[:3], 8)], 3) for t, by in ((q, 4 * added), (k, 1)))
        actual = attend(*longer, v, scale=0.25, backend=backend)
        compared.append(compare(backend, actual, q, k, v, exact=exact, shift=added, scale=0.25))
    assert_right(compared)


@pytest.mark.parametrize("dtype", DTYPES["cpu_flash"])
def test_auto_on_the_cpu(dtype):
    q, k, v = inputs("reference", dtype, T=2, S=9, D=5, D_v=3)
    for name in (*CHOICES, *HIDDEN):
        how = choices(name, q, k)
        expected = "reference" if name == "softcap" else "cpu_flash"
        assert explain(q, k, v, **how).backend == expected
        chosen, auto = attend(q, k, v, **how, backend=expected), attend(q, k, v, **how)
        assert torch.equal(auto.out, chosen.out)
        assert torch.equal(auto.lse, chosen.lse)
    assert choose_backend(check_call(q, k, v), "reference") == ("reference", {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda():
    def chosen(dtype, *, T=1, D=64, D_v=64, masked=False, softcap=None):
        q, k, v = peaked_inputs(T=T, S=9, D=D, D_v=D_v, dtype=dtype, device="cuda")
        mask = torch.ones(1, 1, T, 9, dtype=torch.bool, device="cuda") if masked else None
        return explain(q, k, v, mask=mask, softcap=softcap).backend

    for dtype in HALVES:
        assert chosen(dtype) == "triton"
        assert chosen(dtype, T=16, masked=True, softcap=9.0, D=40) == "triton"
        assert chosen(dtype, T=17) == "cudnn"  # 68 rows
        assert chosen(dtype, T=17, masked=True) == "efficient"
        assert chosen(dtype, T=17, D=40) == "efficient"
        assert chosen(dtype, T=17, softcap=9.0) == "reference"
        assert chosen(dtype, D=264, D_v=264) == "efficient"
        assert chosen(dtype, D=20, D_v=20) == "reference"
    assert chosen(torch.float32) == chosen(torch.float32, masked=True) == "efficient"
    assert chosen(torch.float32, softcap=9.0) == "reference"
    assert chosen(torch.float64) == "reference"


CALL = {"T": 2, "S": 8, "H": 4, "H_kv": 2, "D": 16}
HALF, FULL, DOUBLE = {"dtype": torch.float16}, {"dtype": torch.float32}, {"dtype": torch.float64}
SOFTCAP, LENGTHS = {"softcap": 3.0}, {"local_seqlens": torch.tensor([3, 8])}
REFUSED_ON_CPU = [("cpu_flash", FULL, SOFTCAP, "has no softcap")]
REFUSED_ON_CPU += [(backend, HALF, {}, "runs on CUDA tensors, got cpu") for backend in CUDA if backend != "triton"]
REFUSED_BY_TRITON = [
    ("triton", FULL, {}, "has bfloat16 and float16 only, got torch.float32"),
    ("triton", HALF | {"D": 20}, {}, "needs head dims that are multiples of 8 up to 256, got 20 and 20"),
    ("triton", HALF | {"D_v": 12}, {}, "needs head dims that are multiples of 8 up to 256, got 16 and 12"),
    ("triton", HALF | {"D": 264}, {}, "needs head dims that are multiples of 8 up to 256, got 264 and 264"),
    ("triton", HALF | {"S": 5, "T": 5}, {"causal": True}, "supports the causal rule by positions only"),
    ("triton", HALF | {"T": 33}, {}, "takes at most 64 query rows per KV head (T H / H_kv), got 66"),
]
REFUSED_ON_CUDA = [
    ("cpu_flash", FULL, {}, "runs on CPU tensors, got cuda"),
    ("efficient", DOUBLE, {}, "does not have float64"),
    ("efficient", HALF | {"D": 20}, {}, "needs head dims that are multiples of 8, got 20 and 20"),
    ("efficient", HALF, SOFTCAP, "has no softcap"),
]
for fused in ("cudnn", "cuda_flash"):
    REFUSED_ON_CUDA += [
        (fused, FULL, {}, "has bfloat16 and float16 only, got torch.float32"),
        (fused, HALF | {"D": 20}, {}, "needs one head dim, a multiple of 8 up to 256, got 20 and 20"),
        (fused, HALF | {"D": 24, "D_v": 40}, {}, "needs one head dim, a multiple of 8 up to 256, got 24 and 40"),
        (fused, HALF | {"D": 264}, {}, "needs one head dim, a multiple of 8 up to 256, got 264 and 264"),
        (fused, HALF, LENGTHS, "has no masks (local_seqlens, positions or mask)"),
        (fused, HALF, SOFTCAP, "has no softcap"),
    ]


@pytest.mark.parametrize(
    ("device", "backend", "shape", "how", "text"),
    [("cpu", *case) for case in REFUSED_ON_CPU + ([] if ON_CUDA else REFUSED_BY_TRITON)]
    + [pytest.param("cuda", *case, marks=GPU) for case in REFUSED_ON_CUDA + REFUSED_BY_TRITON],
)
def test_a_backend_that_cannot_run_says_why(device, backend, shape, how, text):
    q, k, v = peaked_inputs(**CALL | shape, device=device)
    with pytest.raises(Unavailable, match=re.escape(f"backend '{backend}' {text}: use backend='auto'")):
        attend(q, k, v, **how, backend=backend)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        Unavailable, match=re.escape("backend 'triton' runs on CUDA tensors, got cpu: use backend='auto'")
    ):
        attend(*peaked_inputs(**CALL | HALF), backend="triton")


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_triton_has_no_gradient_and_says_so(asking):
    tensors = peaked_inputs(**CALL | HALF, device="cuda" if ON_CUDA else "cpu")
    tensors[asking].requires_grad_()
    with pytest.raises(
        Unavailable, match=re.escape("backend 'triton' has no gradient, but q, k or v requires one: use")
    ):
        attend(*tensors, backend="triton")
    assert not attend(*tensors, backend="auto").out.isnan().any()
    with torch.no_grad():
        attend(*tensors, backend="triton")


def test_fused_operators_differentiate_out_and_say_that_they_cannot_lse():
    tensors = [t.requires_grad_() for t in peaked_inputs(**CALL | DOUBLE)]
    ours, expected = (attend(*tensors, backend=backend) for backend in ("cpu_flash", "reference"))
    torch.testing.assert_close(*(torch.autograd.grad(p.out.square().sum(), tensors) for p in (ours, expected)))
    ours = attend(*tensors, backend="cpu_flash")
    with pytest.raises(Unsupported, match="has no gradient of its log-sum-exp: use backend='reference'"):
        torch.autograd.grad((ours.out / (1 + (-ours.lse).exp())[..., None]).sum(), tensors)


def test_a_backend_is_refused_where_there_are_no_keys_too():
    q, k, v = peaked_inputs(**CALL)
    with pytest.raises(Unavailable, match="has no softcap"):
        attend(q, k[:, :0], v[:, :0], softcap=3.0, backend="cpu_flash")


def bad_calls():
    """name -> (what replaces arguments of a good call, what the error says)"""
    q, k, v = peaked_inputs(**CALL)
    queries, keys, mask = torch.arange(2), torch.arange(8), torch.ones(2, 4, 2, 8, dtype=torch.bool)
    seqlens, positions = "local_seqlens must be int32 or int64 [2], got", {"q_positions": queries, "k_positions": keys}
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([3, 8])
    pages = {"page_table": table, "local_seqlens": lengths}
    is_window = "window must be at least 1, and needs q_positions and k_positions, got"
    is_table = "page_table must be int32 or int64 [2, max_pages] on cpu, got"
    fits = "mask must be bool [2 or 1, 4 or 1, 2, 8], got"
    return {
        "rank": ({"q": q[0]}, "q must be 4-D [B, tokens, heads, head_dim], got (2, 4, 16)"),
        "rank of v": ({"v": v[..., 0]}, "v must be 4-D [B, tokens, heads, head_dim], got (2, 8, 2)"),
        "heads": ({"q": q[:, :, :3]}, "query heads must be a multiple of KV heads, got 3 and 2"),
        "more KV heads": ({"q": q[:, :, :1]}, "query heads must be a multiple of KV heads, got 1 and 2"),
        "no KV heads": ({"k": k[:, :, :0], "v": v[:, :, :0]}, "must be a multiple of KV heads, got 4 and 0"),
        "lengths": ({"v": v[:, :7]}, "k and v must agree in [B, S_local, H_kv], got (2, 8, 2) and (2, 7, 2)"),
        "KV heads": ({"v": v[:, :, :1]}, "k and v must agree in [B, S_local, H_kv], got (2, 8, 2) and (2, 8, 1)"),
        "batch": ({"q": q[:1]}, "q and k must have one batch size, got 1 and 2"),
        "head_dim": ({"q": q[..., :8]}, "q and k must have one head_dim, got 8 and 16"),
        "dtypes": ({"k": k.half()}, "one dtype, got torch.float32, torch.float16 and torch.float32"),
        "dtype of v": ({"v": v.double()}, "one dtype, got torch.float32, torch.float32 and torch.float64"),
        "integers": (
            {"q": q.long(), "k": k.long(), "v": v.long()},
            "q, k and v must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        "devices": ({"v": v.to("meta")}, "q, k and v must be on one device, got cpu, cpu and meta"),
        "device of q": ({"q": q.to("meta")}, "q, k and v must be on one device, got meta, cpu and cpu"),
        "scale 0": ({"scale": 0.0}, "scale must be positive, got 0.0"),
        "scale nan": ({"scale": math.nan}, "scale must be positive, got nan"),
        "softcap": ({"softcap": -1.0}, "softcap must be positive and finite, or None, got -1.0"),
        "softcap 0": ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
        "softcap inf": ({"softcap": math.inf}, "softcap must be positive and finite, or None, got inf"),
        "no dim": ({"q": q[..., :0], "k": k[..., :0]}, "head dims must be at least 1, got 0 of k and 16 of v"),
        "no dim of v": ({"v": v[..., :0]}, "head dims must be at least 1, got 16 of k and 0 of v"),
        "negative": ({"local_seqlens": torch.tensor([-1, 3])}, "between 0 and S_local = 8, got -1 to 3"),
        "too large": ({"local_seqlens": torch.tensor([0, 9])}, "between 0 and S_local = 8, got 0 to 9"),
        "seqlens' shape": ({"local_seqlens": torch.tensor([1, 2, 3])}, f"{seqlens} torch.int64 [3]"),
        "seqlens' dims": ({"local_seqlens": torch.tensor(4)}, f"{seqlens} torch.int64 []"),
        "seqlens' dtype": ({"local_seqlens": torch.tensor([1.0, 2.0])}, f"{seqlens} torch.float32 [2]"),
        "one position": ({"q_positions": queries}, "q_positions and k_positions must be given together, or neither"),
        "other position": ({"k_positions": keys}, "q_positions and k_positions must be given together, or neither"),
        "positions' shape": (
            positions | {"q_positions": keys},
            "q_positions must be integers [2] or [2, 2], got torch.int64 [8]",
        ),
        "key positions' shape": (
            positions | {"k_positions": keys.expand(3, 8)},
            "k_positions must be integers [8] or [2, 8], got torch.int64 [3, 8]",
        ),
        "positions' dtype": (
            positions | {"k_positions": keys.float()},
            "k_positions must be integers [8] or [2, 8], got torch.float32 [8]",
        ),
        "positions' device": (positions | {"k_positions": keys.to("meta")}, "k_positions must be on cpu, got meta"),
        "mask's shape": ({"mask": mask[..., :7]}, f"{fits} torch.bool [2, 4, 2, 7]"),
        "mask's heads": ({"mask": mask[:, :2]}, f"{fits} torch.bool [2, 2, 2, 8]"),
        "mask's dims": ({"mask": mask[0, 0]}, f"{fits} torch.bool [2, 8]"),
        "mask's dtype": ({"mask": mask.float()}, f"{fits} torch.float32 [2, 4, 2, 8]"),
        "mask's device": ({"mask": mask.to("meta")}, "mask must be on cpu, got meta"),
        "window alone": ({"window": 3}, f"{is_window} 3"),
        "causal": ({"causal": True}, "causal needs a key for each query and no positions, got 2 queries, 8 keys"),
        "window 0": (positions | {"window": 0}, f"{is_window} 0"),
        "table's dims": (pages | {"page_table": table[0]}, f"{is_table} torch.int32 [3] on cpu"),
        "table's rows": (pages | {"page_table": table[:1]}, f"{is_table} torch.int32 [1, 3] on cpu"),
        "table's dtype": (pages | {"page_table": table.float()}, f"{is_table} torch.float32 [2, 3] on cpu"),
        "table's device": (pages | {"page_table": table.to("meta")}, f"{is_table} torch.int32 [2, 3] on meta"),
        "pages alone": ({"page_table": table}, "page_table needs local_seqlens: how many keys of each row there are"),
        "longer than pages": (
            pages | {"local_seqlens": torch.tensor([25, 3])}, "between 0 and S_local = 24, got 3 to 25"
        ),
        "no such page": (
            pages | {"page_table": torch.tensor([[0, 9, 9], [1, 2, 9]]), "local_seqlens": torch.tensor([8, 9])},
            "page_table must name pages 0 to 1 within a row's length",
        ),
        "positions of pages": (positions | pages, "k_positions must be integers [24] or [2, 24], got torch.int64 [8]"),
        "mask of pages": (pages | {"mask": mask}, "mask must be bool [2 or 1, 4 or 1, 2, 24], got torch.bool [2, 4"),
        "backend": ({"backend": "flash"}, f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got 'flash'"),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", list(bad_calls()))
def test_arguments_that_do_not_fit(name, backend):
    changes, text = bad_calls()[name]
    q, k, v = peaked_inputs(**CALL)
    arguments = {"q": q, "k": k, "v": v, "backend": backend} | changes
    with pytest.raises(InputError, match=re.escape(text)):
        attend(**arguments)


@pytest.mark.parametrize("backend", [marked(backend) for backend in ("cudnn", "cuda_flash", "efficient")])
@pytest.mark.parametrize("shape", [{"S": 1, "D": 64}, {"S": 300, "D": 256}, {"S": 1, "D": 256}], ids=str)
def test_shapes_that_pytorch_itself_keeps_from_cudnn(backend, shape):
    """Right, or refused for a reason; "auto" never runs into them."""
    q, k, v = inputs(backend, **shape)
    for asked in ("auto", backend):
        try:
            actual = attend(q, k, v, backend=asked)
        except Unavailable:
            assert asked != "auto"
        else:
            assert_right([compare(backend, actual, q, k, v)])
