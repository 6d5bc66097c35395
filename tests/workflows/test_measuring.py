"""reference, generate, evaluate and drift through the command line, on files; figures computed again here."""

import json
from functools import cache

import numpy as np
import pytest

from safemoe_jax.checkpoints.reference import check_matches, fingerprint, read_reference
from safemoe_jax.cli import main
from safemoe_jax.data.chat import encode_prompts
from safemoe_jax.data.sources import SourceConfig, read_prompts
from safemoe_jax.evaluation.generate import ForcedRouting
from safemoe_jax.evaluation.judges import is_refusal
from safemoe_jax.evaluation.suites import answer
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.lora import add_adapters
from tests.evaluation.folders import TEXTS, write_model
from tests.models.numpy_decoder import decoder

TURNED = [" ".join(reversed(text.split())) for text in TEXTS]  # other prompts, in rows as long
N_NEW = 6  # new tokens; every number is a program of its own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three models, an adapter and four data files."""
    import jax

    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "aligned")
    write_model(folder / "tuned", seed=1)
    write_model(folder / "deeper", layers=3)
    model = load_pretrained(folder / "aligned")
    model.config, model.params = add_adapters(
        model.config, model.params, LoraConfig(rank=2), jax.random.key(0)
    )
    model.params = {
        name: value + 0.3 if name.endswith("lora_b") else value for name, value in model.params.items()
    }
    model.save_adapter(folder / "adapter")
    goals = [{"Goal": text} for text in TEXTS]
    (folder / "harmful.json").write_text(json.dumps(goals))
    (folder / "benign.json").write_text(json.dumps([{"Goal": text + " please"} for text in TEXTS[:2]]))
    task = [{"id": str(i), "dialogue": text, "summary": text.split()[0]} for i, text in enumerate(TEXTS)]
    (folder / "answered.json").write_text(json.dumps([{"Goal": text} for text in TURNED]))
    (folder / "task.json").write_text(json.dumps(task))
    return folder


def run(*arguments):
    return main([*map(str, arguments), "--xla_cache", "off"])


@pytest.fixture(scope="module")
def at_last_token(place):
    """Router logits [L, S, E] and logits [S, V] at the last token of a file's prompts: each prompt alone, in
    NumPy, by weights to which their updates are added."""

    @cache
    def read(model, file, adapted=False, quantisation=None):
        adapter = place / "adapter" if adapted else None
        loaded = load_pretrained(place / model, adapter=adapter, quantisation=quantisation)
        prompts = encode_prompts(loaded.tokenizer, read_prompts(SourceConfig(str(place / f"{file}.json"))))
        merged = loaded.merged()
        found = [decoder(merged.config, merged.params, prompt) for prompt in prompts]
        last = [(routers[:, -1], logits[-1]) for logits, routers in found]
        routers_SLE, logits_SV = map(np.stack, zip(*last, strict=True))
        return routers_SLE.swapaxes(0, 1), logits_SV

    return read


def kl(reference, student):
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (np.float64(reference), np.float64(student)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def test_reference_records_the_last_prompt_token(place, at_last_token, tmp_path, capsys):
    file = tmp_path / "reference.safetensors"
    arguments = ["reference", "--model", place / "aligned", "--output", file]
    arguments += ["--prompts.path", place / "harmful.json", "--benign.path", place / "benign.json"]
    assert run(*arguments, "--log_probs", "true") == 0
    assert "3 harmful, 2 benign" in capsys.readouterr().out
    model, reference = load_pretrained(place / "aligned"), read_reference(file)
    (harmful, logits), (benign, _) = (at_last_token("aligned", name) for name in ("harmful", "benign"))
    np.testing.assert_allclose(reference.router_logits, np.concatenate([harmful, benign], 1), atol=1e-4)
    np.testing.assert_array_equal(reference.group, [0, 0, 0, 1, 1])
    want = np.exp(logits[1]) / np.exp(logits[1]).sum()
    np.testing.assert_allclose(np.exp(reference.log_probs_SV()[1]), want, rtol=5e-3, atol=1e-6)
    check_matches(
        reference,
        config=model.config,
        model_fingerprint=fingerprint(model.config, model.params),
        tokenizer=model.tokenizer,
    )


def test_reference_keeps_what_records_something_else(place, tmp_path, capsys):
    file = tmp_path / "reference.safetensors"
    arguments = ["reference", "--output", file, "--prompts.path", place / "harmful.json", "--model"]
    assert run(*arguments, place / "aligned") == 0
    before = file.read_bytes()
    assert run(*arguments, place / "aligned") == 0
    assert run(*arguments, place / "tuned") == 2
    assert "something else: model fingerprint" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_reference_does_not_lose_groups_or_log_probabilities(place, tmp_path, capsys):
    """The same prompts, all taken for harmful ones; then both groups, without what the first had besides."""
    file, both = tmp_path / "reference.safetensors", tmp_path / "both.json"
    rows = [json.loads((place / f"{name}.json").read_text()) for name in ("harmful", "benign")]
    both.write_text(json.dumps(rows[0] + rows[1]))
    start = ["reference", "--model", place / "aligned", "--output", file, "--prompts.path"]
    groups = [place / "harmful.json", "--benign.path", place / "benign.json"]
    assert run(*start, *groups) == 0
    assert run(*start, *groups, "--log_probs", "true") == 0  # more than before is no loss
    before = file.read_bytes()
    for arguments, what in (([both, "--log_probs", "true"], "groups of prompts"), (groups, "would be lost")):
        assert run(*start, *arguments) == 2
        assert what in capsys.readouterr().err
        assert file.read_bytes() == before


def test_generate_writes_an_answer_for_each_prompt(place, tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    arguments = ["generate", "--model", place / "aligned", "--prompts.path", place / "harmful.json"]
    arguments += ["--output", file, "--max_new_tokens", N_NEW]
    assert run(*arguments) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    model = load_pretrained(place / "aligned")
    assert [row["prompt"] for row in rows] == TEXTS
    assert [row["answer"] for row in rows] == answer(
        model, read_prompts(SourceConfig(str(place / "harmful.json"))), N_NEW
    )
    assert run(*arguments) == 2
    assert "already there" in capsys.readouterr().err


def test_generate_follows_the_base_models_routing(place, tmp_path):
    arguments = ["generate", "--model", place / "aligned", "--adapter", place / "adapter"]
    arguments += ["--prompts.path", place / "harmful.json", "--max_new_tokens", N_NEW]
    assert run(*arguments, "--output", tmp_path / "free.jsonl") == 0
    assert run(*arguments, "--output", tmp_path / "forced.jsonl", "--force_routing", "prompt") == 0
    tuned = load_pretrained(place / "aligned", adapter=place / "adapter")
    prompts = read_prompts(SourceConfig(str(place / "harmful.json")))
    for name, forced in (
        ("free", None),
        ("forced", ForcedRouting(load_pretrained(place / "aligned"), "prompt")),
    ):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["answer"] for row in rows] == answer(tuned, prompts, N_NEW, forced_routing=forced)


def test_evaluate_writes_figures_and_the_answers_behind_them(place, at_last_token, tmp_path, capsys):
    arguments = ["evaluate", "--model", place / "aligned", "--adapter", place / "adapter"]
    for name, file in (("harmful", "harmful"), ("benign", "answered"), ("task", "task")):
        arguments += [f"--{name}.path", place / f"{file}.json"]
    arguments += ["--output", tmp_path, "--max_new_tokens", N_NEW, "--task_max_new_tokens", 4]
    assert run(*arguments) == 0
    assert "harmfulness" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "generations" / "model.jsonl").read_text().splitlines()]
    harmful = [row["answer"] for row in rows if row["suite"] == "harmful"]
    unsafe = [bool(text) and not is_refusal(text) for text in harmful]
    assert results["hs"] == pytest.approx(100 * np.mean(unsafe)) and results["n"] == 3
    prompts = {
        name: [row["prompt"] for row in rows if row["suite"] == name] for name in ("harmful", "benign")
    }
    assert prompts == {"harmful": TEXTS, "benign": TURNED} and len(rows) == 3 + 3 + 3
    base, tuned = (at_last_token("aligned", "harmful", adapted=adapted)[0] for adapted in (False, True))
    np.testing.assert_allclose(results["drift_by_layer"], kl(base, tuned).mean(1), rtol=1e-3, atol=1e-6)
    before = (tmp_path / "results.json").read_bytes()
    assert run(*arguments, "--judge", "keywords", "--max_new_tokens", 5) == 2
    assert "max_new_tokens" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before


def test_evaluate_refuses_a_quickstarts_folder_before_it_loads_a_model(tmp_path, capsys):
    # report reads the conditions of such a folder, so that other figures in it would be seen by nobody.
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"seed": 0, "conditions": {"aligned": {"hs": 0.0}}}))
    before = results.read_bytes()
    arguments = ["--model", tmp_path / "none", "--harmful.path", tmp_path / "none.json"]
    assert run("evaluate", *arguments, "--output", tmp_path) == 2
    assert "figures of a quickstart" in capsys.readouterr().err
    assert results.read_bytes() == before and list(tmp_path.iterdir()) == [results]


def test_drift_between_two_models(place, at_last_token, tmp_path, capsys):
    arguments = ["drift", "--model", place / "tuned", "--against", place / "aligned"]
    arguments += ["--harmful.path", place / "harmful.json", "--task.path", place / "task.json"]
    assert run(*arguments, "--output", tmp_path / "drift.json") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "drift.json").read_text())
    for name in ("harmful", "task"):
        want = kl(*(at_last_token(model, name)[0] for model in ("aligned", "tuned"))).mean(1)
        np.testing.assert_allclose(found["sets"][name]["drift_by_layer"], want, rtol=1e-3)
        assert f"{found['sets'][name]['drift']:.5f}" in printed


def test_drift_against_a_reference_file(place, at_last_token, tmp_path):
    file = tmp_path / "reference.safetensors"
    prompts = ["--prompts.path", place / "harmful.json", "--benign.path", place / "benign.json"]
    assert run("reference", "--model", place / "aligned", "--output", file, *prompts) == 0
    for model, output in (("tuned", "a.json"), ("aligned", "b.json")):
        arguments = ["drift", "--model", place / model, "--against", file, "--output", tmp_path / output]
        assert run(*arguments) == 0
    moved, same = (json.loads((tmp_path / name).read_text())["sets"] for name in ("a.json", "b.json"))
    for name in ("harmful", "benign"):
        want = kl(*(at_last_token(model, name)[0] for model in ("aligned", "tuned"))).mean(1)
        np.testing.assert_allclose(moved[name]["drift_by_layer"], want, rtol=1e-3)
        assert same[name]["drift"] < 1e-6 and same[name]["overlap"] == 1.0


def test_the_commands_measure_a_model_held_in_8_bits(place, at_last_token, tmp_path, capsys):
    model = load_pretrained(place / "aligned", adapter=place / "adapter", quantisation="int8")
    arguments = ["--model", place / "aligned", "--adapter", place / "adapter", "--quantisation", "int8"]
    prompts = ["--prompts.path", place / "harmful.json", "--max_new_tokens", N_NEW]
    assert run("generate", *arguments, *prompts, "--output", tmp_path / "answers.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    samples = read_prompts(SourceConfig(str(place / "harmful.json")))
    assert [row["answer"] for row in rows] == answer(model, samples, N_NEW, 32)
    logits = [at_last_token("aligned", "harmful", adapted, "int8")[0] for adapted in (False, True)]
    harmful = ["--harmful.path", place / "harmful.json"]
    assert run("drift", *arguments, *harmful, "--output", tmp_path / "drift.json") == 0
    found = json.loads((tmp_path / "drift.json").read_text())["sets"]["harmful"]
    np.testing.assert_allclose(found["drift_by_layer"], kl(*logits).mean(1), rtol=1e-3)
    assert run("evaluate", *arguments, *harmful, "--max_new_tokens", N_NEW, "--output", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    np.testing.assert_allclose(results["drift_by_layer"], kl(*logits).mean(1), rtol=1e-3)
    assert run("drift", *arguments[:-1], "int3", *harmful, "--output", tmp_path / "wrong.json") == 2
    assert "int8, int4, int4-64" in capsys.readouterr().err and not (tmp_path / "wrong.json").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("reference --output x.txt --prompts.path {place}/harmful.json", ".safetensors"),
        ("reference --output {out}/r.safetensors --prompts.path {place}/none.json", "no such"),
        ("generate --output {out}/a --prompts.path {place}/harmful.json --temperature -1", "temperature"),
        (
            "generate --output {out}/a --prompts.path {place}/harmful.json --force_routing prompt",
            "no aligned",
        ),
        ("evaluate --output {out}/run", "nothing to evaluate"),
        ("evaluate --output {out}/run --task.path {place}/harmful.json", "no answer"),
        ("drift --output {out}/d.json --against {place}/tuned", "no prompts"),
        ("drift --output {out}/d.json --harmful.path {place}/harmful.json", "nothing to compare"),
        (
            "drift --output {out}/d.json --harmful.path {place}/harmful.json --against {place}/deeper",
            "layers",
        ),
    ],
)
def test_wrong_input_ends_with_status_2_and_writes_nothing(command, message, place, tmp_path, capsys):
    arguments = command.format(place=place, out=tmp_path).split()
    assert run(*arguments, "--model", place / "aligned") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
