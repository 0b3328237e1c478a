"""The energy against what it must be the generating function of: attention, its moments, and its shards."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tree_attention import InputError, Partial, Unsupported, attend, attention_energy, attention_from_energy, merge
from tree_attention.partial import stack

HEADS = [pytest.param(6, 6, id="MHA"), pytest.param(6, 2, id="GQA"), pytest.param(6, 1, id="MQA")]
B, T, S, D, D_v = 2, 3, 13, 5, 7
INF = float("inf")


def inputs(H: int = 6, H_kv: int = 2, *, dtype: torch.dtype = torch.float64, D_v: int = D_v) -> tuple[Tensor, ...]:
    """q, k, v with scores so spread that a few keys carry most of the weight."""
    generator = torch.Generator().manual_seed(H + H_kv)
    shapes = (B, T, H, D), (B, S, H_kv, D), (B, S, H_kv, D_v)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (3 * q).to(dtype), k.to(dtype), v.to(dtype)


def source(q: Tensor, v: Tensor, size: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    zeta = size * torch.randn((*q.shape[:-1], v.shape[-1]), generator=generator, dtype=torch.float64)
    return zeta.to(q.dtype).requires_grad_()


def choices(name: str) -> dict[str, Any]:
    """What `attend` and the energy take beside the tensors; every query of every case sees a key."""
    positions = {"q_positions": torch.tensor([4, 0, 9]), "k_positions": torch.arange(S)}
    mask = torch.rand(B, 6, T, S, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[..., 0] = True
    return {
        "plain": {},
        "causal": positions,
        "causal rows": positions | {"q_positions": torch.tensor([[0, 1, 2], [3, 7, 12]])},
        "mask": {"mask": mask},
        "mask for all": {"mask": mask[:1, :1]},
        "softcap": {"softcap": 2.0},
        "scale": {"scale": 1.3},
        "all": positions | {"mask": mask, "softcap": 5.0, "scale": 0.9},
    }[name]


CASES = ["plain", "causal", "causal rows", "mask", "mask for all", "softcap", "scale", "all"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Largest error, relative to the largest expected number; infinities must agree exactly."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    error = (actual - expected)[finite].abs().max() / expected[finite].abs().max()
    assert error <= tolerance, f"relative error {float(error):.1e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("H", "H_kv"), HEADS)
def test_gradient_is_attention_and_value_is_lse(H: int, H_kv: int, case: str) -> None:
    q, k, v = inputs(H, H_kv)
    expected = attend(q, k, v, backend="reference", **choices(case))
    zeta = source(q, v)
    energy = attention_energy(q, k, v, zeta, **choices(case))
    close(energy.detach(), expected.lse)
    close(torch.autograd.grad(energy.sum(), zeta)[0], expected.out)
    for actual, wanted in zip(attention_from_energy(q, k, v, **choices(case)), expected, strict=True):
        close(actual, wanted)


def test_away_from_zero_the_scores_are_tilted() -> None:
    q, k, v = inputs(2, 1)
    zeta = source(q, v, size=0.5)
    energy = attention_energy(q, k, v, zeta, softcap=2.0)
    scores = torch.einsum("bthd,bsd->bths", q, k[:, :, 0]) * D**-0.5
    tilted = 2.0 * torch.tanh(scores / 2.0) + torch.einsum("bthe,bse->bths", zeta.detach(), v[:, :, 0])
    close(energy.detach(), tilted.logsumexp(-1))
    mean = torch.einsum("bths,bse->bthe", tilted.softmax(-1), v[:, :, 0])
    close(torch.autograd.grad(energy.sum(), zeta)[0], mean)


def test_one_source_moves_one_query_and_head_only() -> None:
    q, k, v = inputs()
    zeta = source(q, v)
    (gradient,) = torch.autograd.grad(attention_energy(q, k, v, zeta)[1, 2, 3], zeta)
    elsewhere = gradient.clone()
    elsewhere[1, 2, 3] = 0
    assert gradient[1, 2, 3].abs().min() > 0
    assert torch.count_nonzero(elsewhere) == 0


def test_hessian_is_the_softmax_covariance_of_v() -> None:
    G = 3  # query heads a KV head
    q, k, v = inputs(6, 2)
    for b, t, h in [(0, 0, 0), (1, 2, 4), (1, 1, 5)]:

        def energy(zeta: Tensor, b: int = b, t: int = t, h: int = h) -> Tensor:
            row = q[b : b + 1, t : t + 1, h : h + 1], k[b : b + 1, :, h // G, None], v[b : b + 1, :, h // G, None]
            return attention_energy(*row, zeta.view(1, 1, 1, D_v)).sum()

        hessian = torch.autograd.functional.hessian(energy, q.new_zeros(D_v))
        values = v[b, :, h // G]
        p = (k[b, :, h // G] @ q[b, t, h] * D**-0.5).softmax(-1)
        centred = values - p @ values
        close(torch.as_tensor(hessian), centred.T @ (p[:, None] * centred))


def test_shift_of_all_scores_shifts_the_energy_only() -> None:
    q, k, v = inputs()
    shift = 123.0
    q_longer = torch.cat([q, torch.full_like(q[..., :1], shift)], -1)  # one more dim: adds shift * 1 to each score
    k_longer = torch.cat([k, torch.ones_like(k[..., :1])], -1)
    plain = attention_from_energy(q, k, v, scale=1.0)
    shifted = attention_from_energy(q_longer, k_longer, v, scale=1.0)
    close(shifted.out, plain.out)
    close(shifted.lse, plain.lse + shift)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "H_kv"), HEADS)
def test_gradients_equal_those_of_plain_attention(H: int, H_kv: int, causal: bool) -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(H, H_kv))
    q, k, v = tensors
    positions = {"q_positions": torch.tensor([4, 0, 9]), "k_positions": torch.arange(S)} if causal else {}
    seen = (torch.arange(S) <= torch.tensor([4, 0, 9])[:, None]) if causal else None
    heads_first = (tensor.transpose(1, 2) for tensor in tensors)
    plain = scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    ours = attention_from_energy(q, k, v, **positions)
    close(ours.out.detach(), plain.detach())
    weight = source(q, v, size=1.0).detach()
    expected = torch.autograd.grad((plain * weight).sum(), tensors)
    actual = torch.autograd.grad((ours.out * weight).sum(), tensors)
    for mine, theirs in zip(actual, expected, strict=True):
        close(mine, theirs)


def test_gradients_flow_through_the_energy_and_its_gradient() -> None:
    tensors = [tensor[:1].requires_grad_() for tensor in inputs(2, 1, D_v=3)]
    zeta = source(tensors[0], tensors[2], size=0.3)
    mask = torch.rand(1, 2, T, S, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0, 0] = False  # a query without keys, in the middle of the others
    blind = ~mask.any(-1).transpose(1, 2)
    assert 0 < int(blind.sum()) < blind.numel()

    def energy(*arguments: Tensor) -> Tensor:
        return attention_energy(*arguments, mask=mask, softcap=6.0).masked_fill(blind, 0.0)  # -inf has no differences

    assert torch.autograd.gradcheck(energy, (*tensors, zeta))
    assert torch.autograd.gradgradcheck(energy, (*tensors, zeta))


def test_the_graph_is_kept_only_for_who_asks() -> None:
    q, k, v = inputs()
    assert not any(tensor.requires_grad for tensor in attention_from_energy(q, k, v))
    q.requires_grad_()
    with torch.no_grad():
        partial = attention_from_energy(q, k, v)
    assert not any(tensor.requires_grad for tensor in partial)
    assert all(tensor.requires_grad for tensor in attention_from_energy(q, k, v))
    with torch.inference_mode(), pytest.raises(Unsupported, match=r"use torch\.no_grad"):
        attention_from_energy(q, k, v)


SPLITS = [
    pytest.param([5, 0, 1, 7], id="one empty"),
    pytest.param([0, 13], id="all on one"),
    pytest.param([1] * 13, id="one key each"),
]


def shard_energies(sizes: list[int], causal: bool, zeta: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The energy of each run of `sizes` neighbouring keys; causal, the last runs lie in every query's future."""
    energies, first = [], 0
    for size in sizes:
        keys = slice(first, first + size)
        positions = {"q_positions": torch.tensor([4, 0, 9]), "k_positions": torch.arange(S)[keys]} if causal else {}
        energies.append(attention_energy(q, k[:, keys], v[:, keys], zeta, **positions))
        first += size
    return energies


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SPLITS)
def test_energies_of_shards_combine_by_logsumexp(sizes: list[int], causal: bool) -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs())
    zeta = source(tensors[0], tensors[2])
    (whole,) = shard_energies([S], causal, zeta, *tensors)
    combined = torch.stack(shard_energies(sizes, causal, zeta, *tensors)).logsumexp(0)
    close(combined.detach(), whole.detach())

    out, expected = (torch.autograd.grad(F.sum(), zeta, create_graph=True)[0] for F in (combined, whole))
    close(out.detach(), expected.detach())
    weight = source(tensors[0], tensors[2], size=1.0).detach()
    both = (torch.autograd.grad((gradient * weight).sum(), tensors) for gradient in (out, expected))
    for mine, theirs in zip(*both, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SPLITS)
def test_merge_is_the_gradient_of_the_combined_energy(sizes: list[int], causal: bool) -> None:
    q, k, v = inputs()
    zeta = source(q, v)
    energies = shard_energies(sizes, causal, zeta, q, k, v)
    parts = [Partial(torch.autograd.grad(F.sum(), zeta, retain_graph=True)[0], F.detach()) for F in energies]
    combined = torch.stack(energies).logsumexp(0)
    merged = merge(stack(parts))
    close(merged.out, torch.autograd.grad(combined.sum(), zeta)[0])
    close(merged.lse, combined.detach())


def test_curvature_of_shards_combines_as_the_law_of_total_covariance() -> None:
    q, k, v = (tensor[:1] for tensor in inputs(1, 1))
    q = q[:, :1]

    def hessian(first: int, last: int) -> Tensor:
        def energy(zeta: Tensor) -> Tensor:
            return attention_energy(q, k[:, first:last], v[:, first:last], zeta.view(1, 1, 1, D_v)).sum()

        return torch.as_tensor(torch.autograd.functional.hessian(energy, q.new_zeros(D_v)))

    pieces = [(0, 4), (4, 4), (4, S)]
    whole = attention_from_energy(q, k, v)
    expected = torch.zeros(D_v, D_v, dtype=q.dtype)
    for first, last in pieces:
        part = attention_from_energy(q, k[:, first:last], v[:, first:last])
        gap = (part.out - whole.out).flatten()
        expected += (part.lse - whole.lse).exp().item() * (hessian(first, last) + torch.outer(gap, gap))
    close(hessian(0, S), expected)


def test_scores_of_ten_thousand_stay_finite_and_normalised() -> None:
    q, k, v = inputs(dtype=torch.float32)
    q = 1e4 * torch.nn.functional.normalize(q, dim=-1)
    k = torch.nn.functional.normalize(k, dim=-1)
    k = torch.cat([k, k], 1).requires_grad_()  # every key twice, so that no softmax is one-hot
    v = torch.cat([torch.ones_like(v), torch.ones_like(v)], 1)
    partial = attention_from_energy(q, k, v, scale=1.0)
    assert partial.lse.max() > 5e3
    close(partial.out.detach(), torch.ones_like(partial.out), tolerance=1e-6)
    exact = attend(q.double(), k.detach().double(), v.double(), scale=1.0, backend="reference")
    close(partial.lse.detach(), exact.lse.float(), tolerance=1e-6)
    (gradient,) = torch.autograd.grad(partial.out.sum() + partial.lse.sum(), k)
    assert gradient.isfinite().all()


def test_float32_stays_float32() -> None:
    q, k, v = inputs(dtype=torch.float32)
    expected = attend(q.double(), k.double(), v.double(), backend="reference")
    partial = attention_from_energy(q, k, v)
    close(partial.out, expected.out.float(), tolerance=2e-6)
    close(partial.lse, expected.lse.float(), tolerance=1e-6)


def blind_cases() -> list[tuple[int, dict[str, Any]]]:
    """(keys, what hides them) so that query 1 sees nothing, or no query does."""
    mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    mask[:, :, 1] = False
    future = {"q_positions": torch.tensor([5, -1, 5]), "k_positions": torch.arange(S)}
    return [(S, {"mask": mask}), (S, future), (S, {"mask": mask & False}), (0, {}), (0, {"mask": mask[..., :0]})]


@pytest.mark.parametrize("case", range(len(blind_cases())))
def test_no_visible_key_is_minus_infinity_with_zero_gradients(case: int) -> None:
    keys, hidden = blind_cases()[case]
    q, k, v = inputs()
    tensors = tuple(tensor.requires_grad_() for tensor in (q, k[:, :keys].clone(), v[:, :keys].clone()))
    zeta = source(q, v)
    energy = attention_energy(*tensors, zeta, **hidden)
    (out,) = torch.autograd.grad(energy.sum(), zeta, create_graph=True)
    assert (energy[:, 1] == -INF).all()
    assert (out[:, 1] == 0).all()
    expected = attend(*tensors, backend="reference", **hidden)
    assert torch.equal(energy == -INF, expected.lse == -INF)
    assert torch.equal(out == 0, expected.out == 0)

    everything = [energy.sum(), (out**2).sum(), energy.masked_fill(energy == -INF, 0.0).sum()]
    for loss in everything:
        for gradient in torch.autograd.grad(loss, (*tensors, zeta), retain_graph=True, materialize_grads=True):
            assert gradient.isfinite().all()
        blind_query = torch.autograd.grad(loss, tensors[0], retain_graph=True)[0][:, 1]
        assert torch.count_nonzero(blind_query) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_refused(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    with pytest.raises(InputError, match=f"needs float32 or float64, got {dtype}: widen q, k and v"):
        attention_from_energy(q, k, v)
    with pytest.raises(InputError, match=f"needs float32 or float64, got {dtype}: widen q, k and v"):
        attention_energy(q, k, v, source(q, v).detach())


def test_arguments_that_do_not_fit() -> None:
    q, k, v = inputs()
    zeta = source(q, v).detach()
    with pytest.raises(
        InputError, match=r"zeta must be torch.float64 \[2, 3, 6, 7\] on cpu, got .* \[2, 3, 6, 5\] on cpu"
    ):
        attention_energy(q, k, v, zeta[..., :D])
    with pytest.raises(InputError, match=r"zeta must be torch.float64 .* got torch.float32"):
        attention_energy(q, k, v, zeta.float())
    with pytest.raises(InputError, match="q_positions and k_positions must be given together"):
        attention_energy(q, k, v, zeta, q_positions=torch.arange(T))
    with pytest.raises(InputError, match=r"mask must be bool \[2 or 1, 6 or 1, 3, 13\]"):
        attention_from_energy(q, k, v, mask=torch.ones(B, 1, T, S))
    with pytest.raises(InputError, match="softcap must be positive"):
        attention_from_energy(q, k, v, softcap=-1.0)
    with pytest.raises(InputError, match="q, k and v must have one dtype"):
        attention_from_energy(q, k.float(), v)
    with pytest.raises(InputError, match="q, k and v must be float64, float32"):
        attention_from_energy(q.long(), k.long(), v.long())
    with pytest.raises(InputError, match="query heads must be a multiple of KV heads"):
        attention_from_energy(q[:, :, :5], k, v)
