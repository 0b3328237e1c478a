"""Estimates for one mesh of tensor x sequence ranks: memory, seconds per token, seconds to the first token.

The time of a decode step is the sum of

weights     bytes of the weights that the tokens use / tensor, at the read rate; or their FLOPs, if they take longer
KV          decode.py, for each layer; a layer with a window reads its whole window on every sequence rank
exchange    decode.py, for each layer with full attention, with the algorithm of `choose_exchange`
tensor      2 sums of tokens x hidden per layer: through peer memory within a node (hf/sums.py), otherwise NCCL
launches    attention, products and SMALL_KERNELS per layer, in one CUDA graph; with batch 1, the products that share a
            vector are one launch (hf/inductor.py)
host        the host's work in `generate` between two graphs

Tensor ranks are consecutive. The weights are split over the tensor ranks and replicated on the sequence ranks. Not
counted: sampling, ranks that wait for each other, memory fragmentation.
"""

import math
from collections import Counter
from dataclasses import dataclass

from .decode import AttentionShape, RankGroup, all_reduce_cost, decode_cost, exchange_cost
from .machine import Machine
from .model import ModelSpec

PRODUCTS, PRODUCTS_OF_ONE_VECTOR = 7, 4  # q, k, v, out, gate, up, down; q-k-v, out, gate-up, down
SMALL_KERNELS = 5  # norms, rotation, cache, activation
SUMMED_NUMBERS = 2048 * 128  # / (ranks - 1): the largest sum through peer memory (hf/sums.py)
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
        """Bytes used on each GPU."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


def estimate_mesh(
    model: ModelSpec, machine: Machine, context: int, batch: int, tensor: int, sequence: int
) -> MeshEstimate:
    """Estimate one mesh, without first_token_s (0 here): see `estimate_first_token_s`."""
    held = model.held_tokens(context)
    sharded = [window is None for window in model.windows]
    tokens = sum(math.ceil(n / sequence) if whole else n for n, whole in zip(held, sharded, strict=True))
    group = sequence_group(machine, tensor, sequence)
    shape = layer_shape(model, context / sequence, batch, tensor)
    algorithm = choose_exchange(shape, machine, group)
    workspace = RESERVED_BYTES + _activation_bytes(model, context, batch, tensor, sequence)
    if algorithm == "fused":
        workspace += 2 * sequence * shape.rows * shape.value_dim * 17 / 16 * 8 + 33.6e6  # SymmetricLink
    parts_s = _parts_s(model, machine, context, batch, tensor, group, algorithm)
    weights_bytes = model.weights_bytes / tensor
    kv_bytes = batch * tokens * _key_bytes(model, tensor)
    fits = weights_bytes + kv_bytes + workspace <= machine.gpu.memory_bytes
    sizes, loadable = (weights_bytes, kv_bytes, workspace), model.can_split(tensor)
    tokens_per_s = batch / sum(parts_s.values())
    return MeshEstimate(tensor, sequence, *sizes, loadable, fits, algorithm, parts_s, 0.0, tokens_per_s)


def sequence_group(machine: Machine, tensor: int, sequence: int) -> RankGroup:
    """The ranks that share a sequence: every `tensor`-th rank."""
    return RankGroup(sequence, max(machine.per_node // tensor, 1))


def layer_shape(model: ModelSpec, keys: float, batch: int, tensor: int) -> AttentionShape:
    """The attention of one layer on one of `tensor` ranks, over `keys` keys per sequence."""
    heads, kv_heads, dims = (
        model.heads // tensor,
        math.ceil(model.kv_heads / tensor),
        (model.head_dim, model.head_dim_v),
    )
    how = {"itemsize": model.kv_itemsize, "latent": model.latent}
    return AttentionShape(batch, heads, kv_heads, dims[0], keys, dims[1], **how)


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
        layers, alone = model.windows.count(window), window is not None
        keys = min(window, context) if window is not None else context / group.size
        shape, ranks = layer_shape(model, keys, batch, tensor), 1 if alone else group.size
        cost = decode_cost(shape, machine, ranks, "fused" if ranks == 1 else algorithm, per_node=group.per_node)
        kv_s += layers * cost.read_s
        exchange_s += layers * cost.exchange_s
    weights_s = max(
        model.read_bytes(batch) / tensor / gpu.read_bytes_per_s,
        batch * model.flops_per_token / tensor / gpu.matmul_flops_per_s,
    )
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
    queries, whichever is smaller (hf/chunk.py). At most SAMPLES chunks, evenly spaced, are computed.
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
