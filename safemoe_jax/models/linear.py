"""The linear layer, with its optional bias and low-rank adapter. Legend: X leading axes, I inputs, O
outputs, r rank."""

from __future__ import annotations

import jax
from flax import nnx

from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.params import LoraParam, ParamSpec
from safemoe_jax.models.quantised import Quantisation, Quantised, multiply, read_weight, weight_param


class Linear(nnx.Module):
    """y = x W + b + scale (x A) B; the kernel is the transpose of a torch weight."""

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        lora: LoraConfig | None,
        bias: bool = False,
        quantisation: Quantisation | None = None,
    ) -> None:
        self.kernel = weight_param(ParamSpec((inputs, outputs), axes), quantisation)
        self.bias = nnx.Param(ParamSpec((outputs,), axes[1:], "zeros")) if bias else None
        self.lora_scale = None
        if lora is not None and name in lora.targets:
            self.lora_scale = lora.scale
            self.lora_a = LoraParam(ParamSpec((inputs, lora.rank), (axes[0], "lora"), "lora_a"))
            self.lora_b = LoraParam(ParamSpec((lora.rank, outputs), ("lora", axes[1]), "zeros"))

    def __call__(self, x_XI: jax.Array) -> jax.Array:
        """Applies the layer along the last axis, in the input's dtype."""
        dtype = x_XI.dtype
        kernel = read_weight(self.kernel, dtype)
        y_XO = multiply(_product, x_XI, kernel) if isinstance(kernel, Quantised) else x_XI @ kernel
        if self.bias is not None:
            y_XO = y_XO + self.bias[...].astype(dtype)
        if self.lora_scale is not None:
            y_XO = y_XO + self.lora_scale * (
                (x_XI @ self.lora_a[...].astype(dtype)) @ self.lora_b[...].astype(dtype)
            )
        return y_XO


def _product(x_XI: jax.Array, kernel_IO: jax.Array, _: None) -> jax.Array:
    return x_XI @ kernel_IO
