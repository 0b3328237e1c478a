"""Tensor parallelism next to sequence parallelism: a mesh of two axes, the second of which splits weights and heads.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("sequence", "tensor"))    # on all ranks
    model = load_tensor_parallel(name, mesh)                                          # 1/4 of the weights per rank
    cache = TreeCache(model.config, mesh["sequence"])                                 # 1/2 of the tokens per rank

transformers splits the model by its own plan, with two all-reduces per layer over the tensor axis.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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


def load_tensor_parallel(model: str | Path | PreTrainedConfig, mesh: DeviceMesh, **model_kwargs: Any) -> Any:
    """A causal language model with attn_implementation="tree_attention", split over the mesh's tensor axis.

    All ranks of the mesh load it together. Each rank reads its own part of the weights that the plan splits, and keeps
    it on its device. Other weights, such as norms, are whole on every rank.

    Args:
        model: a folder, a name on the hub, or a configuration. With a configuration each rank draws its own part of the
            weights at random on its device, after `torch.manual_seed(0)`. These differ from the weights that a single
            process would draw; on CPUs all parts of a weight are equal.
        mesh: axes "sequence" and "tensor"; the current device is this rank's. A tensor axis of 1 splits nothing. All
            ranks of the mesh work on one batch: if both axes are above 1 they share the logits.
        model_kwargs: further arguments of `from_pretrained`, or of `from_config`, such as dtype.

    Raises:
        InputError: the axes have other names, or the heads do not divide by the tensor axis.
        Unsupported: transformers has no plan for this model. Both are raised before any communication.
    """
    if mesh.mesh_dim_names != AXES:
        raise InputError(f"mesh must have the axes {AXES}, got {mesh.mesh_dim_names}")
    ranks, tensor = mesh.size(1), mesh["tensor"]
    model_kwargs = {"attn_implementation": "tree_attention"} | model_kwargs
    config = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(model)
    check_tensor_parallel(config, ranks)
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    loaded: Any
    if isinstance(model, PreTrainedConfig):
        loaded = _with_random_weights(model, tensor, device, model_kwargs)
    elif ranks == 1:
        loaded = AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
    else:
        with _split_over(tensor):
            loaded = AutoModelForCausalLM.from_pretrained(model, distributed_config=_plan(tensor), **model_kwargs)
    loaded = loaded.to(device).eval()
    loaded.tree_attention_mesh = mesh
    if mesh.size(0) > 1 and ranks > 1:
        _share_logits(loaded, mesh["sequence"].get_group())
    return loaded


def check_tensor_parallel(config: PreTrainedConfig, ranks: int) -> None:
    """Raise unless a model of this configuration can be split over `ranks` ranks. No communication."""
    text = config.get_text_config(decoder=True)
    if ranks == 1:
        return
    if ranks < 1:
        raise InputError(f"tensor parallelism needs at least 1 rank, got {ranks}")
    if not any(name.startswith("layers.") for name in text.base_model_tp_plan or ()):
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
    """The ranks with the same heads, for a model from `load_tensor_parallel`; None (all ranks) for other models."""
    mesh = getattr(model, "tree_attention_mesh", None)
    return None if mesh is None else mesh["sequence"]


def tensor_group(model: Any) -> ProcessGroup | None:
    """The ranks that the model is split over, however it was loaded; None if it is not split."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or tensor_ranks(model.config) == 1:
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def tensor_ranks(config: PreTrainedConfig) -> int:
    """Number of ranks that a loaded model is split over, which transformers records in the configuration."""
    return getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1


def check_axes(model: Any, group: Group) -> None:
    """Raise InputError if a cache over `group` would merge the attention of ranks with different heads."""
    tensor, sequence = tensor_group(model), resolve_group(group)
    if tensor is None or sequence is None:
        return
    both = set(dist.get_process_group_ranks(tensor)) & set(dist.get_process_group_ranks(sequence))
    if len(both) > 1:
        raise InputError(
            f"the ranks of a cache must hold the same heads, but the model is split over {sorted(both)} of them: "
            "make it with mesh['sequence'], the other axis of the mesh"
        )


def _plan(tensor: DeviceMesh) -> DistributedConfig:
    return DistributedConfig(tp_size=tensor.size(), tp_plan="auto")


def _mesh_argument(tensor: DeviceMesh) -> Any:
    """The mesh in the form that this version of transformers takes: newer ones ask an object for one axis."""
    is_new = hasattr(transformers.distributed.utils, "TransformersDeviceMesh")
    return SimpleNamespace(get_mesh=lambda dims: tensor) if is_new else tensor


@contextlib.contextmanager
def _split_over(tensor: DeviceMesh) -> Iterator[None]:
    """Inside, `from_pretrained(distributed_config=...)` splits over this mesh, not over one that it makes itself."""

    def prepare(cls: Any, distributed_config: Any, **_: Any) -> tuple[Any, None, Any]:
        return distributed_config, None, _mesh_argument(tensor)  # None: a device_map would require accelerate

    cls: Any = PreTrainedModel
    cls.prepare_distribute_model = classmethod(prepare)  # shadows the inherited method
    try:
        yield
    finally:
        del cls.prepare_distribute_model


def _with_random_weights(config: Any, tensor: DeviceMesh, device: torch.device, model_kwargs: dict[str, Any]) -> Any:
    """Split the model before its memory is allocated: no rank ever holds a whole weight that the plan splits."""
    model: Any
    with torch.device("meta"), no_tie_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **model_kwargs)
    if tensor.size() > 1:
        model = model.maybe_distribute_model(model, _plan(tensor), _mesh_argument(tensor))
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.initialize_weights()
    model.tie_weights()
    return model


def _share_logits(model: Any, sequence: ProcessGroup) -> None:
    """Give all ranks of the sequence axis the first rank's logits: each tensor group may sum in another order."""

    def share(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.contiguous() if sequence.rank() == 0 else torch.zeros_like(logits)
        dist.all_reduce(logits, group=sequence)  # a broadcast of rank 0's, in a form that torch.compile supports
        return logits

    model.get_output_embeddings().register_forward_hook(share)
