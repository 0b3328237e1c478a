"""Paged caches and caches of any strides, on every backend that takes them."""

import math

import pytest
import torch

from attention_cases import DTYPES, MASKED, assert_right, compare, inputs, marked, tokens
from tree_attention import attend


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
