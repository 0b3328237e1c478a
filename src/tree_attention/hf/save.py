"""Save a TreeCache to a folder, completely or not at all, and load it on any number of ranks.

    FOLDER/current.json                         the manifest: what the save is, and the SHA-256 of each of its files
    FOLDER/<name>/layer-7-rank-0.safetensors    keys and values of rank 0's slots
    FOLDER/<name>/layer-8.safetensors           a layer that is whole on every rank: a window, a linear state
    ... -tensor-1.safetensors                   either of them, for the heads of rank 1 of the tensor-parallel axis

A save writes a new sub-folder. When the files of every rank are on the disk, it replaces current.json in one step of
the file system. Until then the previous save stays valid; after it, older saves are deleted, and nothing else in the
folder is. Locks keep two processes apart (save_folder.py). All ranks must see the folder.
"""

import contextlib
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from ..errors import InputError, TreeAttentionError
from ..group import broadcast_from_first, first_fault, gather_values, rank_and_size
from ..layout import Layout
from .cache import TreeCache
from .hybrid_layer import HybridLayer
from .inputs import adapters_of
from .layer_state import export_state, import_state
from .layers import ShardedLayer
from .save_folder import delete_save, read_file, read_manifest, reading, replace_manifest, write_file, writing
from .tensor_parallel import tensor_group, tensor_ranks

SAMPLES = 64  # numbers of each weight that the digest of a model reads
OF_LENGTH = "inv_freq"  # buffers that some models change with the length of the text
# Config fields that do not affect outputs.
IGNORED_FIELDS = {*PreTrainedConfig().to_dict(), "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
IGNORED_FIELDS |= {"attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"}
IGNORED_FIELDS |= {"distributed_config", "pretraining_tp", "quantization_config", "use_cache"}


def save_cache(cache: TreeCache, folder: Path, model: Any, about: dict[str, Any]) -> None:
    """Write the cache and `about`, JSON values, to the folder. All ranks call it together.

    Raises:
        TreeAttentionError: on every rank if one of them could not write. The previous save stays valid.
    """
    ranks, tensor = cache.ranks, tensor_group(model)
    groups, is_first = (ranks.group, tensor), ranks.rank == rank_and_size(tensor)[0] == 0
    about = {"model": describe(model)} | about
    name = broadcast_from_first(uuid.uuid4().hex, *groups)
    target, digests, states, fault, cause = folder / name, {}, {}, None, None
    with contextlib.ExitStack() as held:
        try:
            if is_first:
                held.enter_context(writing(folder, name))
        except OSError as error:
            fault = _cannot_write(0, folder, error)
        if fault := first_fault(fault, *groups):
            raise TreeAttentionError(fault)
        try:
            for index, layer in enumerate(cache.layers):
                tensors, states[str(index)] = export_state(layer)
                is_sharded = isinstance(layer, ShardedLayer)
                if is_sharded or (tensors and ranks.rank == 0):
                    file = _file_name(index, ranks.rank if is_sharded else None, tensor)
                    data = save({key: each.contiguous().cpu() for key, each in tensors.items()})
                    digests[file] = write_file(target / file, data)
        except Exception as error:  # reported by the vote below: whatever it is, the other ranks must not wait
            fault, cause = _cannot_write(ranks.rank, folder, error), error
        results = gather_values((fault, digests), *groups)
        fault = next((text for text, _ in results if text), None)
        if fault is None and is_first:
            files = {file: digest for _, of_rank in results for file, digest in of_rank.items()}
            manifest = {"name": name, "about": about, "tokens": cache.get_seq_length(), "states": states}
            manifest |= {"world_size": ranks.layout.world_size, "block": ranks.layout.block}
            manifest |= {"tensor_ranks": rank_and_size(tensor)[1], "files": files}
            try:
                replace_manifest(folder, manifest)
            except Exception as error:  # reported by the vote below
                fault, cause = _cannot_write(0, folder, error), error
        fault = broadcast_from_first(fault, *groups)
        if is_first:
            with contextlib.suppress(OSError):  # a folder that cannot be listed stays
                for path in [target] if fault else [path for path in folder.iterdir() if path.name != name]:
                    delete_save(path)
    if fault:
        raise TreeAttentionError(fault) from cause


def load_cache(cache: TreeCache, folder: Path, model: Any) -> dict[str, Any]:
    """Fill a new cache, of any number of ranks and any block size, and return `about`. All ranks call it together.

    Raises:
        InputError: as `read_manifest`; or the save is of another model, or of one split over another number of ranks;
            or the static cache is too small.
        TreeAttentionError: on every rank if one cannot read: a file is missing or was changed, or memory is short.
    """
    groups, fault = (cache.ranks.group, tensor_group(model)), None
    with contextlib.ExitStack() as held:
        manifest = _read_manifest_of(model, folder, groups, held)
        cache.ranks.check_capacity(manifest["tokens"])
        try:
            for index, layer in enumerate(cache.layers):
                _fill(layer, index, folder / manifest["name"], manifest, model)
        except Exception as error:  # reported by the vote below
            explains_itself = isinstance(error, OSError | SafetensorError | InputError)
            fault = f"rank {cache.ranks.rank}: {error if explains_itself else f'{type(error).__name__}: {error}'}"
        if fault := first_fault(fault, *groups):
            raise TreeAttentionError(fault)
        return manifest["about"]


def _read_manifest_of(
    model: Any, folder: Path, groups: tuple[ProcessGroup | None, ...], held: contextlib.ExitStack
) -> dict[str, Any]:
    """Return the first rank's manifest, and keep its files from being deleted until `held` is closed.

    Raises InputError on all ranks if the save is of another model, or if one of them does not see it.
    """
    described, manifest, fault = describe(model), {}, None
    is_first = all(rank_and_size(group)[0] == 0 for group in groups)
    try:
        manifest = held.enter_context(reading(folder)) if is_first else read_manifest(folder)
        saved, split = manifest["tensor_ranks"], tensor_ranks(model.config)
        if saved != split:
            raise InputError(
                f"the save in {folder} is of a model split over {saved} ranks by tensor parallelism, and has a file "
                f"for the heads of each; this model is split over {split}: load it over {saved}"
            )
        saved = manifest["about"]["model"]  # fields that only one version of transformers knows are not compared
        pairs = ((key, saved.get(key, value), value) for key, value in described.items())
        if other := [f"{key} {old}, not {new}" for key, old, new in pairs if old != new]:
            raise InputError(f"the save in {folder} is of another model: {'; '.join(other)}")
    except InputError as error:
        fault = str(error)
    if fault := first_fault(fault, *groups):
        raise InputError(fault)
    return broadcast_from_first(manifest, *groups)  # another process may have saved since


def describe(model: Any) -> dict[str, Any]:
    """Return what a save and the model that loads it must agree in: all that its keys depend on.

    That is its configuration, dtype, adapters, and digests of sampled weights and buffers (of quantized models). The
    ranks of a split model call it together; the digests are those of the first rank.
    """
    config = model.config.get_text_config(decoder=True)
    state: dict[str, Any] = model.state_dict(keep_vars=True)  # with persistent buffers, and what quantizers add
    buffers = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and not name.endswith(OF_LENGTH)
    }
    digests = _digest_of_samples(dict(model.named_parameters())), _digest_of_samples(buffers)
    weights, other_weights = broadcast_from_first(digests, tensor_group(model))
    adapters, adapter_layers = adapters_of(model)
    known = json.loads(config.to_json_string(use_diff=False))
    fields = {key: value for key, value in known.items() if key not in IGNORED_FIELDS and not key.startswith("_")}
    dtype = str(model.dtype).removeprefix("torch.")
    found = {"model_type": config.model_type, "dtype": dtype, "weights": weights, "buffers": other_weights}
    return found | {"adapters": adapters, "adapter_layers": adapter_layers} | fields


def _digest_of_samples(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor):
            flat = part.flatten()
            count = min(flat.numel(), SAMPLES)  # evenly spaced, so not all from one column
            places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
            digest.update(flat[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold a tensor: a DTensor's own part, a quantized tensor's numbers and scales."""
    tensor = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _fill(layer: Any, index: int, source: Path, manifest: dict[str, Any], model: Any) -> None:
    """Load one layer: all of it, or this rank's slots from the files of all ranks that saved."""
    files, length, device, tensor = manifest["files"], manifest["tokens"], model.device, tensor_group(model)
    if not isinstance(layer, ShardedLayer):
        file, state = _file_name(index, None, tensor), manifest["states"][str(index)]
        tensors = load(read_file(source / file, files[file])) if file in files else {}
        import_state(layer, {key: each.to(device) for key, each in tensors.items()}, state)
        return
    saved, layout, rank = Layout(manifest["world_size"], manifest["block"]), layer.ranks.layout, layer.ranks.rank
    state = manifest["states"][str(index)]
    layer.count(length if state["length"] else 0)  # a layer that the model never feeds stays empty
    for other in [rank] if saved == layout else range(saved.world_size):
        file = _file_name(index, other, tensor)
        tensors = load(read_file(source / file, files[file]))
        if not tensors:  # saved before anything was read
            continue
        if not layer.is_initialized:
            layer.lazy_initialization(*(tensors[key][:, :, :0].to(device) for key in ("keys", "values")))
            layer.grow(layer.held)
        slots = saved.slots(0, length, other)
        kept = (layout.owner(slots) == rank).nonzero().flatten()
        places = layout.local_index(slots[kept]).to(device)
        for key, buffer in (("keys", layer.keys), ("values", layer.values)):
            buffer.index_copy_(2, places, tensors[key][:, :, kept].to(device))
        if isinstance(layer, HybridLayer):  # its states are whole in each rank's file
            layer.import_states({key: each.to(device) for key, each in tensors.items()}, state)


def _file_name(index: int, rank: int | None, tensor: ProcessGroup | None) -> str:
    """Return the file name of a layer: one rank's shard, or the whole layer if `rank` is None."""
    shard = "" if rank is None else f"-rank-{rank}"
    heads = "" if tensor is None else f"-tensor-{tensor.rank()}"
    return f"layer-{index}{shard}{heads}.safetensors"


def _cannot_write(rank: int, folder: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    if isinstance(error, BlockingIOError):
        reason = "another process is saving there"
    kept = "a save that was there before is as it was"
    return f"not saved, rank {rank} cannot write to {folder}: {reason or error}; {kept}"
