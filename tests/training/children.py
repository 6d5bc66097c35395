"""Runs in processes of their own: one that is killed, one that sees eight devices.

python -m tests.training.children killed FOLDER
python -m tests.training.children meshes FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from safemoe_jax.cli import main
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.training.config import TrainConfig, to_dict
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import World, make_world


def long_run(world: World, output: str, **changes) -> TrainConfig:
    """22 task steps with a routing pass after every third: two kinds of step, several epochs."""
    return world.train_config(output, epochs=5.0, defence=world.defence("safemoe", t_reg=3), **changes)


def killed(folder: Path) -> None:
    """A run that writes a checkpoint after every step, so that it is writing at nearly every moment."""
    finetune(long_run(make_world(folder), "killed", checkpoint_every=1))


def meshes(folder: Path) -> None:
    """The same runs on one device and on eight. Their programs are few and small: batches of prompts have one
    shape, and experts get few rows each, for which there is one size of block. The experts' width is three
    blocks of 4 bits, which two devices share."""
    world = make_world(folder, d_model=64, expert_dim=96, n_experts=64)
    _in_floats(world)
    _quantised(world)


def _in_floats(world: World) -> None:
    """On one device and on data 2 x fsdp 2 x tensor 2; losses to losses.json."""
    losses = {}
    for defence in ("safemoe", "safemoe_anchored"):
        for name, sizes in (("one", MeshConfig()), ("eight", MeshConfig(data=2, fsdp=2, tensor=2))):
            run = {"epochs": 1.0, "batch_size": 5, "mesh": sizes, "defence": world.defence(defence, t_reg=2)}
            result = finetune(world.train_config(f"{defence}-{name}", experts="dense", **run))
            rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
            losses[f"{defence}-{name}"] = [[row["loss"], row["routing_penalty"]] if "routing_penalty" in row
                                           else [row["loss"]] for row in rows]  # fmt: skip
            kernel = next(v for k, v in result.model.params.items() if k.endswith("q_proj.kernel"))
            losses[f"{defence}-{name}-shards"] = len({str(s.index) for s in kernel.addressable_shards})
    (world.folder / "losses.json").write_text(json.dumps(losses))


def _quantised(world: World) -> None:
    """`safemoe train` on 8 and 4 bits, with adapters on experts too, on one device and on fsdp 2 x expert 2 x
    tensor 2; run folders METHOD-one and METHOD-eight."""
    lora = LoraConfig(4, 8.0, ("q_proj", "v_proj", "mlp.experts.down_proj"))
    for method in ("int8", "int4"):
        for name, sizes in (("one", MeshConfig()), ("eight", MeshConfig(fsdp=2, expert=2, tensor=2))):
            defence = world.defence("safemoe", t_reg=2)
            run = {"epochs": 1.0, "batch_size": 5, "mesh": sizes, "lora": lora, "defence": defence}
            config = world.train_config(f"{method}-{name}", **run)
            file = world.folder / f"{method}-{name}.yaml"
            file.write_text(yaml.safe_dump(to_dict(config)))
            arguments = ["--config", str(file), "--quantisation", method, "--xla_cache", "off"]
            assert main(["train", *arguments]) == 0


if __name__ == "__main__":
    {"killed": killed, "meshes": meshes}[sys.argv[1]](Path(sys.argv[2]))
