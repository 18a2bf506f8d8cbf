"""The experiments' notebooks: every choice runs, bad ones are refused, a killed run is the same."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from helpers import in_process

from pruning_bias.anatomy import load_encoder
from pruning_bias.execution import RunFailed, execute, job_of
from pruning_bias.executors import execute_all
from pruning_bias.parameters import Run, digest
from pruning_bias.results import load_results
from pruning_bias.runs import (
    Blindness,
    BlockMovement,
    DebiasOnly,
    FineTuning,
    HeadMovement,
    OftenClosed,
)
from pruning_bias.sources import open_encoder
from pruning_bias.subnetworks import subnetworks

CHOICES = [
    DebiasOnly(layer="first", mode="sentence"),
    DebiasOnly(layer="all", fidelity="published_code"),
    DebiasOnly(layer="intermediate", precision="bfloat16"),
    HeadMovement(heads="separate", mlp=True, layer="intermediate", mode="sentence"),
    HeadMovement(heads="tied", layer="all", precision="bfloat16"),
    HeadMovement(fidelity="published_code", mode="sentence"),
    HeadMovement(fidelity="published_code-dropout+squared_sum", initial_score=-2.0),
    BlockMovement(block=16, layer="all"),
    BlockMovement(block=64, mlp=False, fidelity="published_code", layer="intermediate"),
    BlockMovement(layer="first", mode="sentence", random_draws=0),
    BlockMovement(frozen=False, warmup=2, cooldown=2),
    HeadMovement(frozen=False, fidelity="equations+dropout", mode="sentence"),
    HeadMovement(rule="threshold", initial_score=1.0, final_threshold=0.5),
    HeadMovement(rule="topk", initial_threshold=1.0, final_threshold=0.5, mlp=True),
    BlockMovement(rule="l0", initial_score=1.0, norm="l0"),
    HeadMovement(rule="l0", heads="separate", layer="all", mode="sentence"),
    HeadMovement(heads="tied", fidelity="equations+lost_ties+squared_mean"),
]


@pytest.mark.parametrize(
    "run", CHOICES, ids=lambda run: f"{type(run).__name__}-{run.layer}-{run.mode}"
)
def test_every_choice_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    names = in_process(run)
    states = {row["state"] for row in names["metrics"]}
    draws = getattr(run, "random_draws", 0)
    assert states == {"before", "after"} | ({"random"} if draws else set())
    assert names["history"][-1]["step"] == run.steps
    drifts = {r["state"]: r["value"] for r in names["metrics"] if r["metric"] == "drift"}
    assert drifts["before"] < 1e-6
    if isinstance(run, DebiasOnly):
        assert drifts["after"] > 0


def test_magnitude_keeps_the_largest_and_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    names = in_process(HeadMovement(rule="magnitude", initial_threshold=1.0, final_threshold=0.5))
    assert names["history"] == []
    for name, keep in names["keep"].items():
        found = names["subnetwork"].gates[name].scores.flatten()
        assert keep.sum() == 2 and found[keep.flatten()].min() >= found[~keep.flatten()].max()


FAMILIES: dict[str, tuple[type, type]] = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    "albert": (transformers.AlbertConfig, transformers.AlbertModel),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experiment", [DebiasOnly, HeadMovement, BlockMovement])
def test_every_family_is_debiased_and_pruned(
    family: str, experiment: type[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    make_config, make_model = FAMILIES[family]
    config = make_config(vocab_size=30522, pad_token_id=0, embedding_size=32)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, value in (small | {"intermediate_size": 128}).items():
        setattr(config, config.attribute_map.get(name, name), value)
    if family == "distilbert":
        config.hidden_dim = 128
    torch.manual_seed(0)
    make_model(config).save_pretrained(tmp_path)
    load_encoder("tiny").tokenizer.save_pretrained(tmp_path)
    names = in_process(experiment(encoder=str(tmp_path), steps=3))
    found = {(r["state"], r["metric"]): r["value"] for r in names["metrics"]}
    assert found["before", "drift"] < 1e-6 and math.isfinite(found["after", "bias"])


def test_a_run_starts_where_another_ended(tmp_path: Path) -> None:
    learned = FineTuning(keep_weights=True)
    start = f"run:FineTuning/{digest(learned)}"
    debiased = DebiasOnly(encoder=start, keep_weights=True, steps=2)
    closed = HeadMovement(encoder=start, mask_learning_rate=1.0, steps=8)
    often = OftenClosed(encoder=start, sources=f"HeadMovement/{digest(closed)}", draws=2)
    again = FineTuning(encoder=f"run:HeadMovement/{digest(closed)}")
    done = execute_all(
        [again, often, closed, debiased, learned, Blindness()], tmp_path, "pool", slots=2,
        progress=False,
    )  # fmt: skip
    assert len(done.finished) == 6 and not done.failed, done.failed
    model = open_encoder(f"run:HeadMovement/{digest(closed)}", root=tmp_path).model
    (subnetwork,) = subnetworks(model)
    assert not all(bool(keep.all()) for keep in subnetwork.keep().values())
    frame = load_results(tmp_path)
    assert set(frame[frame.metric == "score"].encoder) == {"tiny", again.encoder}


def test_closing_a_head_is_what_the_numbers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    names = in_process(HeadMovement(mask_learning_rate=1.0, steps=8))
    counts = {
        r["metric"]: r["value"]
        for r in names["metrics"]
        if "test" not in r and r["state"] == "after"
    }
    closed = sum(int((~keep).sum()) for keep in names["keep"].values())
    assert closed == counts["closed"] > 0 and counts["groups"] == 8
    assert counts["density"] == 1 - closed / 8


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (BlockMovement(block=48), "cannot be cut into groups of 48x48"),
        (HeadMovement(corpus="no/such/file.txt"), "no corpus at"),
        (HeadMovement(lexicon="no_such_lexicon"), "no word list"),
        (DebiasOnly(encoder="./no_such_encoder"), "no encoder"),
        (DebiasOnly(learning_rate=1e30), "is nan|is inf"),
        (HeadMovement(fidelity="equation"), "expected 'equations' or 'published_code'"),
    ],
    ids=["block", "corpus", "lexicon", "encoder", "nan", "fidelity"],
)
def test_a_bad_choice_is_refused_in_plain_words(run: Run, message: str) -> None:
    with pytest.raises((ValueError, FloatingPointError), match=message):
        in_process(run)


def metrics(folder: Path) -> list[dict]:
    """What a run measured, but for the clock."""
    rows = json.loads((folder / "metrics.json").read_text())
    return [row for row in rows if row["metric"] != "ms_per_sentence"]


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    runs = [HeadMovement(steps=40), BlockMovement(steps=40)]
    whole = execute_all(runs, tmp_path / "whole", "pool", slots=2, progress=False)
    assert len(whole.finished) == 2 and not whole.failed
    # a driver of its own, killed in the middle of training
    code = (
        "from pruning_bias.executors import execute_all\nfrom pruning_bias.runs import *\n"
        "if __name__ == '__main__':\n"
        f"    runs = [HeadMovement(steps=40), BlockMovement(steps=40)]\n"
        f"    execute_all(runs, {str(tmp_path / 'cut')!r}, 'pool', slots=2, progress=False)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cut/*/.*.tmp/progress")) and time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    again = execute_all(runs, tmp_path / "cut", "pool", slots=2, progress=False)
    assert not again.failed
    for run in runs:
        cut, uncut = (job_of(run, tmp_path / name).folder for name in ("cut", "whole"))
        assert metrics(cut) == metrics(uncut)
    frame = load_results(tmp_path / "cut")
    assert set(frame.experiment) == {"HeadMovement", "BlockMovement"}
    environment = json.loads((uncut / "environment.json").read_text())
    assert environment["source"] == "tiny random BERT" and environment["versions"]["torch"]


def test_a_failing_run_leaves_a_notebook_and_no_result(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no corpus at"):
        execute(HeadMovement(corpus="no/such/file.txt"), tmp_path)
    (failed,) = (tmp_path / "HeadMovement").iterdir()
    assert failed.name.endswith(".failed") and (failed / "notebook.ipynb").exists()
    assert not (failed / "metrics.json").exists() and load_results(tmp_path).empty
