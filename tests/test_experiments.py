"""The experiments' notebooks: every choice runs, bad ones are refused, a killed run is the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest

from pruning_bias.execution import RunFailed, execute, job_of
from pruning_bias.executors import execute_all
from pruning_bias.results import load_results
from pruning_bias.runs import BlockMovement, DebiasOnly, HeadMovement, Run, parameters
from pruning_bias.settings import project_root

matplotlib.use("Agg")


def in_process(run: Run) -> dict[str, Any]:
    """The names a run's notebook ends with; its cells are run here, where torch is imported."""
    name = {
        DebiasOnly: "debias_only",
        HeadMovement: "head_movement",
        BlockMovement: "block_movement",
    }
    notebook = nbformat.read(project_root() / f"nbs/experiments/{name[type(run)]}.ipynb", 4)
    names: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name[type(run)], "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters(run))
    return names


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


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.json").read_bytes()


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
