"""The options of every command, each written once, and their checks that need no model.

The fields of a frozen dataclass are the flags of a command, its docstring is the help. A field is annotated with its
type, the names of its flag if they differ from the field's, and the help. Nothing here imports torch or transformers:
`--help` must be fast.
"""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from ..errors import InputError, Unavailable

SIZE, UNITS = re.compile(r"(-?\d[\d_]*(?:\.\d+)?(?:e\d+)?)([km]?)"), {"": 1, "k": 1 << 10, "m": 1 << 20}
ModelName = Annotated[str, "Folder of a Hugging Face model, or its name on the hub."]
Device = Annotated[str, "cpu, cuda or auto. auto: cuda if each rank gets a GPU, else cpu."]
TensorParallel = Annotated[int, "Ranks that split weights and heads. NPROC / TENSOR_PARALLEL ranks shard the sequence."]
Output = Annotated[Path | None, "Append the records to this file, one JSON document per line."]
Plot = Annotated[Path | None, "Draw a chart: a .png or .svg file. Needs matplotlib."]
Json = Annotated[bool, "--json", "Print one JSON document as the last line of stdout."]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options shared by `generate` and `chat`: the ranks, the model's dtype and device, the cache and sampling."""

    nproc: Annotated[int | None, "Ranks to start on this machine. Default: 1."] = None
    sample: Annotated[bool, "Sample tokens instead of taking the most likely one."] = False
    seed: Annotated[int, "Seed for sampling."] = 0
    dtype: Annotated[str, "float32, bfloat16, float16 or auto. auto: float32 on the CPU, bfloat16 on GPUs."] = "auto"
    device: Device = "auto"
    tensor_parallel: TensorParallel = 1
    block_tokens: Annotated[int, "Number of consecutive tokens stored on the same rank."] = 16
    chunk_tokens: Annotated[int | None, "Prompt tokens per forward pass, over all ranks. Default: by device."] = None
    compiled: Annotated[bool, "--compile", "GPUs only: torch.compile the step. A minute at first, then faster."] = False
    lookup: Annotated[bool | None, "Guess tokens from the text, and check several in one step. Default: on CPUs."] = (
        None
    )
    extrapolate: Annotated[bool, "Go beyond the positions the model was trained on. Output may be nonsense."] = False


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DecodingOptions):
    """Read a document into a KV cache that is sharded across ranks, and generate an answer.

    Starts its own ranks; under torchrun, this process is one of them. Exit code 1: a rank died, or --verify found a
    difference that rounding does not explain. Exit code 2: an invalid argument.
    """

    model: Annotated[str | None, "Folder of a Hugging Face model, or its name on the hub."] = None
    prompt: Annotated[str, "The question, or the text to continue."] = ""
    file: Annotated[Path | None, "A UTF-8 document to put before the prompt."] = None
    max_new_tokens: Annotated[int, "Maximum number of tokens to generate."] = 128
    max_prompt_tokens: Annotated[int | None, "Maximum number of prompt tokens: the document is truncated."] = None
    plain: Annotated[
        bool, "Pass the text to the model as it is: no chat template, and control tokens such as <|im_start|> count."
    ] = False
    temperature: Annotated[float, "Sampling temperature. Requires --sample."] = 1.0
    random_weights: Annotated[bool, "Time a model without its weights: random weights and random tokens."] = False
    config: Annotated[Path | None, "config.json for --random-weights; --max-prompt-tokens sets the prompt."] = None
    verify: Annotated[bool, "Compare the logits with those of one process, within the dtype's rounding."] = False
    plot: Plot = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class ChatOptions(DecodingOptions):
    """Answer questions about a document, one per line of stdin. The answers stream to stdout.

    Ctrl-C stops an answer; what was written is kept. A second Ctrl-C, or Ctrl-D, ends the chat.
    """

    model: ModelName
    file: Annotated[Path | None, "A UTF-8 document to ask about."] = None
    load: Annotated[Path | None, "Folder of a saved session to continue."] = None
    save: Annotated[Path | None, "Folder to save the session in, after the document and after each answer."] = None
    max_tokens: Annotated[int | None, "Capacity over all ranks. Default: document + 8192 on GPUs, else unlimited."] = (
        None
    )
    max_new_tokens: Annotated[int, "Maximum number of tokens per answer."] = 512


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check in seconds that a model computes over ranks what it computes in one process, each way to read and write.

    Exit code 1: a way departs from one process by more than rounding. A way that is refused, with its reason, is no
    failure. Exit code 2: an invalid argument.
    """

    model: ModelName
    nproc: Annotated[int | None, "Ranks to start on this machine. Default: 2."] = None
    dtype: Annotated[str, "float32, bfloat16, float16 or auto. auto: float32 on the CPU, bfloat16 on GPUs."] = "auto"
    device: Device = "auto"
    tensor_parallel: TensorParallel = 1
    check_tokens: Annotated[int, "--tokens", "Tokens to read; more than a window of the model has checks it, too."] = 96
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class BenchGenerateOptions:
    """Compare ranks with one process (CPU, float32, one core each): time to first token, time per token, KV memory."""

    model: ModelName
    nproc: Annotated[int, "Ranks to compare with one process."] = 2
    contexts: Annotated[str, "Context lengths in tokens, separated by commas."] = "1024,4096,8192"
    decode_tokens: Annotated[int, "Tokens to decode per round."] = 32
    rounds: Annotated[int, "Rounds per contestant and context length."] = 3
    output: Output = None
    plot: Plot = None


@dataclass(frozen=True, kw_only=True)
class BenchDecodeOptions:
    """Time one decode step on GPUs against other kernels, other exchanges and the memory bandwidth.

    Exit code 1: a result of ours was wrong.
    """

    nproc: Annotated[int, "Number of ranks, one GPU each."] = 2
    keys: Annotated[str, "Keys per rank, separated by commas."] = "16384,65536,262144,1048576"
    batch: Annotated[str, "Batch sizes, separated by commas."] = "1"
    pairs: Annotated[bool, "Pair the lists: first batch size with first KEYS, and so on. Default: all pairs."] = False
    heads: Annotated[int, "Query heads."] = 32
    kv_heads: Annotated[int, "KV heads."] = 8
    head_dim: Annotated[int, "Head dimension of queries, keys and values."] = 128
    layout: Annotated[str, "Memory layout of K and V: NHD (tokens first) or HND (heads first)."] = "HND"
    ragged: Annotated[bool, "Draw each sequence's length from 1 to KEYS. Without peers: none supports it."] = False
    peers: Annotated[str, "Peers to compare with: all, none, or names separated by commas."] = "all"
    rounds: Annotated[int, "Rounds per contestant."] = 15
    eager: Annotated[bool, "Also time the steps launched one by one, without a CUDA graph."] = True
    output: Output = None
    plot: Plot = None


@dataclass(frozen=True, kw_only=True)
class BenchModelOptions:
    """Options shared by `bench steps` and `bench prefill`."""

    config: Annotated[Path, "A model's config.json. The weights are drawn at random."]
    variants: Annotated[str, "--variants", "--ways", "all, or names: an unknown name lists the known ones."] = "all"
    nproc: Annotated[int, "Number of ranks to start."] = 2
    device: Device = "auto"
    output: Output = None
    plot: Plot = None


@dataclass(frozen=True, kw_only=True)
class BenchStepsOptions(BenchModelOptions):
    """Time the decode step of a whole model as `generate` runs it, on caches filled with random numbers."""

    contexts: Annotated[str, "Context lengths in tokens, separated by commas."] = "1024,131072,524288"
    tokens: Annotated[int, "Steps to time, after a warm-up."] = 32
    step_sizes: Annotated[str, "Tokens per step of ours, separated by commas; all but one are wrong guesses."] = "1"
    tensor_parallel: TensorParallel = 1


@dataclass(frozen=True, kw_only=True)
class BenchPrefillOptions(BenchModelOptions):
    """Time a whole model's prefill of a long prompt, ours or stock (sdpa on the first rank only), and its memory."""

    contexts: Annotated[str, "Prompt lengths in tokens, separated by commas."] = "32768,131072"
    chunk_tokens: Annotated[int, "Prompt tokens per forward pass of ours, over all ranks."] = 32768
    rounds: Annotated[int, "Rounds. The first, which compiles kernels, is reported separately."] = 3


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Estimate how many GPUs a model and a context need, how fast they decode, and whether sequence sharding pays.

    Computed from a few constants of the machine, see docs/planning.md; nothing is run. Exit code 1: nothing fits.
    """

    model: Annotated[str, "A preset such as llama-3.1-8b, a config.json, or a folder that holds one."]
    context: Annotated[str, "Tokens per sequence, such as 131072, 128k, 1M or 1e6."]
    batch: Annotated[int, "Number of sequences decoded together."] = 1
    gpu: Annotated[str | None, "A preset such as h200. An unknown name lists the known ones."] = None
    machine: Annotated[Path | None, "A file written by `calibrate`, instead of --gpu."] = None
    gpus: Annotated[int, "Maximum number of GPUs."] = 8
    per_node: Annotated[int | None, "GPUs per node. Default: the preset's."] = None
    inside: Annotated[str | None, "Link within a node, such as pcie5."] = None
    across: Annotated[str | None, "Link between nodes, such as ethernet-100g."] = None
    plot: Plot = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Measure this machine: read bandwidth, matrix products, kernel launches, messages and collectives."""

    output: Annotated[Path, "File to write, for `plan --machine`."] = Path("machine.json")
    nproc: Annotated[int | None, "Number of ranks. Default: one per GPU, or two on the CPU."] = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Show versions, devices and links, the available backends and algorithms, and what "auto" chooses for a shape."""

    nproc: Annotated[int, "Number of ranks."] = 2
    batch: Annotated[int, "Batch size, B."] = 1
    tokens: Annotated[int, "Query tokens per step, T."] = 1
    heads: Annotated[int, "Query heads, H."] = 32
    kv_heads: Annotated[int, "KV heads, H_kv."] = 8
    head_dim: Annotated[int, "Head dimension of queries, keys and values, D."] = 128
    keys: Annotated[int, "Keys per rank, S_local."] = 65536
    dtype: Annotated[str, "Dtype of queries, keys and values."] = "bfloat16"
    masked: Annotated[bool, "Assume a mask: ragged lengths, padding or positions."] = False
    as_json: Json = False


def parse_size(name: str, text: str) -> int:
    """Parse a number such as "4096", "4_096", "128k" (131072), "1.5M" or "1e6". Raises InputError."""
    found = SIZE.fullmatch(text.strip().lower())
    try:
        number = float(found[1]) * UNITS[found[2]] if found else 0.5
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):  # 1__0, 1e999
        pass
    raise InputError(f"{name} must be a number such as 131072, 128k, 1M or 1e6, got {text!r}")


def parse_numbers(name: str, text: str) -> list[int]:
    """Parse an option that lists numbers: "1,2k" -> [1, 2048]. Raises InputError."""
    return [parse_size(name, number) for number in text.split(",")]


def check_files(values: dict[str, Any]) -> None:
    """Raise unless each file that a command will write, an option `output` or `plot`, can be written."""
    for name in ("output", "plot"):
        file = values.get(name)
        if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
            raise InputError(f"{name} must be a file in a folder that can be written to, got {file}")
    plot = values.get("plot")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise InputError(f"plot must be a .png or .svg file, got {plot}")
    if plot is not None and find_spec("matplotlib") is None:
        raise Unavailable("plot needs matplotlib: pip install matplotlib")


def check_options(options: GenerateOptions | ChatOptions | VerifyOptions) -> None:
    """Raise InputError for a model folder, a dtype or a number of tokens that cannot be right."""
    if options.model is not None:
        check_model_folder(options.model)
    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, got {options.dtype!r}")
    for name, value in vars(options).items():
        if name.endswith("_tokens") and value is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")


def check_model_folder(model: str) -> None:
    """Raise InputError unless `model` is a folder with a model and a tokenizer, or could be a name on the hub."""
    folder = Path(model)
    if not folder.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise InputError(f"model must be a folder or a name on the hub (owner/name), and {model!r} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {model} must hold a config.json: is it a transformers model?")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"model folder {model} has no tokenizer (tokenizer.json): save it there with save_pretrained")


def weight_bytes(model: str) -> int:
    """Size of the weights in a model's folder; 0 for a name on the hub."""
    # A folder may hold the same weights again, in other formats.
    files = [*Path(model).glob("model*.safetensors")] or [*Path(model).glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def read_document(file: Path | None) -> str:
    """Return the text of the file; "" without a file."""
    if file is None:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {file} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"file {file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"file {file} must hold text, and is empty")
    return text
