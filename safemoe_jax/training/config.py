"""What a training run is: one dataclass, the same in YAML, on the command line and in Python."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.mesh import MESH_AXES, MeshConfig
from safemoe_jax.training.field_types import check_types

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are the published setting.

    Attributes:
        learning_rate: peak learning rate.
        schedule: after the warm-up: cosine or linear to 0 at the last task step, or constant.
        warmup: share of the task steps over which the rate rises linearly from 0 (rounded up to whole steps).
        weight_decay: decoupled decay, multiplied by the current learning rate; norm scales and biases have
            none.
        clip_norm: longest gradient (global L2 norm) of a task step; null does not clip.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    learning_rate: float = 1e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class DefenceConfig:
    """Which defence acts during training; fields that the named defence does not use are ignored.

    Attributes:
        name: none, safemoe (the published routing passes) or safemoe_anchored (a term in every task step).
        reference: file with the aligned model's routing on the harmful prompts (`safemoe reference`); for a
            quantised base too it is best made of the model in floats.
        benign_reference: the same for benign prompts (safemoe_anchored), where they are not in the first
            file.
        t_reg: safemoe: task steps between two routing passes; null is one pass at the end of every epoch.
        temperature: divides router logits before the softmax; null is the defence's own (0.1; anchored: 1).
        direction: forward is KL(reference || current), reverse is KL(current || reference).
        reduction: sum_layers (what the published code computes) or mean_layers (the paper's formula).
        layers: decoder layers whose routing counts; null is all.
        clip: safemoe: clip the pass's gradient like a task step's (the published code does not).
        coefficient: safemoe_anchored: weight of the term.
        prompts_per_step: safemoe_anchored: prompts of each kind that ride along in a task step.
    """

    name: str = "none"
    reference: str | None = None
    benign_reference: str | None = None
    t_reg: int | None = None
    temperature: float | None = None
    direction: Literal["forward", "reverse"] = "forward"
    reduction: Literal["sum_layers", "mean_layers"] = "sum_layers"
    layers: tuple[int, ...] | None = None
    clip: bool = False
    coefficient: float = 3.0
    prompts_per_step: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """A fine-tuning run: model, data, optimizer, defence. Defaults are the published setting.

    Attributes:
        model: Hugging Face folder (config.json, safetensors, tokenizer) or hub id.
        output: the run folder; a run that was interrupted here continues.
        data: sources of training samples.
        max_length: longest sample in tokens; longer ones are cut, and counted.
        batch_size: samples in one optimizer step, exactly.
        epochs: passes over the data; may be a fraction.
        steps: task steps, instead of epochs.
        gradient_accumulation: parts that a step's rows are computed in, one after another, to save memory.
        seed: order of the data, initial adapters, prompts of the anchored defence.
        dtype: type of frozen weights and of the computation; trained weights are always float32.
        quantisation: int8, int4 or int4-64 holds the frozen kernels of attention, experts and feed-forwards
            in 8 or 4 bits (int4: a scale for every 32 inputs; int4-64: for every 64), with adapters and
            pretrained weights only; null holds them in dtype.
        lora: adapters; null trains every parameter.
        optimizer: AdamW and its schedule.
        defence: what keeps the model safe.
        prompts: the harmful prompts that the defence's reference must have been made of, as given to `safemoe
            reference`; null takes the file as it is.
        benign: the same for its benign prompts.
        mesh: devices for each kind of parallelism.
        remat: full recomputes a layer's activations in the backward pass, to save memory.
        experts: kernel of the expert layers; auto chooses by the platform.
        router_aux_coef: weight of the load-balancing loss (for pretraining; 0 is none, whatever the
            checkpoint's config asks for).
        router_z_coef: weight of the router z-loss (for pretraining; 0 is none).
        initialise: pretrained weights, or random ones for the config in the model folder.
        checkpoint_every: task steps between checkpoints; null is once an epoch and at the end, 0 is never.
        tensorboard: also write TensorBoard files into the run folder.
        wandb: also send the metrics to Weights & Biases.
        progress: show a progress bar.
    """

    model: str
    output: str
    data: list[SourceConfig]
    max_length: int = 512
    batch_size: int = 32
    epochs: float = 3.0
    steps: int | None = None
    gradient_accumulation: int = 1
    seed: int = 42
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantisation: Quantisation | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    prompts: SourceConfig | None = None
    benign: SourceConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    remat: Literal["none", "full"] = "none"
    experts: Literal["auto", "dense", "blocks", "ragged", "megablox"] = "auto"
    router_aux_coef: float = 0.0
    router_z_coef: float = 0.0
    initialise: Literal["pretrained", "random"] = "pretrained"
    checkpoint_every: int | None = None
    tensorboard: bool = False
    wandb: bool = False
    progress: bool = True


# These change what is shown or kept, never the trained bits: a run may be continued with other values.
_NOT_IDENTITY = ("output", "checkpoint_every", "tensorboard", "wandb", "progress")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain YAML and JSON values; `safemoe train --config` reads it back."""
    return _plain(dataclasses.asdict(config))


def identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration (`to_dict`) that decides the trained parameters.

    A field that is missing has its default: the file may be older than the field, and a new field's default
    is what was computed before there was one.
    """
    filled = _filled(resolved, TrainConfig)
    return {name: value for name, value in filled.items() if name not in _NOT_IDENTITY}


def _filled(value: Any, hint: Any) -> Any:
    """Plain values of a dataclass (or of a list of them, or None) with the defaults of missing fields."""
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
    if isinstance(value, list) and len(arms) == 1:
        return [_filled(item, arms[0]) for item in value]
    kind = next((kind for kind in (hint, *arms) if dataclasses.is_dataclass(kind)), None)
    if kind is None or not isinstance(value, dict):
        return value
    hints = typing.get_type_hints(kind)
    given = {name: _filled(item, hints.get(name)) for name, item in value.items()}
    return {f.name: _default(f) for f in dataclasses.fields(kind) if f.name not in given and _has(f)} | given


def _has(declared: dataclasses.Field) -> bool:
    return declared.default is not MISSING or declared.default_factory is not MISSING


def _default(declared: dataclasses.Field) -> Any:
    value = declared.default if declared.default is not MISSING else declared.default_factory()
    return _plain(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)


def validate(config: TrainConfig) -> None:
    """Refuses values that no run can have: of a wrong type, not finite, or out of their range.

    Raises:
        InputError: names the first wrong field and what would be right.
    """
    check_types(config, TrainConfig)
    optimizer, defence, quantisation = config.optimizer, config.defence, config.quantisation
    pretrained, alpha = config.initialise == "pretrained", config.lora.alpha if config.lora else 1.0
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    checks = (
        ("data", len(config.data), len(config.data) > 0, "at least one source"),
        ("max_length", config.max_length, config.max_length >= 2, "at least 2"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("epochs", config.epochs, config.epochs > 0, "above 0"),
        ("steps", config.steps, _unset_or(1, config.steps), "at least 1, or null"),
        ("gradient_accumulation", (parts := config.gradient_accumulation), parts >= 1, "at least 1"),
        ("seed", config.seed, 0 <= config.seed < 2**32, f"from 0 to {2**32 - 1}"),
        ("quantisation", quantisation, not quantisation or config.lora is not None, "null, or adapters"),
        ("quantisation", quantisation, not quantisation or pretrained, "initialise: pretrained, or null"),
        ("lora.alpha", alpha, alpha > 0, "above 0"),
        ("router_aux_coef", config.router_aux_coef, config.router_aux_coef >= 0, "0 or more"),
        ("router_z_coef", config.router_z_coef, config.router_z_coef >= 0, "0 or more"),
        ("checkpoint_every", (every := config.checkpoint_every), _unset_or(0, every), "0 or more, or null"),
        ("optimizer.learning_rate", optimizer.learning_rate, optimizer.learning_rate >= 0, "0 or more"),
        ("optimizer.warmup", optimizer.warmup, 0 <= optimizer.warmup < 1, "a share from 0 to below 1"),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.clip_norm", (clip := optimizer.clip_norm), clip is None or clip > 0, "above 0, or null"),
        ("optimizer.b1", optimizer.b1, 0 <= optimizer.b1 < 1, "from 0 to below 1"),
        ("optimizer.b2", optimizer.b2, 0 <= optimizer.b2 < 1, "from 0 to below 1"),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, "above 0"),
        ("defence.t_reg", defence.t_reg, _unset_or(1, defence.t_reg), "at least 1 step, or null"),
        ("defence.temperature", (tau := defence.temperature), tau is None or tau > 0, "above 0, or null"),
        ("defence.coefficient", defence.coefficient, defence.coefficient >= 0, "0 or more"),
        ("defence.prompts_per_step", (riding := defence.prompts_per_step), riding >= 1, "at least 1"),
        *((f"mesh.{axis}", size, size >= 1, "at least 1") for axis, size in sizes.items()),
    )  # fmt: skip
    for name, value, right, expected in checks:
        if not right:
            where = f"the configuration, field {name}"
            raise InputError(f"{name} is {value}", where=where, expected=expected)


def _unset_or(least: int, value: int | None) -> bool:
    return value is None or value >= least


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
