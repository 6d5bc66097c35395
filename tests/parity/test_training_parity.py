"""Training against plain torch and PEFT: padded batches, a loop written out, the published routing pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from safemoe_jax.data.chat import encode_samples, load_tokenizer
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.data.sources import SourceConfig, read_source
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.routing.auxiliary import load_balancing_loss
from safemoe_jax.training.config import OptimizerConfig, TrainConfig
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import N_HARMFUL, World, make_world, padded

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

T_REG, TASK_STEPS, TEMPERATURE = 5, 12, 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(world: World) -> TrainConfig:
    return world.train_config(
        "run",
        steps=TASK_STEPS,
        lora=LoraConfig(4, 8.0, ("q_proj", "v_proj")),
        defence=world.defence("safemoe", t_reg=T_REG),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.1),
    )


def initial_adapter(world: World, config: TrainConfig) -> Path:
    """The adapter that the run starts from, in PEFT's format."""
    folder = world.folder / "initial"
    model = load_pretrained(world.model)
    key = jax.random.key(config.seed)
    adapted, params = add_adapters(model.config, model.params, config.lora, key)
    dataclasses.replace(model, config=adapted, params=params).save_adapter(folder)
    return folder


def torch_batch(sequences: list[np.ndarray]):
    tokens, mask = padded(sequences)
    return torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def last_router_logits(model, tokens, mask):
    """[B, L, E] at each row's last real token."""
    layers = model(input_ids=tokens, attention_mask=mask, output_router_logits=True).router_logits
    stacked = torch.stack([layer.reshape(*tokens.shape, -1) for layer in layers], dim=1)
    return stacked[torch.arange(len(tokens)), :, mask.sum(dim=1) - 1]


def answer_loss(model, batch):
    """Mean cross-entropy over all answer tokens of a padded batch, prompts masked."""
    tokens, mask = torch_batch([sample.tokens for sample in batch])
    labels, learned = padded([np.where(sample.loss_mask, sample.tokens, -100) for sample in batch])
    labels = torch.tensor(np.where(learned == 1, labels, -100), dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), ignore_index=-100
    )


def torch_losses(world: World, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses of task steps and of routing steps, as the published code trains."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32, attn_implementation="eager")
    prompts = _prompts(world)
    with torch.no_grad():
        reference = [last_router_logits(base, *torch_batch(batch)) for batch in prompts]
    model = peft.PeftModel.from_pretrained(base, initial_adapter(world, config), is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(np.ceil(0.1 * TASK_STEPS)), TASK_STEPS)
    divergence = torch.nn.KLDivLoss(reduction="batchmean")
    task, routing = [], []
    for step, batch in enumerate(_task_batches(world, config), start=1):
        loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        task.append(loss.item())
        for batch_prompts, aligned in zip(prompts, reference, strict=True) if step % T_REG == 0 else ():
            current = last_router_logits(model, *torch_batch(batch_prompts))
            loss = divergence(
                torch.log_softmax(current / TEMPERATURE, dim=-1), torch.softmax(aligned / TEMPERATURE, dim=-1)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            routing.append(loss.item())
    return task, routing


def _task_batches(world: World, config: TrainConfig):
    """The samples of each step, in the run's order."""
    samples = read_source(SourceConfig(str(world.data)))
    encoded = encode_samples(load_tokenizer(str(world.model)), samples, config.max_length)
    pipeline = TrainPipeline.build(encoded, config.batch_size, seed=config.seed, total_steps=TASK_STEPS)
    return [[encoded[i] for i in pipeline.sample_ids(step)] for step in range(TASK_STEPS)]


def _prompts(world: World) -> list[list[np.ndarray]]:
    from safemoe_jax.checkpoints.reference import read_reference

    harmful = list(read_reference(world.reference).prompts[:N_HARMFUL])
    return [harmful[i : i + 4] for i in range(0, N_HARMFUL, 4)]


def test_losses_equal_torch_and_peft(world: World, config: TrainConfig):
    """12 task steps with a routing pass of three batches after the 5th and the 10th, 1e-3 relative."""
    result = finetune(config)
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    task, routing = torch_losses(world, config)
    ours = {kind: [row["loss"] for row in rows if row["kind"] == kind] for kind in ("task", "routing")}
    assert len(task) == TASK_STEPS and len(routing) == 6 and min(routing) > 1e-3
    errors = {
        kind: float(np.max(np.abs(np.array(ours[kind]) / np.array(theirs) - 1)))
        for kind, theirs in (("task", task), ("routing", routing))
    }
    print(f"largest relative differences: {errors}")
    np.testing.assert_allclose(ours["task"], task, rtol=1e-3)
    np.testing.assert_allclose(ours["routing"], routing, rtol=1e-3)


def test_load_balancing_loss_equals_transformers():
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 7, 8)).astype(np.float32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    layers = tuple(torch.tensor(layer.reshape(-1, 8)) for layer in logits)
    theirs = load_balancing_loss_func(layers, 8, 2, torch.tensor(mask)).item()
    assert float(load_balancing_loss(logits, mask, top_k=2)) == pytest.approx(theirs, rel=1e-6)
