"""Two GPUs and NCCL: the same promises as on the CPU, and no wait for the device on the decode path."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from architectures import GREEDY, one_process, prompt, tiny
from tree_attention import Layout, attend, tree_decode, tree_reduce
from tree_attention.hf import TreeCache, prefill
from tree_attention.testing import assert_within_rounding, oracle, peaked_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
S = 4096


def run(function, tmp_path):
    mp.spawn(_rank, (2, f"file://{tmp_path}/meeting", function), nprocs=2)


def _rank(rank, size, meeting, function):
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=size)
    try:
        function(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def same_on_all_ranks(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)


def decode(group):
    torch.cuda.set_sync_debug_mode("default")
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = peaked_inputs(B=3, S=S, H=32, H_kv=8, D=128, dtype=dtype, device="cuda")
        slots = Layout(group.size(), 16).slots(0, S, group.rank(), device="cuda")
        mine = k[:, slots], v[:, slots]
        exact, plain = oracle(q, k, v).out, attend(q, k, v).out.to(dtype)
        heads = 32 // group.size()
        for algorithm in ("all_gather", "all_reduce", "tree", "reduce_scatter"):
            tree_decode(q, *mine, algorithm=algorithm)  # NCCL sets itself up at the first call
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            out = tree_decode(q, *mine, algorithm=algorithm)
            torch.cuda.set_sync_debug_mode("default")
            if algorithm == "reduce_scatter":
                own = slice(group.rank() * heads, (group.rank() + 1) * heads)
                assert_within_rounding(out, exact[:, :, own], plain[:, :, own])
            else:
                assert_within_rounding(out, exact, plain)
                assert same_on_all_ranks(out)


def test_decode(tmp_path):
    run(decode, tmp_path)


def empty_rank(group):
    q, k, v = peaked_inputs(S=S, H=8, H_kv=8, D=64, dtype=torch.bfloat16, device="cuda")
    held = S if group.rank() == 0 else 0
    out = tree_decode(q, k[:, :held], v[:, :held])
    assert_within_rounding(out, oracle(q, k, v).out, attend(q, k, v).out.bfloat16())
    nobody = tree_reduce(attend(q, k[:, :0], v[:, :0]))
    assert nobody.out.eq(0).all()
    assert nobody.lse.eq(-torch.inf).all()


def test_a_rank_without_keys(tmp_path):
    run(empty_rank, tmp_path)


def generate(group):
    """float32: the same tokens as one CPU process; the way the GPU reduces, logits differ by rounding alone."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("llama", "gemma2", "gpt_oss", "deepseek_v3"):
        for padded in (False, True):
            tokens, logits = one_process(name, padded)
            ids, mask = (t.cuda() for t in prompt(padded))
            model = tiny(name, "tree_attention").cuda()
            for parallel in (False, True):
                cache = TreeCache(model.config, group, block_tokens=4)
                if parallel:
                    prefill(model, ids, cache, attention_mask=mask if padded else None, chunk_tokens=24)
                out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
                assert torch.equal(out.sequences.cpu(), tokens), (name, padded, parallel)
                got = torch.stack(out.logits)
                assert same_on_all_ranks(got)
                assert (got.cpu() - logits).abs().max() < 2e-4 * logits.abs().max()


def test_generate(tmp_path):
    run(generate, tmp_path)


def sample(group):
    ids, mask = (t.cuda() for t in prompt(padded=False))
    model = tiny("llama", "tree_attention").cuda()
    torch.manual_seed(group.rank())
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=True, eos_token_id=None)
    assert same_on_all_ranks(out)


def test_sampling_cannot_diverge(tmp_path):
    run(sample, tmp_path)
