"""The placement against a dealer who hands out one slot after another and keeps no formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tree_attention import InputError, Layout

LAYOUTS = st.builds(Layout, world_size=st.integers(1, 9), block=st.integers(1, 12))
SLOTS = st.integers(0, 10**9)
LENGTHS = st.integers(0, 200)
reproducible = settings(deadline=None, derandomize=True)


def deal(layout, length):
    """The slots of each rank, dealt one by one: the next rank's turn comes after `block` of them."""
    hands = [[] for _ in range(layout.world_size)]
    rank = held = 0
    for slot in range(length):
        if held == layout.block:
            rank, held = (rank + 1) % layout.world_size, 0
        hands[rank].append(slot)
        held += 1
    return hands


@reproducible
@given(LAYOUTS, LENGTHS)
def test_every_slot_lies_where_the_dealer_put_it(layout, length):
    for rank, hand in enumerate(deal(layout, length)):
        for index, slot in enumerate(hand):
            assert layout.owner(slot) == rank
            assert layout.local_index(slot) == index
            assert layout.slot(index, rank) == slot


@reproducible
@given(LAYOUTS, SLOTS)
def test_slot_is_the_inverse_of_owner_and_local_index(layout, number):
    rank, index = layout.owner(number), layout.local_index(number)
    assert 0 <= rank < layout.world_size
    assert layout.slot(index, rank) == number
    for rank in range(layout.world_size):  # and the other way round: any index on any rank
        slot = layout.slot(number, rank)
        assert (layout.owner(slot), layout.local_index(slot)) == (rank, number)


@reproducible
@given(LAYOUTS, LENGTHS)
def test_local_lengths_count_what_was_dealt(layout, length):
    lengths = [layout.local_length(length, rank) for rank in range(layout.world_size)]
    assert lengths == [len(hand) for hand in deal(layout, length)]
    assert sum(lengths) == length


@reproducible
@given(LAYOUTS, SLOTS)
def test_two_ranks_differ_by_at_most_one_block(layout, length):
    lengths = [layout.local_length(length, rank) for rank in range(layout.world_size)]
    assert sum(lengths) == length
    assert max(lengths) - min(lengths) <= layout.block


@reproducible
@given(LAYOUTS, LENGTHS, LENGTHS)
def test_slots_equal_brute_force(layout, start, count):
    hands = deal(layout, start + count)
    for rank, hand in enumerate(hands):
        slots = layout.slots(start, start + count, rank)
        assert slots.dtype == torch.int64
        assert slots.tolist() == [slot for slot in hand if slot >= start]
    everyones = torch.cat([layout.slots(start, start + count, rank) for rank in range(layout.world_size)])
    assert everyones.sort().values.tolist() == list(range(start, start + count))  # each on exactly one rank


@reproducible
@given(LAYOUTS, st.lists(st.integers(0, 40), max_size=8))
def test_appending_in_pieces_gives_the_same_placement(layout, pieces):
    for rank, hand in enumerate(deal(layout, sum(pieces))):
        held, length = [], 0
        for piece in pieces:
            slots = layout.slots(length, length + piece, rank)
            behind = range(len(held), len(held) + len(slots))  # a cache that appends keeps them there
            assert layout.local_index(slots).tolist() == list(behind)
            held += slots.tolist()
            length += piece
            assert layout.local_length(length, rank) == len(held)
        assert held == hand


@reproducible
@given(LAYOUTS, st.lists(SLOTS, min_size=1, max_size=20), st.sampled_from([torch.int32, torch.int64]))
def test_tensors_are_treated_as_ints_are(layout, numbers, dtype):
    numbers = [number // layout.cycle for number in numbers]  # `slot` multiplies: keep it within 32 bits
    tensor = torch.tensor(numbers, dtype=dtype)
    pairs = [(layout.owner, []), (layout.local_index, [])]
    pairs += [
        (function, [rank]) for function in (layout.slot, layout.local_length) for rank in range(layout.world_size)
    ]
    for function, rank in pairs:
        result = function(tensor, *rank)
        assert result.dtype == dtype
        assert result.tolist() == [function(number, *rank) for number in numbers]


@reproducible
@given(LAYOUTS)
def test_a_cycle_gives_every_rank_one_block(layout):
    assert layout.cycle == layout.world_size * layout.block
    assert {layout.local_length(layout.cycle, rank) for rank in range(layout.world_size)} == {layout.block}


def test_slots_are_made_on_the_device_asked_for():
    slots = Layout(3, 4).slots(0, 30, 1, device="meta")
    assert slots.device.type == "meta"
    assert slots.shape == (10,)  # 4 to 7, 16 to 19, 28 and 29


@pytest.mark.parametrize(("world_size", "block"), [(0, 1), (1, 0), (-2, 4), (3, -1)])
def test_impossible_layouts_are_refused(world_size, block):
    text = f"world_size and block must be at least 1, got {world_size} and {block}$"
    with pytest.raises(InputError, match=text):
        Layout(world_size, block)
