"""The algebra of partials: merge is a softmax over the union, and a commutative monoid with the empty set."""

import math
import random

import pytest
import torch

from tree_attention import Partial, merge
from tree_attention.partial import empty, stack

B, T, H, D_V = 2, 3, 4, 5
SIZES = {
    "two": (5, 8),
    "one empty": (4, 0, 1, 7),
    "first empty": (0, 3, 2),
    "all on the last": (0, 0, 6),
    "one key each": (1,) * 9,
    "alone": (6,),
    "all empty": (0, 0, 0),
}
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-14, 1e-13)}  # of out and of lse, absolute


def softmax_partial(scores, values):
    """By definition: scores `[..., S]`, values `[..., S, D_v]` -> Partial; `(0, -inf)` without keys."""
    return Partial((scores.softmax(-1).unsqueeze(-1) * values).sum(-2), scores.logsumexp(-1))


def disjoint_parts(sizes, dtype=torch.float32, seed=0):
    """Partials over disjoint sets of `sizes` keys, and the float64 Partial over their union."""
    generator = torch.Generator().manual_seed(seed)
    scores = 6 * torch.randn(B, T, H, sum(sizes), generator=generator, dtype=torch.float64)  # a few keys win
    values = torch.randn(B, T, H, sum(sizes), D_V, generator=generator, dtype=torch.float64)
    pieces = zip(scores.split(sizes, -1), values.split(sizes, -2), strict=True)
    parts = [Partial(*(tensor.to(dtype) for tensor in softmax_partial(*piece))) for piece in pieces]
    return parts, softmax_partial(scores, values)


def assert_close(actual, expected):
    atol_out, atol_lse = TOLERANCE[actual.out.dtype]
    torch.testing.assert_close(actual.out.double(), expected.out.double(), atol=atol_out, rtol=0)
    torch.testing.assert_close(actual.lse.double(), expected.lse.double(), atol=atol_lse, rtol=0)


def assert_same_bits(actual, expected):
    assert actual.out.dtype == expected.out.dtype
    assert torch.equal(actual.out, expected.out)
    assert torch.equal(actual.lse, expected.lse)


def nothing(dtype=torch.float32, shape=(B, T, H, D_V)):
    return empty(shape, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_merge_is_the_softmax_over_the_union(sizes, dtype):
    parts, union = disjoint_parts(sizes, dtype)
    merged = merge(stack(parts))
    assert merged.out.dtype == merged.lse.dtype == dtype
    assert_close(merged, union)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_empty_set_is_the_identity_on_either_side(dtype):
    (part,), _ = disjoint_parts((7,), dtype)
    for several in ([nothing(dtype), part], [part, nothing(dtype)], [nothing(dtype), part, nothing(dtype)], [part]):
        assert_same_bits(merge(stack(several)), part)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_sets_merge_to_the_empty_set(count, dtype):
    merged = merge(stack([nothing(dtype)] * count))
    assert_same_bits(merged, nothing(dtype))
    assert (merged.out == 0).all()
    assert (merged.lse == -math.inf).all()


def test_rows_are_empty_one_by_one():
    parts, _ = disjoint_parts((3, 4))
    for part, rows in zip(parts, [(0, 1), (1, 2)], strict=True):  # of dim T: row 1 sees no key in either part
        part.out[:, rows], part.lse[:, rows] = 0, -math.inf
    merged = merge(stack(parts))
    assert_same_bits(Partial(merged.out[:, 0], merged.lse[:, 0]), Partial(parts[1].out[:, 0], parts[1].lse[:, 0]))
    assert_same_bits(Partial(merged.out[:, 2], merged.lse[:, 2]), Partial(parts[0].out[:, 2], parts[0].lse[:, 2]))
    assert (merged.out[:, 1] == 0).all()
    assert (merged.lse[:, 1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_any_order_and_any_tree_give_the_same(seed, dtype):
    parts, union = disjoint_parts((4, 0, 1, 7, 2, 0, 30), dtype, seed)
    choose = random.Random(seed)
    choose.shuffle(parts)
    assert_close(merge(stack(parts)), union)
    while len(parts) > 1:  # merge a few that need not be neighbours, put the result anywhere
        taken = [parts.pop(choose.randrange(len(parts))) for _ in range(choose.randint(2, min(3, len(parts))))]
        parts.insert(choose.randint(0, len(parts)), merge(stack(taken)))
    assert_close(parts[0], union)


def test_equal_inputs_give_equal_bits():
    parts, _ = disjoint_parts((4, 0, 1, 7, 30))
    first = merge(stack(parts))
    for _ in range(3):
        assert_same_bits(merge(stack([Partial(part.out.clone(), part.lse.clone()) for part in parts])), first)


@pytest.mark.parametrize("shift", [-1e4, -3.0, 0.5, 1e4])
def test_a_shift_of_all_lse_shifts_the_result(shift):
    parts, union = disjoint_parts((4, 0, 1, 7), torch.float64)
    shifted = merge(stack([Partial(part.out, part.lse + shift) for part in parts]))
    torch.testing.assert_close(shifted.out, union.out, atol=1e-11, rtol=0)  # 1e4 leaves an lse 12 digits
    torch.testing.assert_close(shifted.lse, union.lse + shift, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_lse(extreme, dtype):
    (one, other), _ = disjoint_parts((3, 4), dtype)
    level = torch.full_like(one.lse, extreme)
    merged = merge(stack([Partial(one.out, level), Partial(other.out, level)]))
    torch.testing.assert_close(merged.out, (one.out + other.out) / 2)
    torch.testing.assert_close(merged.lse, level + math.log(2))
    heavier = one if extreme > 0 else other
    merged = merge(stack([Partial(one.out, level), Partial(other.out, -level)]))
    assert_same_bits(merged, Partial(heavier.out, level.abs()))
    assert_same_bits(merge(stack([nothing(dtype), Partial(one.out, level)])), Partial(one.out, level))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_merged_with_itself_it_has_its_keys_twice(count, dtype):
    (part,), _ = disjoint_parts((7,), dtype)
    assert_close(merge(stack([part] * count)), Partial(part.out, part.lse + math.log(count)))


@pytest.mark.parametrize("shape", [(D_V,), (H, D_V), (B, T, H, D_V), (2, B, T, H, D_V), (B, T, H, 1)])
def test_any_number_of_dims(shape):
    generator = torch.Generator().manual_seed(1)
    out, lse = torch.randn(3, *shape, generator=generator), 9 * torch.randn(3, *shape[:-1], generator=generator)
    merged = merge(Partial(out, lse))
    weight = lse.double().softmax(0).unsqueeze(-1)
    assert_close(merged, Partial((weight * out.double()).sum(0), lse.double().logsumexp(0)))


@pytest.mark.parametrize("shape", [(0, T, H, D_V), (B, 0, H, D_V), (B, T, H, 0)])
def test_dims_of_size_0(shape):
    merged = merge(stack([nothing(shape=shape)] * 2))
    assert merged.out.shape == shape
    assert merged.lse.shape == shape[:-1]


def test_expanded_and_broadcast_partials():
    parts, _ = disjoint_parts((4, 3))
    out, lse = stack(parts)
    whole = lse[:, :1].clone().expand(2, B, T, H)  # one lse for all rows, stride 0
    expected = merge(Partial(out, whole.contiguous()))
    assert_same_bits(merge(Partial(out, whole)), expected)
    broadcast = merge(Partial(out, lse[:, :1]))
    assert torch.equal(broadcast.out, expected.out)
    assert torch.equal(broadcast.lse, expected.lse[:1])


def test_stack_and_empty():
    parts, _ = disjoint_parts((4, 3, 2))
    together = stack(parts)
    assert together.out.shape == (3, B, T, H, D_V)
    assert together.lse.shape == (3, B, T, H)
    for index, part in enumerate(parts):
        assert_same_bits(Partial(together.out[index], together.lse[index]), part)
    none = empty([B, T, H, D_V], dtype=torch.float64, device=torch.device("cpu"))
    assert none.out.dtype == none.lse.dtype == torch.float64
    assert_same_bits(none, Partial(none.out.new_zeros(B, T, H, D_V), none.out.new_full((B, T, H), -math.inf)))
