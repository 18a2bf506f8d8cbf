"""Tables, verdicts and figures from results whose numbers are known."""

import csv
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from pruning_bias.averages import labels, movement_figures, movement_runs
from pruning_bias.charts import seat_figure, training_figure
from pruning_bias.comparison import agreement, compare
from pruning_bias.conclusions import conclusions, verdicts
from pruning_bias.findings import findings
from pruning_bias.maps import closing_map, draw_blocks, draw_closing, draw_heads
from pruning_bias.overview import main_table, table_by_test
from pruning_bias.pairs import variants_table
from pruning_bias.parameters import digest, parameters
from pruning_bias.published import PUBLISHED, published_table
from pruning_bias.report_parts import P_VALUES, parts
from pruning_bias.reports import write_report
from pruning_bias.results import load_histories, load_results
from pruning_bias.runs import BlockMovement, DebiasOnly, FineTuning, HeadMovement, Movement

Measured = dict[str, float]  # a test's name, bias or drift -> value
DENSE = {"builtin-6": 1.4, "builtin-7": 0.3, "bias": 20.0, "drift": 0.0}


def rows(state: str, measured: Measured, draw: int = 0, p: float = 0.01) -> list[dict[str, Any]]:
    """Rows of metrics.json."""
    return [
        {"state": state, "draw": draw}
        | (
            {"metric": name, "value": value}
            if name in ("bias", "drift", "closed", "groups", "density")
            else {"metric": "effect_size", "test": name, "value": value, "p_value": p}
        )
        for name, value in measured.items()
    ]


def leave_run(
    root: Path,
    run: Movement,
    after: Measured,
    random: Iterable[Measured] = (),
    keep: dict[str, np.ndarray] | None = None,
    p: float = 0.2,
    seconds: float = 10.0,
) -> Path:
    """A finished run's folder, as `execute` leaves it."""
    folder = root / type(run).__name__ / digest(run)
    folder.mkdir(parents=True)
    metrics = rows("before", DENSE) + rows("after", after, p=p)
    if keep:
        groups = sum(each.size for each in keep.values())
        closed = sum(int((~each).sum()) for each in keep.values())
        counts = {"closed": closed, "groups": groups, "density": 1 - closed / groups}
        metrics += rows("after", counts)
        save_file({f"{k}.keep": v for k, v in keep.items()}, folder / "masks.safetensors")
    for draw, measured in enumerate(random):
        metrics += rows("random", measured, draw)
    text = json.dumps(metrics)
    facts = {"experiment": type(run).__name__, **parameters(run)}
    files = {
        "metrics.json": text,
        "parameters.json": json.dumps(facts),
        "environment.json": json.dumps({"seconds": seconds}),
        "done.json": json.dumps({"metrics.json": hashlib.sha256(text.encode()).hexdigest()}),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "threshold", "loss", "bias", "drift", "open"])
        for step in range(5):
            share = step / 4
            bias = DENSE["bias"] + share * (after["bias"] - DENSE["bias"])
            writer.writerow([step, 0.1 * share, 4, bias, share * after["drift"], 1])
    return folder


def leave_task(root: Path, run: FineTuning, score: float) -> None:
    """A finished fine-tuning."""
    folder = root / "FineTuning" / digest(run)
    folder.mkdir(parents=True)
    values = {"majority": 0.5, "after": score}
    metrics = json.dumps([{"state": s, "metric": "score", "value": v} for s, v in values.items()])
    (folder / "metrics.json").write_text(metrics)
    for name, content in {
        "parameters": {"experiment": "FineTuning", **parameters(run)},
        "environment": {"seconds": 1.0},
        "done": {"metrics.json": hashlib.sha256(metrics.encode()).hexdigest()},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def measured(six: float, seven: float, bias: float, drift: float) -> Measured:
    """What one state of one run measures."""
    return {"builtin-6": six, "builtin-7": seven, "bias": bias, "drift": drift}


def heads(*closed: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks of 2 layers with 4 value heads, all open but these (layer, head)."""
    keep = {f"{layer}/value": np.ones((4, 1), bool) for layer in range(2)}
    for layer, head in closed:
        keep[f"{layer}/value"][head] = False
    return keep


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of heads that help on test 6, of blocks that do not, of a model torn apart."""
    root = tmp_path / "results"
    control = [measured(1.4, 0.3, 19.0, 2.0), measured(1.3, 0.3, 19.0, 3.0)]
    for seed, six in enumerate((0.8, 0.9, 1.0)):
        leave_run(
            root,
            HeadMovement(seed=seed),
            measured(six, 0.9 + 0.01 * seed, 10.0, 1.0 + seed / 2),
            control,
            heads((0, 1), (1, seed)),
            p=(0.01, 0.02, 0.3)[seed],
            seconds=10 + seed,
        )
        blocks = {f"{i}/{part}": np.ones((2, 2), bool) for i in (0, 1) for part in ("query", "ffn")}
        blocks["1/query"][0, 0] = False
        same = measured(1.38, 0.31, 19.0, 20.0)
        leave_run(root, BlockMovement(seed=seed), same, control, blocks)
    leave_run(root, DebiasOnly(), measured(0.2, 0.31, 1.0, 500.0))
    return root


def test_means_and_sample_deviations_over_seeds(results: Path) -> None:
    found = movement_figures(load_results(results))
    heads = found[found["configuration"] == "heads (value), last/token"]
    six = heads[heads["test"] == "builtin-6"].set_index("state")
    assert six.loc["after", "mean"] == pytest.approx(0.9)
    assert six.loc["after", "sd"] == pytest.approx(0.1)  # of a sample: the population's is 0.082
    assert six["n"].tolist() == [3, 3, 3]
    drift = heads[heads["metric"] == "drift"].set_index("state")
    assert drift.loc["after", "mean"] == pytest.approx(1.5)
    assert drift.loc["random", "mean"] == pytest.approx(2.5)
    seconds = heads[heads["metric"] == "seconds"]
    assert seconds["mean"].tolist() == [11.0]


def test_of_several_random_controls_their_mean_counts_once_per_seed(results: Path) -> None:
    found = movement_figures(load_results(results))
    random = found[(found["state"] == "random") & (found["test"] == "builtin-6")]
    assert random["n"].tolist() == [3, 3]
    assert random["mean"].tolist() == pytest.approx([1.35, 1.35])


def test_p_values_are_not_averaged(results: Path) -> None:
    found = movement_figures(load_results(results))
    after = found[(found["state"] == "after") & (found["test"] == "builtin-6")].iloc[0]
    assert after["p_median"] == 0.02  # of 0.01, 0.02 and 0.3; their mean would be 0.11
    assert after["p_below"] == pytest.approx(2 / 3)
    table = table_by_test(load_results(results))
    assert table.loc[0, "p < .05 after"] == "67%"
    assert "share of seeds" in P_VALUES


def test_the_table_says_before_and_after_and_leaves_empty_what_is_missing(results: Path) -> None:
    table = main_table(movement_runs(load_results(results))).set_index("configuration")
    assert list(table.index) == [
        "as it came",
        "heads (value), last/token",
        "blocks 32 + FFN, last/token",
        "debias only, last/token",
    ]
    assert table["n"].tolist() == ["", "3", "3", "1"]
    assert table["builtin-6"].tolist() == ["1.40", "0.90 ± 0.10 (1.35) ↓", "1.38 (1.35)", "0.20"]
    assert table["open"].tolist() == ["", "0.750", "0.938", ""]
    assert table["drift"].tolist() == ["", "1.50 ± 0.50 (2.50)", "20.0 (2.50)", "500"]
    assert "±" not in " ".join(table.loc["debias only, last/token"])  # one seed


def test_a_configuration_is_named_by_what_tells_it_apart(tmp_path: Path) -> None:
    same = measured(1.0, 0.3, 10.0, 1.0)
    for run in (
        HeadMovement(),
        HeadMovement(seed=1),
        HeadMovement(penalty=2.0),
        HeadMovement(heads="tied", mlp=True, layer="all", mode="sentence"),
        HeadMovement(random_draws=7),  # what decides no result makes no other run
        BlockMovement(corpus="some/folder/brown.txt.gz"),
        BlockMovement(block=64),
    ):
        leave_run(tmp_path, run, same)
    runs = movement_runs(load_results(tmp_path))
    told = labels(runs).assign(corpus=runs["corpus"], digest=runs["digest"]).drop_duplicates()
    assert sorted(told[["configuration", "variant"]].itertuples(index=False, name=None)) == [
        ("blocks 32 + FFN, last/token", ""),
        ("blocks 64 + FFN, last/token", "block 64"),
        ("heads (tied) + FFN, all/sentence", "heads tied, with FFN"),
        ("heads (value), last/token", ""),
        ("heads (value), last/token", ""),
        ("heads (value), last/token, penalty 2", "penalty 2"),
    ]


def test_a_variant_is_held_against_the_usual_run_of_the_same_seed(tmp_path: Path) -> None:
    for seed in range(3):
        leave_run(tmp_path, HeadMovement(seed=seed), measured(1.0 + seed, 0.0, 10.0, 1.0))
        other = HeadMovement(seed=seed, rule="topk", initial_threshold=1.0)
        leave_run(tmp_path, other, measured(0.6 + 1.02 * seed, 0.0, 10.0, 1.0))
    table = variants_table(movement_runs(load_results(tmp_path)))
    assert table["configuration"].tolist()[1].startswith("· ")
    assert table["change of mean |d|"].tolist() == ["", "-0.19 [-0.21, -0.17] *"]


def judged(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """The verdicts by first word of the configuration and test."""
    found = verdicts(load_results(folder))
    return {
        (row.configuration.split()[0], row.test): (row.verdict, row.why)
        for row in found.itertuples()
    }


def test_verdicts_say_what_helps_what_does_not_and_what_makes_it_worse(results: Path) -> None:
    assert judged(results) == {
        ("heads", "builtin-6"): ("helps on", "falls"),
        ("heads", "builtin-7"): ("makes worse:", "rises"),
        ("blocks", "builtin-6"): ("does not help on", "hardly moves"),
        ("blocks", "builtin-7"): ("does not help on", "hardly moves"),
        ("debias", "builtin-6"): ("may help on", "falls"),
        ("debias", "builtin-7"): ("does not help on", "hardly moves"),
    }


@pytest.mark.parametrize(
    ("after", "random", "verdict", "why"),
    [
        ((0.8, 0.9, 1.0), 0.9, "does not help on", "falls no further than at random"),
        ((0.2, 0.9, 1.2), 1.4, "may help on", "falls"),
        ((0.2, 0.5, 1.5), 1.4, "does not help on", "moves differently from seed to seed"),
        ((-1.35, -1.4, -1.38), 1.4, "does not help on", "changes sides"),
        ((-0.3, -0.3, -0.31), 1.4, "helps on", "falls"),
        ((1.8, 1.85, 1.9), 1.4, "makes worse:", "rises"),
        ((1.45, 1.5, 1.99), 1.4, "may make worse:", "rises"),
        ((0.5, 0.6), 1.4, "may help on", "falls"),
    ],
)
def test_a_verdict_needs_the_seeds_and_the_controls(
    tmp_path: Path, after: tuple[float, ...], random: float, verdict: str, why: str
) -> None:
    for seed, six in enumerate(after):
        control = [measured(random, 0.3, 19.0, 1.0)]
        leave_run(tmp_path, HeadMovement(seed=seed), measured(six, 0.3, 9.0, 1.0), control)
    assert judged(tmp_path)["heads", "builtin-6"] == (verdict, why)


def test_the_interval_is_students_over_the_seeds_each_against_its_own_controls(
    results: Path,
) -> None:
    row = verdicts(load_results(results)).iloc[0]
    half = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %
    assert (row["fall_low"], row["fall_high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert (row["gain"], row["gain_low"]) == pytest.approx((0.45, 0.45 - half), abs=1e-6)
    assert (row["draws"], row["as_low"]) == (6, 0)


def test_conclusions_are_plain_about_harm_and_drift(results: Path) -> None:
    heads, blocks, debias = conclusions(load_results(results)).to_dict("records")
    assert (
        "helps on builtin-6; makes worse: builtin-7; drift is moderate, 0.60" in heads["headline"]
    )
    assert "falls by 0.50 (36%) in 3 of 3 seeds" in heads["test_6"]
    assert "(0 of 6 draws are as near to zero)" in heads["test_6"]
    assert "builtin-7 rises (0.30 → 0.91)" in heads["others"]
    assert heads["against"] == "builtin-7 gets worse"
    assert "does not help on builtin-6, builtin-7; drift is large, 8.00 times" in blocks["headline"]
    assert "3 of 6 draws" in blocks["test_6"]
    assert blocks["against"] == "builtin-6 hardly moves; drift is large"
    assert "n = 1" in debias["headline"] and "no random control" in debias["test_6"]
    assert "drift is large, 100.0 times the bias there was" in debias["headline"]
    assert debias["against"] == "drift is large"


def test_drift_has_three_sizes(tmp_path: Path) -> None:
    for drift, size in ((0.5, "small"), (0.8, "moderate"), (2.5, "large")):
        folder = tmp_path / size
        control = [measured(1.4, 0.3, 19.0, 1.0)]
        leave_run(folder, HeadMovement(), measured(1.0, 0.3, 9.0, drift), control)
        headline = conclusions(load_results(folder))["headline"][0]
        assert f"drift is {size}, {drift:.2f} times that of the random controls" in headline


def test_the_map_counts_how_often_each_head_was_closed(results: Path) -> None:
    frame = load_results(results)
    often, count = closing_map(results, frame[frame["experiment"] == "HeadMovement"])
    assert count == 3 and list(often) == ["value"]
    third = 1 / 3
    assert often["value"] == pytest.approx(np.array([[0, 1, 0, 0], [third, third, third, 0]]))
    blocks, _ = closing_map(results, frame[frame["experiment"] == "BlockMovement"])
    assert {part: each.sum() for part, each in blocks.items()} == {"query": 1, "ffn": 0}
    none, count = closing_map(results, frame[frame["experiment"] == "DebiasOnly"])
    assert (none, count) == ({}, 0)
    drawn = draw_closing(results, frame)
    assert list(drawn) == ["heads (value), last/token", "blocks 32 + FFN, last/token"]
    plt.close("all")


def test_figures_show_what_the_frames_hold(results: Path) -> None:
    figure = seat_figure(load_results(results))
    assert [ax.get_title() for ax in figure.axes] == ["builtin-6", "builtin-7"]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "heads (value), last/token" and len(labels) == 3
    points = [list(line.get_xdata()) for line in figure.axes[0].lines]
    for expected in ([1.4, 0.9], [1.35]):  # a line from before to after, and a control
        assert any(len(p) == len(expected) and p == pytest.approx(expected) for p in points)
    histories = load_histories(results)
    path, bias, _ = training_figure(histories).axes
    assert len(bias.lines) == 7  # one per run
    ends = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in path.lines
        if len(line.get_xdata()) == 1
    }
    assert {(0.0, 20.0), (1.0, 10.0), (20.0, 19.0), (500.0, 1.0)} <= ends
    plt.close("all")


def test_masks_of_torch_are_drawn_layer_by_layer() -> None:
    torch = pytest.importorskip("torch")
    closed = {"1/value": torch.tensor([[True], [False]]), "0/value": torch.zeros(2, 1, dtype=bool)}
    figure = draw_heads(closed | {"1/ffn": torch.ones(8, 1, dtype=bool)})
    assert figure.axes[0].images[0].get_array().tolist() == [[0, 0], [1, 0]]
    assert figure.axes[0].get_title() == "value\n1 of 4 closed"
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0, 1]
    blocks = draw_blocks({"0/query": torch.tensor([[True, False], [True, True]])})
    assert [text.get_text() for text in blocks.axes[0].texts] == ["25.0%"]
    plt.close("all")


def test_published_numbers_carry_their_model_and_source(results: Path) -> None:
    numbers = PUBLISHED
    assert (numbers[["source", "model", "note"]] != "").all(axis=None)
    kept = numbers[numbers["quantity"] == "value heads kept, of 12"]
    assert kept["value"].sum() == 47 and len(kept) == 12
    density = numbers[numbers["quantity"] == "density"].set_index(["configuration", "where"])
    assert density.loc[("blocks 32 + FFN, last/sentence", "layer 0"), "value"] == 0.791667
    table = published_table(load_results(results))
    ours = table["measured by"] == "this report"
    assert set(table.loc[~ours, "model"]) == {"bert-base-uncased", "BERT"}
    assert set(table.loc[ours, "model"]) == {"tiny"}
    assert table.loc[ours, "heads kept"].tolist()[0] == "6 of 8 value heads"
    debiased = table[table["configuration"] == "Context-Debias, all/token"].iloc[0]
    assert (debiased["SEAT-6"], debiased["SEAT-7"]) == ("0.41", "-0.22")


def files_of(folder: Path) -> dict[str, bytes]:
    """The report's files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*"))}


def test_the_same_results_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    text = write_report(results, tmp_path / "one")
    again = write_report(results, tmp_path / "two")
    assert text == again.replace("two", "one")
    code = "import sys; from pruning_bias.reports import write_report; write_report(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(results), str(tmp_path / "three")]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7", "MPLBACKEND": "agg"})
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two == three
    assert set(one) == {
        *(f"tables/{name}.md" for name in ("movement", "verdicts", "published", "tests", "heads")),
        *(f"tables/{name}.csv" for name in ("movement", "verdicts", "published")),
        *(
            f"figures/{name}.{ending}"
            for name in (
                "effect_sizes",
                "training",
                "densities",
                "closed_heads-value-last-token",
                "closed_blocks-32-FFN-last-token",
            )
            for ending in ("png", "svg")
        ),
    }


def test_what_is_missing_is_not_printed_and_120_columns_suffice(
    results: Path, tmp_path: Path
) -> None:
    long = HeadMovement(heads="separate", layer="intermediate", mode="sentence", mlp=True)
    leave_run(results, long, measured(-0.012, math.nan, 12345.678, 0.000123))
    text = write_report(results, tmp_path / "out")
    files = files_of(tmp_path / "out").items()
    tables = {name: data.decode() for name, data in files if "tables" in name}
    table = text.split("tables:")[0]
    for told in (table, *tables.values()):
        assert "nan" not in told.lower()
    assert max(map(len, table.splitlines())) <= 120
    assert "-0.01" in table and "-0.01" in tables["tables/variants.md"]
    full = pd.read_csv(tmp_path / "out" / "tables" / "movement.csv")
    assert full["mean"].notna().all() and (full["sd"].isna() == (full["n"] == 1)).all()


def test_the_text_ends_with_the_places_and_stands_on_its_own(results: Path, tmp_path: Path) -> None:
    text = write_report(results, tmp_path)
    assert "heads (value), last/token    3    0.90 ± 0.10 (1.35)" in text
    assert text.splitlines()[-3:] == [
        f"tables:    {tmp_path / 'tables'}",
        f"figures:   {tmp_path / 'figures'}",
        f"runs:      {results}",
    ]


def test_what_is_gained_and_what_it_costs_are_parts_where_there_are_such_runs(
    results: Path,
) -> None:
    assert not {"gains", "tasks", "audit", "seeds"} & set(parts(results, load_results(results)))
    for seed in range(2):
        start = leave_run(
            results, DebiasOnly(seed=10 + seed, keep_weights=True), measured(0.7, 0.1, 1, 1)
        )
        for encoder, score in (("tiny", 0.8), (f"run:DebiasOnly/{start.name}", 0.7)):
            run = FineTuning(encoder=encoder, seed=10 + seed, task="RTE")
            leave_task(results, run, score + 0.01 * seed)
    tasks = parts(results, load_results(results))["tasks"]
    table = tasks.tables["Debiased, then fine-tuned"]
    assert table["RTE"].tolist() == ["50.0", "80.5 ± 0.7", "70.5 ± 0.7"]
    assert table["mean |d| before"].tolist() == ["", "0.85", "0.40"]
    assert "score RTE -10.0 (2 of 2 seeds)" in tasks.words[0]
    assert list(tasks.figures) == ["trade"]
    plt.close("all")


def test_where_everything_is_closed_no_effect_size_is_left(results: Path) -> None:
    nothing = {f"{layer}/value": np.zeros((4, 1), bool) for layer in range(2)}
    for seed in range(3):
        run = HeadMovement(seed=seed, layer="first")
        leave_run(results, run, measured(0.0, 0.0, 0.0, 70.0), (), nothing)
    runs = movement_runs(load_results(results))
    row = main_table(runs).set_index("configuration").loc["heads (value), first/token"]
    assert (row["builtin-6"], row["open"], row["drift"]) == ("", "0.000", "70.0")
    assert "Everything is closed by heads (value), first/token" in " ".join(findings(runs))


def test_without_runs_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_report(tmp_path, out) == f"There are no finished runs in {tmp_path}."
    assert not out.exists()


def test_comparison_finds_the_largest_difference(results: Path, tmp_path: Path) -> None:
    here = load_results(results)
    assert "the same as the reference to the last digit" in agreement(compare(here, here))
    moved = (here["metric"] == "drift") & (here["state"] == "after")
    there = here.assign(value=here["value"] + 0.25 * moved)
    found = compare(here, there).set_index("metric")
    assert found.loc["drift", "largest"] == 0.25 and found.loc["effect_size", "largest"] == 0
    assert found["runs"].max() == 7
    assert "drift by up to 0.2" in agreement(compare(here, there))
    fewer = there[~((there["digest"] == there["digest"][0]) & (there["metric"] == "bias"))]
    assert "in one of the two only" in agreement(compare(here, fewer))
    nothing = compare(here, load_results(tmp_path / "nowhere"))
    assert agreement(nothing).startswith("No run is in both folders")


def test_importing_reports_does_not_import_torch() -> None:
    code = "import sys, pruning_bias.reports; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_report_notebook_shows_the_folder_it_is_given(results: Path, tmp_path: Path) -> None:
    import papermill

    notebook = Path(__file__).parents[1] / "nbs" / "reports" / "movement.ipynb"
    assert list(papermill.inspect_notebook(notebook)) == ["results"]
    done = papermill.execute_notebook(
        notebook,
        tmp_path / "movement.ipynb",
        {"results": str(results)},
        kernel_name="python3",
        progress_bar=False,
    )
    shown = json.dumps([cell.get("outputs", []) for cell in done.cells], ensure_ascii=False)
    assert "0.90 ± 0.10 (1.35) ↓" in shown and "47 of 144 value heads" in shown
    assert "drift is large: blocks 32 + FFN, last/token; debias only, last/token." in shown
    assert shown.count('"image/png"') == 5 and "no runs yet" not in shown
    assert str(results) not in shown
