"""Which mesh of GPUs a model and a context need, and whether sharding the sequence pays."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from .machine import Machine
from .mesh import Outlook, first_token_s, outlook
from .model import Model

LONGEST_TOKENS = 1 << 30  # searches end there: with windows alone every context fits
ALIKE = 1.03  # meshes within 3 % of the fastest count as equally fast: then fewer GPUs are better


@dataclass(frozen=True)
class Plan:
    """Every mesh of at most the GPUs there are, fewest first. Of those that fit and that `load_tensor_parallel` takes:
    `fewest` GPUs, the quickest of these; and `fastest`, the fewest GPUs among those within 3 % of the fastest step.

    pays_from_tokens: the shortest context from which on the fastest mesh is one that shards the sequence; None: none.
    """

    meshes: tuple[Outlook, ...]
    fewest: Outlook | None
    fastest: Outlook | None
    pays_from_tokens: int | None
    verdict: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "meshes": [_described(mesh) for mesh in self.meshes],
            "fewest": self.fewest and [self.fewest.tensor, self.fewest.sequence],
            "fastest": self.fastest and [self.fastest.tensor, self.fastest.sequence],
            "pays_from_tokens": self.pays_from_tokens, "verdict": self.verdict, "notes": list(self.notes),
        }  # fmt: skip


def make_plan(model: Model, machine: Machine, *, context: int, batch: int, gpus: int) -> Plan:
    """For `batch` sequences of `context` tokens each.

    Raises ValueError for numbers below 1, or GPUs that do not fill nodes.
    """
    if min(context, batch, gpus) < 1:
        raise ValueError(f"context, batch and gpus must be at least 1, got {context}, {batch} and {gpus}")
    if gpus > machine.per_node and gpus % machine.per_node:
        raise ValueError(f"gpus must fill nodes of {machine.per_node}, or fit one, got {gpus}: see --per-node")
    meshes = _outlooks(model, machine, context, batch, gpus)
    meshes = [replace(mesh, first_token_s=first_token_s(model, machine, context, batch, mesh)) for mesh in meshes]
    fewest = min(_choices(meshes), key=lambda mesh: (mesh.gpus, mesh.token_s), default=None)
    pays_from = _pays_from(model, machine, batch, gpus)
    notes = [*model.notes, *_tensor_notes(model, meshes, gpus)]
    if model.most_positions is not None and context > model.most_positions:
        notes.append(f"the model was made for {model.most_positions} positions, fewer than {context}")
    return Plan(tuple(meshes), fewest, _fastest(meshes), pays_from, _verdict(meshes, machine), tuple(notes))


def _tensor_notes(model: Model, meshes: list[Outlook], gpus: int) -> list[str]:
    """What is to be said of numbers of tensor ranks that do not help, or cannot be."""
    notes = []
    if any(mesh.tensor > model.kv_heads for mesh in meshes):
        notes.append(
            f"more tensor ranks than the {model.kv_heads} KV head(s) each hold a copy of one: they divide the weights, "
            "and the keys and values no further"
            + ("" if model.latent else "; that is for other engines, and not chosen here")
        )
    uneven = [n for n in range(1, gpus + 1) if gpus % n == 0 and model.heads % n]
    if uneven:
        listed = ", ".join(map(str, uneven))
        notes.append(f"{listed} tensor ranks are left out: {model.heads} query heads do not divide by them")
    return notes


def over_contexts(
    model: Model, machine: Machine, *, batch: int, gpus: int
) -> list[tuple[int, float | None, float | None]]:
    """Context, doubled from 1024 on as long as something fits; and a token's time on the fastest mesh of tensor ranks
    alone, and of those that shard the sequence; None if none fits.
    """
    rows, context = [], 1024
    while context <= LONGEST_TOKENS:
        fitting = _choices(_outlooks(model, machine, context, batch, gpus))
        if not fitting:
            break
        best_s = [
            min((mesh.token_s for mesh in fitting if (mesh.sequence > 1) == sharded), default=None)
            for sharded in (False, True)
        ]
        rows.append((context, *best_s))
        context *= 2
    return rows


def _outlooks(model: Model, machine: Machine, context: int, batch: int, gpus: int) -> list[Outlook]:
    """All meshes of n GPUs, n a divisor of `gpus` that fits one node or fills some; without first_token_s."""
    counts = [n for n in range(1, gpus + 1) if gpus % n == 0 and (n <= machine.per_node or n % machine.per_node == 0)]
    return [
        outlook(model, machine, context, batch, tensor, n // tensor)
        for n in counts
        for tensor in range(1, n + 1)
        if n % tensor == 0 and model.heads % tensor == 0 and _fills(tensor, n, machine.per_node)
    ]


def _fills(tensor: int, gpus: int, per_node: int) -> bool:
    """Whether no tensor group straddles nodes but by filling them."""
    return gpus <= per_node or per_node % tensor == 0 or tensor % per_node == 0


def _choices(meshes: list[Outlook]) -> list[Outlook]:
    return [mesh for mesh in meshes if mesh.fits and mesh.loads]


def _fastest(meshes: list[Outlook]) -> Outlook | None:
    fitting = _choices(meshes)
    limit_s = ALIKE * min((mesh.token_s for mesh in fitting), default=0.0)
    alike = [mesh for mesh in fitting if mesh.token_s <= limit_s]
    return min(alike, key=lambda mesh: (mesh.gpus, mesh.token_s), default=None)


def _pays_from(model: Model, machine: Machine, batch: int, gpus: int) -> int | None:
    """By doubling, then by halving the interval to 1 part in 64."""

    def pays(context: int) -> bool | None:
        fastest = _fastest(_outlooks(model, machine, context, batch, gpus))
        return None if fastest is None else fastest.sequence > 1

    high = 1024
    while pays(high) is False and high < LONGEST_TOKENS:
        high *= 2
    if not pays(high):
        return None
    low = high // 2
    while high > 1024 and high - low > high // 64:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


def _verdict(meshes: list[Outlook], machine: Machine) -> str:
    fastest = _fastest(meshes)
    if fastest is None:
        least = min((mesh for mesh in meshes if mesh.loads), key=lambda mesh: mesh.used_bytes)
        return (
            f"Nothing fits: {least.tensor} x {least.sequence} still needs {least.used_bytes / 1e9:.1f} GB a GPU "
            f"of {machine.gpu.memory_bytes / 1e9:.0f} GB. Take more GPUs, a smaller batch or a shorter context."
        )
    if fastest.gpus == 1:
        return "One GPU is enough, and as fast as more."
    if fastest.sequence == 1:
        return f"Use tensor parallelism alone ({fastest.tensor} GPUs): sharding the sequence makes no step faster here."
    alone = min((m for m in _choices(meshes) if m.sequence == 1), key=lambda m: m.token_s, default=None)
    if alone is None:
        return "Shard the sequence: no mesh without that has the memory."
    return (
        f"Shard the sequence: {1e3 * fastest.token_s:.1f} ms a token on {fastest.tensor} x {fastest.sequence}, against "
        f"{1e3 * alone.token_s:.1f} ms at best without, on {alone.tensor} x 1."
    )


def _described(mesh: Outlook) -> dict[str, Any]:
    derived = {name: getattr(mesh, name) for name in ("gpus", "token_s", "bound", "used_bytes")}
    return asdict(mesh) | derived
