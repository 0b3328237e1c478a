"""The pass over a compiled step's graph: our kernel multiplies one vector, and a link sums over ranks."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear

from tree_attention import Partial
from tree_attention.hf import link_sums
from tree_attention.hf.compile_pass import COLS, MAX_TOGETHER, StepPass, products
from tree_attention.hf.step import install_step

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Watched(StepPass):
    """Records the number of products in each launch, and of products and sums that are not replaced."""

    def __call__(self, graph):
        super().__call__(graph)
        aten, named = torch.ops.aten, {"op": "call_function"}
        ours = graph.find_nodes(target=torch.ops.tree_attention.products.default, **named)
        self.together = [len(node.args[1]) for node in ours]
        self.left = sum(len(graph.find_nodes(target=t, **named)) for t in (aten.mm.default, aten.addmm.default))
        self.sums = len(graph.find_nodes(target=torch.ops._c10d_functional.all_reduce.default, **named))

    def uuid(self):
        """Always run the pass, and never use inductor's cache."""


def compiled(function, *arguments, sums_over=None):
    """Return the result of a function that was compiled with the pass, and the pass."""
    torch._dynamo.reset()
    watched = Watched(sums_over, DEVICE)
    options = {"deterministic": True, "post_grad_custom_pre_pass": watched}
    with torch.no_grad():
        return torch.compile(function, options=options)(*arguments), watched


def assert_close(found, expected):
    """Compare half-precision results that were rounded at different places."""
    assert found.dtype == torch.float16
    assert (found - expected).abs().max() <= 4e-3 * expected.abs().max()


def drawn(*shapes, dtype=torch.float16):
    torch.manual_seed(0)
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [1, 40, COLS, COLS + 9])
def test_every_row_of_every_weight(K, dtype):
    x, *weights = drawn((1, K), (1, K), (5, K), (3, K), dtype=dtype)
    found = products(x, weights)
    expected = x.double() @ torch.cat(weights).double().T
    assert found.dtype == torch.float32
    scale = (x.double().abs() @ torch.cat(weights).double().abs().T).max()
    assert (found - expected).abs().max() <= 1e-6 * scale


def layer(x, q, k, v, bias, down):
    """Three products that share a vector, one with a bias, and one product of their result."""
    together = torch.cat([linear(x, q), linear(x, k), linear(x, v, bias)], -1)
    return linear(together.sin(), down)


@pytest.mark.slow
def test_products_that_share_a_vector_are_one_launch():
    x, *weights = drawn((1, 1, 24), (6, 24), (10, 24), (3, 24), (3,), (7, 19))
    found, watched = compiled(layer, x, *weights)
    assert (watched.together, watched.left) == ([3, 1], 0)
    assert_close(found, layer(x, *weights))


@pytest.mark.slow
def test_what_is_not_one_vector_stays_with_the_library():
    x, *weights = drawn((2, 1, 24), (6, 24), (10, 24), (3, 24), (3,), (7, 19))
    found, watched = compiled(layer, x, *weights)
    assert (watched.together, watched.left) == ([], 4)
    assert_close(found, layer(x, *weights))


@pytest.mark.slow
def test_many_products_are_several_launches():
    x, *weights = drawn((1, 24), *[(2, 24)] * (MAX_TOGETHER + 1))
    found, watched = compiled(lambda x, *weights: torch.cat([linear(x, w) for w in weights]), x, *weights)
    assert (watched.together, watched.left) == ([MAX_TOGETHER, 1], 0)
    assert_close(found, torch.cat([linear(x, w) for w in weights]))


OTHERS = {  # name -> a product of x [1, 24] and w [24, 24]
    "a weight that is computed": lambda x, w: linear(x, 2 * w),
    "columns": lambda x, w: linear(x, w.T),
    "not transposed": lambda x, w: torch.mm(x, w.permute(0, 1)),
    "a factor": lambda x, w: torch.addmm(x, x, w.T, alpha=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_stay_with_the_library(name):
    x, w = drawn((1, 24), (24, 24))
    found, watched = compiled(OTHERS[name], x, w)
    assert (watched.together, watched.left) == ([], 1)
    assert_close(found, OTHERS[name](x, w))


def test_a_double_weight_stays_with_the_library():
    x, w = drawn((1, 24), (6, 24), dtype=torch.float64)
    found, watched = compiled(linear, x, w)
    assert (watched.together, watched.left) == ([], 1)
    assert torch.equal(found, linear(x, w))


@dataclass
class Mirror:
    """Replaces a link between ranks that all have the same numbers; test_gpu.py has real ones."""

    world_size: int
    calls: int = 0
    group: object = field(default_factory=object)

    def reduce(self, partial):
        self.calls += 1
        assert partial.out.dtype == torch.float32
        assert (partial.lse == 0).all()
        return Partial(partial.out.clone(), partial.lse)


def split_layer(x, w, small):
    total = linear(x, w)
    dist.all_reduce(total)
    dist.all_reduce(small)
    return total, small + 1


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.slow
def test_small_sums_go_through_the_link(group, monkeypatch):
    x, w, small = drawn((1, 1, 24), (40, 24), (2, 1, 24))
    mirror = Mirror(3)
    monkeypatch.setitem(link_sums._links, group.group_name, (mirror, torch.zeros(link_sums.ROWS, device=DEVICE)))
    (total, more), watched = compiled(split_layer, x, w, small.clone(), sums_over=group.group_name)
    assert (watched.together, watched.sums, mirror.calls) == ([1], 0, 2)
    assert_close(total, 3 * linear(x, w))
    assert_close(more, 3 * small + 1)


@pytest.mark.slow
def test_other_sums_stay_with_the_library(group, monkeypatch):
    monkeypatch.setattr(link_sums, "ROWS", 2)  # of gcd(8, 128) = 8 numbers, over 3 - 1
    x, w, small = drawn((1, 1, 24), (8, 24), (2, 1, 8))
    mirror = Mirror(3)
    monkeypatch.setitem(link_sums._links, group.group_name, (mirror, torch.zeros(8, device=DEVICE)))
    (_, more), watched = compiled(split_layer, x, w, small.clone(), sums_over=group.group_name)
    assert (watched.sums, mirror.calls) == (1, 1)
    assert_close(more, small + 1)
    _, watched = compiled(split_layer, x, w, small.clone(), sums_over=None)
    assert (watched.sums, mirror.calls) == (2, 1)


def odd_sums(x):
    across, whole, exact = (2 * x).transpose(0, 1), x.sum(), x.double()
    for total in (across, whole, exact):
        dist.all_reduce(total)
    return across, whole, exact


@pytest.mark.slow
def test_sums_of_odd_tensors(group, monkeypatch):
    (x,) = drawn((4, 6, 8))
    monkeypatch.setitem(link_sums._links, group.group_name, (Mirror(2), torch.zeros(link_sums.ROWS, device=DEVICE)))
    (across, whole, exact), watched = compiled(odd_sums, x, sums_over=group.group_name)
    assert watched.sums == 2  # a scalar and float64 are the library's, one rank's own
    assert_close(across, 4 * x.transpose(0, 1))
    assert_close(whole, x.sum())
    assert torch.equal(exact, x.double())


def test_a_link_ends_with_its_group(group, monkeypatch):
    first, second = Mirror(2), Mirror(2)
    monkeypatch.setattr(link_sums, "_links", {"a": (first, None), "b": (second, None)})
    install_step(torch.nn.Linear(1, 1))
    dist.destroy_process_group(dist.GroupMember.NON_GROUP_MEMBER)  # of a group that this rank is not in
    assert list(link_sums._links) == ["a", "b"]
    link_sums.close_links(first.group)
    assert list(link_sums._links) == ["b"]
    link_sums.close_links(None)
    assert not link_sums._links
