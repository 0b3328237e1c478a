"""Tensor parallelism beside the sequence: a mesh of two axes, whose second one shares out weights and heads.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("sequence", "tensor"))    # on all ranks
    model = load_tensor_parallel(name, mesh)                                          # a quarter of the weights a rank
    cache = TreeCache(model.config, mesh["sequence"])                                 # a half of the tokens a rank

transformers splits the model by its own plan: a rank has some of the heads and a part of each MLP, and two all-reduces
a layer add up what the ranks of the tensor axis give. A cache sees its rank's heads only, and spreads their keys over
the sequence axis. By itself transformers splits a model over all ranks there are; here it is told the axis.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.distributed.utils
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.initialization import no_tie_weights

from ..errors import InputError, Unsupported
from ..group import Group, resolve_group

AXES = ("sequence", "tensor")


def load_tensor_parallel(model: str | Path | PreTrainedConfig, mesh: DeviceMesh, **how: Any) -> Any:
    """A causal language model with attn_implementation="tree_attention", split over the mesh's tensor axis.

    All ranks of the mesh load it together. A rank reads, and keeps on its device, its own part of each weight in the
    plan; the others, such as norms, are whole on every rank.

    Args:
        model: a folder, a name on the hub, or a configuration: then weights are drawn at random, each rank its own part
            on its device, after `torch.manual_seed(0)`. They are others than one process would draw; on CPUs the parts
            of one weight are alike.
        mesh: axes "sequence" and "tensor"; the current device is this rank's. With a tensor axis of 1 nothing is split.
            All its ranks work on one batch: with both axes above 1 they share the logits.
        how: further arguments of `from_pretrained`, or of `from_config`: dtype, and so on.

    Raises, before any communication:
        InputError: other axes, or heads that cannot be shared out over so many ranks.
        Unsupported: transformers has no plan for this model.
    """
    if mesh.mesh_dim_names != AXES:
        raise InputError(f"mesh must have the axes {AXES}, got {mesh.mesh_dim_names}")
    ranks, tensor, how = mesh.size(1), mesh["tensor"], {"attn_implementation": "tree_attention"} | how
    config = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
    check_tensor_parallel(config, ranks)
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    loaded: Any
    if isinstance(model, PreTrainedConfig):
        loaded = _drawn(model, tensor, device, how)
    elif ranks == 1:
        loaded = AutoModelForCausalLM.from_pretrained(model, **how)
    else:
        with _split_over(tensor):
            loaded = AutoModelForCausalLM.from_pretrained(model, distributed_config=_config(ranks), **how)
    loaded = loaded.to(device).eval()
    loaded.tree_attention_mesh = mesh
    if mesh.size(0) > 1 and ranks > 1:
        _equal_bits(loaded, mesh["sequence"].get_group())
    return loaded


def check_tensor_parallel(config: PreTrainedConfig, ranks: int) -> None:
    """Raise unless a model of this configuration can be split over so many ranks; no communication."""
    text = config.get_text_config(decoder=True)
    if ranks == 1:
        return
    if ranks < 1:
        raise InputError(f"tensor parallelism needs at least 1 rank, got {ranks}")
    if not text.base_model_tp_plan:
        raise Unsupported(
            f"transformers has no tensor-parallel plan for {text.model_type}: leave its weights whole on every rank, "
            "and use all ranks for the sequence"
        )
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if ranks > kv_heads:
        raise InputError(
            f"tensor parallelism goes up to the KV heads, {kv_heads} here, got {ranks} ranks: beyond that ranks would "
            "hold the same keys; use the other ranks for the sequence"
        )
    if heads % ranks or kv_heads % ranks:
        raise InputError(f"{heads} heads and {kv_heads} KV heads must divide by the tensor-parallel ranks, got {ranks}")


def sequence_axis(model: Any) -> DeviceMesh | None:
    """The ranks with the same heads, of a model from `load_tensor_parallel`; None for others: all ranks."""
    mesh = getattr(model, "tree_attention_mesh", None)
    return None if mesh is None else mesh["sequence"]


def tensor_group(model: Any) -> ProcessGroup | None:
    """The ranks that the model is split over, however it was loaded; None if it is whole."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or tensor_ranks(model.config) == 1:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def tensor_ranks(config: PreTrainedConfig) -> int:
    """How many ranks a loaded model is split over, which transformers notes in its configuration."""
    return getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1


def check_axes(model: Any, group: Group) -> None:
    """Raise InputError if ranks with different heads would merge their attention: the wrong ranks for a cache."""
    tensor, sequence = tensor_group(model), resolve_group(group)
    if tensor is None or sequence is None:
        return
    both = set(dist.get_process_group_ranks(tensor)) & set(dist.get_process_group_ranks(sequence))
    if len(both) > 1:
        raise InputError(
            f"the ranks of a cache must hold the same heads, but the model is split over {sorted(both)} of them: "
            "make it with mesh['sequence'], the other axis of the mesh"
        )


def _config(ranks: int) -> DistributedConfig:
    return DistributedConfig(tp_size=ranks, tp_plan="auto")


@dataclass(frozen=True)
class _OneAxis:
    """Stands for the mesh of all of transformers' axes, of which the others have one rank."""

    tensor: DeviceMesh

    def get_mesh(self, dims: Any) -> DeviceMesh:
        return self.tensor


def _as_transformers_wants(tensor: DeviceMesh) -> Any:
    """Older ones take the mesh itself."""
    return _OneAxis(tensor) if hasattr(transformers.distributed.utils, "TransformersDeviceMesh") else tensor


@contextlib.contextmanager
def _split_over(tensor: DeviceMesh) -> Iterator[None]:
    """Within it `from_pretrained(distributed_config=...)` splits over this mesh, not over one that it makes.

    Weights come to the CPU, whence the caller moves them: a device_map would need accelerate.
    """

    def prepare(cls: Any, distributed_config: Any, **_: Any) -> tuple[Any, None, Any]:
        return distributed_config, None, _as_transformers_wants(tensor)

    cls: Any = PreTrainedModel
    cls.prepare_distribute_model = classmethod(prepare)  # hides the inherited one
    try:
        yield
    finally:
        del cls.prepare_distribute_model


def _drawn(config: PreTrainedConfig, tensor: DeviceMesh, device: torch.device, how: dict[str, Any]) -> Any:
    """Split while it has no memory yet, so that no rank ever holds a whole weight of the plan."""
    model: Any
    with torch.device("meta"), no_tie_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **how)
    if tensor.size() > 1:
        model = model.maybe_distribute_model(model, _config(tensor.size()), _as_transformers_wants(tensor))
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.initialize_weights()
    model.tie_weights()
    return model


def _equal_bits(model: Any, sequence: ProcessGroup) -> None:
    """The first rank's logits for all of them.

    An all-reduce gives its own ranks the same bits, but another group may add in another order. Then logits that differ
    in the last bit could sample different tokens.
    """

    def share(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.contiguous() if sequence.rank() == 0 else torch.zeros_like(logits)
        dist.all_reduce(logits, group=sequence)  # a broadcast, which torch.compile could not take
        return logits

    model.get_output_embeddings().register_forward_hook(share)
