"""`Route`: everything that `tree_decode` decides before the first kernel or message, and `explain`, which asks for it.

`resolve` is the only place where a decode step is checked and its backend and algorithm are chosen. The choice depends
only on values that all ranks share, so all ranks take the same route.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import reduce
from .errors import InputError, Unavailable
from .group import Group
from .local import BACKENDS, AttentionCall, check_call, choose_backend
from .reduce import ALGORITHMS, Link, Reduction, Target

FUSED = {"fused": "symmetric", "fused_scatter": "symmetric_scatter"}  # -> the exchange that the launch contains
DECODE_ALGORITHMS = (*FUSED, *ALGORITHMS)


@dataclass(frozen=True)
class Route(Reduction):
    """What one call of `tree_decode` does, on this rank; `print` it, or read its fields.

    Attributes:
        backend: name of the local backend, in `local.BACKENDS`; "triton" if fused.
        algorithm: name of the algorithm, never "auto". With one rank, nothing is exchanged.
        exchange: the algorithm of `tree_reduce` by which partials are exchanged: "symmetric" for "fused".
        group, rank, world_size: process group, this rank, and number of ranks.
        link: the link that the exchange runs over, if any.
        spec: shape, dtype and device of the partials.
        backend_obstacles: backend -> why it cannot run the call. From `explain`, of all backends.
        algorithm_obstacles: algorithm -> why it cannot run the call. From `explain`, of all algorithms.
    """

    algorithm: str
    backend: str
    backend_obstacles: dict[str, str]

    @property
    def is_fused(self) -> bool:
        """True if decoding and the exchange are one launch."""
        return self.algorithm in FUSED

    def __str__(self) -> str:
        launches = "decoding and exchange in one launch" if self.is_fused else "after the backend"
        over = "process group" if self.link is None else type(self.link).__name__
        lines = [
            f"rank       {self.rank} of {self.world_size}, {over if self.world_size > 1 else 'no exchange'}",
            f"backend    {self.backend}",
            f"algorithm  {self.algorithm} ({launches})",
            f"received   {self.received_bytes / 1e3:.1f} kB per rank and step",
            f"result     {'the heads of each rank' if self.scatters else 'all heads, the same bits on every rank'}",
        ]
        obstacles = self.backend_obstacles | self.algorithm_obstacles
        return "\n".join([*lines, *(f"not        {name}: {text}" for name, text in obstacles.items())])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | Link = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    algorithm: str = "auto",
    **attention: Any,
) -> Route:
    """Return the Route that `tree_decode` takes with these arguments. No communication, no kernel.

    Args:
        q, k, v: as in `tree_decode`. Only shape, dtype and device matter: expanded or meta tensors will do.
        group: as in `tree_decode`, or `AssumedRanks` to ask about ranks that do not exist.
        sinks, backend, algorithm: as in `tree_decode`.
        attention: local_seqlens, q_positions, k_positions, window, mask, page_table, scale and softcap, as in `attend`.

    Returns:
        The Route, with the obstacles of all backends and algorithms.

    Raises:
        InputError, Unavailable, Unsupported: what `tree_decode` would raise before it communicates.

    Example:
        >>> print(explain(q, k, v, group=link))
    """
    call, route = resolve(q, k, v, group=group, sinks=sinks, backend=backend, algorithm=algorithm, **attention)
    backends = {name: text for name, candidate in BACKENDS.items() if (text := candidate.obstacle(call))}
    algorithms = {name: _obstacle(name, call, group, backend, backends.get("triton")) for name in DECODE_ALGORITHMS}
    algorithms = {name: text for name, text in algorithms.items() if text}
    return replace(route, backend_obstacles=backends, algorithm_obstacles=algorithms)


def resolve(
    q: Tensor, k: Tensor, v: Tensor, *, group: Target, sinks: Tensor | None, backend: str, algorithm: str, **rules: Any
) -> tuple[AttentionCall, Route]:
    """Check the arguments of `tree_decode` and choose backend and algorithm; arguments and errors as in `explain`."""
    call = check_call(q, k, v, **rules)
    if sinks is not None and (sinks.shape != q.shape[2:3] or sinks.device != q.device):
        raise InputError(f"sinks must be [{q.shape[2]}] on {q.device}, got {list(sinks.shape)} on {sinks.device}")
    reduce.check_name(algorithm, DECODE_ALGORITHMS)
    ranks, spec, obstacles = reduce.ranks_of(group), call.spec(), {}
    reduce.check_no_gradient(ranks[2], q, k, v)
    if algorithm in FUSED and (fault := reduce.misfit(FUSED[algorithm], spec, group)):
        raise InputError(f"{algorithm} {fault}")
    chosen, tried = choose_backend(call, backend)
    if isinstance(group, Link) and algorithm in ("auto", *FUSED):
        name = "fused" if algorithm == "auto" else algorithm
        triton = None if chosen == "triton" else tried.get("triton") or BACKENDS["triton"].obstacle(call)
        obstacle = _obstacle(name, call, group, backend, triton)
        if obstacle is None:
            return call, Route(FUSED[name], *ranks, group, spec, {}, name, "triton", tried)
        if algorithm in FUSED and q.numel() > 0:
            raise Unavailable(f"algorithm {algorithm!r} {obstacle}: use algorithm='auto'")
        obstacles[name] = obstacle
    exchange, *shared, passed_over = reduce.choose_exchange(spec, group, ranks, FUSED.get(algorithm, algorithm))
    fields: Any = (exchange, *shared, obstacles | passed_over, exchange, chosen, tried)
    return call, Route(*fields)


def _obstacle(name: str, call: AttentionCall, group: Target, backend: str, triton: str | None) -> str | None:
    """Return why an algorithm cannot run a call; None if it can. triton: why the Triton backend cannot."""
    if name in FUSED and reduce.misfit(FUSED[name], call.spec(), group) is None:
        if call.q.numel() == 0:
            return "has no query to decode"
        if triton is not None:
            return triton
        if backend not in ("auto", "triton"):
            return f"has a kernel of its own, got backend {backend!r}"
    return reduce.reduction_obstacle(FUSED.get(name, name), call.spec(), group)
