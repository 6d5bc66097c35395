"""Rows of a tensor table that most families share, so that a family names only what is its own.

Every function gives more rows than one config declares (biases, norms, sinks): a table may be a superset.
The names are transformers', of the published layout first.
"""

from __future__ import annotations

from safemoe_jax.families.tensor_table import Row, Source, expert, linear, same

LAYER = "model.layers.{layer}"
BUFFERS = (r".*\.rotary_emb\.inv_freq",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def norm(name: str, disk: str) -> tuple[Row, Row]:
    """A norm's scale and, for LayerNorm, its bias."""
    return same(f"{name}.scale", f"{disk}.weight"), same(f"{name}.bias", f"{disk}.bias")


def decoder_rows() -> tuple[Row, ...]:
    """Embedding, both norms of a layer, the final norm and the output projection."""
    return (
        same("embed.embedding", "model.embed_tokens.weight"),
        *norm("input_norm", f"{LAYER}.input_layernorm"),
        *norm("post_attention_norm", f"{LAYER}.post_attention_layernorm"),
        *norm("final_norm", "model.norm"),
        *linear("lm_head", "lm_head"),
    )


def attention_rows() -> tuple[Row, ...]:
    """Grouped-query attention: projections with biases, q and k norms, sinks."""
    attention = f"{LAYER}.self_attn"
    return (
        *(row for p in "qkvo" for row in linear(f"attention.{p}_proj", f"{attention}.{p}_proj")),
        *(same(f"attention.{p}_norm.scale", f"{attention}.{p}_norm.weight") for p in "qk"),
        same("attention.sinks", f"{attention}.sinks"),
    )


def latent_attention_rows() -> tuple[Row, ...]:
    """DeepSeek's latent attention, with a full query projection or a low-rank one."""
    attention = f"{LAYER}.self_attn"
    projections = {
        "q_proj": "q_proj",
        "q_a_proj": "q_a_proj",
        "q_b_proj": "q_b_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_b_proj": "kv_b_proj",
        "o_proj": "o_proj",
    }
    return (
        *(
            row
            for ours, disk in projections.items()
            for row in linear(f"attention.{ours}", f"{attention}.{disk}")
        ),
        same("attention.q_a_norm.scale", f"{attention}.q_a_layernorm.weight"),
        same("attention.kv_a_norm.scale", f"{attention}.kv_a_layernorm.weight"),
    )


def swiglu_rows(name: str, disk: str) -> tuple[Row, ...]:
    """A dense layer's or a shared expert's three projections.

    Args:
        name: "mlp" or "moe.shared".
        disk: the module that holds gate_proj, up_proj and down_proj.
    """
    projections = ("gate_proj", "up_proj", "down_proj")
    return tuple(row for p in projections for row in linear(f"{name}.{p}", f"{disk}.{p}"))


def expert_rows(
    experts: str = f"{LAYER}.mlp.experts",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused: str = f"{LAYER}.mlp.experts",
) -> tuple[Row, ...]:
    """Experts published one by one, also read fused as transformers holds them: [E, 2F, D] and [E, D, F].

    Args:
        experts: the module list of the published layout.
        names: an expert's gate, up and down projections there.
        fused: the module of the fused layout.
    """
    gate, up, down = (f"{experts}.{{expert}}.{name}.weight" for name in names)
    return (
        expert("moe.experts.gate", gate, f"{fused}.gate_up_proj", part=(0, 2)),
        expert("moe.experts.up", up, f"{fused}.gate_up_proj", part=(1, 2)),
        expert("moe.experts.down", down, f"{fused}.down_proj"),
    )


def fused_expert_rows(
    gate_ups: tuple[str, ...], downs: tuple[str, ...], *, transpose: bool
) -> tuple[Row, ...]:
    """Experts published in two tensors, gate before up.

    Args:
        gate_ups: names of the tensor with both halves, the published one first.
        downs: names of the tensor of the down projections.
        transpose: [E, 2F, D] and [E, D, F] (granite); otherwise [E, D, 2F] and [E, F, D] (llama4).
    """

    def row(name: str, disks: tuple[str, ...], part: tuple[int, int]) -> Row:
        return Row(f"moe.experts.{name}", tuple(Source(disk, transpose, part) for disk in disks))

    return row("gate", gate_ups, (0, 2)), row("up", gate_ups, (1, 2)), row("down", downs, (0, 1))


def interleaved_expert_rows(experts: str = f"{LAYER}.mlp.experts") -> tuple[Row, ...]:
    """gpt_oss: gate and up alternate along the last axis of [E, D, 2F], with biases; also read from MXFP4."""

    def row(name: str, disk: str, part: tuple[int, int]) -> Row:
        plain = Source(f"{experts}.{disk}", part=part, interleaved=True)
        packed = Source(f"{experts}.{disk}", transpose=True, part=part, interleaved=True, packed=True)
        return Row(f"moe.experts.{name}", (plain, packed))

    def bias(name: str, disk: str, part: tuple[int, int]) -> Row:
        source = Source(f"{experts}.{disk}_bias", part=part, interleaved=True)
        return Row(f"moe.experts.{name}_bias", (source,))

    places = (("gate", "gate_up_proj", (0, 2)), ("up", "gate_up_proj", (1, 2)), ("down", "down_proj", (0, 1)))
    return tuple(make(*place) for make in (row, bias) for place in places)


def correction_bias_row(*disks: str, boxed: bool = False) -> Row:
    """The bias that is added for the choice of experts only; it stays float32.

    Args:
        disks: its names, the published one first.
        boxed: it is stored as [1, E] (ernie4_5_moe).
    """
    return Row("moe.router.correction_bias", tuple(Source(disk, boxed=boxed) for disk in disks), float32=True)
