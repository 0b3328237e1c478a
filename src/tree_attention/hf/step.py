"""The decode step of a model with a static TreeCache: one token a row, on a GPU captured once and then replayed.

`generate` calls `model.forward`, which `install_step` wraps. The wrapper takes the calls that are such a step and
passes the others on. `TreeCache.step` says how such a step is run:

eager      as it is; with `generate(disable_compile=True)`, and where a model cannot be captured
captured   on GPUs once as it is, so that kernels are compiled and links made, then as a CUDA graph: a thousand launches
           are one
compiled   after one as it is, what torch.compile makes of the model (one graph, no breaks), which fuses its small
           kernels; captured from the third on

Sampling stays with `generate`, beside the graph.

NCCL does not end a group while a graph that holds one of its collectives is alive (pytorch issue 115388), so
`install_step` also has `torch.distributed.destroy_process_group` drop the graphs first.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import TreeCache
from .sums import close_links, open_link

TAKEN = (  # arguments of `forward` that a step takes, or that say nothing new for one token
    "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
)  # fmt: skip
# Kernels by rule, not by timing them: that might choose others on another rank, and so other bits.
ALIKE: dict[str, Any] = {"deterministic": True}
_with_steps: weakref.WeakSet[TreeCache] = weakref.WeakSet()


@dataclass
class Captured:
    """A step's graph, once it has one, and the memory that it reads and writes."""

    ids: Tensor
    positions: Tensor
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None
    received_bytes: float = 0.0


def install_step(model: Any) -> None:
    """Wrap `model.forward`, once; and torch's end of a group, once for all."""
    _release_with_groups()
    if not hasattr(model.forward, "_tree_attention"):
        model.forward = SteppingForward(model.forward)


class SteppingForward:
    """The wrapped `forward`. An object, not a function, so that a copied or unpickled model has one of its own."""

    def __init__(self, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._tree_attention = True  # an attribute of the object: who wraps it again copies these

    def __reduce__(self) -> Any:
        return SteppingForward, (self.original,)  # a method is copied together with the model that it belongs to

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        from .inductor import StepPass  # loads the compiler, which takes seconds

        step_pass = StepPass(open_link(getattr(self.original, "__self__", None)))
        options: Any = ALIKE | {"post_grad_custom_pre_pass": step_pass}
        return torch.compile(self.original, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not is_step(kwargs):
            return self.original(*args, **kwargs)
        cache = kwargs["past_key_values"]
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), cache.get_seq_length(), device=ids.device)
        how = "eager" if cache.disable_compile else cache.step
        ways = [self.original, self.compiled] if how == "compiled" else [self.original]
        logits = decode_step(ways, cache, ids, positions, kwargs.get("attention_mask"), capture=how != "eager")
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _release_with_groups() -> None:
    original = dist.destroy_process_group
    if hasattr(original, "_tree_attention"):
        return

    @functools.wraps(original)
    def destroy(group: Any = None) -> None:
        for cache in _with_steps:
            cache.steps.clear()  # a cache that is used again captures again
        close_links(group)
        original(group)

    destroy._tree_attention = True  # type: ignore[attr-defined]
    dist.destroy_process_group = destroy


def is_step(arguments: dict[str, Any]) -> bool:
    """Whether a call of `forward` is one new token for each row of a static TreeCache, and asks for nothing else."""
    cache, ids, mask = (arguments.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
    return (
        isinstance(cache, TreeCache)
        and cache.can_step()
        and isinstance(ids, Tensor)
        and ids.shape[1] == 1
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and arguments.get("use_cache") is not False
        and arguments.get("return_dict") is not False
        and all(value is None for name, value in arguments.items() if name not in TAKEN)
        and not torch.is_grad_enabled()
    )


def decode_step(
    ways: Sequence[Callable[..., Any]], cache: TreeCache, ids: Tensor, positions: Tensor, padding: Tensor | None, *,
    capture: bool,
) -> Tensor:  # fmt: skip
    """Feed ids `[B, 1]` at `positions`; returns the logits `[B, 1, vocabulary]`, new memory each time.

    ways: forward functions; each runs one step, and all others are the last one's. capture: as a CUDA graph, on GPUs.
    """
    cursor = cache.begin_step(len(ids), ids.device, padding)
    key = (id(ways[0]), len(ways), capture, ids.shape, positions.shape, cursor.padding is None, cache.placement.version)
    step = cache.steps.get(key)
    if step is None:
        cache.steps.clear()
        _with_steps.add(cache)
        step = cache.steps[key] = Captured(ids.clone(), positions.clone())
    step.ids.copy_(ids)
    step.positions.copy_(positions)
    forward, before = ways[min(step.runs, len(ways) - 1)], cache.placement.received_bytes
    if step.runs == len(ways) and ids.is_cuda and capture:
        _capture(forward, cache, step)
    if step.graph is None or step.logits is None:
        logits = _run(forward, cache, step)
    else:
        step.graph.replay()
        logits = step.logits.clone()
    if step.runs == 0:  # later ones may be run without our Python
        step.received_bytes = cache.placement.received_bytes - before
    cache.placement.received_bytes = before + step.received_bytes
    step.runs += 1
    cache.end_step()
    return logits


def _capture(forward: Callable[..., Any], cache: TreeCache, step: Captured) -> None:
    """The graph of a step, which is not run here; without one, and with a warning, if the model does not let it."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # thread_local: NCCL's watchdog looks at its events meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step.logits = _run(forward, cache, step)
        step.graph = graph
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # torch leaves a stream that it could not capture current
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the decode step is launched kernel by kernel, it cannot be captured: {reason}", stacklevel=2)


def _run(forward: Callable[..., Any], cache: TreeCache, step: Captured) -> Tensor:
    with cache.stepping():
        return forward(
            input_ids=step.ids, position_ids=step.positions, past_key_values=cache, use_cache=True, return_dict=True
        ).logits
