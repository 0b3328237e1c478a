"""Hugging Face transformers with a KV cache that is spread across ranks.

    import tree_attention.hf                     # registers "tree_attention"; on every rank, e.g. under torchrun
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tree_attention")
    model.generate(**inputs)                     # each rank keeps its share of the cache, all write the same tokens

and, for a long prompt, each rank computing only its share of it:

    cache = TreeCache(model.config)
    prefill(model, inputs.input_ids, cache)
    model.generate(**inputs, past_key_values=cache)

attention.py is what transformers calls in each layer, mask.py its mask; cache.py the cache, layers.py its layers,
placement.py its ranks; chunk.py the attention of a chunk whose queries are spread too; prefill.py and generation.py the
two steps above; cursor.py and step.py the decode step of a static cache, inductor.py and product_kernels.py what a
compiled one does beside attention; session.py a conversation, save.py its folder; state.py what a layer holds, taken
out and put back; tensor.py tensor parallelism beside it, sums.py its sums over a link.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import tree_attention_forward
from .cache import TreeCache
from .generation import install_generation_hook
from .mask import lazy_mask
from .prefill import can_prefill, prefill
from .session import Session
from .tensor import load_tensor_parallel

__all__ = ["Session", "TreeCache", "can_prefill", "load_tensor_parallel", "prefill"]

AttentionInterface.register("tree_attention", tree_attention_forward)
AttentionMaskInterface.register("tree_attention", lazy_mask)
install_generation_hook()
