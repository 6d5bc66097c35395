"""What every test runs under: the CPU, fixed seeds, and one compilation cache that outlives the run.

The environment is set at import, before any test module imports JAX.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most of the suite's time is compiling programs that run once; compiling them without the code generator's
# optimisations takes half of it, and what the compiler does to the computation itself stays as it is.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Nothing is fetched while testing; a test that needs a model or a data set makes it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/parity is a parity test, marked or not: none can be missing from `make parity`."""
    for item in items:
        if REPOSITORY / "tests" / "parity" in item.path.parents:
            item.add_marker(pytest.mark.parity)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Seeds Python's and NumPy's global generators: a test sees the same numbers alone and in the suite."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY
