"""The decode step of a model with a static TreeCache: 1 to 16 tokens per row, on GPUs captured once, then replayed.

`install_step` wraps `model.forward`. The wrapper runs such steps in one of the modes that `TreeCache.step_mode` names:

eager      the model's forward as it is; also with `generate(disable_compile=True)`, and if it cannot be captured
captured   on GPUs: once eagerly, which compiles kernels, then as a CUDA graph: one launch instead of a thousand
compiled   once eagerly, once by torch.compile (one graph, no breaks), which fuses small kernels; then as a CUDA graph

NCCL cannot end a group while a graph with one of its collectives is alive (pytorch issue 115388). So `install_step`
also makes `torch.distributed.destroy_process_group` drop the graphs first.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import TreeCache
from .inputs import CACHE, OTHER_NAME
from .link_sums import close_links, open_link

# Arguments of `forward` in a step; the latter make no difference to it.
SUPPORTED = {"input_ids", "position_ids", "attention_mask", CACHE, OTHER_NAME}
WITHOUT_EFFECT = {"use_cache", "return_dict", "logits_to_keep"}
Forward = Callable[..., Any]
_caches_with_steps: weakref.WeakSet[TreeCache] = weakref.WeakSet()


@dataclass
class CapturedStep:
    """The memory that a step reads and writes, and its graph once it has been captured."""

    ids: Tensor
    positions: Tensor
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None
    received_bytes: float = 0.0


def install_step(model: Any) -> None:
    """Wrap `model.forward` and `destroy_process_group`, each once."""
    call_before(dist, "destroy_process_group", _release)
    if not hasattr(model.forward, "_tree_attention"):
        model.forward = SteppingForward(model.forward)


def call_before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Make the function `owner.name` call `action` first, with the same arguments. Wraps it once."""
    original = getattr(owner, name)
    if hasattr(original, "_tree_attention"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    wrapped._tree_attention = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _release(group: Any = None) -> None:
    for cache in _caches_with_steps:
        cache.captured_steps.clear()  # a cache that is used again captures again
    close_links(group)


class SteppingForward:
    """The wrapped `forward`: an object, not a function, so that a copied or unpickled model has its own."""

    def __init__(self, original: Forward) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._tree_attention = True  # on the instance, so that another wrapper copies it

    def __reduce__(self) -> Any:
        return SteppingForward, (self.original,)  # a bound method is copied together with its model

    @functools.cached_property
    def compiled(self) -> Forward:
        from .compile_pass import StepPass  # loads the compiler, which takes seconds

        step_pass = StepPass(open_link(getattr(self.original, "__self__", None)))
        # Choose kernels by rule: timing could choose differently on another rank, and give different bits.
        options: Any = {"deterministic": True, "post_grad_custom_pre_pass": step_pass}
        return torch.compile(self.original, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or not is_step(kwargs):
            return self.original(*args, **kwargs)
        cache = cache_in(kwargs)
        logits = self._step(cache, kwargs["input_ids"], kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return CausalLMOutputWithPast(logits=logits[:, -(kwargs.get("logits_to_keep") or 0) :], **{CACHE: cache})

    def _step(self, cache: TreeCache, ids: Tensor, positions: Tensor | None, padding: Tensor | None) -> Tensor:
        """Feed ids `[B, T]`; return the logits `[B, T, vocabulary]` in new memory.

        Step i runs `forwards[i]`. Later steps repeat the last one, on GPUs as a CUDA graph unless the mode is eager.
        """
        tokens, length = ids.shape[1], cache.get_seq_length()
        if positions is None:
            positions = torch.arange(length, length + tokens, device=ids.device)[None]
        # A graph would keep the casted weights that autocast frees when its block ends.
        is_eager = cache.disable_compile or torch.is_autocast_enabled(ids.device.type)
        mode = "eager" if is_eager else cache.step_mode
        forwards = [self.original, self.compiled] if mode == "compiled" else [self.original]
        exchange, cursor = cache.exchange, cache.begin_step(len(ids), tokens, ids.device, padding)
        version = cache.step_state.buffers_version
        key = (id(self.original), mode, len(ids), len(positions), cursor.padding is None, version, tokens)
        step = cache.captured_steps.get(key)
        if step is None:
            if any(other[:-1] != key[:-1] for other in cache.captured_steps):
                cache.captured_steps.clear()
            _caches_with_steps.add(cache)
            with torch.inference_mode(False):  # later steps write to them, in inference mode or not
                step = cache.captured_steps[key] = CapturedStep(ids.clone(), positions.clone())
        step.ids.copy_(ids)
        step.positions.copy_(positions)
        forward, before = forwards[min(step.runs, len(forwards) - 1)], exchange.received_bytes
        if step.runs == len(forwards) and ids.is_cuda and mode != "eager":
            _capture(forward, cache, step)
        if step.graph is None or step.logits is None:
            logits = _run(forward, cache, step)
        else:
            step.graph.replay()
            logits = step.logits.clone()
        counted = exchange.received_bytes - before
        if step.runs == 0:
            step.received_bytes = counted
        exchange.count(step.received_bytes - counted)  # a replayed or compiled step runs no Python code that counts
        step.runs += 1
        cache.end_step(tokens)
        return logits


def is_step(arguments: dict[str, Any]) -> bool:
    """Return whether a call of `forward` feeds a few tokens per row to a static TreeCache, and asks only for logits."""
    cache, ids, mask = cache_in(arguments), arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(cache, TreeCache) or not isinstance(ids, Tensor) or torch.is_grad_enabled():
        return False
    if not cache.can_step(ids.shape[1], mask) or isinstance(arguments.get("logits_to_keep"), Tensor):
        return False
    is_2d = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    returns_cache = arguments.get("use_cache") is not False and arguments.get("return_dict") is not False
    others = arguments.keys() - SUPPORTED - WITHOUT_EFFECT
    return is_2d and returns_cache and all(arguments[name] is None for name in others)


def cache_in(arguments: dict[str, Any]) -> Any:
    return arguments.get(CACHE, arguments.get(OTHER_NAME))


def _capture(forward: Forward, cache: TreeCache, step: CapturedStep) -> None:
    """Capture a step without running it. If the model cannot be captured, warn, and leave `step.graph` None."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # thread_local: NCCL's watchdog thread queries its events at the same time
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step.logits = _run(forward, cache, step)
        step.graph = graph
    except RuntimeError as error:
        torch.cuda.set_stream(here)  # after a failed capture torch leaves its capture stream current
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the decode step is launched kernel by kernel, it cannot be captured: {reason}", stacklevel=2)


def _run(forward: Forward, cache: TreeCache, step: CapturedStep) -> Tensor:
    with cache.step_state.stepping(cache.layers, step.ids.shape[1]):
        inputs = {"input_ids": step.ids, "position_ids": step.positions, CACHE: cache}
        return forward(**inputs, use_cache=True, return_dict=True).logits
