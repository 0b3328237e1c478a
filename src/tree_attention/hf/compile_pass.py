"""`StepPass`: a pass over inductor's graph of a compiled step, which speeds up what is not attention.

- Products of a matrix and one vector: one launch of our kernel for all that share a vector, instead of cuBLAS.
- Sums over the ranks of a tensor-parallel model: through a link (link_sums.py), instead of NCCL.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import link_sums

ops: Any = torch.ops
aten, collectives, rounding = ops.aten, ops._c10d_functional, ops.prims.convert_element_type.default
PRODUCTS = (aten.mm.default, aten.addmm.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
COLS, WARPS = 2048, 4
MAX_TOGETHER = 16  # products in one launch


class StepPass(CustomGraphPass):
    """Replaces sums over linked ranks, and products `x @ w.T` of x `[1, K]` and w `[N, K]`, an input of the graph.

    sums_over: the name of the group whose ranks are linked; None leaves sums to NCCL.
    """

    def __init__(self, sums_over: str | None = None, device_type: str = "cuda") -> None:
        self.sums_over, self.device_type = sums_over, device_type
        self.ranks = 1 if sums_over is None else link_sums.link_size(sums_over)

    def __call__(self, graph: Graph) -> None:
        sharing: dict[Node, list[Node]] = {}
        for node in list(graph.nodes):
            if node.target in PRODUCTS and self._is_replaceable(node):
                sharing.setdefault(_source(_vector(node)), []).append(node)
        for products in sharing.values():
            for first in range(0, len(products), MAX_TOGETHER):
                _multiply(graph, products[first : first + MAX_TOGETHER])
        for node in graph.find_nodes(op="call_function", target=collectives.all_reduce.default):
            x, what, group_name = cast("tuple[Node, str, str]", node.args)
            if what == "sum" and group_name == self.sums_over and link_sums.fits(x.meta["val"], self.ranks):
                _sum_over_link(graph, node, x, group_name, self.ranks)

    def uuid(self) -> Any:
        """The key of this pass in inductor's cache on disk."""
        return get_hash_for_files((__file__, link_sums.__file__), f"{self.sums_over} {self.ranks} {self.device_type}")

    def _is_replaceable(self, product: Node) -> bool:
        transposed: Any = product.args[-1]
        if transposed.target is not aten.permute.default or [dim % 2 for dim in transposed.args[1]] != [1, 0]:
            return False
        if product.kwargs or _weight(product).op != "placeholder":  # alpha and beta
            return False
        x, w = _vector(product).meta["val"], _weight(product).meta["val"]
        is_vector = statically_known_true(x.shape[0] == 1) and x.is_contiguous()
        return is_vector and w.is_contiguous() and w.device.type == self.device_type and w.dtype in link_sums.DTYPES


def _vector(product: Node) -> Node:
    return cast(Any, product.args[-2])


def _weight(product: Node) -> Node:
    return cast(Any, product.args[-1]).args[0]


def _source(x: Any) -> Any:
    """The node that x is a view of, with the elements in the same order: the same for all products of one vector."""
    while x.target in VIEWS:
        x = x.args[0]
    return x


def _multiply(graph: Graph, together: list[Node]) -> None:
    """Replace these products, which share a vector, by one launch."""
    weights = [_weight(product) for product in together]
    with graph.inserting_before(together[0]):
        all_rows = _call(graph, ops.tree_attention.products.default, _vector(together[0]), weights)
    first = 0
    for product, weight in zip(together, weights, strict=True):
        last = first + weight.meta["val"].shape[0]
        with graph.inserting_before(product):
            exact = _call(graph, aten.slice.Tensor, all_rows, 1, first, last)
            if product.target is aten.addmm.default:
                exact = _call(graph, aten.add.Tensor, exact, product.args[0])
            rounded = _call(graph, rounding, exact, product.meta["val"].dtype)
        product.replace_all_uses_with(rounded)
        graph.erase_node(product)
        first = last


def _sum_over_link(graph: Graph, node: Node, x: Node, group_name: str, ranks: int) -> None:
    """Replace an all-reduce by one exchange of float32, from before the last rounding if x was rounded from float32."""
    source, like = _source(x), x.meta["val"]
    with graph.inserting_before(node):
        if source.target is rounding and source.args[0].meta["val"].dtype == torch.float32:
            exact = _call(graph, aten.reshape.default, source.args[0], list(like.shape))
        else:
            exact = _call(graph, rounding, x, torch.float32)
        mean = _call(graph, ops.tree_attention.mean_over_ranks.default, exact, group_name)
        rounded = _call(graph, rounding, _call(graph, aten.mul.Tensor, mean, ranks), like.dtype)
    for wait in [user for user in node.users if user.target is collectives.wait_tensor.default]:
        wait.replace_all_uses_with(rounded)
        graph.erase_node(wait)
    node.replace_all_uses_with(rounded)
    graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """Insert a call. Sets `meta["val"]`, which inductor needs."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*cast(Any, map_arg(args, lambda other: other.meta["val"])))
    return node


@torch.library.custom_op("tree_attention::products", mutates_args=())
def products(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Multiply x `[1, K]` by the transpose of each weight `[N_i, K]`: float32 `[1, sum of N_i]`."""
    from .product_kernels import products_kernel

    sizes = tuple(len(weight) for weight in weights)
    out = x.new_empty((1, sum(sizes)), dtype=torch.float32)
    with torch.cuda.device_of(x):
        cast(Any, products_kernel)[(sum(sizes),)](
            x, tuple(weights), sizes, out, K=x.shape[1], COUNT=len(sizes), COLS=COLS, num_warps=WARPS
        )
    return out


@products.register_fake
def _(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty((1, sum(len(weight) for weight in weights)), dtype=torch.float32)


# The link counts epochs in its own memory, so the order of these calls matters: all ranks run the same graph.
mean_over_ranks = torch.library.custom_op("tree_attention::mean_over_ranks", link_sums.mean_over_ranks, mutates_args=())
mean_over_ranks.register_fake(lambda x, group_name: x.new_empty(x.shape))
