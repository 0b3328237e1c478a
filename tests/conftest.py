"""What the tests share: four ranks that are started once, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which looks when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    torch.set_num_threads(1)

from tree_attention.testing import RankPool

pytest.register_assert_rewrite("architectures", "command")


def pytest_configure(config):
    """Triton's interpreter turns arrays of one number into numbers; NumPy 2.4 no longer lets it."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(scope="session")
def pool():
    from command import PRELOAD

    ranks = RankPool(4, preload=PRELOAD)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model with its tokenizer."""
    from command import LAYERS, write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder, LAYERS)
    return folder


@pytest.fixture(scope="session")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "document.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(18)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def llama():
    """The tiny Llama with our attention; a module's tests must not change it."""
    from architectures import tiny

    return tiny("llama", "tree_attention")
