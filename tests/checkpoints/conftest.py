"""Folders that transformers and PEFT wrote (tests/references), and copies of them to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

REFERENCES = Path(__file__).resolve().parent.parent / "references"


@pytest.fixture(scope="session")
def references() -> Path:
    """The folder of the committed reference files."""
    return REFERENCES


@pytest.fixture
def mha(tmp_path: Path) -> Path:
    """A copy of a single-file checkpoint folder, free to change."""
    return shutil.copytree(REFERENCES / "mha", tmp_path / "model")


@pytest.fixture
def rewrite():
    """Changes the tensors of a safetensors file: rewrite(path, function of the dictionary of arrays)."""

    def change(path: Path, function) -> None:
        arrays: dict[str, np.ndarray] = load_file(path)
        function(arrays)
        save_file(arrays, path, {"format": "pt"})

    return change
