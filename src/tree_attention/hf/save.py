"""A TreeCache in a folder: written whole or not at all, read on any number of ranks.

    FOLDER/current.json                         what the save is, and the SHA-256 of each of its files
    FOLDER/<name>/layer-7-rank-0.safetensors    keys and values of rank 0's slots
    FOLDER/<name>/layer-8.safetensors           a layer that is whole on every rank: a window, a linear state
    ... -tensor-1.safetensors                   either, of a model split by tensor parallelism: the heads of its rank 1

A save is a new sub-folder. current.json is replaced, in one step of the file system, when every rank has written its
files and they are on the disk; whatever happens before, the last save is as it was. Then older saves are deleted, and nothing else.
All ranks must see the folder.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from ..errors import InputError, TreeAttentionError
from ..group import first_fault, gather_objects, rank_and_size
from ..layout import Layout
from .cache import TreeCache
from .layers import ShardedLayer
from .state import set_state, state_of
from .tensor import tensor_group, tensor_ranks

VERSION = 2
CURRENT = "current.json"
NAME = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"layer-\d+(-rank-\d+)?(-tensor-\d+)?\.safetensors")
SAMPLES = 64  # of each weight
# Config fields that do not affect outputs.
NO_MATTER = {
    "attention_dropout", "bos_token_id", "distributed_config", "eos_token_id", "initializer_range",
    "output_router_logits", "pad_token_id", "pretraining_tp", "quantization_config", "router_aux_loss_coef",
    "tie_word_embeddings", "use_cache", *PreTrainedConfig().to_dict(),
}  # fmt: skip


def describe(model: Any) -> dict[str, Any]:
    """What a save must agree in with the model that reads it: the configuration, the dtype, a digest of some weights.

    Of a model that is split over ranks (all call together), the first one's weights.
    """
    config = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        here = (weight.to_local() if hasattr(weight, "to_local") else weight).detach().flatten()
        count = min(here.numel(), SAMPLES)  # from the first to the last, and not all of one column
        places = torch.arange(count, device=here.device) * (here.numel() - 1) // max(count - 1, 1)
        digest.update(here[places].float().cpu().numpy().tobytes())
    [weights] = _from_first([digest.hexdigest()[:16]], [tensor_group(model)])
    known = json.loads(config.to_json_string(use_diff=False))
    fields = {name: value for name, value in known.items() if name not in NO_MATTER and not name.startswith("_")}
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model_type": config.model_type, "dtype": dtype, "weights": weights} | fields


def save_cache(cache: TreeCache, folder: Path, about: dict[str, Any], *, tensor: ProcessGroup | None = None) -> None:
    """Write what the cache holds, and `about`, JSON values that `load_cache` gives back; all ranks together.

    tensor: the ranks that the model is split over, each with its heads; None if it is whole.

    Raises TreeAttentionError on every rank if one of them could not write; the folder's last save stays.
    """
    placement, groups = cache.placement, [cache.placement.group, tensor]
    tensor_rank, tensor_ranks = rank_and_size(tensor)
    first = placement.rank == 0 and tensor_rank == 0
    [name] = _from_first([uuid.uuid4().hex], groups)
    here, digests, states, cause = folder / name, {}, {}, None
    fault = _make_folder(here) if first else None
    _vote(fault, groups)
    try:
        for index, layer in enumerate(cache.layers):
            tensors, states[str(index)] = state_of(layer)
            if isinstance(layer, ShardedLayer):
                file = _file(index, placement.rank, tensor)
            elif tensors and placement.rank == 0:
                file = _file(index, None, tensor)
            else:
                continue
            digests[file] = _write(here / file, save({key: t.contiguous().cpu() for key, t in tensors.items()}))
    except Exception as error:  # the other ranks must not wait, whatever it is: memory is short as well as disks
        fault, cause = _cannot_write(placement.rank, folder, error), error
    gathered = _gathered((fault, digests), groups)
    fault = next((said for said, _ in gathered if said), None)
    if fault is None and first:
        manifest = {
            "version": VERSION, "name": name, "about": about, "tokens": cache.get_seq_length(),
            "world_size": placement.layout.world_size, "block": placement.layout.block, "states": states,
            "tensor_ranks": tensor_ranks,
            "files": {file: digest for _, its in gathered for file, digest in its.items()},
        }  # fmt: skip
        try:
            _replace_manifest(folder, manifest)
        except Exception as error:
            fault, cause = _cannot_write(0, folder, error), error
    [fault] = _from_first([fault], groups)
    if first:
        with contextlib.suppress(OSError):  # what cannot be looked at stays
            for path in [here] if fault else [path for path in folder.iterdir() if path.name != name]:
                if _is_ours(path):
                    shutil.rmtree(path, ignore_errors=True)
    if fault:
        raise TreeAttentionError(f"not saved, {fault}; a save that was there before is as it was") from cause


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder's last save is; raises InputError if there is none, or one that was changed."""
    try:
        document = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
        manifest, digest = document["manifest"], document["sha256"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no save: there is no {CURRENT}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the save in {folder} cannot be read: {CURRENT} is damaged ({error})") from None
    if digest != _digest(_as_json(manifest)):
        raise InputError(f"the save in {folder} cannot be read: {CURRENT} was changed since it was written")
    if manifest["version"] != VERSION:
        raise InputError(f"the save in {folder} is of version {manifest['version']}, this library reads {VERSION}")
    return manifest


def read_manifest_of(model: Any, folder: Path, groups: list[ProcessGroup | None]) -> dict[str, Any]:
    """Read the manifest and check that the save is of this model.

    All ranks of both groups (sequence, tensor) call it together. If one raises, all do: one may not see the folder.

    Raises:
        InputError: as `read_manifest`, or the save is of another model or of one split over another number of ranks.
    """
    described, manifest, fault = describe(model), {}, None
    try:
        manifest = read_manifest(folder)
        saved, split = manifest["tensor_ranks"], tensor_ranks(model.config)
        if saved != split:
            raise InputError(
                f"the save in {folder} is of a model split over {saved} ranks by tensor parallelism, and has a file "
                f"for the heads of each; this model is split over {split}: load it over {saved}"
            )
        _check_model(manifest["about"]["model"], described, folder)
    except InputError as error:
        fault = str(error)
    for group in groups:
        fault = first_fault(fault, group)
    if fault:
        raise InputError(fault)
    return manifest


def _check_model(saved: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raise InputError unless both describe one model. Fields that only one version of transformers has are ignored."""
    other = [f"{name} {saved[name]}, not {value}" for name, value in here.items() if saved.get(name, value) != value]
    if other:
        raise InputError(f"the save in {folder} is of another model: {'; '.join(other)}")


def load_cache(
    cache: TreeCache, folder: Path, manifest: dict[str, Any], device: torch.device, *,
    tensor: ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Fill a new cache, of any number of ranks and block size; all ranks together. tensor: as when it was saved.

    Raises InputError if it has no room, TreeAttentionError on every rank if one cannot read: a file is missing or was
    changed, memory is short.
    """
    placement = cache.placement
    placement.check_room(manifest["tokens"])
    fault = None
    try:
        for index, layer in enumerate(cache.layers):
            _fill(layer, index, folder / manifest["name"], manifest, device, tensor)
    except Exception as error:  # the vote below raises on every rank what one rank met
        expected = isinstance(error, OSError | SafetensorError | InputError)
        fault = f"rank {placement.rank}: {error if expected else f'{type(error).__name__}: {error}'}"
    placement.moved = True
    _vote(fault, [placement.group, tensor])


def _fill(
    layer: Any, index: int, here: Path, manifest: dict[str, Any], device: torch.device, tensor: ProcessGroup | None
) -> None:
    files, length = manifest["files"], manifest["tokens"]
    if not isinstance(layer, ShardedLayer):
        file, state = _file(index, None, tensor), manifest["states"][str(index)]
        tensors = _read(here / file, files[file]) if file in files else {}
        set_state(layer, {name: tensor.to(device) for name, tensor in tensors.items()}, state)
        return
    saved, mine, rank = Layout(manifest["world_size"], manifest["block"]), layer.placement.layout, layer.placement.rank
    layer.length, layer.fed = length, 0
    for other in [rank] if saved == mine else range(saved.world_size):
        file = _file(index, other, tensor)
        tensors = _read(here / file, files[file])
        if not tensors:  # saved before anything was read
            continue
        if not layer.is_initialized:
            empty = (tensors[name][:, :, :0].to(device) for name in ("keys", "values"))
            layer.lazy_initialization(*empty)
            layer.grow(layer.held)
        slots = saved.slots(0, length, other)
        kept = (mine.owner(slots) == rank).nonzero().flatten()
        places = mine.local_index(slots[kept]).to(device)
        for name, buffer in (("keys", layer.keys), ("values", layer.values)):
            buffer.index_copy_(2, places, tensors[name][:, :, kept].to(device))


def _file(index: int, rank: int | None, tensor: ProcessGroup | None) -> str:
    """The name for a layer's shard of a rank, or for a whole layer."""
    of_rank = "" if rank is None else f"-rank-{rank}"
    of_heads = "" if tensor is None else f"-tensor-{tensor.rank()}"
    return f"layer-{index}{of_rank}{of_heads}.safetensors"


def _is_ours(folder: Path) -> bool:
    """Whether a save made it, and nobody has put anything into it since."""
    is_named_so = NAME.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    return bool(is_named_so) and all(FILE.fullmatch(file.name) and file.is_file() for file in folder.iterdir())


def _cannot_write(rank: int, folder: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return f"rank {rank} cannot write to {folder}: {reason or error}"


def _make_folder(folder: Path) -> str | None:
    """Or why not."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return f"not saved, {folder.parent} cannot be written to: {error.strerror or error}"
    return None


def _write(file: Path, data: bytes) -> str:
    """To the disk; returns the digest."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return _digest(data)


def _read(file: Path, digest: str) -> dict[str, Tensor]:
    data = file.read_bytes()
    if _digest(data) != digest:
        raise InputError(f"{file} is cut off or was changed since it was written")
    return load(data)


def _replace_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    new = folder / f"{CURRENT}.new"
    _write(new, json.dumps({"manifest": manifest, "sha256": _digest(_as_json(manifest))}).encode())
    new.replace(folder / CURRENT)
    listing = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(listing)
    finally:
        os.close(listing)


def _as_json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _from_first(values: list[Any], groups: list[ProcessGroup | None]) -> list[Any]:
    """Of the first rank on both axes: along the sequence, then along the heads."""
    for group in groups:
        if group is not None:
            dist.broadcast_object_list(values, group=group, group_src=0)
    return values


def _gathered(mine: Any, groups: list[ProcessGroup | None]) -> list[Any]:
    """Of all ranks of both axes, the same list on each."""
    found = [mine]
    for group in groups:
        found = [each for one in gather_objects(found, group) for each in one]
    return found


def _vote(fault: str | None, groups: list[ProcessGroup | None]) -> None:
    """Raise on every rank what one of them found."""
    found = next((said for said in _gathered(fault, groups) if said), None)
    if found:
        raise TreeAttentionError(found)
