"""One rank's keys, on every backend: right to rounding in every dtype and shape."""

import math

import pytest
import torch

from attention_cases import (
    CAPPED,
    CHOICES,
    CPU,
    DTYPES,
    HIDDEN,
    MASKED,
    SHAPES,
    SMALL,
    assert_right,
    choices,
    compare,
    inputs,
    lse_bound,
    marked,
    poisoned,
    runs,
    tokens,
)
from tree_attention import Partial, attend, merge
from tree_attention.local import BACKENDS
from tree_attention.partial import stack
from tree_attention.testing import oracle, peaked_inputs


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


@pytest.mark.parametrize("backend", [marked(backend) for backend in MASKED])
def test_each_query_may_see_a_number_of_keys_of_its_own(backend):
    q, k, v = inputs(backend, B=2, T=4, S=70, H=4, H_kv=2, D=32)
    lengths = torch.tensor([[0, 0, 1, 9], [66, 67, 68, 70]], device=q.device)
    together = attend(q, poisoned(k, lengths), poisoned(v, lengths), local_seqlens=lengths, backend=backend)
    compared = []
    for t in range(4):
        one = Partial(together.out[:, t : t + 1], together.lse[:, t : t + 1])
        compared.append(compare(backend, one, q[:, t : t + 1], k, v, local_seqlens=lengths[:, t]))
    assert_right(compared)


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
