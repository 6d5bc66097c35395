"""One pair of models a variant: a family's test file names its VARIANTS and imports the facts.

torch is imported only when a test runs: where it is not installed nothing here is collected.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
pytest.register_assert_rewrite("tests.parity.families.harness", "tests.parity.families.facts")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every fact that asks for `pair` is checked for every variant of its file."""
    if "pair" in metafunc.fixturenames:
        variants = metafunc.module.VARIANTS
        names = [variant.name for variant in variants]
        metafunc.parametrize("pair", variants, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A variant's torch model, what that computes, its folders, and this project's model of them."""
    import torch

    from tests.parity.families.harness import make_pair

    torch.set_num_threads(1)
    return make_pair(request.param, tmp_path_factory.mktemp(request.param.name))
