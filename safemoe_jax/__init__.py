"""Safe fine-tuning of Mixture-of-Experts language models in JAX.

    import safemoe_jax as sm

    model = sm.load_pretrained("allenai/OLMoE-1B-7B-0125-Instruct")
    result = sm.finetune(sm.TrainConfig(model=..., output=..., data=[sm.SourceConfig(path=...)]))

Every public name is read from its module on first use: importing the package imports no other library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "DefenceConfig": "training.config:DefenceConfig",
    "InputError": "errors:InputError",
    "LoraConfig": "models.config:LoraConfig",
    "MeshConfig": "parallel.mesh:MeshConfig",
    "Model": "model:Model",
    "OptimizerConfig": "training.config:OptimizerConfig",
    "Reference": "checkpoints.reference:Reference",
    "SourceConfig": "data.sources:SourceConfig",
    "TrainConfig": "training.config:TrainConfig",
    "alignment_penalty": "routing.penalty:alignment_penalty",
    "encode_prompts": "data.chat:encode_prompts",
    "evaluate": "evaluation.suites:evaluate",
    "extract_reference": "evaluation.readout:extract_reference",
    "finetune": "workflows.train:finetune",
    "generate": "evaluation.generate:generate",
    "load_pretrained": "model:load_pretrained",
    "make_mesh": "parallel.mesh:make_mesh",
    "read_prompts": "data.sources:read_prompts",
    "read_reference": "checkpoints.reference:read_reference",
    "routing_drift": "routing.drift:drift",
    "write_reference": "checkpoints.reference:write_reference",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'safemoe_jax' has no attribute '{name}'")
    module, attribute = _PUBLIC[name].split(":")
    value = getattr(import_module(f"safemoe_jax.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
