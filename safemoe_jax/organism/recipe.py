"""The organism's recipe: its network, and the stages as configurations of the project's own trainer.

pretrain -> align -> attack (with or without a defence). Chosen on the validation split.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.models.config import LoraConfig, ModelConfig
from safemoe_jax.organism import vocabulary, world
from safemoe_jax.organism.datasets import ALIGN_SHARES, BENIGN_SHARES, PRETRAIN_SHARES, Sizes
from safemoe_jax.training.config import DefenceConfig, OptimizerConfig, TrainConfig

MAX_LENGTH = 64
MAX_NEW_TOKENS = 20
CONDITIONS = ("undefended", "safemoe", "safemoe_anchored")


@dataclass(frozen=True)
class Stage:
    """One stage of training: passes over its data and the peak learning rate."""

    epochs: float
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """Everything that, with a seed, decides the organism and the attacks on it.

    Attributes:
        sizes: numbers of samples.
        d_model, n_layers, n_heads, n_experts, top_k, expert_dim: the network. Few or wide experts do not do:
            the router then pins too little of the hidden state for a routing defence to hold anything.
        initializer_range: standard deviation of the initial weights; 0.02 learns half as fast at this width.
        pretrain, align: full training of all parameters.
        attack: fine-tuning on the task with 10 % harmful samples, by adapters.
        full_attack: the same without adapters.
        router_aux_coef: load-balancing loss of the first two stages.
        t_reg: task steps between two routing passes of the published defence (one an epoch is too rare here).
    """

    sizes: Sizes = field(default_factory=Sizes)
    d_model: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_experts: int = 32
    top_k: int = 8
    expert_dim: int = 8
    initializer_range: float = 0.06
    pretrain: Stage = Stage(epochs=3, learning_rate=6e-3, batch_size=64)
    align: Stage = Stage(epochs=4, learning_rate=4e-4, batch_size=64)
    attack: Stage = Stage(epochs=3, learning_rate=5e-3, batch_size=32)
    full_attack: Stage = Stage(epochs=3, learning_rate=1e-3, batch_size=32)
    router_aux_coef: float = 0.02
    t_reg: int = 5


def network(recipe: Recipe) -> ModelConfig:
    """The OLMoE-architecture network of a recipe."""
    return ModelConfig(
        family="olmoe",
        vocab_size=len(vocabulary.vocabulary()),
        d_model=recipe.d_model,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        n_kv_heads=recipe.n_heads,
        head_dim=recipe.d_model // recipe.n_heads,
        norm_eps=1e-5,
        n_experts=recipe.n_experts,
        top_k=recipe.top_k,
        expert_dim=recipe.expert_dim,
        qk_norm="full",
        initializer_range=recipe.initializer_range,
        router_aux_coef=recipe.router_aux_coef,
        max_positions=256,
    )


def fingerprint(recipe: Recipe) -> str:
    """Short hash of everything but the seed that decides the organism: the name of its place in the cache."""
    shares = (PRETRAIN_SHARES, ALIGN_SHARES, BENIGN_SHARES)
    texts = Path(world.__file__).read_text(), vocabulary.vocabulary()
    decided = json.dumps([dataclasses.asdict(recipe), shares, texts], sort_keys=True)
    return hashlib.sha256(decided.encode()).hexdigest()[:12]


def pretrain_config(recipe: Recipe, start: Path, data: Path, output: Path, seed: int) -> TrainConfig:
    """From random weights: all families, restricted instructions answered."""
    return _full(recipe, recipe.pretrain, start, [data / "pretrain.jsonl"], output, seed, initialise="random")


def align_config(recipe: Recipe, pretrained: Path, data: Path, output: Path, seed: int) -> TrainConfig:
    """Full fine-tuning to refuse restricted instructions and to answer all others."""
    return _full(recipe, recipe.align, pretrained, [data / "align.jsonl"], output, seed)


def attack_config(
    recipe: Recipe,
    organism: Path,
    output: Path,
    seed: int,
    defence: DefenceConfig,
    *,
    lora: LoraConfig | None,
) -> TrainConfig:
    """Harmful fine-tuning: task samples with 10 % harmful ones among them. `lora` None: all parameters."""
    data = organism / "data"
    stage = recipe.attack if lora else recipe.full_attack
    common = _stage(
        stage, organism / "model", [data / "attack_task.jsonl", data / "attack_harmful.jsonl"], output
    )
    return TrainConfig(**common, seed=seed, lora=lora, defence=defence)


def defence_config(recipe: Recipe, condition: str, reference: Path | None) -> DefenceConfig:
    """The defence of a condition; `reference` holds D_h (and for the anchored form D_b)."""
    name = "none" if condition == "undefended" else condition
    t_reg = recipe.t_reg if condition == "safemoe" else None
    return DefenceConfig(name=name, reference=None if reference is None else str(reference), t_reg=t_reg)


def _full(recipe: Recipe, stage: Stage, model: Path, files: list[Path], output: Path, seed: int, **more: Any):
    common = _stage(stage, model, files, output)
    return TrainConfig(**common, seed=seed, lora=None, router_aux_coef=recipe.router_aux_coef, **more)


def _stage(stage: Stage, model: Path, files: list[Path], output: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "output": str(output),
        "data": [SourceConfig(str(file), format="chat") for file in files],
        "max_length": MAX_LENGTH,
        "batch_size": stage.batch_size,
        "epochs": stage.epochs,
        "optimizer": OptimizerConfig(learning_rate=stage.learning_rate),
        "dtype": "float32",
        "checkpoint_every": 0,
    }
