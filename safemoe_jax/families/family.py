"""What a family of models is to this project: a config translation and a tensor table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from safemoe_jax.families.tensor_table import TensorTable
from safemoe_jax.models.config import ModelConfig


class Family(NamedTuple):
    """One family.

    Attributes:
        model_type: its name in config.json.
        read_config: parsed config.json -> ModelConfig; raises InputError naming the field.
        write_config: ModelConfig -> fields of config.json (adapters are not part of them).
        table: its tensors.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    table: TensorTable
