"""`safemoe evaluate`: harmfulness, over-refusal, task accuracy and routing drift of a model on files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safemoe_jax.checkpoints.json_files import add_results, read_if_there
from safemoe_jax.data.sources import SourceConfig, read_prompts, read_source
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation import suites
from safemoe_jax.evaluation.judges import Judge, get_judge
from safemoe_jax.evaluation.judges_llama_guard import HUB_ID, LlamaGuardJudge
from safemoe_jax.evaluation.metrics import get_metric
from safemoe_jax.evaluation.records import check_free, write_jsonl
from safemoe_jax.evaluation.suites import Results, Suites
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.organism.judge import organism_judge
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.workflows.generate import ForceRouting, forced_routing
from safemoe_jax.workflows.loading import load_aligned, load_model


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures a model on files: share of harmful instructions answered (HS), of benign ones refused,
    accuracy on the fine-tuning task (FA), and how far routing has drifted from the aligned model's.

    Writes generations/model.jsonl (every answer with its verdict) and adds its figures, each with its 95 %
    interval, to results.json.

    Attributes:
        model: Hugging Face folder or hub id.
        output: folder for the results; it may be the run folder of the training, but not a quickstart's.
        adapter: adapter folder in PEFT's format.
        harmful: instructions to be refused (published: the 100 harmful goals of JailbreakBench).
        benign: instructions of the same topics to be answered.
        task: test samples of the fine-tuning task, with answers.
        task_metric: rouge1; sql (exact, included and execution match); exact (the same words).
        judge: who decides what is unsafe and what a refusal. keywords only looks for refusal phrases: a
            smoke test, not a harmfulness score to be published. organism compares with the right answers
            that the built-in organism's files hold. llama_guard asks the judge model (of refusals it says
            nothing: those are told by their phrases).
        judge_model: Hugging Face folder or hub id of the judge model, for llama_guard.
        aligned: folder or hub id of the aligned model, for drift; null is the model without its adapter.
        max_new_tokens: longest answer to harmful and benign instructions.
        task_max_new_tokens: longest answer to a task sample.
        batch_size: prompts computed together.
        force_routing: answer with the aligned model's routing on the last_token of the prompt or the whole
            prompt.
        dtype: type of the weights; null keeps bfloat16, and makes everything else float32.
        quantisation: int8, int4 or int4-64 holds the kernels of attention, experts and feed-forwards in 8 or
            4 bits, the aligned model's too, but not the judge model's; null in floats.
        mesh: devices to spread the model over.
    """

    model: str
    output: str
    adapter: str | None = None
    harmful: SourceConfig | None = None
    benign: SourceConfig | None = None
    task: SourceConfig | None = None
    task_metric: Literal["rouge1", "sql", "exact"] = "rouge1"
    judge: Literal["keywords", "organism", "llama_guard"] = "keywords"
    judge_model: str = HUB_ID
    aligned: str | None = None
    max_new_tokens: int = 1024
    task_max_new_tokens: int = 512
    batch_size: int = 32
    force_routing: ForceRouting = "none"
    dtype: Literal["float32", "bfloat16"] | None = None
    quantisation: Quantisation | None = None
    mesh: MeshConfig = MeshConfig()


def evaluate(config: EvaluateConfig) -> str:
    """Writes results.json and generations/model.jsonl and returns a table for the terminal.

    Raises:
        InputError: model, adapter or a file cannot be read, nothing is to be tested, or the output folder
            holds an evaluation with other settings or the figures of several models.
    """
    settings = _settings(config)
    check_free(config.output, "evaluation", settings)
    _check_one_model(config.output)
    metric = get_metric(config.task_metric)
    tests = _read_suites(config)
    judge = _judge(config)
    model = load_model(config.model, config.adapter, config)
    found = suites.evaluate(
        model,
        tests,
        judge=judge,
        metric=metric,
        aligned=load_aligned(model, config.aligned, config),
        forced_routing=forced_routing(model, config),
    )
    write_jsonl(Path(config.output) / "generations" / "model.jsonl", found.generations)
    add_results(config.output, found.results | {"evaluation": {"settings": settings}})
    return f"{table(found.results)}\n{Path(config.output) / 'results.json'}"


def _check_one_model(output: str) -> None:
    """Refuses a quickstart's folder: its report shows its own conditions and never the figures added here."""
    path = Path(output) / "results.json"
    if "conditions" in read_if_there(path):
        raise InputError(
            "the output folder holds the figures of a quickstart, and its report would not show these",
            where=str(path),
            expected="another output folder; nothing was changed",
        )


def _judge(config: EvaluateConfig) -> Judge:
    """The judge named; a judge model is loaded first of all, for a missing one must not cost the answers."""
    if config.judge == "llama_guard":
        model = load_model(config.judge_model, None, dataclasses.replace(config, quantisation=None))
        return LlamaGuardJudge(model, config.batch_size).as_judge()
    return organism_judge() if config.judge == "organism" else get_judge(config.judge)


def table(results: Results) -> str:
    """The figures with their 95 % intervals, a line each."""
    lines = []
    for key, title in (
        ("hs", f"harmfulness, % (judge: {results.get('judge')})"),
        ("over_refusal", f"over-refusal, % (judge: {results.get('judge')})"),
        ("fa", f"task accuracy, % ({results.get('fa_metric')})"),
    ):
        if key in results:
            lines.append(_line(title, results[key], results[f"{key}_interval"], results[f"{key}_n"], ".1f"))
    if results.get("hs_unreadable"):
        lines.append(f"{'answers that the judge could not decide':<48} {results['hs_unreadable']}")
    for name, found in results.get("routing", {}).items():
        title = f"routing drift, nats ({name}; overlap {found['overlap']:.3f})"
        lines.append(_line(title, found["drift"], found["drift_interval"], found["n"], ".5f"))
    return "\n".join(lines)


def _line(title: str, value: float | None, interval: list[float | None], n: int, form: str) -> str:
    if value is None:
        return f"{title:<48} undefined"
    return f"{title:<48} {value:{form}}  [{interval[0]:{form}}, {interval[1]:{form}}]  n = {n}"


def _read_suites(config: EvaluateConfig) -> Suites:
    if config.harmful is None and config.benign is None and config.task is None:
        raise InputError(
            "nothing to evaluate", where="harmful, benign, task", expected="one of them at least"
        )
    return Suites(
        harmful=[] if config.harmful is None else read_prompts(config.harmful),
        benign=[] if config.benign is None else read_prompts(config.benign),
        task=[] if config.task is None else read_source(config.task),
        max_new_tokens=config.max_new_tokens,
        task_max_new_tokens=config.task_max_new_tokens,
        batch_size=config.batch_size,
    )


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on: everything but where they are written and how many devices compute them."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "mesh", "batch_size")}
