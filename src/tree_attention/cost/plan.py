"""Finds the mesh of GPUs that a model and a context need, and whether sharding the sequence pays."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from .machine import Machine
from .mesh import MeshEstimate, estimate_first_token_s, estimate_mesh
from .model import ModelSpec

LONGEST_TOKENS = 1 << 30  # searches stop here: a model with windows only fits every context
EQUALLY_FAST = 1.03  # within 3 % of the fastest, the mesh with the fewest GPUs is chosen


@dataclass(frozen=True)
class MeshPlan:
    """The estimates of all meshes, fewest GPUs first, and the meshes to choose.

    fewest, fastest: among the meshes that fit and are loadable, the fastest mesh of the fewest GPUs, and the mesh of
    the fewest GPUs whose step is within 3 % of the fastest. pays_from_tokens: the shortest context from which on the
    fastest mesh shards the sequence, or None.
    """

    meshes: tuple[MeshEstimate, ...]
    fewest: MeshEstimate | None
    fastest: MeshEstimate | None
    pays_from_tokens: int | None
    verdict: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as values that JSON can hold."""
        fewest, fastest = (mesh and [mesh.tensor, mesh.sequence] for mesh in (self.fewest, self.fastest))
        about = {"pays_from_tokens": self.pays_from_tokens, "verdict": self.verdict, "notes": list(self.notes)}
        return {"meshes": [_described(mesh) for mesh in self.meshes], "fewest": fewest, "fastest": fastest} | about


def make_plan(model: ModelSpec, machine: Machine, *, context: int, batch: int, gpus: int) -> MeshPlan:
    """Plan for `batch` sequences of `context` tokens each on at most `gpus` GPUs.

    Raises ValueError if a number is below 1, or `gpus` neither fit one node nor fill whole nodes.
    """
    if min(context, batch, gpus) < 1:
        raise ValueError(f"context, batch and gpus must be at least 1, got {context}, {batch} and {gpus}")
    per_node = machine.per_node
    if gpus > per_node and gpus % per_node:
        raise ValueError(f"gpus must fit one node of {per_node} or fill whole nodes, got {gpus}: see --per-node")
    work = (model, machine, context, batch)
    meshes = [replace(mesh, first_token_s=estimate_first_token_s(*work, mesh)) for mesh in _estimates(*work, gpus)]
    fewest, pays_from = _smallest(_choices(meshes)), _pays_from(model, machine, batch, gpus)
    notes = list(model.notes)
    if any(mesh.tensor > model.kv_heads for mesh in meshes):
        notes.append(
            f"with more tensor ranks than the {model.kv_heads} KV head(s), KV heads are replicated: the weights are "
            "split further, the KV cache is not"
            + ("" if model.latent else ". Only other engines support that: not chosen")
        )
    uneven = [n for n in range(1, gpus + 1) if gpus % n == 0 and model.heads % n]
    if uneven:
        listed = ", ".join(map(str, uneven))
        notes.append(f"{listed} tensor ranks are left out: they do not divide {model.heads} query heads")
    if model.most_positions is not None and context > model.most_positions:
        notes.append(f"the model was trained for {model.most_positions} positions, fewer than {context}")
    return MeshPlan(tuple(meshes), fewest, _fastest(meshes), pays_from, _verdict(meshes, machine), tuple(notes))


def over_contexts(
    model: ModelSpec, machine: Machine, *, batch: int, gpus: int
) -> list[tuple[int, float | None, float | None]]:
    """Rows of (context, seconds per token without sequence sharding, with it), each on the fastest mesh that fits.

    The context doubles from 1024 tokens for as long as any mesh fits. None: no such mesh fits.
    """
    rows, context = [], 1024
    while context <= LONGEST_TOKENS and (fitting := _choices(_estimates(model, machine, context, batch, gpus))):
        whole_s = min((mesh.token_s for mesh in fitting if mesh.sequence == 1), default=None)
        sharded_s = min((mesh.token_s for mesh in fitting if mesh.sequence > 1), default=None)
        rows.append((context, whole_s, sharded_s))
        context *= 2
    return rows


def _estimates(model: ModelSpec, machine: Machine, context: int, batch: int, gpus: int) -> list[MeshEstimate]:
    """Estimates, without first_token_s, for each divisor of `gpus` that fits one node or fills whole nodes."""
    per_node, meshes = machine.per_node, []
    for n in (n for n in range(1, gpus + 1) if gpus % n == 0 and (n <= per_node or n % per_node == 0)):
        for tensor in (tensor for tensor in range(1, n + 1) if n % tensor == 0 and model.heads % tensor == 0):
            if n <= per_node or per_node % tensor == 0 or tensor % per_node == 0:  # no tensor group straddles nodes
                meshes.append(estimate_mesh(model, machine, context, batch, tensor, n // tensor))
    return meshes


def _choices(meshes: list[MeshEstimate]) -> list[MeshEstimate]:
    return [mesh for mesh in meshes if mesh.fits and mesh.loadable]


def _fastest(meshes: list[MeshEstimate]) -> MeshEstimate | None:
    fitting = _choices(meshes)
    limit_s = EQUALLY_FAST * min((mesh.token_s for mesh in fitting), default=0.0)
    return _smallest([mesh for mesh in fitting if mesh.token_s <= limit_s])


def _smallest(meshes: list[MeshEstimate]) -> MeshEstimate | None:
    """The fastest mesh of the fewest GPUs."""
    return min(meshes, key=lambda mesh: (mesh.gpus, mesh.token_s), default=None)


def _pays_from(model: ModelSpec, machine: Machine, batch: int, gpus: int) -> int | None:
    """The shortest context at which sharding pays: by doubling, then by bisection to 1 part in 64."""

    def pays(context: int) -> bool | None:
        fastest = _fastest(_estimates(model, machine, context, batch, gpus))
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


def _verdict(meshes: list[MeshEstimate], machine: Machine) -> str:
    fastest = _fastest(meshes)
    if fastest is None:
        least = min((mesh for mesh in meshes if mesh.loadable), key=lambda mesh: mesh.used_bytes)
        return (
            f"Nothing fits: {least.tensor} x {least.sequence} still needs {least.used_bytes / 1e9:.1f} GB per GPU "
            f"of {machine.gpu.memory_bytes / 1e9:.0f} GB. Use more GPUs, a smaller batch or a shorter context."
        )
    if fastest.gpus == 1:
        return "One GPU is enough, and as fast as more."
    if fastest.sequence == 1:
        return f"Use tensor parallelism only ({fastest.tensor} GPUs): sharding the sequence is not faster here."
    alone = min((m for m in _choices(meshes) if m.sequence == 1), key=lambda m: m.token_s, default=None)
    if alone is None:
        return "Shard the sequence: no mesh without sequence sharding has enough memory."
    return (
        f"Shard the sequence: {1e3 * fastest.token_s:.1f} ms per token on {fastest.tensor} x {fastest.sequence}, "
        f"at best {1e3 * alone.token_s:.1f} ms without, on {alone.tensor} x 1."
    )


def _described(mesh: MeshEstimate) -> dict[str, Any]:
    """The fields and derived figures of a mesh; records call `loadable` "loads"."""
    known = asdict(mesh)
    known["loads"] = known.pop("loadable")
    return known | {name: getattr(mesh, name) for name in ("gpus", "token_s", "bound", "used_bytes")}
