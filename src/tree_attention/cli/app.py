"""The commands and their options; nothing is computed here.

Each command loads its work when it is called: torch and transformers take seconds, `--help` and `plan` need neither.
"""

from pathlib import Path
from typing import Annotated

import typer

from .exits import run

app = typer.Typer(
    help="Exact attention over a KV cache that is spread across ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure, first whether it is right.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Option(help="Folder of a Hugging Face model, or its name on the hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one GPU a rank.")]
Split = Annotated[
    int, typer.Option(help="Ranks that share out weights and heads; the sequence is spread over NPROC / this many.")
]
Output = Annotated[Path | None, typer.Option(help="Append the records to this file, one JSON document a line.")]
Chunk = Annotated[
    int | None,
    typer.Option(help="Tokens read in one forward pass, over all ranks; as many as suit the device by default."),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="On GPUs: a minute of torch.compile at the first token for faster ones after it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]


@app.command()
def generate(
    model: Annotated[str | None, typer.Option(help="Folder of a Hugging Face model, or its name on the hub.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask, or the text to continue.")] = "",
    file: Annotated[Path | None, typer.Option(help="A UTF-8 document, put before the prompt.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks to start on this machine; 1 by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut the document's end so that this suffices.")] = None,
    plain: Annotated[bool, typer.Option(help="Feed the text as it is, without the chat template.")] = False,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the draw.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: float32 on the CPU, else bfloat16.")
    ] = "auto",
    device: Device = "auto",
    tensor_parallel: Split = 1,
    block_tokens: Annotated[int, typer.Option(help="Neighbouring tokens that one rank keeps together.")] = 16,
    chunk_tokens: Chunk = None,
    compiled: Compile = False,
    extrapolate: Annotated[
        bool, typer.Option(help="Read on where the model's trained positions end: the answer may be nonsense.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option(help="Time a model whose weights are not at hand, on random tokens.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Its config.json; --max-prompt-tokens says how many.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Do the same on one process, and say whether the tokens are equal.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a document with its KV cache spread over ranks, and write.

    Starts its own ranks; under torchrun it is one of them. Exit code 1: a rank died, or --verify found other tokens;
    2: an argument is not what it must be.
    """
    from .generate import Request, generate_on_ranks

    request = Request(
        model=model, config=config, random_weights=random_weights, prompt=prompt, file=file,
        max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, plain=plain, sample=sample,
        temperature=temperature, seed=seed, dtype=dtype, device=device, tensor_parallel=tensor_parallel,
        block_tokens=block_tokens, chunk_tokens=chunk_tokens, compiled=compiled, extrapolate=extrapolate, verify=verify,
        as_json=as_json,
    )  # fmt: skip
    run(lambda: generate_on_ranks(request, nproc))


@app.command()
def chat(
    model: Model,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 document to talk about.")] = None,
    load: Annotated[Path | None, typer.Option(help="Folder of a session to go on with.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder to keep it in: after reading, and at the end.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks to start on this machine; 1 by default.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Room for so many tokens; on GPUs 8192 more than are read, by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: Annotated[str, typer.Option(help="As in generate.")] = "auto",
    device: Device = "auto",
    tensor_parallel: Split = 1,
    block_tokens: Annotated[int, typer.Option(help="Neighbouring tokens that one rank keeps together.")] = 16,
    chunk_tokens: Chunk = None,
    compiled: Compile = False,
    extrapolate: Annotated[bool, typer.Option(help="Go on where the model's trained positions end.")] = False,
) -> None:
    """Ask questions about a document, a line of stdin each; the answers stream to stdout."""
    from . import chat as chat_command

    request = chat_command.Request(
        model=model, file=file, load=load, save=save, max_tokens=max_tokens, max_new_tokens=max_new_tokens,
        sample=sample, seed=seed, dtype=dtype, device=device, tensor_parallel=tensor_parallel,
        block_tokens=block_tokens, chunk_tokens=chunk_tokens, compiled=compiled, extrapolate=extrapolate,
    )  # fmt: skip
    run(lambda: chat_command.chat_on_ranks(request, nproc))


@bench.command("generate")
def generation(
    model: Model,
    nproc: Annotated[int, typer.Option(help="Ranks to compare with one process.")] = 2,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,4096,8192",
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode in a round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns for each contestant at each length.")] = 3,
    output: Output = None,
) -> None:
    """Time reading and writing on one process and on ranks (CPU, float32, a core each), and weigh the KV cache."""
    from .bench import bench_generate

    run(lambda: bench_generate(model, nproc, contexts, decode_tokens, rounds, output))


@bench.command()
def decode(
    nproc: Annotated[int, typer.Option(help="Ranks, a GPU each.")] = 2,
    keys: Annotated[str, typer.Option(help="Keys on each rank.")] = "16384,65536,262144,1048576",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1",
    pairs: Annotated[
        bool, typer.Option(help="The first batch size with the first KEYS, and so on, not each with each.")
    ] = False,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Of queries, keys and values.")] = 128,
    layout: Annotated[str, typer.Option(help="Of K and V in memory: NHD, tokens first, or HND, heads first.")] = "HND",
    ragged: Annotated[
        bool, typer.Option(help="Lengths drawn between 1 and KEYS; ours alone, peers have none.")
    ] = False,
    peers: Annotated[str, typer.Option(help="Names with commas between them, all or none.")] = "all",
    rounds: Annotated[int, typer.Option(help="Turns for each contestant.")] = 15,
    eager: Annotated[bool, typer.Option(help="Time the steps called one by one, too.")] = True,
    output: Output = None,
) -> None:
    """Time a decode step on GPUs against other kernels and exchanges and the speed of memory, after comparing results.

    Exit code 1: ours was wrong.
    """
    from . import bench_decode as decode_command

    request = decode_command.Request(
        nproc=nproc, keys=keys, batch=batch, pairs=pairs, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        layout=layout, ragged=ragged, peers=peers, rounds=rounds, eager=eager, output=output,
    )  # fmt: skip
    run(lambda: decode_command.bench_decode(request))


@bench.command()
def steps(
    config: Annotated[Path, typer.Option(help="A model's config.json; its weights are drawn at random.")],
    nproc: Annotated[int, typer.Option(help="Ranks.")] = 2,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,131072,524288",
    ways: Annotated[
        str, typer.Option(help="All, or some with commas between them; an unknown one lists them.")
    ] = "all",
    tokens: Annotated[int, typer.Option(help="Tokens that count, after some that warm up.")] = 32,
    tensor_parallel: Split = 1,
    device: Device = "auto",
    output: Output = None,
) -> None:
    """Time the decode step of a whole model as `generate` runs it, on caches filled with random numbers."""
    from . import bench_steps as steps_command

    run(lambda: steps_command.bench_steps(config, nproc, contexts, ways, tokens, tensor_parallel, device, output))


@bench.command("prefill")
def reading(
    config: Annotated[Path, typer.Option(help="A model's config.json; its weights are drawn at random.")],
    nproc: Annotated[int, typer.Option(help="Ranks.")] = 2,
    contexts: Annotated[str, typer.Option(help="Lengths of the text in tokens.")] = "32768,131072",
    ways: Annotated[str, typer.Option(help="all, ours or stock: transformers' sdpa on the first rank alone.")] = "all",
    chunk_tokens: Annotated[int, typer.Option(help="Tokens that ours reads in one forward pass.")] = 32768,
    rounds: Annotated[int, typer.Option(help="Times; the first is told apart, since kernels are made in it.")] = 3,
    device: Device = "auto",
    output: Output = None,
) -> None:
    """Time a whole model that reads a long text, and weigh what it takes."""
    from . import bench_prefill as prefill_command

    run(lambda: prefill_command.bench_prefill(config, nproc, contexts, ways, chunk_tokens, rounds, device, output))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A preset such as llama-3.1-8b, a config.json or a folder with one.")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence: 131072, 128k, 1M.")],
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="A preset such as h200; an unknown one lists them.")] = None,
    machine: Annotated[Path | None, typer.Option(help="What calibrate wrote, instead of --gpu.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs at most.")] = 8,
    per_node: Annotated[int | None, typer.Option(help="GPUs of a node, by default as the preset has them.")] = None,
    inside: Annotated[str | None, typer.Option(help="Link in a node, such as pcie5.")] = None,
    across: Annotated[str | None, typer.Option(help="Link between nodes, such as ethernet-100g.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a token's time over the context: a png or svg.")] = None,
    as_json: Json = False,
) -> None:
    """How many GPUs a model and a context need, how fast they will be, and whether sharding the sequence pays.

    Computed from a few constants of the machine, docs/planning.md says how; nothing is run. Exit code 1: nothing fits.
    """
    from . import plan as plan_command

    request = plan_command.Request(
        model=model, context=context, batch=batch, gpu=gpu, machine=machine, gpus=gpus, per_node=per_node,
        inside=inside, across=across, plot=plot, as_json=as_json,
    )  # fmt: skip
    run(lambda: plan_command.plan(request))


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="File to write, for plan --machine.")] = Path("machine.json"),
    nproc: Annotated[int | None, typer.Option(help="Ranks; by default a GPU each, on the CPU two.")] = None,
    device: Device = "auto",
) -> None:
    """Measure this machine: how fast it reads and multiplies, what launches, messages and collectives cost."""
    from .calibrate import calibrate as calibrate_here

    run(lambda: calibrate_here(output, nproc, device))


@app.command()
def info(
    nproc: Annotated[int, typer.Option(help="Ranks to choose for.")] = 2,
    batch: Annotated[int, typer.Option(help="B")] = 1,
    tokens: Annotated[int, typer.Option(help="Query tokens of a step, T")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads, H")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads, H_kv")] = 8,
    head_dim: Annotated[int, typer.Option(help="D = D_v")] = 128,
    keys: Annotated[int, typer.Option(help="Keys on each rank, S_local")] = 65536,
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "bfloat16",
    masked: Annotated[bool, typer.Option(help="With a mask: ragged rows, padding or positions.")] = False,
    as_json: Json = False,
) -> None:
    """Versions, devices and links; which backends and algorithms there are, and what "auto" chooses for a shape."""
    from . import info as info_command

    shape = info_command.Shape(nproc, batch, tokens, heads, kv_heads, head_dim, keys, dtype, masked)
    run(lambda: info_command.info(shape, as_json))
