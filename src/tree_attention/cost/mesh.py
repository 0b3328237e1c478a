"""Estimates for one mesh of tensor x sequence ranks: memory, seconds per token, seconds to the first token.

docs/planning.md has the formulas. Tensor ranks are consecutive. The weights are split over the tensor ranks and
replicated on the sequence ranks. Not counted: sampling, ranks that wait for each other, memory fragmentation.
"""

import math
from collections import Counter
from dataclasses import dataclass

from .decode import AttentionShape, RankGroup, all_reduce_cost, decode_cost, exchange_cost
from .machine import Machine
from .model import ModelSpec

PRODUCTS, PRODUCTS_OF_ONE_VECTOR = 7, 4  # q, k, v, out, gate, up, down; q-k-v, out, gate-up, down
SMALL_KERNELS = 5  # norms, rotation, cache, activation
SUMMED_NUMBERS = 2048 * 128  # / (ranks - 1): the largest sum through peer memory (hf/link_sums.py)
HOST_S = 0.5e-3  # measured: 0.35 to 0.56 ms on two H100s (docs/log.md)
CHUNK_TOKENS, MASKED_CHUNK_TOKENS = 32768, 4096  # prefill chunk on GPUs, over all ranks; with windows
SAMPLES = 64
RESERVED_BYTES = 1.5e9  # CUDA context, libraries and graphs: assumed


@dataclass(frozen=True)
class MeshEstimate:
    """The estimate for one mesh. Bytes are per GPU.

    loadable: True if `load_tensor_parallel` supports this number of tensor ranks; otherwise only other engines do.
    parts_s: the parts of a decode step. tokens_per_s: over all sequences.
    """

    tensor: int
    sequence: int
    weights_bytes: float
    kv_bytes: float
    workspace_bytes: float
    loadable: bool
    fits: bool
    algorithm: str
    parts_s: dict[str, float]
    first_token_s: float
    tokens_per_s: float

    @property
    def gpus(self) -> int:
        return self.tensor * self.sequence

    @property
    def token_s(self) -> float:
        """Seconds of one decode step."""
        return sum(self.parts_s.values())

    @property
    def bound(self) -> str:
        """Name of the largest part of a decode step."""
        return max(self.parts_s, key=self.parts_s.__getitem__)

    @property
    def used_bytes(self) -> float:
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


def estimate_mesh(
    model: ModelSpec, machine: Machine, context: int, batch: int, tensor: int, sequence: int
) -> MeshEstimate:
    """Estimate one mesh, without first_token_s (0 here): see `estimate_first_token_s`."""
    group = sequence_group(machine, tensor, sequence)
    shape = layer_shape(model, context / sequence, batch, tensor)
    algorithm = choose_exchange(shape, machine, group)
    workspace_bytes = RESERVED_BYTES + _activation_bytes(model, context, batch, tensor, sequence)
    if algorithm == "fused":
        workspace_bytes += 2 * sequence * shape.rows * shape.value_dim * 17 / 16 * 8 + 33.6e6  # SymmetricLink
    held_by_layer = zip(model.held_tokens(context), model.windows, strict=True)
    tokens = sum(math.ceil(held / sequence) if window is None else held for held, window in held_by_layer)
    sizes = (model.weights_bytes / tensor, batch * tokens * _key_bytes(model, tensor), workspace_bytes)
    fits = sum(sizes) <= machine.gpu.memory_bytes
    parts_s = _parts_s(model, machine, context, batch, tensor, group, algorithm)
    times = (parts_s, 0.0, batch / sum(parts_s.values()))
    return MeshEstimate(tensor, sequence, *sizes, model.can_split(tensor), fits, algorithm, *times)


def sequence_group(machine: Machine, tensor: int, sequence: int) -> RankGroup:
    """The ranks that share a sequence: every `tensor`-th rank."""
    return RankGroup(sequence, max(machine.per_node // tensor, 1))


def layer_shape(model: ModelSpec, keys: float, batch: int, tensor: int) -> AttentionShape:
    """The attention of one layer on one of `tensor` ranks, over `keys` keys per sequence."""
    heads, how = model.heads // tensor, {"itemsize": model.kv_itemsize, "latent": model.latent}
    kv_heads = math.ceil(model.kv_heads / tensor)
    return AttentionShape(batch, heads, kv_heads, model.head_dim, keys, model.head_dim_v, **how)


def choose_exchange(shape: AttentionShape, machine: Machine, group: RankGroup) -> str:
    """Name the algorithm that TreeCache uses; across nodes it supports two, of which this is the faster one."""
    if group.size == 1:
        return "none"
    if not machine.inside.peer_access:
        return "all_gather"
    if group.nodes == 1:
        return "fused"
    return min("two_level", "all_gather", key=lambda name: exchange_cost(shape, machine, group, name)[0])


def _parts_s(
    model: ModelSpec, machine: Machine, context: int, batch: int, tensor: int, group: RankGroup, algorithm: str
) -> dict[str, float]:
    gpu, kv_s, exchange_s = machine.gpu, 0.0, 0.0
    for window in set(model.windows) - {0}:
        layers = model.windows.count(window)
        keys, ranks = (context / group.size, group.size) if window is None else (min(window, context), 1)
        shape = layer_shape(model, keys, batch, tensor)
        cost = decode_cost(shape, machine, ranks, "fused" if ranks == 1 else algorithm, per_node=group.per_node)
        kv_s += layers * cost.read_s
        exchange_s += layers * cost.exchange_s
    flops = batch * model.flops_per_token
    weights_s = max(model.read_bytes(batch) / tensor / gpu.read_bytes_per_s, flops / tensor / gpu.matmul_flops_per_s)
    products, product_s = (PRODUCTS_OF_ONE_VECTOR, gpu.kernel_s) if batch == 1 else (PRODUCTS, gpu.launch_s)
    products_s = (model.layers * products + 1) * product_s  # + 1: the output head
    sums_s = 2 * model.layers * _sum_s(batch * model.hidden, machine, RankGroup(tensor, machine.per_node))
    launches_s = model.layers * (gpu.launch_s + SMALL_KERNELS * gpu.kernel_s) + products_s
    read_s = {"weights": weights_s, "KV": kv_s}
    return read_s | {"exchange": exchange_s, "tensor": sums_s, "launches": launches_s, "host": HOST_S}


def _sum_s(numbers: int, machine: Machine, group: RankGroup) -> float:
    """Seconds to sum 16-bit numbers over the tensor ranks; through peer memory as float32, each with its epoch."""
    small = numbers * (group.size - 1) <= SUMMED_NUMBERS
    if group.size == 1 or group.nodes > 1 or not machine.inside.peer_access or not small:
        return all_reduce_cost(2 * numbers, machine, group)[0]
    return machine.gpu.kernel_s + machine.inside.latency_s + 8 * (group.size - 1) * numbers / machine.inside.bytes_per_s


def estimate_first_token_s(model: ModelSpec, machine: Machine, context: int, batch: int, mesh: MeshEstimate) -> float:
    """Seconds to prefill the context in chunks, divided over all ranks, and to run one decode step.

    A chunk takes the time of its causal FLOPs, or of reading the weights if that is longer; two all-reduces per layer
    over the tensor ranks; and per layer the transfer over the sequence ranks of the keys so far or of the chunk's
    queries, whichever is smaller (hf/parallel_prefill.py). At most SAMPLES chunks, evenly spaced, are computed.
    """
    P, chunks = mesh.sequence, math.ceil(context / _chunk_tokens(model))
    tokens, layers = context / chunks, Counter(model.windows)
    linear = model.flops_per_token - 2 * model.vocabulary * model.hidden
    read_s = model.read_bytes(batch * math.ceil(tokens / P)) / mesh.tensor / machine.gpu.read_bytes_per_s
    tensors = RankGroup(mesh.tensor, machine.per_node)
    reduced_s = 2 * model.layers * all_reduce_cost(batch * tokens / P * model.hidden * 2, machine, tensors)[0]
    link = sequence_group(machine, mesh.tensor, P).slowest(machine)
    key_bytes = _key_bytes(model, mesh.tensor)
    seconds, samples = 0.0, min(chunks, SAMPLES)
    for sample in range(samples):
        middle = (sample + 0.5) / samples * context
        seen = sum(n * (middle if window is None else min(middle, window)) for window, n in layers.items())
        flops = batch * tokens * (linear + 2 * model.heads * model.prefill_dims * seen)
        chunk_s = max(flops / mesh.gpus / machine.gpu.matmul_flops_per_s, read_s) + reduced_s
        if P > 1:
            moved = batch * min(middle * key_bytes, tokens * _query_bytes(model, mesh.tensor)) * (P - 1) / P
            chunk_s += layers[None] * (link.collective_s + moved / link.bytes_per_s)
        seconds += chunk_s * chunks / samples
    return seconds + mesh.token_s


def _chunk_tokens(model: ModelSpec) -> int:
    return CHUNK_TOKENS if set(model.windows) <= {None, 0} else MASKED_CHUNK_TOKENS


def _key_bytes(model: ModelSpec, tensor: int) -> float:
    """KV bytes per token and layer on the tensor rank with the most KV heads; each has at least one."""
    return math.ceil(model.kv_heads / tensor) / model.kv_heads * model.key_bytes


def _query_bytes(model: ModelSpec, tensor: int) -> float:
    """Bytes per token when queries travel in prefill: the queries out and the partial results back."""
    return model.heads / tensor * (model.head_dim * model.kv_itemsize + (model.head_dim_v + 1) * 4)


def _activation_bytes(model: ModelSpec, context: int, batch: int, tensor: int, sequence: int) -> float:
    """Bytes of a prefill chunk: 8 copies of the hidden state, one layer's gathered keys or queries, the logits."""
    tokens = min(_chunk_tokens(model), context)
    copies = batch * math.ceil(tokens / sequence) * 8 * model.hidden * 2
    keys = context * _key_bytes(model, tensor)
    gathered = batch * min(keys, tokens * _query_bytes(model, tensor)) if sequence > 1 else 0.0
    return copies + gathered + batch * model.vocabulary * 4
