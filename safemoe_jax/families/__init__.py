"""Families of MoE models, by `model_type`: each a config translation and a tensor table, nothing else."""

from __future__ import annotations

from safemoe_jax.errors import InputError
from safemoe_jax.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama,
    llama4,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from safemoe_jax.families.family import Family

_ALL = (
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    granitemoe.FAMILY,
    llama.FAMILY,
    qwen3.FAMILY,
    gpt_oss.FAMILY,
    phimoe.FAMILY,
    llama4.FAMILY,
    llama4.HUB_FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    dots1.FAMILY,
    glm4_moe.FAMILY,
    ernie4_5_moe.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(model_type: object, where: str = "config.json") -> Family:
    """The family of a `model_type`.

    Raises:
        InputError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"unknown model_type {model_type!r}",
            where=where,
            expected=f"one of {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "family_of"]
