"""The regimes of the debias subnetworks: who learns in which step, and what is left of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import finished_in_process, small_encoder
from torch import Tensor
from torch.nn import functional as F

from pruning_bias.attributes import Attribute
from pruning_bias.changes import Dense, Entries
from pruning_bias.debias_grid import removals
from pruning_bias.differences import (
    Difference,
    difference_,
    keep_largest_,
    penalty,
    penalty_weights,
)
from pruning_bias.erasers import Eraser, warm_up_
from pruning_bias.files import weights_sha256
from pruning_bias.glue import Task
from pruning_bias.regimes import (
    TaskModel,
    losses_of,
    scores_and_deltas,
    task_states,
    teach_head_,
    train_,
    train_parallel_,
)
from pruning_bias.removal_runs import (
    Combine,
    FinetuneBiased,
    FinetuneErased,
    SubnetworkParallel,
    SubnetworkPost,
)
from pruning_bias.results import load_results
from pruning_bias.state_tables import (
    comparison_table,
    core_of,
    states,
    tell_sizes,
    tell_states,
)
from pruning_bias.subnetworks import active
from pruning_bias.task_models import chosen, open_subnetworks, open_task_model
from pruning_bias.tasks import EncodedTask
from pruning_bias.trace_parts import (
    selectivity_figure,
    trace_parts,
    trade_figure,
    write_traces,
)
from pruning_bias.traces import density_rows, overlap_rows, states_of
from pruning_bias.training import adam

TASK = Task("kinds", ("text",), "label", ("a", "b", "c"))


def texts(n: int = 24) -> tuple[EncodedTask, Attribute]:
    """Random word pieces with random labels and groups."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 9, n)
    ids = rng.integers(3, 30, lengths.sum()).astype(np.int32)
    types, offsets = np.zeros(len(ids), np.uint8), np.cumsum([0, *lengths])
    data = EncodedTask(TASK, ids, types, offsets, rng.integers(0, 3, n), 0)
    return data, Attribute("side", ("left", "right"), rng.integers(0, 2, n))


def biased() -> tuple[TaskModel, EncodedTask, Attribute]:
    """A frozen random model in float32, with its texts."""
    model = TaskModel(small_encoder().float(), 3)
    return (model.eval().requires_grad_(False), *texts())


def post(
    model: TaskModel, data: EncodedTask, side: Attribute, kind: str = "adversarial", **how: Any
) -> tuple[Difference, list[dict[str, float]]]:
    """Three steps of learning a difference."""
    difference = difference_(model.encoder, **how)
    eraser, weights = Eraser(side, 12, kind), penalty_weights(1e-4, "", model.encoder)
    losses = losses_of(model, [eraser], lambda: penalty(difference, weights))
    scores, deltas = scores_and_deltas(difference)
    optimizer = adam((deltas, 1e-2, 0.0), (scores, 0.1, 0.0), (eraser.parameters(), 1e-3, 0.0))
    return difference, train_(
        model, data, losses, optimizer, steps=3, batch_size=6, difference=difference, every=1
    )


@pytest.mark.parametrize("kind", ["adversarial", "mmd"])
def test_post_leaves_the_core_as_it_is_and_moves_what_is_on(kind: str) -> None:
    """To the bit; and one seed gives the same bytes."""
    model, data, side = biased()
    before = weights_sha256(model.encoder)
    plain = task_states(model, data)[0]
    difference, rows = post(model, data, side, kind)
    assert weights_sha256(model.encoder) == before and torch.equal(
        task_states(model, data)[0], plain
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert all(
        row["loss"] == pytest.approx(row["task"] + row["removal"] + row["l0"]) for row in rows
    )
    keep_largest_(difference, 0.1)
    with active(difference):
        assert (task_states(model, data)[0] - plain).abs().max() > 1e-3
    again, _ = post(model, data, side, kind)
    keep_largest_(again, 0.1)
    for one, other in zip(difference.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_that_no_text_uses_need_no_gate() -> None:
    """The kept entries and their values are those that gates for all rows lead to."""
    found = []
    for seen in (False, True):
        model, data, side = biased()
        rows = torch.from_numpy(data.ids).long().unique() if seen else None
        difference = difference_(model.encoder, seen=rows)
        for part in difference.parts.values():  # without noise, which is drawn by place
            part.gates[0].sample_ = lambda _: None
        losses = losses_of(model, [Eraser(side, 12, "mmd")])
        optimizer = adam((scores_and_deltas(difference)[1], 1e-2, 0.0))
        train_(model, data, losses, optimizer, steps=3, batch_size=6, difference=difference)
        keep_largest_(difference, 0.1)
        found.append({name: part for name, part in difference.parts.items()})
    sizes = [sum(len(part.index) for part in parts.values()) for parts in found]
    assert sizes[0] == sizes[1] > 0
    for name in found[0]:
        assert torch.equal(found[0][name].index, found[1][name].index)
        assert torch.allclose(found[0][name].values, found[1][name].values, atol=1e-6)


def test_the_reversed_gradient_reaches_the_states_and_not_the_adversary() -> None:
    """Descending drives the group out of the state, while the adversary learns to tell it."""
    _, side = texts()
    h = torch.randn(24, 12, requires_grad=True)
    eraser = Eraser(side, 12, "adversarial", strength=2.0).eval()
    index = torch.arange(24)
    eraser(h, index).backward()
    reversed_, own = h.grad.clone(), [p.grad.clone() for p in eraser.parameters()]
    h.grad, eraser.strength = None, -1.0
    eraser.zero_grad()
    eraser(h, index).backward()
    assert torch.allclose(reversed_, -2 * h.grad, atol=1e-7)
    assert all(
        torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(own, eraser.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="erasure is 'hope'"):
        Eraser(side, 12, "hope")


def test_a_warmed_up_adversary_knows_the_groups() -> None:
    """And MMD has nobody to warm up."""
    _, side = texts()
    states = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    states[:, 0] += 4.0 * torch.from_numpy(side.values)
    index, losses = torch.arange(24), []
    for epochs in (0, 60):
        eraser = Eraser(side, 12)
        warm_up_(eraser, states, epochs, 1e-2)
        losses.append(eraser.eval()(states, index).item())
    assert losses[1] < 0.3 < losses[0]
    warm_up_(Eraser(side, 12, "mmd"), states, 5)


@pytest.mark.parametrize("absolute", [False, True])
def test_parallel_trains_the_core_on_the_task_alone(absolute: bool) -> None:
    """As without any difference; a difference that is absolute takes the core's steps back."""
    model, data, side = biased()
    alone, other = TaskModel(small_encoder().float(), 3), []
    for each in (model, alone):
        each.encoder.requires_grad_(True)
        each.head.requires_grad_(True)
        difference = difference_(each.encoder)
        core = adam((each.encoder.parameters(), 1e-2, 0.0))
        turns = []
        if each is model:
            scores, deltas = scores_and_deltas(difference)
            optimizer = adam((deltas, 0.0, 0.0), (scores, 0.0, 0.0))
            turns = [(difference, optimizer, losses_of(each, [Eraser(side, 12, "mmd")]))]
            start = {n: w.detach().clone() for n, w in each.encoder.named_parameters()}
        for dropout in (m for m in each.modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
        for layer in each.encoder.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        each.encoder.config.attention_probs_dropout_prob = 0.0
        rows = train_parallel_(
            each, data, core, turns, steps=3, batch_size=6, absolute=absolute, every=1
        )
        other.append(dict(each.encoder.named_parameters()))
        assert len(rows) == 3 and ("removal 1" in rows[0]) == bool(turns)
    for name, weight in other[0].items():
        assert torch.equal(weight, other[1][name])
    moved = 0
    difference = model.encoder.differences[0]
    for name, part in difference.parts.items():
        own = name.replace("/", ".")
        wanted = start[own] - other[0][own] if absolute else torch.zeros_like(start[own])
        assert isinstance(part, Dense) and torch.allclose(part.delta, wanted, atol=1e-6)
        moved += int((start[own] != other[0][own]).sum())
    assert moved > 100


def test_states_are_the_core_and_every_combination() -> None:
    """Each a `with`, in which exactly these are on."""
    model, data, side = biased()
    made = {name: post(model, data, side)[0] for name in ("gender", "age")}
    for each in made.values():
        keep_largest_(each, 0.05)
    found = states_of(model, made)
    assert list(found) == ["core", "+gender", "+age", "+gender+age"]
    assert list(states_of(model, made, together=True)) == ["+gender+age"]
    for name, on in found.items():
        with on:
            assert [n for n, each in made.items() if each.on] == [n for n in made if n in name]
    rows = density_rows(made)
    total = {r["test"]: r["value"] for r in rows if r["metric"] == "density"}
    assert total == pytest.approx({"gender": 0.05, "age": 0.05}, abs=1e-3)
    sizes = {n: w.numel() for n, w in model.encoder.named_parameters()}
    assert sum(sizes.values()) == sum(w.numel() for _, w in made["age"].weights())
    shared = {row["metric"]: row["value"] for row in overlap_rows(made)}
    assert 0 <= shared["jaccard"] <= 1 and shared["times chance"] >= 0


def test_an_overlap_is_counted_by_hand() -> None:
    """Two of six entries are shared."""
    model = small_encoder()
    name = "encoder.layer.0.output.dense.bias"
    made = {
        key: Difference(model, {name: Entries(torch.tensor(places), torch.ones(len(places)))})
        for key, places in {"a": [0, 1, 2, 3], "b": [2, 3, 4, 5]}.items()
    }
    found = {row["metric"]: row["value"] for row in overlap_rows(made)}
    assert found["jaccard"] == pytest.approx(2 / 6)
    assert found["times chance"] == pytest.approx(2 / (4 * 4 / 12))


def test_a_head_that_learns_alone_leaves_the_encoder() -> None:
    """To the bit, and the task's loss falls."""
    model, pieces, _ = biased()
    model.requires_grad_(True)
    before = weights_sha256(model.encoder)
    labels = torch.from_numpy(pieces.labels)
    first = F.cross_entropy(task_states(model, pieces)[1], labels)
    teach_head_(model, pieces, 50)
    assert weights_sha256(model.encoder) == before
    assert F.cross_entropy(task_states(model, pieces)[1], labels) < first - 0.01


def test_attributes_are_chosen_by_name() -> None:
    """An unknown one is refused with those that there are."""
    _, side = texts()
    assert list(chosen({"side": side, "b": side}, "all")) == ["side", "b"]
    with pytest.raises(ValueError, match="no attribute \\['race'\\]; these texts have side"):
        chosen({"side": side}, "race")


@pytest.fixture(scope="module")
def small_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole comparison on the tiny encoder, two seeds."""
    root = tmp_path_factory.mktemp("removals")
    shared = {"examples": 48, "batch_size": 16, "probe_epochs": 2, "probe_rate": 1e-3}
    runs = removals(
        {"encoder": "tiny"},
        (0, 1),
        shared,
        {"epochs": 1},
        {"learn_steps": 2, "fix_steps": 1},
        {"mmd": {"strength": 1.0}},
        ("gender", "age"),
        warm_up=1,
        baselines={},
        control=True,
    )
    for run in runs:
        finished_in_process(run, root)
    return root


def test_the_experiments_leave_what_the_report_reads(small_grid: Path, tmp_path: Path) -> None:
    """Every experiment, its files, and every part of the report."""
    frame = load_results(small_grid)
    names = {each.__name__ for each in (FinetuneBiased, FinetuneErased, SubnetworkPost)}
    assert {*frame["experiment"]} == names | {Combine.__name__, SubnetworkParallel.__name__}
    found = states(frame)
    regimes = set(zip(found["regime"], found["state"], strict=True))
    assert {
        ("fine-tuned", "core"),
        ("post, mmd", "+gender"),
        ("post, mmd", "+gender+age"),
    } <= regimes
    assert {("parallel, mmd", "core"), ("parallel, mmd", "+gender+age")} <= regimes
    assert ("post, mmd", "core") not in regimes
    assert ("post, task alone", "+gender") in regimes
    table = comparison_table(found)
    assert set(table["n"]) == {"2"} and {"gender", "gap age", "DTO age"} <= {*table.columns}
    told = tell_states(found)
    assert len(told) == 5 and all("of the way from the core to chance" in line for line in told)
    sizes = tell_sizes(found)
    assert len(sizes) == 1 and sizes[0].startswith(f"{found['data'][0]}: ")
    core = core_of(found)
    n, accuracy = (core.loc[core["metric"] == each, "value"] for each in ("n_dev", "accuracy"))
    error = 100 * (accuracy.mean() * (1 - accuracy.mean()) / n.iloc[0]) ** 0.5
    assert f"the task {error:.1f} points, probes of" in sizes[0]
    report = trace_parts(frame)
    assert {"states", "trade", "selectivity", "files", "density", "published"} == {*report}
    text = write_traces(small_grid, tmp_path)
    assert "post, mmd" in text and (tmp_path / "figures" / "trade.png").is_file()
    saved = pd.read_csv(tmp_path / "tables" / "states.csv")
    assert len(saved) == len(found)


def test_figures_name_what_they_show(small_grid: Path) -> None:
    """One look for each label, in every panel; a core is the core of its own regime."""
    found = states(load_results(small_grid))
    looks: dict[str, set] = {}
    for ax in trade_figure(found).axes:
        for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
            looks.setdefault(label, set()).add((line.get_color(), line.get_marker()))
    assert len(set.union(*looks.values())) == len(looks) > 5
    gives, seen = found[found["metric"] == "gives"], 0
    for ax in selectivity_figure(found).axes:
        regime = ax.get_title().split(", ", 1)[1]
        first = ax.get_xticklabels()[0].get_text()
        core = core_of(gives[gives["test"] == first], regime)["value"].mean()
        assert ax.texts[0].get_text() == f"{100 * core:.0f}"
        seen += regime.startswith("parallel")
    assert seen


def test_a_subnetwork_of_a_run_is_opened_in_one_line(small_grid: Path) -> None:
    """On the core that it was learned for; another core, and two of one attribute, are refused."""
    posts = sorted(small_grid.glob("SubnetworkPost/*/done.json"))
    frame = load_results(small_grid).drop_duplicates("digest").set_index("digest")
    one = posts[0].parent.name
    core = open_task_model(frame.loc[one, "encoder"], root=small_grid)
    found = open_subnetworks([f"SubnetworkPost/{one}"], core.model.encoder, small_grid)
    (attribute,) = found
    assert attribute == frame.loc[one, "attribute"]
    plain: Tensor = task_states(core.model, core.dev.pieces)[0]
    with active(*found.values()):
        assert not torch.equal(task_states(core.model, core.dev.pieces)[0], plain)
    with pytest.raises(ValueError, match="one of each attribute"):
        open_subnetworks([f"SubnetworkPost/{one}"] * 2, core.model.encoder, small_grid)
    others = frame[(frame["experiment"] == "FinetuneBiased") & (frame.index != one)]
    wanted = [f"run:FinetuneBiased/{d}" for d in others.index]
    other = next(name for name in wanted if name != frame.loc[one, "encoder"])
    with pytest.raises(ValueError, match="was made for"):
        open_subnetworks(
            [f"SubnetworkPost/{one}"],
            open_task_model(other, root=small_grid).model.encoder,
            small_grid,
        )
    with pytest.raises(ValueError, match="left no subnetwork"):
        open_subnetworks([wanted[0].removeprefix("run:")], core.model.encoder, small_grid)


def test_no_model_without_a_task_is_debiased(small_grid: Path) -> None:
    """A post-hoc subnetwork needs a model that is done."""
    with pytest.raises(ValueError, match="has learned no task"):
        open_task_model("packaged")
    parallel = next(small_grid.glob("SubnetworkParallel/*/done.json")).parent.name
    with pytest.raises(ValueError, match="left no head"):
        open_task_model(f"run:SubnetworkParallel/{parallel}", root=small_grid)
