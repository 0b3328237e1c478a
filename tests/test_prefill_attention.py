"""Attention of a chunk whose queries and keys are spread over ranks, compared with attention in one piece."""

import pytest
import torch

from tree_attention import Layout, attend
from tree_attention.hf import prefill_attention
from tree_attention.hf.exchange import CacheRanks
from tree_attention.partial import Partial
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs

SCALE = 0.3


def of_a_rank(group, shape, block, start, passed, causal_only, scale=SCALE):
    """Return the Partial of this rank's queries of the chunk, their slots, and the bytes received."""
    stop = shape["S"]
    q, k, v = peaked_inputs(T=stop, **shape)
    layout = Layout(group.size(), block)
    ranks = CacheRanks(group, group.rank(), layout, max_tokens=None)
    mine, held = (layout.slots(first, stop, group.rank(), device=q.device) for first in (start, 0))

    def build(query_slots, key_slots):
        return (key_slots[None, :] <= query_slots[:, None])[None, None]

    prefill_attention.choose_pass, choose = (lambda *_: passed), prefill_attention.choose_pass
    try:
        partial, received = prefill_attention.attend_chunk(
            q[:, mine],
            k[:, held],
            v[:, held],
            (start, stop),
            ranks,
            None if causal_only else build,
            {"scale": scale, "softcap": None},
        )
    finally:
        prefill_attention.choose_pass = choose
    return partial.out, partial.lse, mine, received


@pytest.mark.parametrize("passed", ["kv", "q"])
@pytest.mark.parametrize(
    ("ranks", "block", "cycles", "chunk_cycles"), [(1, 4, 5, 2), (2, 4, 6, 3), (3, 1, 7, 7), (3, 5, 2, 1), (4, 2, 5, 5)]
)
def test_a_chunk_spread_over_ranks(pool, passed, ranks, block, cycles, chunk_cycles):
    stop, start = ranks * block * cycles, ranks * block * (cycles - chunk_cycles)
    shape = {"B": 2, "S": stop, "H": 6, "H_kv": 2, "D": 16, "D_v": 8}
    q, k, v = peaked_inputs(T=stop, **shape)
    at = {"q_positions": torch.arange(start, stop), "k_positions": torch.arange(stop), "scale": SCALE}
    exact, plain = oracle(q[:, start:], k, v, **at), attend(q[:, start:], k, v, **at)
    for causal_only in (True, False):
        for out, lse, slots, received in pool.run(of_a_rank, shape, block, start, passed, causal_only, ranks=ranks):
            rows = slots - start
            assert_within_rounding(out, exact.out[:, rows], plain.out[:, rows])
            torch.testing.assert_close(lse.double(), exact.lse[:, rows], atol=1e-5, rtol=0)
            keys, queries = 2 * stop * 2 * (16 + 8) * 4, 2 * (stop - start) * 6 * (16 + 8 + 1) * 4
            assert received == (keys if passed == "kv" else queries) * (ranks - 1) / ranks


def test_all_ranks_draw_the_same_inputs():
    """Even if several queries point at the same key, which threads could otherwise write in any order."""
    shape = {"B": 1, "T": 1024, "S": 1024, "H": 8, "H_kv": 1, "D": 64}
    first, again = peaked_inputs(**shape), peaked_inputs(**shape)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_merge_rows_is_merge():
    """Also for rows in which no part has a key."""
    out, lse = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4) * 9
    lse[0, :, 1], lse[:, :, 2] = -torch.inf, -torch.inf
    out[lse == -torch.inf] = 0.0
    out[2, :, :3], lse[2, :, :3] = 0.0, -torch.inf
    expected = prefill_attention.merge(Partial(out, lse))
    actual = prefill_attention.merge_rows([(0, Partial(out[0].clone(), lse[0])), (0, Partial(out[1], lse[1])),
                               (3, Partial(out[2, :, 3:], lse[2, :, 3:]))])  # fmt: skip
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(actual.lse == -torch.inf, expected.lse == -torch.inf)
