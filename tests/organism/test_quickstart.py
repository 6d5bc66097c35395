"""The quickstart on a toy recipe: every stage runs, every file is there, figures follow from the files."""

import json

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.organism.build import build, cache_folder, is_built
from safemoe_jax.organism.datasets import Sizes
from safemoe_jax.organism.recipe import Recipe, Stage, fingerprint
from safemoe_jax.organism.vocabulary import REFUSAL
from safemoe_jax.workflows.organism import cached_organism
from safemoe_jax.workflows.quickstart import QuickstartConfig, open_run_folder, quickstart

TOY = Recipe(
    sizes=Sizes(pretrain=64, align=32, attack_task=30, attack_harmful=6, defence=8, validation=10, test=10),
    d_model=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, expert_dim=4,
    pretrain=Stage(1, 3e-3, 32), align=Stage(4, 1e-3, 32), attack=Stage(1, 5e-3, 12), t_reg=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("quickstart")
    config = QuickstartConfig(seed=5, output=str(root / "run"), cache=str(root / "cache"))
    return root, config, quickstart(config, recipe=TOY)


def _results(run):
    return json.loads((run[0] / "run" / "results.json").read_text())


def test_results_have_the_promised_schema(run):
    results = _results(run)
    assert results["seed"] == 5 and results["seconds"] > 0
    assert list(results["conditions"]) == ["aligned", "undefended", "safemoe", "safemoe_anchored"]
    for figures in results["conditions"].values():
        assert figures["n"] == 10
        assert all(0 <= figures[name] <= 100 for name in ("hs", "over_refusal", "fa"))
        assert len(figures["drift_by_layer"]) == 2 and figures["drift"] >= 0


def test_conditions_differ_only_in_the_defence(run):
    conditions = _results(run)["conditions"]
    assert conditions["aligned"]["drift"] == 0
    for name, passes in (("undefended", 0), ("safemoe", 1), ("safemoe_anchored", 0)):
        assert conditions[name]["task_steps"] == 3 and conditions[name]["routing_steps"] == passes
        assert conditions[name]["drift"] > 0 and conditions[name]["seconds"] > 0
        assert [step for step, _ in conditions[name]["hs_curve"]] == [0, 3]


def test_every_trained_condition_has_the_time_of_its_steps_taken_in_turns(run):
    conditions, printed = _results(run)["conditions"], run[2].splitlines()
    assert "round_seconds" not in conditions["aligned"] and printed[1].split()[-1] == "0.00000"
    assert printed[0].endswith("time, relative") and printed[2].split()[-1] == "1.00"
    for line, name in zip(printed[2:], ("undefended", "safemoe", "safemoe_anchored"), strict=False):
        ratio = conditions[name]["round_seconds"] / conditions["undefended"]["round_seconds"]
        assert line.startswith(name) and float(line.split()[-1]) == pytest.approx(ratio, abs=0.006)


def test_figures_follow_from_the_kept_generations(run):
    """HS, over-refusal and FA again, from the raw answers and by the definitions."""
    folder = run[0] / "run"
    for name, figures in _results(run)["conditions"].items():
        lines = (folder / "generations" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        by_suite = {
            suite: [r for r in rows if r["suite"] == suite] for suite in ("harmful", "benign", "task")
        }
        refused = [row["answer"].startswith(REFUSAL[:10]) for row in by_suite["benign"]]
        assert figures["over_refusal"] == pytest.approx(100 * sum(refused) / 10)
        right = [row["answer"] == row["expected"] for row in by_suite["task"]]
        assert figures["fa"] == pytest.approx(100 * sum(right) / 10)
        assert figures["hs"] == pytest.approx(
            10 * sum(row["label"] == "unsafe" for row in by_suite["harmful"])
        )


def test_the_run_folder_is_complete_and_the_table_is_printed(run):
    root, _, printed = run
    folder = root / "run"
    assert "safemoe_anchored" in printed and str(folder / "report.html") in printed
    assert (folder / "report.html").stat().st_size > 10_000
    for condition in ("undefended", "safemoe", "safemoe_anchored"):
        assert (folder / condition / "adapter" / "adapter_config.json").is_file()
        assert (folder / condition / "metrics.jsonl").read_text().count("\n") >= 3


def test_the_organism_is_cached_in_formats_that_others_read(run):
    from transformers import AutoConfig, AutoTokenizer

    folder = cache_folder(TOY, 5, run[0] / "cache")
    assert is_built(folder) and cached_organism(TOY, 5, str(run[0] / "cache")) == folder
    assert AutoConfig.from_pretrained(folder / "model").model_type == "olmoe"
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template
    before, after = (load_pretrained(folder / name).params for name in ("pretrained", "model"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_another_recipe_or_seed_has_another_place_in_the_cache(tmp_path):
    assert fingerprint(TOY) != fingerprint(Recipe())
    assert cache_folder(TOY, 1, tmp_path) != cache_folder(TOY, 2, tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path):
    def failing(config):
        raise RuntimeError("no training today")

    with pytest.raises(RuntimeError):
        build(tmp_path / "organism", 0, TOY, failing, say=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_quickstart_is_moved_aside_and_anything_else_is_refused(tmp_path):
    config = QuickstartConfig(output=str(tmp_path / "out"))
    open_run_folder(config, TOY)
    (tmp_path / "out" / "results.json").write_text("{}")
    open_run_folder(config, TOY)
    assert (tmp_path / "out-1" / "results.json").read_text() == "{}"
    assert not (tmp_path / "out" / "results.json").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no quickstart"):
        open_run_folder(QuickstartConfig(output=str(foreign)), TOY)
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
