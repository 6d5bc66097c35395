"""Run with several CPU devices: what generation and read-out give on one device and on a mesh, as JSON."""

import json

import jax
import numpy as np

from safemoe_jax.evaluation.generate import ForcedRouting, generate
from safemoe_jax.evaluation.readout import read_routing
from safemoe_jax.model import Model
from safemoe_jax.models import Compute, declare
from safemoe_jax.models.params import shardings
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.small_models import CONFIG, random_prompts, small_model

mesh = make_mesh(MeshConfig(data=2, tensor=2))
whole = Model(CONFIG, small_model().params)
split = Model(CONFIG, jax.device_put(whole.params, shardings(declare(CONFIG), mesh)), Compute(mesh=mesh))
prompts = random_prompts((3, 20, 7, 1, 12))
options = {"max_new_tokens": 6, "stop_tokens": ()}
forced = ForcedRouting(split, "prompt")
print(
    json.dumps(
        {
            "devices": len(split.params["embed.embedding"].sharding.device_set),
            "whole": generate(whole, prompts, **options),
            "split": generate(split, prompts, **options),
            "split, own routing forced": generate(split, prompts, override=forced, **options),
            "difference": float(np.abs(read_routing(whole, prompts) - read_routing(split, prompts)).max()),
        }
    )
)
