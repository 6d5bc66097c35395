"""One tiny world for all defence tests."""

from __future__ import annotations

import pytest

from tests.training.tiny import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Model, tokenizer, data and reference on disk."""
    return make_world(tmp_path_factory.mktemp("world"))
