"""Which backend "auto" chooses, and what each of them refuses, with its reason."""

import math
import re

import pytest
import torch

from attention_cases import (
    CHOICES,
    CUDA,
    DTYPES,
    GPU,
    HALVES,
    HIDDEN,
    ON_CUDA,
    assert_right,
    choices,
    compare,
    inputs,
    marked,
)
from tree_attention import InputError, Unavailable, Unsupported, attend, explain
from tree_attention.local import BACKENDS, check_call, choose_backend
from tree_attention.testing import peaked_inputs


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
    seqlens, positions = "local_seqlens must be int32 or int64 [2] or", {"q_positions": queries, "k_positions": keys}
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
        "fewer": ({"local_seqlens": torch.tensor([[2, 3], [3, 2]])}, "local_seqlens must not decrease along a row"),
        "seqlens' shape": ({"local_seqlens": torch.tensor([1, 2, 3])}, f"{seqlens} [2, 2], got torch.int64 [3]"),
        "seqlens' dims": ({"local_seqlens": torch.tensor(4)}, f"{seqlens} [2, 2], got torch.int64 []"),
        "seqlens' dtype": ({"local_seqlens": torch.tensor([1.0, 2.0])}, f"{seqlens} [2, 2], got torch.float32 [2]"),
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
