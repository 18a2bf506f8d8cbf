"""The audit of the published code: every switch does what it says, and what it does is found."""

import copy
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_pruning_reference import patch_
from safetensors.numpy import save_file

from pruning_bias.anatomy import tiny_encoder
from pruning_bias.debias import orthogonality
from pruning_bias.departures import (
    departure_table,
    departures,
    draw_departures,
    judge,
    tell_departures,
)
from pruning_bias.execution import job_of
from pruning_bias.fidelity import ALONE, Fidelity
from pruning_bias.gates import ThresholdGate
from pruning_bias.movement_grid import audit
from pruning_bias.parameters import Run, digest, parameters
from pruning_bias.plans import Plan, block_plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.runs import DebiasOnly, HeadMovement
from pruning_bias.subnetworks import attach_

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
NAMES = [field.name for field in fields(Fidelity)]


# a switch has a name


@given(some=st.sets(st.sampled_from(NAMES)), start=st.sampled_from(["equations", "published_code"]))
def test_switches_are_taken_one_at_a_time(some: set[str], start: str) -> None:
    """+ switches on, - switches off, in any order; the others stay as the start has them."""
    base = vars(Fidelity.parse(start))
    for sign, on in (("+", True), ("-", False)):
        found = vars(Fidelity.parse(start + "".join(sign + name for name in some)))
        assert found == base | dict.fromkeys(some, on)


def test_the_published_code_is_all_switches_but_those_that_stand_alone() -> None:
    on = {name for name, value in vars(Fidelity.parse("published_code")).items() if value}
    assert on == set(NAMES) - set(ALONE) and not any(vars(Fidelity()).values())


@pytest.mark.parametrize("name", NAMES)
def test_every_switch_is_asked_for_somewhere(name: str) -> None:
    """No switch is a dead letter: a module or an experiment reads it."""
    modules = [p for p in (ROOT / "pruning_bias").glob("*.py") if p.name != "fidelity.py"]
    notebooks = (ROOT / "nbs" / "experiments").glob("*_movement.ipynb")
    asked = re.compile(rf"(fidelity|switches)\.{name}\b")
    assert any(asked.search(p.read_text(encoding="utf-8")) for p in (*modules, *notebooks))


def test_the_grid_asks_for_every_switch() -> None:
    """Each slip alone, those of the published code together, and each has its partner."""
    runs = [make(**fields_) for make, fields_ in audit({"steps": 8})]
    texts = {run.fidelity for run in runs}
    assert {"equations", "published_code"} <= texts
    assert {text.removeprefix("equations+") for text in texts} >= set(NAMES) - {"diluted_penalty"}
    for run in runs:
        assert any(
            parameters(other) | {"fidelity": ""} == parameters(run) | {"fidelity": ""}
            for other in runs
            if other.fidelity == "equations"
        ) or run.fidelity.startswith("equations+squared"), run.fidelity


# a switch does something


def until_trained(run: Run) -> dict[str, Any]:
    """The names of a run's notebook once it has trained; its cells are run here."""
    path = Path(job_of(run, None).notebook)
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "history" not in names:
            exec(compile(cell.source, path.stem, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters(run))
    plt.close("all")
    return names


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured before training, and no folder is written."""
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    monkeypatch.setattr("pruning_bias.movement.Debiasing.evaluate", lambda *_: [])


SMALL = {"steps": 3, "sentences": 12, "batch_size": 3}
WHERE = {  # what a run must be for a switch to matter to it
    "padded_states": {"mode": "sentence"},
    "pooled_prototypes": {"layer": "all"},
    "fixed_penalty": {"penalty": 50.0},
    "lost_ties": {"heads": "tied"},
}
TRACES: dict[str, tuple[list[str], list[dict]]] = {}


def trace(**how: Any) -> tuple[list[str], list[dict]]:
    """The gates and the history of a small run; of the same run once."""
    name = repr(how)
    if name not in TRACES:
        names = until_trained(HeadMovement(**SMALL, **how))
        TRACES[name] = list(names["subnetwork"].gates), names["history"]
    return TRACES[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "piece_masks"])
def test_every_switch_changes_a_run(quick: None, name: str) -> None:
    """Of the same seed, sentences and batches; piece masks need words that are cut alike."""
    where = WHERE.get(name, {})
    assert trace(**where) != trace(**where, fidelity=f"equations+{name}")


@pytest.mark.parametrize("name", WHERE)
def test_a_switch_changes_nothing_where_it_has_nothing_to_do(quick: None, name: str) -> None:
    """No padding in token mode, one layer's prototypes, a weight of 1, nothing tied."""
    assert trace() == trace(fidelity=f"equations+{name}")


@pytest.mark.parametrize(("make", "epsilon"), [(HeadMovement, 1e-6), (DebiasOnly, 1e-8)])
def test_the_published_epsilon_is_smaller_where_nothing_is_closed(
    quick: None, make: type[Run], epsilon: float
) -> None:
    """The pruned debiaser leaves Hugging Face's default, the other one passes its own."""
    run = make(**SMALL, fidelity="equations+folded_epsilon")
    optimizer = until_trained(run)["optimizer"]
    for group in optimizer.param_groups:
        assert group["eps"] == pytest.approx(epsilon / math.sqrt(1 - 0.999**3), rel=1e-12)


def test_a_vector_for_each_word_is_one_call() -> None:
    """Eq. (1) with every attribute word's own vector, where both codes have two prototypes."""
    generator = torch.Generator().manual_seed(0)
    states, words = (torch.randn(2, n, 5, generator=generator) for n in (4, 7))
    expected = sum(
        float(states[layer, n] @ words[layer, w]) ** 2
        for layer in range(2)
        for n in range(4)
        for w in range(7)
    )
    came = orthogonality(states, words, torch.ones(4))
    assert came.item() == pytest.approx(expected / (2 * 4), rel=1e-5)


# the penalty as nn_pruning counts it


def plans() -> dict[str, tuple[Plan, set[str], int | None]]:
    """Our plan, the parts of nn_pruning that train, and the side of a block."""
    model = tiny_encoder()
    parts, attention = ("query", "key", "value"), {"query", "key", "value", "attention_output"}
    values = head_plan(model) | head_output_plan(model)
    heads = head_plan(model, parts) | head_output_plan(model)
    tied = head_plan(model, parts, tied=True) | head_output_plan(model)
    return {
        "values and outputs": (values, {"value", "attention_output"}, None),
        "attention only": (heads, attention, None),
        "attention and units": (heads | ffn_plan(model), {*attention, "ffn"}, None),
        "tied": (tied, attention, None),
        "blocks": (block_plan(model, 16), attention, 16),
    }


@pytest.mark.parametrize("name", ["values and outputs", "attention only", "attention and units",
                                  "tied", "blocks"])  # fmt: skip
def test_the_diluted_penalty_has_nn_prunings_gradient(name: str) -> None:
    """Modules that do not train are there all the same: they thin the gradient of those that do."""
    plan, trained, block = plans()[name]
    model = tiny_encoder().eval().requires_grad_(False)
    patched = patch_(copy.deepcopy(model), block or 16, block or 64)
    generator = torch.Generator().manual_seed(0)
    for gate, scores in patched.scores().items():
        scores.requires_grad_(gate.split("/")[1] in trained)
        scores.data = torch.randn(scores.shape, generator=generator)
    theirs = patched.scores()
    subnetwork = attach_(model, plan, lambda _, shape: ThresholdGate(shape))
    for gate, ours in subnetwork.gates.items():
        source = gate.replace("heads", "query")
        if gate.endswith("heads"):
            for part in ("key", "value"):
                theirs[gate.replace("heads", part)].data = theirs[source].data
        ours.scores.data.copy_(theirs[source].data.view_as(ours.scores))
    patched.host(input_ids=torch.arange(1000, 1008)[None])  # it counts open weights as it goes
    patched.penalty().backward()
    subnetwork.penalty(diluted=True).backward()
    for gate, ours in subnetwork.gates.items():
        each = ["query", "key", "value"] if gate.endswith("heads") else [gate.split("/")[1]]
        expected = sum(theirs[f"{gate.split('/')[0]}/{part}"].grad for part in each)
        torch.testing.assert_close(ours.scores.grad, expected.view_as(ours.scores))
    if name == "attention and units":
        assert subnetwork.penalty().item() == pytest.approx(subnetwork.penalty(True).item())


# what a slip does is found


SEEDS = (0, 1, 2)
BASE = {"SEAT-6": 1.0, "SEAT-7": -0.6, "SEAT-8": 0.4, "bias": 50.0, "drift": 20.0, "density": 0.8}
SPREAD = {
    "SEAT-6": 0.05,
    "SEAT-7": 0.04,
    "SEAT-8": 0.03,
    "bias": 2.0,
    "drift": 1.0,
    "density": 0.01,
}
CLOSED = ([1, 9, 17, 20, 25], [1, 9, 17, 21, 26], [2, 9, 17, 20, 27])


def planted(
    root: Path, seed: int, fidelity: str, values: dict[str, float], closed: list[int], **how: Any
) -> list[dict]:
    """The rows of a run that left these values; its masks, with these heads of 32 closed."""
    run = HeadMovement(seed=seed, fidelity=fidelity, **how)
    about = {"experiment": "HeadMovement", "digest": digest(run), **parameters(run)}
    about |= {"seconds": 1.0, "state": "after", "p_value": np.nan}
    open_ = np.ones((4, 8, 1), bool)
    open_.reshape(-1)[closed] = False
    folder = root / "HeadMovement" / digest(run)
    folder.mkdir(parents=True)
    masks = {f"{layer}/value.keep": open_[layer].copy() for layer in range(4)}
    save_file(masks, folder / "masks.safetensors")
    return [
        about
        | {"metric": "effect_size" if name.startswith("SEAT") else name, "value": value}
        | {"test": name if name.startswith("SEAT") else None}
        for name, value in values.items()
    ]


def usual(seed: int) -> dict[str, float]:
    """What the equations leave of this seed."""
    rng = np.random.default_rng(seed)
    return {name: value + SPREAD[name] * rng.standard_normal() for name, value in BASE.items()}


def found_in(
    root: Path, slips: dict[str, tuple[dict[str, float], list[int] | None]]
) -> pd.DataFrame:
    """Departures of slips that add these values and close these heads instead, on three seeds."""
    rows = []
    for seed in SEEDS:
        rows += planted(root, seed, "equations", usual(seed), CLOSED[seed])
        for slip, (added, heads) in slips.items():
            values = {name: value + added.get(name, 0) for name, value in usual(seed).items()}
            text = slip if slip == "published_code" else f"equations+{slip}"
            rows += planted(root, seed, text, values, heads or CLOSED[seed])
    return departures(root, pd.DataFrame(rows))


def verdicts(found: pd.DataFrame) -> pd.Series:
    """By slip and measure."""
    return judge(found).set_index(["slip", "measure"])["verdict"]


def test_a_planted_slip_is_found_and_nothing_else(tmp_path: Path) -> None:
    """One slip moves SEAT-6 and the heads, one the bias, one nothing."""
    found = found_in(
        tmp_path,
        {
            "squared_sum": ({"SEAT-6": 0.4}, [3, 4, 5, 6, 7]),
            "words_drift": ({"bias": -25.0}, None),
            "dropout": ({}, None),
        },
    )
    verdict = verdicts(found)
    moved = {key for key, said in verdict.items() if said == "moves"}
    assert moved >= {("squared_sum", "SEAT-6"), ("squared_sum", "heads"), ("words_drift", "bias")}
    assert {slip for slip, _ in moved} == {"squared_sum", "words_drift"}
    allowed = {"SEAT-6", "heads"} | {m for _, m in moved if "|d|" in m}
    assert {m for slip, m in moved if slip == "squared_sum"} == allowed
    assert {m for slip, m in moved if slip == "words_drift"} == {"bias"}
    (text,) = tell_departures(found)
    assert "squared_sum" in text.split("No further")[0] and "dropout" in text.split("No further")[1]
    assert set(departure_table(found)["slip"]) == {"equations", *found["slip"]}
    plt.close(draw_departures(found))


def test_no_slip_gives_no_change(tmp_path: Path) -> None:
    """Runs that equal the equations' to the last digit change nothing and close the same heads."""
    found = found_in(tmp_path, {"folded_epsilon": ({}, None), "published_code": ({}, None)})
    heads = found["measure"] == "heads"
    assert (found.loc[~heads, "change"] == 0).all() and (found.loc[heads, "value"] == 1).all()
    assert (verdicts(found) == "does not move").all()
    assert set(found["slip"]) == {"folded_epsilon", "published_code"}


def test_a_slip_is_held_against_its_own_seed(tmp_path: Path) -> None:
    """Seeds may lie far apart: a change that is the same in each has no spread at all."""
    rows = []
    for seed in SEEDS:
        values = {name: value + 3 * seed for name, value in BASE.items()}
        rows += planted(tmp_path, seed, "equations", values, CLOSED[seed])
        values["SEAT-8"] += 0.25
        rows += planted(tmp_path, seed, "equations+dropout", values, CLOSED[seed])
    judged = judge(departures(tmp_path, pd.DataFrame(rows))).set_index("measure")
    row = judged.loc["SEAT-8"]
    assert row["change"] == pytest.approx(0.25) and row["sd"] == pytest.approx(0, abs=1e-12)
    assert row["n"] == 3 and row["verdict"] == "does not move"  # the seeds differ by more


def test_bias_and_drift_are_shares_and_seat_is_its_size(tmp_path: Path) -> None:
    """Half the bias is -50 %; of an effect size that turns its sign the size is compared."""
    rows = []
    for seed in SEEDS:
        rows += planted(tmp_path, seed, "equations", BASE, CLOSED[seed])
        values = BASE | {"bias": 25.0, "SEAT-7": 0.6, "SEAT-8": -0.7}
        rows += planted(tmp_path, seed, "equations+dropout", values, CLOSED[seed])
    change = judge(departures(tmp_path, pd.DataFrame(rows))).set_index("measure")["change"]
    assert change["bias"] == pytest.approx(-0.5) and change["drift"] == 0
    assert change["SEAT-7"] == pytest.approx(0) and change["SEAT-8"] == pytest.approx(0.3)


def test_only_pairs_count(tmp_path: Path) -> None:
    """A seed without its partner, other steps, other text: nothing that the slip alone changed."""
    rows = planted(tmp_path, 0, "equations", usual(0), CLOSED[0])
    for seed, how in ((7, {}), (0, {"steps": 99}), (0, {"corpus": "other.txt"})):
        rows += planted(tmp_path, seed, "equations+dropout", usual(0), CLOSED[0], **how)
    assert departures(tmp_path, pd.DataFrame(rows)).empty
    rows += planted(tmp_path, 0, "equations+dropout", usual(0), CLOSED[0])
    found = departures(tmp_path, pd.DataFrame(rows))
    assert set(found["seed"]) == {0} and set(found["slip"]) == {"dropout"}
    assert (verdicts(found) == "").all() and tell_departures(found) == []


def test_small_changes_do_not_move(tmp_path: Path) -> None:
    """A change within the spread over seeds may be sure, and is still no finding."""
    found = found_in(tmp_path, {"dropout": ({"SEAT-6": SPREAD["SEAT-6"] / 10}, None)})
    assert verdicts(found)["dropout", "SEAT-6"] == "does not move"


def test_wide_changes_may_move(tmp_path: Path) -> None:
    """Larger than the spread on average, but of either sign over seeds."""
    rows = []
    for seed, added in zip(SEEDS, (1.5, -0.4, 0.2), strict=True):
        rows += planted(tmp_path, seed, "equations", usual(seed), CLOSED[seed])
        values = usual(seed)
        values["SEAT-6"] += added
        rows += planted(tmp_path, seed, "equations+dropout", values, CLOSED[seed])
    assert verdicts(departures(tmp_path, pd.DataFrame(rows)))["dropout", "SEAT-6"] == "may move"


def test_heads_of_one_seed_are_as_alike_as_their_sets(tmp_path: Path) -> None:
    """Jaccard: the heads that both closed among those that either closed."""
    found = found_in(tmp_path, {"dropout": ({}, [1, 9, 17, 30, 31])})
    heads = found[found["measure"] == "heads"].set_index("seed")
    for seed in SEEDS:
        ours, theirs = set(CLOSED[seed]), {1, 9, 17, 30, 31}
        assert heads.loc[seed, "value"] == pytest.approx(len(ours & theirs) / len(ours | theirs))
    pairs = [(0, 1), (0, 2), (1, 2)]
    alike = [
        len(a & b) / len(a | b) for a, b in ((set(CLOSED[i]), set(CLOSED[j])) for i, j in pairs)
    ]
    assert heads["usual"].iloc[0] == pytest.approx(np.mean(alike))
