"""From the command line to a model and tokens: the ranks, the chat template around a document; or random ones."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import InputError, TreeAttentionError
from ..group import Group, gather_objects
from ..hf import load_tensor_parallel
from ..hf.tensor_parallel import AXES, check_tensor_parallel, sequence_axis
from ..reduce import TwoLevel


def sequence_ranks(model: Any) -> Group | TwoLevel:
    """The ranks that share a sequence, for a TreeCache; if all ranks do, on several hosts, by hosts."""
    axis = sequence_axis(model)
    hosts = set(gather_objects(socket.gethostname(), dist.group.WORLD))
    return TwoLevel() if axis is None and len(hosts) > 1 else axis


def step_of(compiled: bool, device: torch.device) -> str:
    """How a TreeCache is to run its steps."""
    if compiled and device.type != "cuda":
        raise InputError("compile is for GPUs, where steps are captured: leave it out")
    return "compiled" if compiled else "captured"


def load_model(model: str, dtype: str, device: torch.device, *, random: bool = False, tensor_parallel: int = 1) -> Any:
    """A folder, a name on the hub or, with random weights, a config.json; auto is float32 on the CPU, else bfloat16.

    tensor_parallel: ranks that the weights are split over, neighbours; the others are for the sequence.
    """
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "tree_attention"}
    try:
        if tensor_parallel != 1:
            config = AutoConfig.from_pretrained(model)
            mesh = _mesh(config, tensor_parallel, device)
            return load_tensor_parallel(config if random else model, mesh, **how)
        if random:
            torch.manual_seed(0)  # the same weights on every rank
            with device:
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), **how).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, **how)
    except TreeAttentionError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"model {model} cannot be loaded: {error}") from None
    return loaded.to(device).eval()


def _mesh(config: Any, tensor_parallel: int, device: torch.device) -> DeviceMesh:
    """All ranks, on two axes."""
    check_tensor_parallel(config, tensor_parallel)
    ranks = dist.get_world_size()
    if ranks % tensor_parallel:
        raise InputError(
            f"nproc is the ranks of the sequence times those of tensor-parallel, got {ranks} and {tensor_parallel}: "
            f"start a multiple of {tensor_parallel}"
        )
    return init_device_mesh(device.type, (ranks // tensor_parallel, tensor_parallel), mesh_dim_names=AXES)


@contextlib.contextmanager
def reading_bar(tokens: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that predicts the end; gives what to call with the number of tokens read."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=tokens)
        yield lambda done: progress.update(task, completed=done)


def prompt_ids(tokenizer: Any, document: str, prompt: str, *, plain: bool, limit: int | None) -> Tensor:
    """`[1, tokens]`: the document, the question, and the chat template around them if the tokenizer has one.

    plain: without the template. limit: cut the document's end so that there are no more tokens.
    """

    def tokens(text: str) -> list[int]:
        whole = f"{text}\n\n{prompt}" if text else prompt
        if plain or tokenizer.chat_template is None:
            return tokenizer(whole).input_ids
        message = [{"role": "user", "content": whole}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids = tokens(document)
    if limit is not None and len(ids) > limit:
        alone = len(tokens(""))
        kept = tokenizer(document).input_ids[: max(limit - alone, 0)]
        while kept and len(ids) > limit:  # around the cut and in the template there may be some tokens more
            ids = tokens(tokenizer.decode(kept, skip_special_tokens=True))
            kept = kept if len(ids) <= limit else kept[:-1]
        if not kept:
            raise InputError(f"max-prompt-tokens must be more than the {alone} of the prompt alone, got {limit}")
    return torch.tensor([ids])


def random_ids(config: Any, tokens: int, seed: int) -> Tensor:
    """`[1, tokens]`, the same on every rank."""
    vocabulary = config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def check_positions(config: Any, tokens: int, new_tokens: int) -> None:
    """Raise InputError if the model was not made for so many positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and tokens + new_tokens > positions:
        raise InputError(
            f"the model has {positions} positions, and {tokens} prompt tokens with {new_tokens} new ones "
            "do not fit: give it less text (generate cuts it with --max-prompt-tokens), or --extrapolate to go beyond "
            "its training"
        )
