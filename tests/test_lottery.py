"""Propositions about tickets: drawn, found, removed, trained again, and told."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import in_process, small_encoder
from torch import nn
from transformers import PreTrainedModel

from pruning_bias.anatomy import Encoder, load_encoder, tiny_encoder
from pruning_bias.classifiers import open_classifier, save_classifier, unseen
from pruning_bias.compaction import dense_shaped
from pruning_bias.glue import read_task
from pruning_bias.importance import all_open
from pruning_bias.lottery_grid import AS_PUBLISHED, lottery
from pruning_bias.lottery_published import LOTTERY_PUBLISHED, published_score, slips
from pruning_bias.masks import read_keep
from pruning_bias.outcomes import outcome_figure, outcome_table, outcomes, tell_outcomes
from pruning_bias.parameters import digest, parameters
from pruning_bias.results import lasting, load_results
from pruning_bias.retraining import close_, component_ticket, still_, weight_ticket
from pruning_bias.runs import FineTuning, ImportancePruning, MagnitudePruning, Ticket
from pruning_bias.search import size
from pruning_bias.settings import project_root
from pruning_bias.tasks import Classifier, encode_task, predict
from pruning_bias.ticket_parts import good_tickets, lottery_parts, write_lottery
from pruning_bias.tickets import TICKETS, Keep, draw_ticket

torch.set_num_threads(1)


def half_open(model: PreTrainedModel, seed: int = 0) -> Keep:
    """About half of the heads and MLPs, and a layer without any head."""
    generator = torch.Generator().manual_seed(seed)
    keep = {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in all_open(model).items()}
    keep["0/value"][:] = False
    keep["0/mlp"][:], keep["1/mlp"][:] = True, False
    return keep


# Tickets by name


@pytest.mark.parametrize("kind", TICKETS)
def test_the_same_name_is_the_same_ticket(kind: str) -> None:
    good = [half_open(tiny_encoder(), seed) for seed in range(3 if "super" in kind else 1)]
    first, again, other = (draw_ticket(kind, good, number) for number in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    if kind in ("good", "super"):
        assert all(torch.equal(first[name], other[name]) for name in first)
    if kind in ("random", "bad"):
        assert [size(first, part) for part in ("value", "mlp")] == [
            size(good[0], part) for part in ("value", "mlp")
        ]


def test_what_is_no_ticket_is_refused() -> None:
    good = half_open(tiny_encoder())
    with pytest.raises(ValueError, match="expected one of good, random"):
        draw_ticket("best", [good])
    with pytest.raises(ValueError, match="from one good ticket, not from 2"):
        draw_ticket("random", [good, good])


# Removed, or held closed


def still_encoder(family: str) -> PreTrainedModel:
    """Without dropout, whose places would differ."""
    names = "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"
    still = dict.fromkeys(names, 0.0)
    return small_encoder(family, vocab_size=30522, pad_token_id=0, **still)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_training_without_the_parts_is_training_with_them_closed(
    family: str, packaged: Encoder
) -> None:
    data = encode_task(packaged.tokenizer, read_task("acceptability", "train", 0, 24), 24)
    batch, keep, found = data.batch(np.arange(24)), half_open(still_encoder(family)), []
    for hold in ("masked", "removed"):
        encoder = close_(still_encoder(family), keep, hold)
        classifier = Classifier(encoder, 2, seed=0, dropout=0.0).double().train()
        still_(encoder, keep)
        trained = [p for p in classifier.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, 1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(batch), batch.labels).backward()
            optimizer.step()
        found.append(classifier.eval()(batch).detach())
        small = sum(p.numel() for p in encoder.parameters())
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)
    assert small < sum(p.numel() for p in still_encoder(family).parameters())
    with torch.no_grad():  # and an ordinary model says the same
        classifier.encoder = dense_shaped(encoder)
        torch.testing.assert_close(classifier(batch), found[1], rtol=0, atol=1e-9)


# What fine-tuning leaves, and what it has not seen


def test_a_model_found_again_says_the_same(tmp_path: Path, packaged: Encoder) -> None:
    run = FineTuning(keep_weights=True)
    folder = tmp_path / "FineTuning" / digest(run)
    found = load_encoder("tiny")
    classifier = Classifier(found.model, 2, seed=3).eval()
    found.model.save_pretrained(folder / "model")
    found.tokenizer.save_pretrained(folder / "model")
    save_classifier(classifier, folder)
    (folder / "parameters.json").write_text(pd.Series(parameters(run)).to_json())
    name = f"run:FineTuning/{digest(run)}"
    with pytest.raises(ValueError, match="no finished run"):
        open_classifier(name, root=tmp_path)
    (folder / "done.json").write_text("{}")
    learned = open_classifier(name, root=tmp_path)
    data = encode_task(found.tokenizer, read_task("acceptability", "dev", 0, 20))
    told = [predict(each, data) for each in (learned.classifier, classifier)]
    torch.testing.assert_close(*told, rtol=0, atol=1e-6)  # the kernels of attention may differ
    assert learned.run["task"] == "acceptability"
    (folder / "model" / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match="must be a FineTuning with keep_weights"):
        open_classifier(name, root=tmp_path)
    with pytest.raises(ValueError, match="has learned no task"):
        open_classifier("packaged")


def test_what_was_not_trained_on_is_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rows = "".join(f"sentence {i}\t{i % 2}\n" for i in range(50))
    (folder / "train.tsv").write_text("sentence\tlabel\n" + rows)
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path))
    seen = read_task("SST-2", "train", 7, 30)
    rest = unseen("SST-2", 30, 7)
    assert sorted([*seen.texts[0], *rest.texts[0]]) == sorted(f"sentence {i}" for i in range(50))
    assert all(int(t.split()[1]) % 2 == y for t, y in zip(rest.texts[0], rest.labels, strict=True))
    assert len(unseen("SST-2", 30, 7, 5)) == 5 and len(unseen("SST-2", 0, 7)) == 50
    built_in = read_task("acceptability", "train", 0, 400)
    assert not set(unseen("acceptability", 400, 0, 300).texts[0]) & set(built_in.texts[0])


# The experiments


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder that a run writes into, as the sweep gives it."""

    def folder(name: str) -> Path:
        made = tmp_path / name / ".0123456789ab.host-1.tmp"
        made.mkdir(parents=True)
        monkeypatch.setenv("PRUNING_BIAS_RUN_FOLDER", str(made))
        return made

    return folder


def states(names: dict[str, Any]) -> set[str]:
    return {row["state"] for row in names["metrics"] if row["metric"] == "quality"}


def test_the_searches_leave_tickets_and_the_tickets_learn(here: Callable[[str], Path]) -> None:
    folder = here("ImportancePruning")
    names = in_process(ImportancePruning(share=0.6, draws=2))
    assert states(names) == {"full", "good", "random", "bad", "complement", "majority", "searched"}
    assert names["history"][0]["heads"] == 8 > names["history"][-1]["heads"]
    assert (folder / "journal.jsonl").is_file() and not lasting(folder, "journal.jsonl").exists()
    names = in_process(MagnitudePruning(search="steps", amount=0.3, steps=3, share=0.5))
    kept = [row["living"] for row in names["history"]]
    assert np.allclose(kept, 0.7 ** np.arange(1, len(kept) + 1), atol=1e-4)
    root = folder.parents[1]
    for name in ("ImportancePruning", "MagnitudePruning"):  # both wrote into the same folder
        (root / name).mkdir(exist_ok=True)
        (root / name / "a").symlink_to(folder, target_is_directory=True)
    (folder / "done.json").write_text("{}")
    for source, kind in (("Importance", "bad"), ("Magnitude", "random")):
        names = in_process(Ticket(sources=f"{source}Pruning/a", kind=kind, examples=32))
        found = {r["metric"]: r["value"] for r in names["metrics"] if r["state"] == "after"}
        assert 0 <= found["prunable"] < 1 and math.isfinite(found["score"])
    model = names["classifier"].encoder
    for name, kept in names["mask"].items():  # what was removed never came back
        assert not model.get_parameter(name)[~kept].any()
    with pytest.raises(ValueError, match="left no good ticket 7"):
        weight_ticket("MagnitudePruning/a", "good", 7, root)
    with pytest.raises(ValueError, match="no ticket of all heads and MLPs of this encoder"):
        component_ticket(["ImportancePruning/a"], "good", 0, still_encoder("bert"), root)


def test_a_killed_search_goes_on_to_the_same_mask(here: Callable[[str], Path]) -> None:
    run = ImportancePruning(share=0.6, draws=1)
    whole = here("whole")
    in_process(run)
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    again = here("killed")
    lasting(again, "journal.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    in_process(run)
    assert (again / "journal.jsonl").read_bytes() == b"".join(lines)
    theirs, ours = (read_keep(place / "masks.safetensors") for place in (whole, again))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_published_program_is_a_choice_of_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    names = in_process(ImportancePruning(**AS_PUBLISHED, share=0.6))
    assert np.array_equal(names["found"].ids, names["report"].ids)  # both are the dev set
    assert states(names) >= {"good", "random"}


def test_a_grid_trains_what_its_searches_found() -> None:
    machine = {"encoder": "packaged", "threads": 1}
    runs = lottery(machine, (0, 1), {"task": "acceptability"}, {"draws": 1})
    kinds = pd.Series([type(run).__name__ for run in runs]).value_counts().to_dict()
    assert kinds == {"FineTuning": 2, "ImportancePruning": 2, "MagnitudePruning": 2, "Ticket": 18}
    tickets = [run for run in runs if isinstance(run, Ticket)]
    searches = {f"{type(run).__name__}/{digest(run)}" for run in runs if hasattr(run, "share")}
    assert {name for run in tickets for name in run.sources.split()} == searches
    assert all(len(run.sources.split()) == (2 if "super" in run.kind else 1) for run in tickets)
    assert len(set(runs)) == len(runs)


# What is told


TASK = "SST-2_sentences"


def frame_of(root: Path) -> pd.DataFrame:
    """Results of three seeds with scores that are known."""
    rows = []
    for seed in range(3):
        run = ImportancePruning(seed=seed, encoder=f"run:FineTuning/{seed}")
        given = parameters(run) | {"experiment": "ImportancePruning", "digest": digest(run)}
        scores = {"full": 0.9, "majority": 0.5, "good": 0.82, "bad": 0.6}
        found = [(state, 0, value) for state, value in scores.items()]
        found += [("random", draw, 0.6 + 0.1 * draw) for draw in range(2)]
        rows += [
            given | {"state": state, "draw": draw, "metric": "quality", "test": TASK}
            | {"value": value + 0.01 * seed}
            for state, draw, value in found
        ]  # fmt: skip
        again = Ticket(seed=seed, sources=f"ImportancePruning/{digest(run)}", kind="bad")
        rows.append(
            parameters(again)
            | {"experiment": "Ticket", "digest": digest(again), "state": "after", "draw": 0}
            | {
                "metric": "quality",
                "test": "SST-2_sentences",
                "value": 0.88,
                "task": "SST-2_sentences",
            }
        )
    return pd.DataFrame(rows)


def test_draws_of_a_seed_count_once_and_published_numbers_stand_beside(tmp_path: Path) -> None:
    found = outcomes(frame_of(tmp_path))
    random = found[found["state"] == "random"]
    assert np.allclose(random["score"], [65, 66, 67]) and set(random["way"]) == {"pruned"}
    table = outcome_table(found).set_index("ticket")["SST-2_sentences"]
    assert table["full"] == "91.0 ± 1.0 (92.6)" and table["bad, retrained"] == "88.0 (85.8)"
    assert table["random, pruned"] == "66.0 ± 1.0 (68.9)" and table["majority"].startswith("51.0")
    words = tell_outcomes(found)
    assert "keep good 91%, random 73%, bad 67%" in words[0]
    assert "ahead of random in 3 of 3 seeds, of bad in 3 of 3 seeds" in words[0]
    assert outcome_figure(found) is not None and outcome_figure(found, "magnitude") is None


def test_the_published_table_says_what_the_spec_counts() -> None:
    full = LOTTERY_PUBLISHED.query("state == 'full'")["mean"]
    assert np.isclose(full.mean(), 0.761, atol=5e-4)
    good = LOTTERY_PUBLISHED.query("state == 'good' and way == 'retrained'")
    means = good.groupby("search")["mean"].mean()
    assert np.allclose([means["importance"], means["magnitude"]], [0.732, 0.762], atol=6e-4)
    assert published_score("SST-2", "importance", "bad", "retrained") == (0.858, 0.057)
    assert published_score("HANS", "importance", "bad", "retrained") is None
    told = slips().set_index("claim")
    assert told.loc["random tickets, CoLA", "verdict"] == "-0.087"
    assert "random tickets, WNLI" not in told.index


def test_a_folder_without_tickets_has_no_report(tmp_path: Path) -> None:
    frame = load_results(tmp_path)
    assert not lottery_parts(tmp_path, frame) and not good_tickets(tmp_path, frame)
    assert "no finished runs" in write_lottery(tmp_path, tmp_path)


def test_a_search_by_removal_closes_what_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    names = in_process(ImportancePruning(score="removal", share=0.6, draws=1))
    first, scores = names["steps"][1].keep, names["scores"](names["start"])
    costs = torch.cat([scores[n].flatten() for n in scores if n.endswith("/mlp")])
    closed = torch.cat([~first[n].flatten() for n in scores if n.endswith("/mlp")])
    assert closed.sum() == 1 and costs[closed] == costs.min()


def test_the_committed_demo_has_every_part_of_its_report() -> None:
    root = project_root() / "results" / "reference" / "lottery_demo"
    frame = load_results(root)
    report = lottery_parts(root, frame)
    assert {"outcomes", "sizes", "survival", "stability", "patterns", "audit"} == report.keys()
    (figure,) = report["survival"].figures.values()
    kept = good_tickets(root, frame)["acceptability", "importance"]
    mean = round(float(kept["value"].sum()) / 3, 1)
    assert f"{mean:g} of 72 kept" in figure.axes[0].get_title()
    table = outcomes(frame).pivot_table("score", "seed", ["state", "way"])
    assert (table["good", "retrained"] > table["random", "retrained"]).all()
    sizes = report["sizes"].tables[""].set_index("ticket")
    assert sizes.loc["good", "heads"] == sizes.loc["bad", "heads"]  # of equal size, by seed
