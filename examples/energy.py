"""The paper's observation in numbers: attention is the gradient of an energy, and energies of shards add up.

    python examples/energy.py

One process; no ranks.
"""

import torch

from tree_attention import attend, attention_energy
from tree_attention.testing import peaked_inputs

SHARDS = 3


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (x.double() for x in peaked_inputs(B=1, T=2, S=300, H=4, H_kv=2, D=16, device=device))
    zeta = torch.zeros_like(q, requires_grad=True)  # one source for each query token and head, of a value's shape

    energy = attention_energy(q, k, v, zeta)  # F(zeta) = log sum_a exp(q.k_a / sqrt(D) + zeta.v_a)
    (gradient,) = torch.autograd.grad(energy.sum(), zeta)
    out, lse = attend(q, k, v)  # the usual way
    show("dF/dzeta at 0  -  attention", gradient - out)
    show("F at 0         -  log-sum-exp", energy - lse)

    shards = zip(k.chunk(SHARDS, 1), v.chunk(SHARDS, 1), strict=True)
    energies = torch.stack([attention_energy(q, k_shard, v_shard, zeta) for k_shard, v_shard in shards])
    whole = energies.logsumexp(0)  # all that ranks have to tell one another
    (gradient,) = torch.autograd.grad(whole.sum(), zeta)
    show(f"the same from {SHARDS} shards", gradient - out)


def show(what: str, difference: torch.Tensor) -> None:
    largest = float(difference.detach().abs().max())
    print(f"{what:<32}at most {largest:.0e}")
    assert largest < 1e-13


if __name__ == "__main__":
    main()
