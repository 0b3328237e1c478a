"""Read a long prompt and continue it, the KV cache of a Hugging Face model spread over the ranks.

    torchrun --nproc-per-node 2 examples/generate.py MODEL PROMPT_FILE [NEW_TOKENS]

MODEL is a folder or a name on the hub. On GPUs if there is one for each rank, otherwise on the CPU.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from tree_attention.hf import TreeCache, prefill


def main(name: str, prompt_file: str, new_tokens: int) -> None:
    device = join()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto" if device.type == "cuda" else torch.float32, attn_implementation="tree_attention"
    )
    model = model.to(device).eval()
    inputs = tokenizer(Path(prompt_file).read_text(encoding="utf-8"), return_tensors="pt").to(device)

    most = inputs.input_ids.shape[1] + new_tokens  # makes the cache static: on GPUs each token is then one CUDA graph
    cache = TreeCache(model.config, max_tokens=most if device.type == "cuda" else None)
    prefill(model, inputs.input_ids, cache)  # each rank computes its share of the prompt
    out = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)

    if dist.get_rank() == 0:
        read = inputs.input_ids.shape[1]
        print(tokenizer.decode(out[0, read:], skip_special_tokens=True))
        print(f"({read} tokens read, {cache.kv_bytes / 1e6:.1f} MB of keys and values on this rank)", flush=True)
    dist.destroy_process_group()


def join() -> torch.device:
    """Become one of torchrun's ranks; returns this rank's device."""
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64)
