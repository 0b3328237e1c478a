"""Two GPUs and NCCL: the same promises as on the CPU, and no wait for the device on the decode path."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig

from architectures import GREEDY, one_process, prompt, tiny
from test_hf_calls import FAILING, HOW, attempt, raise_at, text
from test_prefill_attention import of_a_rank as chunk_of_a_rank
from tree_attention import (
    InputError,
    Layout,
    SymmetricLink,
    TreeAttentionError,
    Unavailable,
    attend,
    tree_decode,
    tree_reduce,
)
from tree_attention.hf import TreeCache, load_tensor_parallel, prefill
from tree_attention.hf.tensor_parallel import AXES
from tree_attention.testing import RankPool, assert_within_rounding, oracle, peaked_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
S = 4096
LAYERS = {"captured": 4, "compiled": 2}  # compiling takes most of a test's time


@pytest.fixture(scope="module")
def gpus():
    """Two ranks with a GPU each, started once for this file: `gpus(function, *args)` runs `function(group, *args)`."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    pool = RankPool(2, "nccl")
    yield lambda function, *args: pool.run(_in_clean_state, function, args)
    pool.close()


def _in_clean_state(group, function, args):
    """What one test leaves in a rank must not reach the next: compiled code, settings, cached memory."""
    try:
        function(group, *args)
    finally:
        torch.cuda.set_device(dist.get_rank())
        torch.cuda.set_sync_debug_mode("default")
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def run_once(function, tmp_path, *args, ranks=2):
    """In processes of its own, whose end is a part of the test."""
    mp.spawn(_rank, (ranks, f"file://{tmp_path}/meeting", function, args), nprocs=ranks)


def _rank(rank, size, meeting, function, args):
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=size)
    try:
        function(dist.group.WORLD, *args)
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


def test_decode(gpus):
    gpus(decode)


def empty_rank(group):
    q, k, v = peaked_inputs(S=S, H=8, H_kv=8, D=64, dtype=torch.bfloat16, device="cuda")
    held = S if group.rank() == 0 else 0
    out = tree_decode(q, k[:, :held], v[:, :held])
    assert_within_rounding(out, oracle(q, k, v).out, attend(q, k, v).out.bfloat16())
    nobody = tree_reduce(attend(q, k[:, :0], v[:, :0]))
    assert nobody.out.eq(0).all()
    assert nobody.lse.eq(-torch.inf).all()


def test_a_rank_without_keys(gpus):
    gpus(empty_rank)


def chunks(group):
    """Context-parallel prefill at the size of a real model: cuDNN for what is causal or seen, masks for the rest."""
    start, stop, block = 2048, 4096, 16
    shape = {"B": 1, "S": stop, "H": 8, "H_kv": 2, "D": 128, "dtype": torch.bfloat16, "device": "cuda"}
    q, k, v = peaked_inputs(T=stop, **shape)
    at = {
        "q_positions": torch.arange(start, stop, device="cuda"),
        "k_positions": torch.arange(stop, device="cuda"),
    }
    exact, plain = oracle(q[:, start:], k, v, **at), attend(q[:, start:], k, v, backend="reference", **at)
    for passed in ("kv", "q"):
        for causal_only in (True, False):
            out, lse, slots, _ = chunk_of_a_rank(group, shape, block, start, passed, causal_only, None)
            rows = slots - start
            assert_within_rounding(out.bfloat16(), exact.out[:, rows], plain.out[:, rows].bfloat16())
            torch.testing.assert_close(lse.double(), exact.lse[:, rows], atol=1e-4, rtol=0)


def test_a_chunk_spread_over_gpus(gpus):
    gpus(chunks)


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
                out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
                assert torch.equal(out.sequences.cpu(), tokens), (name, padded, parallel)
                got = torch.stack(out.logits)
                assert same_on_all_ranks(got)
                assert (got.cpu() - logits).abs().max() < 2e-4 * logits.abs().max()


def test_generate(gpus):
    gpus(generate)


def static(group, name, step):
    """Steps of a static cache, run in one of the ways: one process's tokens in float32, eager's bits in bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    layers = LAYERS[step]
    for padded in (False, True):
        tokens, logits = one_process(name, padded, layers)
        ids, mask = (t.cuda() for t in prompt(padded))
        of_dtype = []
        for dtype, way in ((torch.float32, step), (torch.bfloat16, step), (torch.bfloat16, "eager")):
            model = tiny(name, "tree_attention", layers).cuda().to(dtype)
            cache = TreeCache(model.config, group, block_tokens=4, max_tokens=tokens.shape[1])
            cache.step_mode = way
            out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
            got = torch.stack(out.logits)
            assert same_on_all_ranks(got)
            assert isinstance(cache.exchange.link, SymmetricLink)
            assert [kept.graph is not None for kept in cache.captured_steps.values()] == [way != "eager"]
            of_dtype.append((out.sequences.cpu(), got.cpu(), cache.received_bytes))
        assert torch.equal(of_dtype[0][0], tokens), (name, padded)
        assert (of_dtype[0][1] - logits).abs().max() < 2e-4 * logits.abs().max()
        assert of_dtype[1][2] == of_dtype[2][2]
        if step == "captured":
            assert torch.equal(of_dtype[1][1], of_dtype[2][1]), (name, padded)


@pytest.mark.parametrize("step", ["captured", "compiled"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_static_cache(gpus, name, step):
    gpus(static, name, step)


alive = []  # caches whose graphs hold NCCL's collectives; their group must end all the same


def split(group, folder, name, step, sequence=1):
    """Tensor parallelism, alone or beside the sequence: its all-reduces are in the graph. Otherwise as `static`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    mesh = init_device_mesh("cuda", (sequence, 2), mesh_dim_names=AXES)
    layers = LAYERS[step]
    for padded in (False, True):
        tokens, logits = one_process(name, padded, layers)
        ids, mask = (t.cuda() for t in prompt(padded))
        of_dtype = []
        for dtype, way in ((torch.float32, step), (torch.bfloat16, step), (torch.bfloat16, "eager")):
            model = load_tensor_parallel(folder, mesh, dtype=dtype)
            assert {weight.device for weight in model.parameters()} == {torch.device("cuda", group.rank())}
            cache = TreeCache(model.config, mesh["sequence"], block_tokens=4, max_tokens=tokens.shape[1])
            cache.step_mode = way
            alive.append(cache)
            out = model.generate(ids, attention_mask=mask, cache=cache, **GREEDY)
            got = torch.stack(out.logits)
            assert same_on_all_ranks(got)
            assert [kept.graph is not None for kept in cache.captured_steps.values()] == [way != "eager"]
            of_dtype.append((out.sequences.cpu(), got.cpu()))
            if dtype == torch.float32 and not padded:  # a batch of one has kernels of its own
                cache = TreeCache(model.config, mesh["sequence"], max_tokens=tokens.shape[1], step=way)
                out = model.generate(ids[:1], attention_mask=mask[:1], cache=cache, **GREEDY)
                assert torch.equal(out.sequences.cpu(), tokens[:1])
                assert (torch.stack(out.logits).cpu() - logits[:, :1]).abs().max() < 2e-4 * logits.abs().max()
                assert [kept.graph is not None for kept in cache.captured_steps.values()] == [way != "eager"]
        assert torch.equal(of_dtype[0][0], tokens), (name, padded)
        assert (of_dtype[0][1] - logits).abs().max() < 2e-4 * logits.abs().max()
        if step == "captured":
            assert torch.equal(of_dtype[1][1], of_dtype[2][1]), (name, padded)
    drawn = load_tensor_parallel(AutoConfig.from_pretrained(folder), mesh, dtype=torch.bfloat16)
    parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in drawn.parameters()]
    assert all(part.is_cuda and part.isfinite().all() for part in parts)
    assert sum(part.numel() for part in parts) < 0.7 * sum(
        weight.numel() for weight in tiny(name, "eager", layers).parameters()
    )
    out = drawn.generate(ids, max_new_tokens=8, do_sample=True, eos_token_id=None)  # the cache that it makes itself
    assert same_on_all_ranks(out)


@pytest.mark.parametrize(
    ("name", "step"),
    [("llama", "compiled"), *((name, step) for name in ("qwen3", "gemma2") for step in ("captured", "compiled"))],
)
def test_tensor_parallel(gpus, tmp_path, name, step):
    folder = str(tmp_path / "model")
    tiny(name, "eager", LAYERS[step]).save_pretrained(folder)
    gpus(split, folder, name, step)


def test_a_group_ends_while_graphs_hold_its_collectives(tmp_path):
    folder = str(tmp_path / "model")
    tiny("llama", "eager").save_pretrained(folder)
    run_once(split, tmp_path, folder, "llama", "captured")


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
def test_tensor_parallel_beside_the_sequence(tmp_path):
    folder = str(tmp_path / "model")
    tiny("llama", "eager").save_pretrained(folder)
    run_once(split, tmp_path, folder, "llama", "captured", 2, ranks=4)


def sample(group):
    ids, mask = (t.cuda() for t in prompt(padded=False))
    model = tiny("llama", "tree_attention").cuda()
    torch.manual_seed(group.rank())
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=True, eos_token_id=None)
    assert same_on_all_ranks(out)


def test_sampling_cannot_diverge(gpus):
    gpus(sample)


LINKED = ("fused", "fused_scatter", "symmetric", "symmetric_scatter")
SHAPES = [
    {"B": 1, "T": 1, "H": 32, "H_kv": 8, "D": 128},
    {"B": 3, "T": 2, "H": 16, "H_kv": 4, "D": 64},
    {"B": 2, "T": 1, "H": 8, "H_kv": 8, "D": 256, "D_v": 128},
    {"B": 5, "T": 3, "H": 12, "H_kv": 6, "D": 40, "D_v": 24},
    {"B": 1, "T": 16, "H": 8, "H_kv": 2, "D": 128},
    {"B": 64, "T": 1, "H": 32, "H_kv": 8, "D": 128},
    {"B": 1, "T": 1, "H": 2, "H_kv": 1, "D": 8},
]


def own_heads(tensor, algorithm, group):
    """Those that an algorithm leaves on this rank, of `[B, T, H, ...]`."""
    heads = tensor.shape[2] // group.size()
    return tensor[:, :, group.rank() * heads :][:, :, :heads] if algorithm.endswith("scatter") else tensor


def assert_decodes(link, q, k, v, exact, plain, case, *, algorithms=LINKED, **how):
    """Every algorithm over the link: right, and the same on all ranks."""
    for algorithm in algorithms:
        out = tree_decode(q, k, v, group=link, algorithm=algorithm, **how)
        parts = (own_heads(t, algorithm, link.group) for t in (exact, plain))
        try:
            assert_within_rounding(out, *parts)
        except AssertionError as error:
            raise AssertionError(f"{case} {algorithm}: {error}") from error
        if not algorithm.endswith("scatter"):
            assert same_on_all_ranks(out), f"{case} {algorithm}"


def held_by(layout, S, group):
    """This rank's slots on its device."""
    return layout.slots(0, S, group.rank(), device="cuda")


def lengths_of(B, S, seed):
    """Of all ranks' keys, by row; a row without any, if there are several."""
    total = torch.randint(1, S + 1, (B,), generator=torch.Generator().manual_seed(seed))
    total[0] = 0 if B > 1 else total[0]
    return total


def poisoned(cache, lengths):
    """The same, with NaN behind the lengths."""
    unused = torch.arange(cache.shape[1], device=cache.device) >= lengths[:, None]
    return cache.masked_fill(unused[:, :, None, None], torch.nan)


def over_a_link(group, shape, dtype):
    link, S = SymmetricLink(group, rows=4096, head_dim=256), 1000
    layout = Layout(group.size(), 16)
    slots = held_by(layout, S, group)
    q, k, v = peaked_inputs(S=S, dtype=dtype, device="cuda", **shape)
    mine = k[:, slots], v[:, slots]
    exact, plain = oracle(q, k, v).out, attend(q, k, v, backend="efficient").out.to(dtype)
    assert_decodes(link, q, *mine, exact, plain, "even")
    held = S if group.rank() == 0 else 0
    assert_decodes(link, q, k[:, :held], v[:, :held], exact, plain, "an empty rank")
    total = lengths_of(shape["B"], S, seed=3)
    ragged = {"local_seqlens": total.cuda()}
    exact, plain = oracle(q, k, v, **ragged).out, attend(q, k, v, **ragged, backend="efficient").out.to(dtype)
    local = layout.local_length(total, group.rank()).int().cuda()
    cache = [poisoned(t, local) for t in mine]
    assert_decodes(link, q, *cache, exact, plain, "ragged", local_seqlens=local)
    nobody = torch.zeros(shape["B"], dtype=torch.int32, device="cuda")
    for algorithm in LINKED:
        assert tree_decode(q, *mine, group=link, algorithm=algorithm, local_seqlens=nobody).eq(0).all()
    link.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_over_a_link(gpus, shape, dtype):
    gpus(over_a_link, shape, dtype)


def paged(k, v, lengths, page_tokens):
    """k and v as pages in a random order, and the table; entries past the lengths point nowhere."""
    B, S = k.shape[:2]
    count = -(-S // page_tokens)
    order = torch.randperm(B * count, generator=torch.Generator().manual_seed(1)).cuda()
    pages = []
    for cache in (poisoned(k, lengths), poisoned(v, lengths)):
        padded = cache.new_full((B, count * page_tokens, *cache.shape[2:]), torch.nan)
        padded[:, :S] = cache
        blocks = padded.unflatten(1, (count, page_tokens)).flatten(0, 1)
        pages.append(torch.empty_like(blocks).index_copy_(0, order, blocks))
    used = torch.arange(count, device="cuda") < (lengths[:, None] + page_tokens - 1) // page_tokens
    return *pages, order.view(B, count).masked_fill(~used, 10**6).int()


def with_everything(group, T):
    """Sinks, soft cap, positions, windows, masks and pages."""
    link, S, dtype = SymmetricLink(group), 700, torch.bfloat16
    layout = Layout(group.size(), 16)
    slots = held_by(layout, S, group)
    shape = {"B": 3, "H": 16, "H_kv": 4, "D": 64}
    sinks = torch.linspace(-2, 4, 16, device="cuda")
    q, k, v = peaked_inputs(T=T, S=S, dtype=dtype, device="cuda", **shape)
    mine = k[:, slots], v[:, slots]
    every = torch.arange(S, device="cuda")
    total = torch.tensor([S, 333, 0])
    local = layout.local_length(total, group.rank()).cuda()
    mask = torch.rand(3, 1, T, S, generator=torch.Generator().manual_seed(5)).cuda() < 0.5
    queries = {"q_positions": torch.arange(300, 300 + 100 * T, 100, device="cuda")}
    ragged = {"local_seqlens": total.cuda()}, {"local_seqlens": local}
    causal = queries | {"k_positions": every}, queries | {"k_positions": slots}
    cases = {
        "causal": causal,
        "window": tuple(how | {"window": 90} for how in causal),
        "mask": ({"mask": mask}, {"mask": mask[..., slots]}),
        "softcap": ({"softcap": 2.5}, {"softcap": 2.5}),
        "ragged and causal": tuple(a | b for a, b in zip(ragged, causal, strict=True)),
    }
    for name, (of_all, of_mine) in cases.items():
        if name == "softcap":
            exact, plain = oracle(q, k, v, **of_all), attend(q, k, v, backend="reference", **of_all)
        else:
            exact, plain = oracle(q, k, v, **of_all), attend(q, k, v, backend="efficient", **of_all)
        assert_decodes(link, q, *mine, exact.out, plain.out.to(dtype), (T, name), **of_mine)
        with_sinks = [(p.out / (1 + (sinks - p.lse).exp())[..., None]) for p in (exact, plain)]
        assert_decodes(
            link, q, *mine, with_sinks[0], with_sinks[1].to(dtype), (T, name, "sinks"), sinks=sinks, **of_mine
        )
    exact, plain = oracle(q, k, v, **ragged[0]).out, attend(q, k, v, backend="efficient", **ragged[0]).out.to(dtype)
    for page_tokens in (1, 5, 16):
        k_pages, v_pages, table = paged(*mine, local, page_tokens)
        assert_decodes(
            link,
            q,
            k_pages,
            v_pages,
            exact,
            plain,
            (T, "pages", page_tokens),
            page_table=table,
            local_seqlens=local,
        )
    link.synchronize()


@pytest.mark.parametrize("T", [1, 4])
def test_over_a_link_with_everything(gpus, T):
    gpus(with_everything, T)


def captured(group):
    """One graph, replayed with other numbers and lengths in the same memory, eager steps between."""
    link, S, dtype = SymmetricLink(group), 1024, torch.bfloat16
    shape = {"B": 4, "S": S, "H": 16, "H_kv": 4, "D": 64, "dtype": dtype, "device": "cuda"}
    layout = Layout(group.size(), 16)
    slots = held_by(layout, S, group)
    q, k, v = peaked_inputs(**shape)
    mine = [k[:, slots].clone(), v[:, slots].clone()]
    local = torch.full((4,), len(slots), dtype=torch.int32, device="cuda")

    def step():
        return [tree_decode(q, *mine, group=link, local_seqlens=local, algorithm=name) for name in ("auto", *LINKED)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for seed in range(6):
        numbers = peaked_inputs(**shape, seed=seed)
        total = lengths_of(4, S, seed)
        ragged = {"local_seqlens": total.cuda()}
        exact = oracle(*numbers, **ragged).out
        plain = attend(*numbers, **ragged, backend="efficient").out.to(dtype)
        q.copy_(numbers[0])
        for cache, new in zip(mine, numbers[1:], strict=True):
            cache.copy_(new[:, slots])
        local.copy_(layout.local_length(total, group.rank()))
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for name, out, eager in zip(("auto", *LINKED), outs, step(), strict=True):
            assert_within_rounding(out, own_heads(exact, name, group), own_heads(plain, name, group))
            assert torch.equal(out, eager), (seed, name)
        assert same_on_all_ranks(outs[0])
    link.synchronize()


def test_captured_steps(gpus):
    gpus(captured)


def captured_first(group):
    """A capture before any call of that shape: it works, or raises on every rank and leaves the link as it was."""
    link = SymmetricLink(group)
    q, k, v = peaked_inputs(B=2, S=512, H=8, H_kv=2, D=64, dtype=torch.bfloat16, device="cuda")
    slots = held_by(Layout(group.size(), 16), 512, group)
    mine = k[:, slots], v[:, slots]
    exact, plain = oracle(q, k, v).out, attend(q, k, v, backend="efficient").out.bfloat16()
    graph, works = torch.cuda.CUDAGraph(), True
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            out = tree_decode(q, *mine, group=link, algorithm="fused")
    except RuntimeError:
        works = False
    votes = [None] * group.size()
    dist.all_gather_object(votes, works)
    assert len(set(votes)) == 1, votes
    if works:
        graph.replay()
        assert_within_rounding(out, exact, plain)
    assert_decodes(link, q, *mine, exact, plain, "after a capture")
    link.synchronize()


def test_capture_before_the_first_call(gpus):
    gpus(captured_first)


def waiting_for_nothing(group):
    """No step over a link waits for the device, and torch.compile takes it whole."""
    link = SymmetricLink(group)
    q, k, v = peaked_inputs(B=2, S=512, H=8, H_kv=2, D=64, dtype=torch.bfloat16, device="cuda")
    layout = Layout(group.size(), 16)
    slots = held_by(layout, 512, group)
    mine = k[:, slots], v[:, slots]
    local = layout.local_length(torch.tensor([512, 77]), group.rank()).int().cuda()
    sinks = torch.zeros(8, device="cuda")

    def step(algorithm):
        return tree_decode(q, *mine, group=link, local_seqlens=local, sinks=sinks, algorithm=algorithm)

    first = [step(name) for name in LINKED]
    alone = attend(q, *mine, local_seqlens=local, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    again = [step(name) for name in LINKED]
    alone_again = attend(q, *mine, local_seqlens=local, backend="triton")
    torch.cuda.set_sync_debug_mode("default")
    for one, other in zip([*first, *alone], [*again, *alone_again], strict=True):
        assert torch.equal(one, other)

    def decoded(q, k, v, local):
        return tree_decode(2 * q, k, v, group=link, local_seqlens=local) + 1

    def attended(q, k, v, local):
        partial = attend(2 * q, k, v, local_seqlens=local, backend="triton")
        return partial.out + 1, partial.lse

    for function in (decoded, attended):
        expected = function(q, *mine, local)
        compiled = torch.compile(function, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(q, *mine, local), expected, atol=0.02, rtol=0)  # 2 q, + 1 may be fused
    link.synchronize()


def test_no_waits_and_no_graph_breaks(gpus):
    gpus(waiting_for_nothing)


def at_the_same_time(group):
    """Two links on two streams, each with half the multiprocessors; two groups; a group of one."""
    half = torch.cuda.get_device_properties(group.rank()).multi_processor_count // 2
    groups = [group, dist.new_group(list(range(group.size())))]
    links = [SymmetricLink(over, programs=half) for over in groups]
    streams = [torch.cuda.Stream() for _ in links]
    slots = held_by(Layout(group.size(), 16), S, group)
    calls, expected = [], []
    for seed, link in enumerate(links):
        q, k, v = peaked_inputs(B=1 + seed, S=S, H=16, H_kv=4, D=128, dtype=torch.bfloat16, device="cuda", seed=seed)
        calls.append((q, k[:, slots].clone(), v[:, slots].clone()))
        plain = attend(q, k, v, backend="efficient").out.bfloat16()
        assert_decodes(link, *calls[-1], oracle(q, k, v).out, plain, ("half", seed))
        expected.append(tree_decode(*calls[-1], group=link, algorithm="fused"))
    # the first comparison here: CUDA loads a kernel at its first launch and may wait for the device to do so
    wrong = [(out != out.clone()).sum() for out in expected]
    for count in wrong:
        count += (expected[0] != expected[0]).sum()
    torch.cuda.synchronize()
    for step in range(500):
        for i in (0, 1) if step % 2 == group.rank() else (1, 0):  # the ranks take the links in another order
            with torch.cuda.stream(streams[i]):
                out = tree_decode(*calls[i], group=links[i], algorithm="fused")
                wrong[i] += (out != expected[i]).sum()
    for link in links:
        link.synchronize()
    assert [int(count) for count in wrong] == [0, 0]
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    link = SymmetricLink(alone)
    assert_decodes(link, q, k, v, oracle(q, k, v).out, plain, "alone")
    link.synchronize()


def test_two_links_at_the_same_time(gpus):
    gpus(at_the_same_time)


def hammer(group):
    """Each step's bits are compared on the device with those of its lengths' first step, which is held to an oracle."""
    link, S, B, dtype, vectors, per_graph = SymmetricLink(group), 1024, 4, torch.bfloat16, 64, 100
    q, k, v = peaked_inputs(B=B, S=S, H=8, H_kv=2, D=64, dtype=dtype, device="cuda")
    layout, rank = Layout(group.size(), 16), group.rank()
    slots = held_by(layout, S, group)
    mine = k[:, slots].clone(), v[:, slots].clone()
    totals = torch.stack([lengths_of(B, S, seed) for seed in range(vectors)])
    table = torch.stack([layout.local_length(total, rank) for total in totals]).int().cuda()
    order = torch.randint(vectors, (7919,), generator=torch.Generator().manual_seed(0)).cuda()  # alike on all ranks
    local, at = table[0].clone(), torch.zeros(1, dtype=torch.long, device="cuda")
    wrong, checksum = torch.zeros_like(at), torch.zeros_like(at)
    expected = {name: [] for name in LINKED}
    for total, lengths in zip(totals, table, strict=True):
        ragged = {"local_seqlens": total.cuda()}
        exact, plain = oracle(q, k, v, **ragged).out, attend(q, k, v, **ragged, backend="efficient").out.to(dtype)
        for name in LINKED:
            out = tree_decode(q, *mine, group=link, local_seqlens=lengths, algorithm=name)
            assert_within_rounding(out, own_heads(exact, name, group), own_heads(plain, name, group))
            expected[name].append(out)
    expected = {name: torch.stack(outs) for name, outs in expected.items()}
    assert same_on_all_ranks(expected["fused"])
    assert same_on_all_ranks(expected["symmetric"])
    naps = torch.randint(1, 40000, (per_graph,), generator=torch.Generator().manual_seed(rank)).tolist()  # clock cycles

    def step(i):
        name = ("fused", "fused", "symmetric", "fused", "fused_scatter", "fused", "symmetric_scatter")[i % 7]
        if i % 10 == 3 * rank:
            torch.cuda._sleep(naps[i % per_graph])
        which = order.index_select(0, at)
        local.copy_(table.index_select(0, which)[0])
        out = tree_decode(q, *mine, group=link, local_seqlens=local, algorithm=name)
        wrong.add_((out != expected[name].index_select(0, which)[0]).sum())
        if not name.endswith("scatter"):
            checksum.add_(out.view(torch.int16).sum())
        at.add_(1).remainder_(len(order))

    for i in range(1000):
        step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(per_graph):
            step(i)
    for _ in range(1000):
        graph.replay()
    for i in range(1000):
        step(i)
    link.synchronize()
    assert wrong.item() == 0
    assert same_on_all_ranks(checksum)


@pytest.mark.slow
def test_a_hundred_thousand_steps(gpus):
    started = time.monotonic()
    gpus(hammer)
    assert time.monotonic() - started < 90


def refusals(group):
    """What cannot be is said on every rank alike, before anybody waits."""
    q, k, v = peaked_inputs(S=64, H=8, H_kv=2, D=64, dtype=torch.bfloat16, device="cuda")
    small = SymmetricLink(group, rows=15, head_dim=64)
    with pytest.raises(Unavailable, match="has a link for at most 15 rows B T H and head dim 64, got 16 and 64"):
        tree_decode(q, k, v, group=small, algorithm="fused")
    with pytest.raises(InputError, match="has a link for at most 15 rows B T H and head dim 64, got 16 and 64"):
        tree_decode(q, k, v, group=small, algorithm="symmetric")
    with pytest.raises(Unavailable, match=r"has bfloat16 and float16 only, got torch\.float32"):
        tree_decode(q.float(), k.float(), v.float(), group=small, algorithm="fused")
    with pytest.raises(Unavailable, match="has a kernel of its own, got backend 'efficient'"):
        tree_decode(q[:1], k[:1], v[:1], group=small, algorithm="fused", backend="efficient")
    with pytest.raises(InputError, match="needs heads that divide by the ranks, got 7 heads and 2 ranks"):
        tree_decode(q[:, :, :7], k[:, :, :1], v[:, :, :1], group=small, algorithm="fused_scatter")
    with pytest.raises(InputError, match="symmetric needs a SymmetricLink as the group, got ProcessGroup"):
        tree_decode(q, k, v, group=group, algorithm="symmetric")
    slots = held_by(Layout(group.size(), 16), 64, group)
    exact, plain = oracle(q, k, v).out, attend(q, k, v, backend="efficient").out.bfloat16()
    assert_decodes(small, q, k[:, slots], v[:, slots], exact, plain, "too small", algorithms=("auto",))
    halves = SymmetricLink(group)
    out = tree_decode(q.float(), k[:, slots].float(), v[:, slots].float(), group=halves)  # apart, over the link
    assert_within_rounding(out, exact, attend(q.float(), k.float(), v.float()).out)
    gloo = dist.new_group(backend="gloo")
    torch.cuda.set_device(0)
    with pytest.raises(Unavailable, match=r"two ranks share a device: \[0, 0\]"):
        SymmetricLink(gloo)


def test_what_a_link_refuses(gpus):
    gpus(refusals)


def _without_rank_1(rank, meeting, algorithm, said):
    """Rank 0 decodes, rank 1 does not; both end without a goodbye, since CUDA has ended on rank 0."""
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    link = SymmetricLink(rows=64, head_dim=64, timeout_s=2)
    if rank == 0:
        texts = []
        arguments = peaked_inputs(B=1, S=64, H=8, H_kv=2, D=64, dtype=torch.bfloat16, device="cuda")
        attend(*arguments).out.bfloat16()  # a kernel that is loaded later would wait for the one that waits
        tree_decode(*arguments, group=link, algorithm=algorithm)
        for call in (link.synchronize, link.check):
            try:
                call()
            except TreeAttentionError as error:
                texts.append(str(error))
        said.with_suffix(".new").write_text("\n".join(texts))
        said.with_suffix(".new").rename(said)
    for _ in range(600):
        if said.exists():
            break
        time.sleep(0.1)
    os._exit(0)


@pytest.mark.parametrize("algorithm", ["fused", "symmetric"])
def test_a_rank_that_never_arrives_is_named(tmp_path, algorithm):
    context, said = multiprocessing.get_context("spawn"), tmp_path / "said"
    ranks = [
        context.Process(target=_without_rank_1, args=(rank, f"file://{tmp_path}/meeting", algorithm, said), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        process.kill()
    text = "ranks [1] did not arrive within 2 s; CUDA has ended in this process: start it anew"
    assert said.read_text().splitlines() == [text, text]


# What fails; the step of a static cache, "" for a dynamic cache; whether the model is split over the ranks.
ALONE = [
    ("progress", "", False),
    ("layer of prefill", "", True),
    ("layer", "", False),
    ("streamer", "captured", False),
    ("streamer", "captured", True),
    ("streamer", "compiled", True),
    ("killed", "captured", False),
]


def _fail_alone(rank, meeting, folder, case, queue):
    """Rank 1 fails in a call, or is killed; what each rank is told then, and at the next call."""
    way, step, is_split = case
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=meeting, rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (1, 2) if is_split else (2, 1), mesh_dim_names=AXES)
    model = load_tensor_parallel(folder, mesh)

    def cache():
        static = {"max_tokens": 512, "step": step} if step else {}
        return TreeCache(model.config, mesh["sequence"], **static)

    def fail_at(turn):
        return raise_at(turn, rank == 1, ValueError("no room")) if way != "killed" else die_at(turn, rank == 1)

    ids, used = text(300).cuda(), cache()
    model.generate(ids, cache=cache(), **HOW)  # kernels are made
    run = FAILING["streamer" if way == "killed" else way]
    first = attempt(lambda: run(model, used, ids, fail_at(3)))
    then = attempt(lambda: model.generate(ids, cache=used, **HOW))
    torch.cuda.synchronize()  # CUDA goes on
    queue.put((rank, first, then))
    dist.destroy_process_group()


def die_at(turn, is_mine):
    def act():
        turns.append(None)
        if is_mine and len(turns) == turn:
            os.kill(os.getpid(), signal.SIGKILL)

    turns = []
    return act


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_a_rank_that_fails_alone_is_named_by_every_rank(tmp_path, case):
    folder = str(tmp_path / "model")
    tiny("llama", "eager", 2).save_pretrained(folder)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = f"file://{tmp_path}/meeting", folder, case, queue
    ranks = [context.Process(target=_fail_alone, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    is_killed = case[0] == "killed"
    told = {rank: said for rank, *said in (queue.get(timeout=240) for _ in range(1 if is_killed else 2))}
    for process in ranks:
        process.join(30)
        process.kill()
    said = "rank 1 has ended without an error, it may have been killed: start all ranks again"
    if not is_killed:
        name = "prefill" if case[0] in ("progress", "layer of prefill") else "generate"
        said = f"rank 1 failed in {name}: ValueError: no room"
        assert told[1][0] == (("ValueError", "no room"), True)
    assert told[0][0] == (("TreeAttentionError", said), True)
    for first, (then, in_time) in told.values():
        assert in_time, first
        assert then[0] in ("InputError", "TreeAttentionError"), then
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL if is_killed else 0]
