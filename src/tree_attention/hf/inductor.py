"""What a compiled step does beside attention, where inductor leaves time on the table: a pass over its graph.

- Products of one vector. cuBLAS takes 3 to 5 us longer for one than reading its weights does, two hundred times a token
  (docs/log.md). Our kernel takes its place, one launch for all that share the vector: a layer's q, k and v, its gate
  and up.
- Sums over the ranks of a tensor-parallel model: sums.py takes the place of NCCL, 12 us each.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node, map_arg

from . import sums

ops: Any = torch.ops
aten, collectives, rounding = ops.aten, ops._c10d_functional, ops.prims.convert_element_type.default
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
COLS, WARPS = 2048, 4


class StepPass(CustomGraphPass):
    """Replaces `mm(x [1, K], w.T)`, w `[N, K]` a contiguous input of the graph, and small sums over linked ranks.

    sums_over: the name of the group of linked ranks; None: sums stay as they are.
    """

    def __init__(self, sums_over: str | None = None, device_type: str = "cuda") -> None:
        self.sums_over, self.device_type = sums_over, device_type

    def __call__(self, graph: Graph) -> None:
        sharing: dict[Node, list[Node]] = {}
        for product in graph.find_nodes(op="call_function", target=aten.mm.default):
            if self._takes(product):
                sharing.setdefault(_source(product.args[0]), []).append(product)
        for products in sharing.values():
            _multiply(graph, products)
        for node in graph.find_nodes(op="call_function", target=collectives.all_reduce.default):
            x, what, group_name = cast("tuple[Node, str, str]", node.args)
            if what == "sum" and group_name == self.sums_over and sums.fits(x.meta["val"]):
                _add_up(graph, node, x, group_name)

    def uuid(self) -> Any:
        """What, beside the graph, decides what is compiled: inductor keeps that on disk."""
        ranks = None if self.sums_over is None else sums.ranks_of(self.sums_over)
        return get_hash_for_files((__file__, sums.__file__), f"{self.sums_over} {ranks} {self.device_type}")

    def _takes(self, product: Node) -> bool:
        x, transposed = cast("tuple[Node, Node]", product.args)
        if transposed.target is not aten.permute.default:
            return False
        weight = _weight(product)
        return (
            weight.op == "placeholder"
            and weight.meta["val"].is_contiguous()
            and weight.meta["val"].device.type == self.device_type
            and x.meta["val"].shape[0] == 1
            and x.meta["val"].is_contiguous()
        )


def _weight(product: Node) -> Node:
    return cast(Any, product.args[1]).args[0]


def _source(x: Any) -> Any:
    """The node that this is a view of: one for all products of one vector."""
    while x.target in VIEWS:
        x = x.args[0]
    return x


def _multiply(graph: Graph, together: list[Node]) -> None:
    """One launch for all of these products."""
    weights = [_weight(product) for product in together]
    with graph.inserting_before(together[0]):
        all_rows = _call(graph, ops.tree_attention.products.default, together[0].args[0], weights)
    first = 0
    for product, weight in zip(together, weights, strict=True):
        last = first + weight.meta["val"].shape[0]
        with graph.inserting_before(product):
            rows = _call(graph, aten.slice.Tensor, all_rows, 1, first, last)
            rounded = _call(graph, rounding, rows, product.meta["val"].dtype)
        product.replace_all_uses_with(rounded)
        graph.erase_node(product)
        first = last


def _add_up(graph: Graph, node: Node, x: Node, group_name: str) -> None:
    """By one exchange of float32; what a product of ours gave is taken as it was before its rounding."""
    source, like = _source(x), x.meta["val"]
    with graph.inserting_before(node):
        if source.target is rounding and source.args[0].meta["val"].dtype == torch.float32:
            exact = _call(graph, aten.reshape.default, source.args[0], list(like.shape))
        else:
            exact = _call(graph, rounding, x, torch.float32)
        mean = _call(graph, ops.tree_attention.mean_over_ranks.default, exact, group_name)
        total = _call(graph, aten.mul.Tensor, mean, sums.ranks_of(group_name))
        rounded = _call(graph, rounding, total, like.dtype)
    for wait in [user for user in node.users if user.target is collectives.wait_tensor.default]:
        wait.replace_all_uses_with(rounded)
        graph.erase_node(wait)
    node.replace_all_uses_with(rounded)
    graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with the value that its neighbours expect it to note."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*cast(Any, map_arg(args, lambda other: other.meta["val"])))
    return node


@torch.library.custom_op("tree_attention::products", mutates_args=())
def products(x: Tensor, weights: list[Tensor]) -> Tensor:
    """x `[1, K]` times the transposed of each weight `[N_i, K]`: float32 `[1, sum of N_i]`."""
    from .product_kernels import products_kernel

    sizes = tuple(len(weight) for weight in weights)
    out = x.new_empty((1, sum(sizes)), dtype=torch.float32)
    cast(Any, products_kernel)[(sum(sizes),)](
        x, tuple(weights), sizes, out, K=x.shape[1], COUNT=len(sizes), COLS=COLS, num_warps=WARPS
    )
    return out


@products.register_fake
def _(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty((1, sum(len(weight) for weight in weights)), dtype=torch.float32)


mean_over_ranks = torch.library.custom_op(
    "tree_attention::mean_over_ranks",
    sums.mean_over_ranks,
    mutates_args=(),
    schema="(Tensor x, str group_name) -> Tensor",
)
mean_over_ranks.register_fake(lambda x, group_name: torch.empty_like(x))
