"""One mesh of tensor x sequence ranks: memory, seconds a token, seconds to the first one.

A step, in seconds, is the sum of

weights     bytes that the step's tokens meet / tensor, at the read rate; or the arithmetic, if that takes longer
KV          decode.py, a layer; layers with a window read it whole on every sequence rank
exchange    decode.py, a layer that is sharded, by the algorithm that `algorithm_of` says
tensor      2 sums a layer of tokens x hidden: through peer memory inside a node (hf/sums.py), otherwise by NCCL
launches    of the attention, the products and SMALL_KERNELS a layer, in one CUDA graph; for a batch of one, products
            that share a vector are one launch (hf/inductor.py)
host        what `generate` does between two graphs

Tensor ranks are neighbours. Weights are divided by the tensor ranks and repeated on the sequence ranks, as `TreeCache`
has them. Left out: sampling, ranks that wait for each other, fragmentation.
"""

import math
from collections import Counter
from dataclasses import dataclass

from .decode import Ranks, Shape, all_reduce, decode_cost, exchange
from .machine import Machine
from .model import Model

PRODUCTS, PRODUCTS_OF_ONE_VECTOR = 7, 4  # q, k, v, out, gate, up, down; q-k-v, out, gate-up, down
SMALL_KERNELS = 5  # norms, rotation, cache, activation
SUMMED_NUMBERS = 2048 * 128  # over (ranks - 1): most of a sum through peer memory (hf/sums.py)
HOST_S = 0.5e-3  # measured: 0.35 to 0.56 ms on two H100s (docs/log.md)
CHUNK_TOKENS, MASKED_CHUNK_TOKENS = 32768, 4096  # of prefill on GPUs, over all ranks; with windows (hf/prefill.py)
SAMPLES = 64
RESERVED_BYTES = 1.5e9  # CUDA context, libraries and graphs: assumed


@dataclass(frozen=True)
class Outlook:
    """One mesh. Bytes are those of a GPU; parts_s: what a decode step is made of; tokens_per_s: of all sequences.

    loads: whether `load_tensor_parallel` takes so many tensor ranks; if not, the mesh is for other engines.
    """

    tensor: int
    sequence: int
    weights_bytes: float
    kv_bytes: float
    workspace_bytes: float
    loads: bool
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
        """Of one decode step."""
        return sum(self.parts_s.values())

    @property
    def bound(self) -> str:
        """The largest part of it."""
        return max(self.parts_s, key=self.parts_s.__getitem__)

    @property
    def used_bytes(self) -> float:
        """Of a GPU's memory."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


def outlook(model: Model, machine: Machine, context: int, batch: int, tensor: int, sequence: int) -> Outlook:
    """One mesh; first_token_s is left at 0, for `first_token_s` to say."""
    held = model.held_tokens(context)
    sharded = [window is None for window in model.windows]
    tokens = sum(math.ceil(n / sequence) if whole else n for n, whole in zip(held, sharded, strict=True))
    group = sequence_ranks(machine, tensor, sequence)
    shape = shape_of(model, context / sequence, batch, tensor)
    algorithm = algorithm_of(shape, machine, group)
    workspace = RESERVED_BYTES + _activation_bytes(model, context, batch, tensor, sequence)
    if algorithm == "fused":
        workspace += 2 * sequence * shape.rows * shape.value_dim * 17 / 16 * 8 + 33.6e6  # SymmetricLink
    parts_s = _parts_s(model, machine, context, batch, tensor, group, algorithm)
    weights_bytes = model.weights_bytes / tensor
    kv_bytes = batch * tokens * _key_bytes(model, tensor)
    fits = weights_bytes + kv_bytes + workspace <= machine.gpu.memory_bytes
    return Outlook(
        tensor, sequence, weights_bytes, kv_bytes, workspace, model.can_split(tensor), fits, algorithm, parts_s,
        0.0, batch / sum(parts_s.values()),
    )  # fmt: skip


def sequence_ranks(machine: Machine, tensor: int, sequence: int) -> Ranks:
    """The ranks that share a sequence; `tensor` ranks sit between two of them."""
    return Ranks(sequence, max(machine.per_node // tensor, 1))


def shape_of(model: Model, keys: float, batch: int, tensor: int) -> Shape:
    """A layer's attention on one of `tensor` ranks, over `keys` keys of each sequence."""
    return Shape(
        batch, model.heads // tensor, math.ceil(model.kv_heads / tensor), model.head_dim, keys, model.head_dim_v,
        itemsize=model.kv_itemsize, latent=model.latent,
    )  # fmt: skip


def algorithm_of(shape: Shape, machine: Machine, group: Ranks) -> str:
    """How ranks that share a sequence exchange, as `TreeCache` does; over nodes it can do both: the quicker."""
    if group.size == 1:
        return "none"
    if not machine.inside.peer_access:
        return "all_gather"
    if group.nodes == 1:
        return "fused"
    return min("two_level", "all_gather", key=lambda name: exchange(shape, machine, group, name)[0])


def _parts_s(
    model: Model, machine: Machine, context: int, batch: int, tensor: int, group: Ranks, algorithm: str
) -> dict[str, float]:
    gpu, kv_s, exchange_s = machine.gpu, 0.0, 0.0
    for window in set(model.windows) - {0}:
        layers, alone = model.windows.count(window), window is not None
        keys = min(window, context) if window is not None else context / group.size
        shape, ranks = shape_of(model, keys, batch, tensor), 1 if alone else group.size
        cost = decode_cost(shape, machine, ranks, "fused" if ranks == 1 else algorithm, per_node=group.per_node)
        kv_s += layers * cost.read_s
        exchange_s += layers * cost.exchange_s
    weights_s = max(
        model.read_bytes(batch) / tensor / gpu.read_bytes_per_s,
        batch * model.flops_per_token / tensor / gpu.matmul_flops_per_s,
    )
    products, product_s = (PRODUCTS_OF_ONE_VECTOR, gpu.kernel_s) if batch == 1 else (PRODUCTS, gpu.launch_s)
    products_s = (model.layers * products + 1) * product_s  # and the output head's
    return {
        "weights": weights_s, "KV": kv_s, "exchange": exchange_s,
        "tensor": 2 * model.layers * _sum_s(batch * model.hidden, machine, Ranks(tensor, machine.per_node)),
        "launches": model.layers * (gpu.launch_s + SMALL_KERNELS * gpu.kernel_s) + products_s, "host": HOST_S,
    }  # fmt: skip


def _sum_s(numbers: int, machine: Machine, group: Ranks) -> float:
    """Of 16 bits each, over the tensor ranks; through peer memory they are float32, and travel with an epoch."""
    small = numbers * (group.size - 1) <= SUMMED_NUMBERS
    if group.size == 1 or group.nodes > 1 or not machine.inside.peer_access or not small:
        return all_reduce(2 * numbers, machine, group)[0]
    return machine.gpu.kernel_s + machine.inside.latency_s + 8 * (group.size - 1) * numbers / machine.inside.bytes_per_s


def first_token_s(model: Model, machine: Machine, context: int, batch: int, mesh: Outlook) -> float:
    """Of reading the context in chunks, divided over all ranks, and of one step.

    A chunk takes its arithmetic, causal, or reading the weights if that is longer; two all-reduces a layer over tensor
    ranks; and over sequence ranks a layer's keys so far or the chunk's queries, whichever are less (hf/chunk.py). Of
    many chunks SAMPLES are computed, evenly spread, and stand for the others.
    """
    P, chunks = mesh.sequence, math.ceil(context / _chunk_tokens(model))
    tokens, layers = context / chunks, Counter(model.windows)
    linear = model.flops_per_token - 2 * model.vocabulary * model.hidden
    read_s = model.read_bytes(batch * math.ceil(tokens / P)) / mesh.tensor / machine.gpu.read_bytes_per_s
    tensors = Ranks(mesh.tensor, machine.per_node)
    reduced_s = 2 * model.layers * all_reduce(batch * tokens / P * model.hidden * 2, machine, tensors)[0]
    link = sequence_ranks(machine, mesh.tensor, P).slowest(machine)
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


def _chunk_tokens(model: Model) -> int:
    return CHUNK_TOKENS if set(model.windows) <= {None, 0} else MASKED_CHUNK_TOKENS


def _key_bytes(model: Model, tensor: int) -> float:
    """Of a token's key and value in one layer, on the tensor rank that has most KV heads: one at least."""
    return math.ceil(model.kv_heads / tensor) / model.kv_heads * model.key_bytes


def _query_bytes(model: Model, tensor: int) -> float:
    """Of a token's queries there and partials back, where queries travel in prefill."""
    return model.heads / tensor * (model.head_dim * model.kv_itemsize + (model.head_dim_v + 1) * 4)


def _activation_bytes(model: Model, context: int, batch: int, tensor: int, sequence: int) -> float:
    """Of a prefill chunk: some copies of the hidden state, the gathered keys or queries of a layer, and logits."""
    tokens = min(_chunk_tokens(model), context)
    copies = batch * math.ceil(tokens / sequence) * 8 * model.hidden * 2
    keys = context * _key_bytes(model, tensor)
    gathered = batch * min(keys, tokens * _query_bytes(model, tensor)) if sequence > 1 else 0.0
    return copies + gathered + batch * model.vocabulary * 4
