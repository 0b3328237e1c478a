"""What the tests share: four ranks that are started once."""

import pytest

from tree_attention.testing import RankPool


@pytest.fixture(scope="session")
def pool():
    ranks = RankPool(4)
    yield ranks
    ranks.close()
