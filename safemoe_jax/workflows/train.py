"""`safemoe train`: from a configuration to a fine-tuned model in a run folder. Wiring only."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from safemoe_jax import defenses
from safemoe_jax.checkpoints.hub import find_description, find_folder
from safemoe_jax.checkpoints.huggingface import part_shardings, read_config
from safemoe_jax.checkpoints.json_files import add_results, read_if_there
from safemoe_jax.checkpoints.reference import (
    Reference,
    check_matches,
    fingerprint,
    fingerprint_folder,
    hash_prompts,
    read_reference,
)
from safemoe_jax.checkpoints.train_state import TrainCheckpoints
from safemoe_jax.data.chat import Encoded, encode_samples
from safemoe_jax.data.formats import Sample
from safemoe_jax.data.mixture import mix
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.data.sources import read_source
from safemoe_jax.errors import InputError
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models.config import Compute, ModelConfig, check_mesh
from safemoe_jax.models.lora import add_adapters, describe, with_targets
from safemoe_jax.models.params import Params, cast, initialise, shardings, split_trainable
from safemoe_jax.models.quantisation import describe_base, quantise_params, quantised_weights
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.models.transformer import declare
from safemoe_jax.parallel.mesh import BATCH_AXES, make_mesh, mesh_axis_sizes
from safemoe_jax.training.config import TrainConfig, to_dict, validate
from safemoe_jax.training.hooks import Defence
from safemoe_jax.training.inputs import check_inputs, check_vocabulary, hash_reference
from safemoe_jax.training.loop import Plan, Start, check_passes, prepare, resume, train
from safemoe_jax.training.metrics import (
    Sink,
    check_packages,
    jsonl_sink,
    progress_sink,
    tensorboard_sink,
    wandb_sink,
)
from safemoe_jax.training.run_folder import (
    check_folder,
    is_whole,
    open_folder,
    set_aside,
)
from safemoe_jax.training.state import TrainState
from safemoe_jax.training.step import n_compiled
from safemoe_jax.workflows.loading import prompt_tokens

OnStep = Callable[[int, Model], None]
"""(finished task steps, the model as it is now), called after every task step and the pass that follows it;
the model's trained arrays are gone when the call returns."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        run_dir: the run folder.
        model: the fine-tuned model, adapters not merged.
        summary: the "training" section of results.json; `resumed_at` is where this call began, so for a run
            that was finished before it is the number of its task steps.
    """

    run_dir: Path
    model: Model
    summary: dict[str, Any]

    def __str__(self) -> str:
        s = self.summary
        loss = "" if s["final_loss"] is None else f", loss {s['first_loss']:.4f} -> {s['final_loss']:.4f}"
        return (
            f"{s['defence']['name']}: {s['task_steps']} task steps and {s['routing_steps']} routing steps"
            f"{loss}, {s['seconds']:.1f} s training, {s['compile_seconds']:.1f} s compiling\n"
            f"{self.run_dir / s['saved']}"
        )


def finetune(config: TrainConfig, *, model: Model | None = None, on_step: Sequence[OnStep] = ()) -> RunResult:
    """Fine-tunes a model, or continues a run of the same configuration that was interrupted.

    Same configuration, seed and platform give the same bits, also after any interruption. A folder with a
    finished run is read, not trained again (unless it was told to keep no checkpoints).

    Args:
        config: the run.
        model: the model to start from where it is already loaded; must be what `config.model` names. In
            floats its adapters are merged, and then its weights rounded to `config.quantisation`. One that is
            quantised already stays as it is and has no adapters; `config.quantisation` may be None then.
        on_step: called as the run goes on, for evaluating while training.

    Returns:
        The model and where everything was written.

    Raises:
        InputError: anything wrong with configuration, files or output folder, before anything is written;
            or a loss that is not finite, naming step and samples.
    """
    plan, base, report = plan_run(config, model)
    counts = f"{report['samples']} samples, {report['truncated']} truncated, {report['dropped']} left out"
    say(config, f"{describe(plan.model_config)}; {counts}")
    held = describe_base(base.config, base.params)
    if held is not None:
        say(config, held)
    folder = open_folder(plan.config, {**plan.inputs, "data_report": report})
    release = (lambda: None) if model is not None else (lambda: _delete(plan.weights.trainable))
    return _run(plan, base, folder, report, on_step, release)


def plan_run(config: TrainConfig, model: Model | None = None) -> tuple[Plan, Model, dict[str, Any]]:
    """Everything that a run needs before its first step; nothing is written.

    Args:
        config, model: as in `finetune`.

    Returns:
        The plan, the model before training without adapters, and the report on the data.

    Raises:
        InputError: anything wrong with configuration, files or output folder.
    """
    config = _with_quantisation(config, model)
    validate(config)
    defenses.check_name(config.defence)
    check_packages(config)
    config = _with_targets(config, model)
    check_folder(config)
    mesh = make_mesh(config.mesh)
    base = _base_model(config, model, mesh)
    check_mesh(base.config, mesh)
    weights = fingerprint(base.config, base.params)
    references = _references(config, base, weights, mesh)
    plan, report = _plan(config, base, mesh, references)
    check_passes(plan)
    # Random weights come from the network and the seed alone; another device may round them differently.
    drawn = config.initialise == "random" and model is None
    inputs = {
        "model": fingerprint(base.config, {}) if drawn else weights,
        "references": [hash_reference(reference) for reference in references],
        "data": plan.pipeline.fingerprint,
    }
    check_inputs(config, inputs)
    return dataclasses.replace(plan, inputs=inputs), base, report


def _with_quantisation(config: TrainConfig, model: Model | None) -> TrainConfig:
    """The configuration with the quantisation of a given model, so that the run folder says which it was."""
    held = None if model is None else model.config.quantisation
    if held is not None and model.config.lora is not None:
        raise InputError(
            f"the given model has adapters on {held} weights; to merge them would round the weights again",
            where="finetune, model",
            expected="the model in floats, whose adapters are merged before it is rounded, or one without",
        )
    if held is None or held == config.quantisation:
        return config
    if config.quantisation is not None:
        raise InputError(
            f"quantisation is {config.quantisation}, and the given model is held in {held}",
            where="the configuration, field quantisation",
            expected=f"{held}, or a model in floats",
        )
    return dataclasses.replace(config, quantisation=held)


def _with_targets(config: TrainConfig, model: Model | None) -> TrainConfig:
    """The configuration with the adapters' targets named, so that the run folder says which they were."""
    if config.lora is None or config.lora.targets is not None:
        return config
    network = model.config if model is not None else read_config(find_description(config.model))[0]
    return dataclasses.replace(config, lora=with_targets(network, config.lora))


def say(config: TrainConfig, text: str) -> None:
    """Tells the user, unless progress is off."""
    if config.progress and jax.process_index() == 0:
        print(text, file=sys.stderr)


def _delete(params: Params) -> None:
    """Frees the initial values of what trains: the state holds the copy that steps overwrite."""
    for value in params.values():
        value.delete()


def _run(
    plan: Plan,
    base: Model,
    folder: Path,
    report: dict[str, Any],
    on_step: Sequence[OnStep],
    release: Callable[[], None],
) -> RunResult:
    """Trains and writes; `release` is called once the state holds its own copy of the initial parameters."""
    config = plan.config

    def model_of(state: TrainState) -> Model:
        params = {**plan.weights.frozen, **state.trainable}
        return dataclasses.replace(base, config=plan.model_config, params=params, compute=plan.compute)

    callbacks = [lambda step, state, call=call: call(step, model_of(state)) for call in on_step]
    with _checkpoints(config, folder) as checkpoints:
        start = resume(plan, checkpoints)
        release()
        began, compiled_before = time.perf_counter(), n_compiled()
        programs = prepare(plan, start.state)
        start.totals.compile_seconds += time.perf_counter() - began
        with _sinks(plan, folder, start) as sinks:
            state, steps = train(plan, programs, start, sinks, checkpoints, callbacks)
    final = _finished(plan, model_of(state))
    saved = _save(final, config, folder)
    before = read_if_there(folder / "results.json").get("training")
    if isinstance(before, dict) and start.task_step == plan.pipeline.total_steps:
        # No step was done: the figures are those of the run that did them.
        return RunResult(folder, final, {**before, "saved": saved, "resumed_at": start.task_step})
    compilations = n_compiled() - compiled_before
    summary = _summary(plan, start, steps, compilations) | {"data": report, "saved": saved}
    if jax.process_index() == 0:
        add_results(folder, {"training": summary})
    return RunResult(folder, final, summary)


def _summary(plan: Plan, start: Start, steps: int, compilations: int) -> dict[str, Any]:
    """The run's figures, those of its earlier parts included; compilations are this part's."""
    task_steps, totals = plan.pipeline.total_steps, start.totals
    return {
        "task_steps": task_steps,
        "routing_steps": steps - task_steps,
        **dataclasses.asdict(totals),
        "compilations": compilations,
        "tokens_per_second": totals.tokens / max(totals.seconds, 1e-9),
        "resumed_at": start.task_step,
        "trainable": describe(plan.model_config),
        "defence": {"name": plan.defence.name, **plan.defence.notes},
    }


def _base_model(config: TrainConfig, model: Model | None, mesh: Mesh) -> Model:
    """The model before training, on the mesh. All its parameters train without adapters, so they are
    float32 then."""
    dtype = config.dtype if config.lora is not None else "float32"
    compute = Compute(config.dtype, config.experts, config.remat, mesh if mesh.size > 1 else None)
    if model is not None:
        if model.config.lora is not None:
            model = model.merged()
        model_config, params = _rounded(model, config.quantisation, mesh)
        placed = shardings(declare(model_config), mesh)
        params = {name: jax.device_put(v, placed[name]) for name, v in cast(params, dtype).items()}
        return dataclasses.replace(model, config=model_config, params=params, compute=compute)
    if config.initialise == "random":
        folder = find_folder(config.model)
        model_config, raw = read_config(folder)
        key = jax.random.key(config.seed)
        specs, stddev = declare(model_config), model_config.initializer_range
        params = initialise(specs, key, dtype=dtype, stddev=stddev, mesh=mesh)
        return Model(model_config, params, compute, config.model, folder, raw)
    loaded = load_pretrained(config.model, mesh=mesh, dtype=dtype, quantisation=config.quantisation)
    return dataclasses.replace(loaded, compute=compute)


def _rounded(model: Model, quantisation: Quantisation | None, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """Network and parameters as a run holds them: as they are, or in 8 or 4 bits that the mesh divides."""
    if quantisation is None:
        return model.config, model.params
    for name, spec in quantised_weights(model.config, quantisation).items():
        part_shardings(name, spec, quantisation, mesh)
    if model.config.quantisation is not None:
        return model.config, model.params
    return quantise_params(model.config, model.params, quantisation)


def _reference_files(config: TrainConfig) -> tuple[str, ...]:
    defence = config.defence
    if defence.name == "none":
        return ()
    return tuple(path for path in (defence.reference, defence.benign_reference) if path is not None)


def _references(config: TrainConfig, base: Model, current: str, mesh: Mesh) -> tuple[Reference, ...]:
    """The reference files, checked against the model's fingerprint. For a quantised base one of the same
    weights in floats is right too: it says how the aligned model itself routes."""
    paths = _reference_files(config)
    if not paths:
        return ()
    references = tuple(read_reference(path) for path in paths)
    if base.config.quantisation is not None and any(r.model_fingerprint != current for r in references):
        floats = fingerprint_folder(find_folder(config.model), base.config, mesh)
    else:
        floats = current
    for path, reference in zip(paths, references, strict=True):
        made_of = current if reference.model_fingerprint == current else floats
        check_matches(
            reference, config=base.config, model_fingerprint=made_of, tokenizer=base.tokenizer, where=path
        )
    _check_prompts(config, base, references)
    return references


def _check_prompts(config: TrainConfig, base: Model, references: tuple[Reference, ...]) -> None:
    """Refuses references of other prompts than the configuration names, where it names any."""
    for group, source in enumerate((config.prompts, config.benign)):
        _, wanted = prompt_tokens(base, source)
        recorded = [r.prompts[row] for r in references for row in np.flatnonzero(r.group == group)]
        if source is not None and hash_prompts(wanted) != hash_prompts(recorded):
            kind = ("harmful", "benign")[group]
            raise InputError(
                f"the reference was made for another prompt set: {len(recorded)} {kind} prompts, not the "
                f"{len(wanted)} of {source.path}",
                where=", ".join(_reference_files(config)),
                expected="a reference made by `safemoe reference` with these prompts, in this order",
            )


def _plan(
    config: TrainConfig, base: Model, mesh: Mesh, references: tuple[Reference, ...]
) -> tuple[Plan, dict[str, Any]]:
    model_config, params = base.config, base.params
    if config.lora is not None:
        key = jax.random.key(config.seed)
        model_config, params = add_adapters(model_config, params, config.lora, key, mesh)
    row_multiple = mesh_axis_sizes(mesh, BATCH_AXES) * config.gradient_accumulation
    clip_norm = config.optimizer.clip_norm
    context = defenses.DefenceContext(
        model_config, config.batch_size, config.seed, row_multiple, clip_norm, references,
        _reference_files(config),
    )  # fmt: skip
    defence = defenses.build(config.defence, context)
    weights = split_trainable(model_config, params)
    weights = weights if defence.init is None else defence.init(model_config, weights)
    samples = mix([(source, read_source(source)) for source in config.data], config.seed)
    samples = samples if defence.data is None else defence.data(samples)
    encoded = encode_samples(base.tokenizer, samples, config.max_length)
    tokens = [sample.tokens for sample in encoded]
    check_vocabulary(base.config.vocab_size, tokens, references, where=base.name or "the given model")
    pipeline = _pipeline(config, encoded, defence, row_multiple)
    ends = epoch_ends(len(pipeline.items), config.batch_size, pipeline.total_steps)
    naming = _naming(samples)
    plan = Plan(config, model_config, base.compute, mesh, weights, pipeline, defence, ends, naming)
    return plan, pipeline.report()


def _pipeline(
    config: TrainConfig, encoded: list[Encoded], defence: Defence, row_multiple: int
) -> TrainPipeline:
    loss = defence.loss
    return TrainPipeline.build(
        encoded,
        config.batch_size,
        config.epochs,
        config.seed,
        total_steps=config.steps,
        row_multiple=row_multiple,
        prompts=loss.prompts if loss else None,
        prompts_for_step=loss.prompts_for_step if loss else None,
    )


def epoch_ends(n_samples: int, batch_size: int, total_steps: int) -> tuple[int, ...]:
    """Numbers of finished task steps at which an epoch's samples are used up.

    Steps have exactly `batch_size` samples, so an epoch may end within a step; it counts as ended after the
    last step that lies wholly in it. A run of whole epochs ends with an epoch.
    """
    last = math.ceil((total_steps + 1) * batch_size / n_samples)
    ends = {epoch * n_samples // batch_size for epoch in range(1, last + 1)}
    return tuple(sorted(end for end in ends if 1 <= end <= total_steps))


def _naming(samples: Sequence[Sample]) -> Callable[[Sequence[int]], str]:
    def name(ids: Sequence[int]) -> str:
        by_source: dict[str, list[int]] = {}
        for i in ids:
            by_source.setdefault(samples[i].source, []).append(samples[i].index)
        return "; ".join(
            f"{source}: records {', '.join(map(str, rows))}" for source, rows in by_source.items()
        )

    return name


@contextlib.contextmanager
def _checkpoints(config: TrainConfig, folder: Path) -> Iterator[TrainCheckpoints | None]:
    if config.checkpoint_every == 0:
        yield None
        return
    with TrainCheckpoints(folder / "checkpoints") as checkpoints:
        yield checkpoints


@contextlib.contextmanager
def _sinks(plan: Plan, folder: Path, start: Start) -> Iterator[list[Sink]]:
    """Opens what the configuration asks for; only the first process writes."""
    config, sinks = plan.config, []
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            sinks.append(jsonl_sink(folder / "metrics.jsonl", start.step))
            if config.tensorboard:
                sinks.append(tensorboard_sink(folder / "tensorboard"))
            if config.wandb:
                sinks.append(wandb_sink(folder, to_dict(config)))
            if config.progress:
                sinks.append(progress_sink(plan.pipeline.total_steps, start.task_step, plan.defence.name))
        for sink in sinks:
            stack.callback(sink.close)
        yield sinks


def _finished(plan: Plan, model: Model) -> Model:
    """The model after the defence's last word."""
    if plan.defence.post is None:
        return model
    weights = plan.defence.post(model.config, split_trainable(model.config, model.params))
    return dataclasses.replace(model, params=weights.merged())


def _save(model: Model, config: TrainConfig, folder: Path) -> str:
    """Writes the adapter, or the whole model. One that is there and whole came from the same configuration
    and the same files (`check_inputs`); one that is not whole is set aside."""
    if model.config.lora is not None:
        name, save = "adapter", model.save_adapter
    else:
        params = cast(model.params, config.dtype)
        name, save = "model", dataclasses.replace(model, params=params).save_pretrained
    if (folder / name).exists() and not is_whole(folder / name):
        aside = set_aside(folder / name) if jax.process_index() == 0 else None
        say(config, f"{folder / name} lacks files, or parts of them; it was renamed to {aside}")
    if not (folder / name).exists():
        save(folder / name)
    return name
