"""Hugging Face transformers with a KV cache that is spread across ranks.

Importing this module, on every rank, registers the attention implementation "tree_attention":

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tree_attention")
    model.generate(**inputs)                     # each rank keeps its share of the cache, all write the same tokens

For a long prompt, `prefill` also divides the computation over the ranks:

    cache = TreeCache(model.config)
    prefill(model, inputs.input_ids, cache)
    model.generate(**inputs, cache=cache)
"""

try:
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("tree_attention.hf needs transformers: pip install 'tree-attention[hf]'") from None

from .attention import tree_attention_forward
from .cache import TreeCache
from .chat_template import ChatTemplate
from .check import check_model
from .generation import prepare, wrap_generate
from .mask import lazy_mask
from .models import check_loading
from .parallel_prefill import can_prefill, prefill
from .session import Session
from .step import call_before
from .tensor_parallel import load_tensor_parallel

__all__ = ["ChatTemplate", "Session", "TreeCache", "can_prefill", "check_model", "load_tensor_parallel", "prefill"]

AttentionInterface.register("tree_attention", tree_attention_forward)
AttentionMaskInterface.register("tree_attention", lazy_mask)
call_before(PreTrainedModel, "_check_and_adjust_attn_implementation", check_loading)
call_before(GenerationMixin, "_prepare_cache_for_generation", prepare)  # there is no registry of caches
if not hasattr(GenerationMixin.generate, "_tree_attention"):
    GenerationMixin.generate = wrap_generate(GenerationMixin.generate)
