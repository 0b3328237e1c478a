"""What the ranks of `generate` and `chat` take from transformers: the model, the prompt, the session, the sampling."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from ..errors import InputError, TreeAttentionError
from ..group import gather_values
from ..hf import Session, load_tensor_parallel
from ..hf.chat_template import ChatTemplate
from ..hf.tensor_parallel import AXES, check_tensor_parallel, sequence_axis
from ..host import free_bytes
from ..reduce import TwoLevel
from .options import ChatOptions, DecodingOptions, GenerateOptions, weight_bytes
from .terminal import busy


def load_model(model: str, dtype: str, device: torch.device, *, random: bool = False, tensor_parallel: int = 1) -> Any:
    """Load a model with "tree_attention" onto this rank's device, on all ranks together.

    model: a folder or a name on the hub; with `random`, a config.json, and the weights are random but the same on every
    rank. dtype: "auto" means float32 on the CPU, else bfloat16. tensor_parallel: ranks that the weights are split over.
    """
    nbytes = weight_bytes(model)
    size = f", {nbytes / 1e9:.2f} GB" if nbytes else ""
    with busy(f"loading {Path(model).name}{size}", shown=not dist.is_initialized() or dist.get_rank() == 0):
        return _load_model(model, dtype, device, random, tensor_parallel)


def _load_model(model: str, dtype: str, device: torch.device, random: bool, tensor_parallel: int) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model_kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "tree_attention"}
    try:
        config: Any = AutoConfig.from_pretrained(model)
        if tensor_parallel != 1:
            check_tensor_parallel(config, tensor_parallel)
        if not random:
            _check_memory(model, config, model_kwargs["dtype"], device, tensor_parallel)
        if tensor_parallel != 1:
            ranks = dist.get_world_size()
            if ranks % tensor_parallel:
                got = f"got {ranks} and {tensor_parallel}: start a multiple of {tensor_parallel} ranks"
                raise InputError(f"nproc must be a multiple of tensor-parallel, {got}")
            shape = (ranks // tensor_parallel, tensor_parallel)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
            return load_tensor_parallel(config if random else model, mesh, **model_kwargs)
        if random:
            torch.manual_seed(0)
            with device:
                return AutoModelForCausalLM.from_config(config, **model_kwargs).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
    except TreeAttentionError:
        raise
    except UnpicklingError:  # torch advises to turn its safety off
        raise InputError(
            f"model {model} cannot be loaded: its weights are damaged, or contain more than tensors"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError) as error:
        raise InputError(f"model {model} cannot be loaded: {error}") from None
    return loaded.to(device).eval()


def _check_memory(model: str, config: Any, dtype: torch.dtype, device: torch.device, tensor_parallel: int) -> None:
    """Raise InputError unless the weights fit: those of all ranks into this host, or a rank's into its GPU."""
    if getattr(config, "quantization_config", None) is not None:
        return
    size = weight_bytes(model) * dtype.itemsize / (config.dtype or torch.float32).itemsize / tensor_parallel
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1))
    needed, free, where = size * ranks, free_bytes(), f"for {ranks} ranks, and this host has"
    if device.type == "cuda":
        needed, free, where = size, torch.cuda.mem_get_info(device)[0], "per rank, and its GPU has"
    if needed > free:
        raise InputError(
            f"the weights of {model} take {needed / 1e9:.1f} GB {where} {free / 1e9:.1f} GB free: start fewer ranks, "
            "use a 16-bit --dtype, or split the weights with --tensor-parallel"
        )


def check_step_mode(compiled: bool, device: torch.device) -> str:
    """Return the `step` argument of TreeCache. Raises InputError for --compile on a CPU."""
    if compiled and device.type != "cuda":
        raise InputError("compile is for GPUs, where steps are captured: leave it out")
    return "compiled" if compiled else "captured"


class StopOnRequest(StoppingCriteria):
    """Ends an answer when a shared value becomes true. `generate` asks it on the first rank alone."""

    def __init__(self, requested: Any) -> None:
        self.requested = requested

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), bool(self.requested.value), device=input_ids.device)


class Prompt(NamedTuple):
    tokenizer: Any
    template: ChatTemplate
    text: Tensor  # token ids [n]
    question: str
    tokens: int  # number of tokens of text, question and template together


def text_prompt(options: GenerateOptions, document: str) -> Prompt:
    """Return the document, truncated to --max-prompt-tokens, and the question; without a document, --prompt as text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    has_template = tokenizer.chat_template is not None and not options.plain
    template = ChatTemplate.from_tokenizer(tokenizer) if has_template else ChatTemplate.plain(tokenizer)
    template = replace(template, control_tokens=options.plain)
    text, question = (document, options.prompt) if document else (options.prompt, "")
    ids, before = template.message_ids(tokenizer, text), tokenizer(template.opening, add_special_tokens=False).input_ids
    after = template.question_ids(tokenizer, question, started=True, in_question=True)
    others, limit = len(before) + len(after), options.max_prompt_tokens
    least = others + (1 if document else len(ids))
    if limit is not None and limit < least:
        raise InputError(f"max-prompt-tokens must be at least {least} for this prompt, got {limit}")
    kept = ids if limit is None else ids[: limit - others]
    return Prompt(tokenizer, template, torch.tensor(kept), question, len(kept) + others)


def random_prompt(options: GenerateOptions, config: Any) -> Prompt:
    """Return --max-prompt-tokens random tokens, the same on every rank, and a tokenizer that decodes all to nothing."""
    tokens, vocabulary = options.max_prompt_tokens or 1, config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(options.seed))
    return Prompt(SimpleNamespace(decode=lambda token_ids, **_: ""), ChatTemplate("", "", "", ""), ids, "", tokens)


def open_session(
    options: GenerateOptions | ChatOptions, model: Any, tokenizer: Any, max_tokens: int | None, template: Any = None
) -> Session:
    """Open a session on all ranks, or load the saved one that `chat --load` names."""
    group, hosts = sequence_axis(model), set(gather_values(socket.gethostname(), dist.group.WORLD))
    if group is None and len(hosts) > 1:
        group = TwoLevel()
    step, block_tokens = check_step_mode(options.compiled, model.device), options.block_tokens
    cache_kwargs: dict[str, Any] = {"max_tokens": max_tokens, "block_tokens": block_tokens, "step": step}
    if isinstance(options, ChatOptions) and options.load is not None:
        return Session.load(options.load, model, tokenizer, group, template=template, **cache_kwargs)
    return Session.open(model, tokenizer, group, template=template, **cache_kwargs)


def check_positions(options: DecodingOptions, config: Any, tokens: int, new_tokens: int) -> None:
    """Raise InputError if a text of `tokens` and `new_tokens` exceeds the model's positions, unless --extrapolate."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    less = "give it less text, with --max-prompt-tokens, or --extrapolate beyond its training"
    if isinstance(options, ChatOptions):
        less = "allow shorter answers with --max-new-tokens, take questions back with /new, or --extrapolate"
    if not options.extrapolate and positions is not None and tokens + new_tokens > positions:
        raise InputError(
            f"the model has {positions} positions, and {tokens} prompt tokens with {new_tokens} new ones do not fit: "
            + less
        )


def generate_kwargs(options: GenerateOptions | ChatOptions) -> dict[str, Any]:
    """Return the arguments of `Session.ask` that the options ask for."""
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.sample}
    chosen["lookup"] = options.lookup
    if not options.sample:  # None overrides the sampling settings of the model's generation_config
        chosen |= dict.fromkeys(("temperature", "top_p", "top_k"))
    elif isinstance(options, GenerateOptions):
        chosen["temperature"] = options.temperature
    if isinstance(options, GenerateOptions) and options.random_weights:
        chosen["eos_token_id"] = None  # always write max_new_tokens
    return chosen
