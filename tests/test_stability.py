"""Masks of several runs: how alike they are, whether chance explains it, and what closing does."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy import stats
from sklearn.metrics import jaccard_score
from statsmodels.stats import inter_rater
from statsmodels.stats.multitest import multipletests

from pruning_bias import stability
from pruning_bias.anatomy import load_encoder
from pruning_bias.files import save
from pruning_bias.gates import FixedGate
from pruning_bias.interventions import (
    draw_interventions,
    intervention_table,
    interventions,
    tell_interventions,
)
from pruning_bias.masks import (
    closed_groups,
    common,
    correlation,
    fleiss_kappa,
    jaccard,
    mean_jaccard,
    mean_of_pairs,
    often_closed,
    overlap,
    read_keep,
    value_heads,
)
from pruning_bias.parameters import Run, digest, parameters
from pruning_bias.plans import block_plan, head_output_plan, head_plan
from pruning_bias.recurrence import (
    agreement_matrix,
    agreement_table,
    agreements,
    draw_agreement,
    masks_of,
    tell_agreement,
    tell_matrix,
)
from pruning_bias.runs import HeadMovement, OftenClosed
from pruning_bias.settings import project_root
from pruning_bias.stability import agreement, between, common_by_chance, layer_excess
from pruning_bias.subnetworks import attach_

matplotlib.use("Agg")
MASKS = st.builds(
    lambda seed, runs, share: np.random.default_rng(seed).random((runs, 4, 9)) < share,
    st.integers(0, 2**16),
    st.integers(2, 5),
    st.sampled_from([0.1, 0.4, 0.8]),
)
few = settings(max_examples=15, derandomize=True, deadline=None)


def independent(seed: int, runs: int = 3, share: float = 0.3) -> np.ndarray:
    """Masks that have nothing to do with each other, of different sizes."""
    return np.random.default_rng(seed).random((runs, 6, 12)) < share


def ties_at_random(seed: int) -> Any:
    """The mean index of Jaccard with a trifle added, so that p-values have no ties."""
    rng = np.random.default_rng(seed)
    return lambda both, groups: mean_jaccard(both, groups) + 1e-6 * rng.random(both.shape[:-2])


# How alike masks are


def test_identical_masks_agree_wholly() -> None:
    mask = np.random.default_rng(0).random((1, 4, 9)) < 0.3
    both = common(np.repeat(mask, 4, axis=0))
    for matrix in (jaccard(both), overlap(both), correlation(both, 36)):
        assert np.allclose(matrix, 1)
    assert mean_jaccard(both, 36) == fleiss_kappa(both, 36) == 1


def test_nothing_closed_is_agreement_that_chance_explains() -> None:
    none = np.zeros((3, 4, 9), bool)
    assert agreement(none, draws=50).p_value == 1
    assert agreement(none, fleiss_kappa, draws=50).p_value == 1
    assert not between([{"value": none}, {"value": ~none}], draws=20)[0].any()


@few
@given(MASKS)
def test_measures_are_those_of_the_libraries(closed: np.ndarray) -> None:
    flat = closed.reshape(len(closed), -1)
    both, groups = common(closed), flat.shape[1]
    table, _ = inter_rater.aggregate_raters(flat.T.astype(int))
    if flat.any() and not flat.all():
        assert np.isclose(fleiss_kappa(both, groups), inter_rater.fleiss_kappa(table))
    for i, j in ((0, 1), (1, 0)):
        expected = jaccard_score(flat[i], flat[j], zero_division=1.0)
        assert np.isclose(jaccard(both)[i, j], expected)
        if 0 < flat[i].sum() < groups and 0 < flat[j].sum() < groups:
            assert np.isclose(correlation(both, groups)[i, j], np.corrcoef(flat[i], flat[j])[0, 1])


def test_kappa_and_jaccard_of_the_lottery_authors_masks(shared_data: Path) -> None:
    reference = shared_data.parent / "reference" / "lottery" / "across_seed_statistics.json"
    if not reference.is_file():
        pytest.skip(f"no {reference.name} beside the data folder")
    known = json.loads(reference.read_text())["heads_mlps"]
    for task in ("CoLA", "MNLI", "QQP"):
        files = (shared_data / "lottery_masks" / "heads_mlps" / task).glob("*/head_mask.npy")
        kept = np.stack([np.load(file) == 1 for file in sorted(files)])
        assert np.isclose(fleiss_kappa(common(kept), 144), known[task]["heads"]["fleiss_kappa"])
        mean = mean_jaccard(common(kept), 144)
        assert np.isclose(mean, known[task]["heads"]["mean_pairwise_jaccard"])


# Masks of runs


def test_masks_of_runs_stand_in_the_order_of_layers() -> None:
    rng = np.random.default_rng(0)
    runs = [{f"{i}/value": rng.random((3, 1)) < 0.5 for i in (10, 2, *range(2), *range(3, 10))}]
    closed = closed_groups(runs * 2)["value"]
    assert closed.shape == (2, 11, 3)
    assert all((closed[0, i] == ~runs[0][f"{i}/value"][:, 0]).all() for i in range(11))
    assert closed_groups([]) == {}


def test_masks_of_different_plans_are_refused() -> None:
    one, other = {"0/value": [[True]]}, {"0/value": [[True], [False]]}
    with pytest.raises(ValueError, match="run 1 has other gates than run 0 \\('0/value'\\)"):
        closed_groups([one, other])
    with pytest.raises(ValueError, match=r"'value' lacks layers: it has \[1\]"):
        closed_groups([{"1/value": [[True]]}])
    with pytest.raises(ValueError, match="at least 2 runs, came 1"):
        agreement(independent(0, runs=1))
    with pytest.raises(ValueError, match="the same parts"):
        between([{"value": independent(0)}, {"value": independent(0)[:, :3]}])


def test_a_saved_subnetwork_is_read_without_its_model(tmp_path: Path) -> None:
    found = load_encoder("tiny")
    plan = head_plan(found.model, ("query", "key", "value"), tied=True)
    plan |= head_output_plan(found.model)
    heads = found.model.config.num_attention_heads
    keep = {name: torch.arange(heads) != i % heads for i, name in enumerate(plan)}
    gates = attach_(found.model, plan, lambda name, shape: FixedGate(keep[name].reshape(shape)))
    file = save(gates, tmp_path / "masks.safetensors")
    gates.detach_()
    masks = read_keep(file)
    assert masks.keys() == plan.keys()
    values = value_heads(masks)
    assert values.keys() == head_plan(found.model).keys()
    assert all((values[f"{i}/value"] == masks[f"{i}/heads"]).all() for i in range(2))
    assert value_heads({"0/value": np.ones((3, 3), bool), "0/ffn": np.ones((9, 1), bool)}) == {}


def test_two_of_three_is_a_share_of_0_67() -> None:
    for runs, least in ((3, 2), (4, 3), (5, 4), (6, 4), (10, 7)):
        closed = np.tri(runs + 1, runs, -1, dtype=bool).T[:, None]  # group i is closed i times
        assert often_closed(closed, 0.67)[0].tolist() == [i >= least for i in range(runs + 1)]


# What chance gives


@few
@given(MASKS, st.sampled_from(["part", "layer"]))
def test_chance_keeps_the_sizes(closed: np.ndarray, within: str) -> None:
    drawn = common_by_chance(closed, 20, np.random.default_rng(0), within)
    assert (np.diagonal(drawn, axis1=1, axis2=2) == closed.sum((1, 2))).all()
    assert (drawn == drawn.swapaxes(1, 2)).all()
    assert (drawn <= np.minimum(drawn[:, [0], [0]], closed.sum((1, 2)))[:, None])[:, :, 0].all()


def test_two_runs_share_as_many_as_the_hypergeometric_distribution_says() -> None:
    closed = np.zeros((2, 6, 12), bool)
    closed[0].flat[:20], closed[1].flat[:25] = True, True
    shared = common_by_chance(closed, 20_000, np.random.default_rng(0))[:, 0, 1]
    expected = 20_000 * stats.hypergeom.pmf(np.arange(21), 72, 20, 25)
    seen, likely = np.bincount(shared, minlength=21), expected > 5
    assert (
        stats.chisquare(
            [*seen[likely], seen[~likely].sum()], [*expected[likely], expected[~likely].sum()]
        ).pvalue
        > 0.001
    )


def test_counting_patterns_is_shuffling_masks() -> None:
    sizes, draws = np.array([5, 9, 20, 14]), 4000
    ways = (stability._by_patterns, stability._by_shuffling)
    drawn = [way(sizes, 30, draws, np.random.default_rng(i)) for i, way in enumerate(ways)]
    for statistic in (mean_jaccard, fleiss_kappa):
        assert stats.ks_2samp(*(statistic(each, 30) for each in drawn)).pvalue > 0.01
    pairs = [each[:, *np.triu_indices(4, 1)] for each in drawn]
    assert np.allclose(*(each.mean(0) for each in pairs), atol=0.1)
    assert np.allclose(*(np.corrcoef(each.T) for each in pairs), atol=0.08)


@pytest.mark.parametrize("within", ["part", "layer"])
def test_p_values_of_independent_masks_are_uniform(within: str) -> None:
    p = [agreement(independent(i), ties_at_random(i), 99, i, within).p_value for i in range(300)]
    assert stats.kstest(np.array(p) - 0.005, "uniform").pvalue > 0.01
    ranks = np.bincount(np.rint(np.array(p) * 10 + 0.4).astype(int), minlength=11)[1:]
    assert stats.chisquare(ranks).pvalue > 0.01


def test_with_ties_small_p_values_are_no_more_frequent() -> None:
    p = np.array([agreement(independent(i, 2, 0.1), draws=99, seed=i).p_value for i in range(500)])
    for level in (0.05, 0.2, 0.5):
        assert stats.binomtest(int((p <= level).sum()), 500, level, "greater").pvalue > 0.01


@few
@given(MASKS, st.randoms(use_true_random=False))
def test_the_order_of_runs_and_groups_does_not_matter(closed: np.ndarray, random: Any) -> None:
    runs, groups = list(range(len(closed))), list(range(36))
    random.shuffle(runs)
    random.shuffle(groups)
    moved = closed.reshape(len(closed), -1)[:, groups].reshape(closed.shape)[runs]
    for statistic in (mean_jaccard, fleiss_kappa):
        assert np.isclose(statistic(common(closed), 36), statistic(common(moved), 36))
    one, other = agreement(closed, draws=2000), agreement(moved, draws=2000)
    assert abs(one.p_value - other.p_value) < 0.05


def test_planted_agreement_is_found_and_kappa_agrees() -> None:
    truth = independent(1, runs=1, share=0.2)
    noisy = truth ^ independent(2, share=0.1)
    for statistic in (mean_jaccard, fleiss_kappa):
        found = agreement(noisy, statistic)
        assert found.p_value == 1 / 10_001 and found.z > 5 and found.low < found.mean < found.high
    assert abs(agreement(noisy, fleiss_kappa).mean) < 0.01


def test_agreement_on_layers_is_not_agreement_on_heads() -> None:
    rates = np.array([0.05, 0.05, 0.05, 0.05, 0.3, 0.7])[:, None]
    p = [[], []]
    for seed in range(20):
        closed = np.random.default_rng(seed).random((3, 6, 12)) < rates
        p[0].append(agreement(closed, draws=200, seed=seed).p_value)
        p[1].append(agreement(closed, draws=200, seed=seed, within="layer").p_value)
    assert np.mean(np.array(p[0]) < 0.05) > 0.9
    assert np.mean(np.array(p[1]) < 0.05) < 0.25


def test_p_values_of_layers_are_those_of_many_draws() -> None:
    closed = independent(5)
    closed[:, 3] |= independent(6, share=0.4)[:, 3]
    excess, rng = layer_excess(closed), np.random.default_rng(0)
    flat = np.repeat(closed.reshape(1, 3, 72), 20_000, axis=0)
    drawn = rng.permuted(flat, axis=-1).reshape(-1, 3, 6, 12).sum((1, 3))
    often = (drawn >= closed.sum((0, 2))).mean(0)
    assert np.allclose(excess["p_value"], often, atol=0.015)
    assert np.isclose(excess["closed"].sum(), excess["expected"].sum())
    assert np.allclose(excess["p_holm"], multipletests(excess["p_value"], method="holm")[1])


# Agreement between configurations


def test_configurations_are_compared_in_any_order() -> None:
    truth = independent(1, runs=1, share=0.2)
    masks = [truth ^ independent(i, runs=i, share=0.1) for i in (1, 2, 3)] + [independent(9)]
    value, p = between([{"value": each} for each in masks], draws=2000)
    back, p_back = between([{"value": each} for each in masks[::-1]], draws=2000)
    assert np.allclose(value, value.T, equal_nan=True) and np.isnan(np.diagonal(p)).all()
    assert np.isnan(value[0, 0]) and np.isclose(
        value[2, 2], mean_of_pairs(correlation(common(masks[2]), 72))
    )
    assert np.allclose(value, back[::-1, ::-1], equal_nan=True)
    assert np.allclose(p, p_back[::-1, ::-1], atol=0.05, equal_nan=True)
    assert (p[:3, :3][~np.eye(3, dtype=bool)] < 0.01).all()


def test_seeds_that_are_alike_do_not_make_configurations_agree() -> None:
    """Each configuration has three equal masks; shuffling them apart would find agreement."""
    p = []
    for seed in range(300):
        one, other = independent(seed, runs=2)[:, None]
        pair = [{"value": np.repeat(each, 3, axis=0)} for each in (one, other)]
        p.append(between(pair, draws=99, seed=seed)[1][0, 1])
    for level in (0.05, 0.2, 0.5):
        count = int((np.array(p) <= level).sum())
        assert stats.binomtest(count, 300, level, "greater").pvalue > 0.01
        assert stats.binomtest(count, 300, 0.6 * level, "less").pvalue > 0.01


def test_parts_are_shuffled_each_by_itself() -> None:
    """Closing one part and not another is no agreement: chance keeps the number in each."""
    rng = np.random.default_rng(0)
    pair = [
        {"key": np.zeros((2, 6, 12), bool), "value": rng.random((2, 6, 12)) < 0.6} for _ in "ab"
    ]
    value, p = between(pair, draws=500)
    assert value[0, 1] > 0.2 and p[0, 1] > 0.01


# Tables, words and figures


def leave_masks(root: Path, run: Run, keep: dict[str, np.ndarray]) -> dict[str, Any]:
    """The masks of a finished run, and what load_results says of it."""
    folder = root / type(run).__name__ / digest(run)
    folder.mkdir(parents=True)
    save_file({f"{name}.keep": mask for name, mask in keep.items()}, folder / "masks.safetensors")
    (folder / "done.json").write_text("{}")
    return {"experiment": type(run).__name__, "digest": digest(run), **parameters(run)}


def heads(mask: np.ndarray, part: str = "value") -> dict[str, np.ndarray]:
    """A mask [L, H] of closed heads, as a run leaves it."""
    return {f"{layer}/{part}": ~closed[:, None] for layer, closed in enumerate(mask)}


def test_agreement_of_seeds_in_table_and_words(tmp_path: Path) -> None:
    truth, noise = independent(1, runs=1, share=0.2)[0], independent(2, share=0.05)
    rows = [leave_masks(tmp_path, HeadMovement(seed=i), heads(truth ^ noise[i])) for i in range(3)]
    other = independent(7)
    rows += [
        leave_masks(tmp_path, HeadMovement(seed=i, layer="all"), heads(other[i])) for i in range(3)
    ]
    rows += [leave_masks(tmp_path, HeadMovement(layer="first"), heads(truth))]
    frame = pd.DataFrame(
        [row | {"metric": "closed", "state": "after", "value": 1.0} for row in rows]
    )
    every = agreements(tmp_path, frame, draws=2000)
    found = every.set_index("configuration")
    same, apart = found.loc["heads (value), last/token"], found.loc["heads (value), all/token"]
    assert len(found) == 2 and len(masks_of(tmp_path, frame)) == 3
    assert np.isclose(same["jaccard"], mean_jaccard(common(truth ^ noise), 72))
    assert same["p_value_holm"] < 0.01 < 0.05 < apart["p_value_holm"]
    assert same["closed"] == (truth ^ noise).sum() / 3 and same["groups"] == 72
    told = {text.split(",")[1]: text for text in tell_agreement(every)}
    assert "the seeds agree on the value heads themselves" in told[" last/token"]
    assert "no more than chance allows" in told[" all/token"]
    table = agreement_table(every)
    assert table["part"].tolist() == ["value heads"] * 2 and set(table["n"]) == {"3"}


def test_tied_heads_and_value_heads_are_compared_blocks_are_not(tmp_path: Path) -> None:
    truth = independent(1, runs=1, share=0.2)[0]
    runs = [HeadMovement(seed=0), HeadMovement(seed=0, heads="tied")]
    rows = [
        leave_masks(tmp_path, run, heads(truth, part))
        for run, part in zip(runs, ("value", "heads"), strict=True)
    ]
    matrix = agreement_matrix(tmp_path, pd.DataFrame(rows), draws=500)
    pair = matrix[matrix["one"] != matrix["other"]]
    assert len(matrix) == 3 and pair["p_holm"].item() < 0.01
    assert np.isclose(pair["correlation"].item(), 1)
    assert tell_matrix(matrix)[0].startswith("72 value heads in 6 layers: 1 of 1 pairs")
    assert draw_agreement(matrix).keys() == {"72 value heads in 6 layers"}


def test_nothing_gives_nothing(tmp_path: Path) -> None:
    one = pd.DataFrame(
        [{"experiment": "HeadMovement", "digest": "0" * 12, **parameters(HeadMovement())}]
    )
    for frame in (pd.DataFrame(), one):
        assert masks_of(tmp_path, frame) == {}
        assert agreements(tmp_path, frame).empty and agreement_matrix(tmp_path, frame).empty
        assert interventions(frame).empty and draw_interventions(frame) == {}
    nothing = pd.DataFrame()
    assert agreement_table(nothing).empty and intervention_table(nothing).empty
    assert tell_agreement(nothing) == tell_matrix(nothing) == tell_interventions(nothing) == []
    assert draw_agreement(nothing) == {}


# Closing the often-closed heads


def intervention(run: OftenClosed, after: float, closed: int = 5) -> pd.DataFrame:
    """What load_results gives of a run whose random sets bring |d| to 0.01, 0.02, ..."""
    values = {"before": [1.5], "after": [after]}
    values["random"] = [(-1) ** i * (i + 1) / 100 for i in range(run.draws)]
    rows = [
        {"state": state, "draw": i, "metric": "effect_size", "test": test, "value": value}
        for state, each in values.items()
        for i, value in enumerate(each)
        for test in ("builtin-6", "builtin-7")
    ]
    counts = {"closed": closed, "groups": 72}
    rows += [{"state": "after", "draw": 0, "metric": k, "value": v} for k, v in counts.items()]
    about = {"experiment": "OftenClosed", "digest": digest(run), **parameters(run)}
    return pd.DataFrame([about | row for row in rows])


def test_where_the_often_closed_heads_fall_among_random_ones() -> None:
    found = interventions(intervention(OftenClosed(draws=100), after=-0.1)).set_index("test")
    assert found["as_low"].tolist() == [0.1] * 3 and found["before"].tolist() == [1.5] * 3
    assert np.allclose(found["p_value"], 11 / 101) and np.allclose(found["p_high"], 92 / 101)
    assert np.allclose(found.loc["builtin-6", "p_value_holm"], 22 / 101)
    mean = found.loc["builtin, mean size"]
    assert mean["after"] == 0.1 and np.isclose(mean["random"], 0.505)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (0.001, "they carry more of the measured bias"),
        (0.5, "they are no better to close than random heads"),
        (1.8, "they raise the measured bias when closed"),
    ],
)
def test_the_words_follow_from_the_numbers(after: float, told: str) -> None:
    frame = intervention(OftenClosed(draws=100), after)
    assert told in tell_interventions(interventions(frame))[0]
    assert len(intervention_table(interventions(frame))) == 3
    few = tell_interventions(interventions(intervention(OftenClosed(draws=5), after)))[0]
    assert "random sets are too few" in few
    none = tell_interventions(interventions(intervention(OftenClosed(), after, closed=0)))[0]
    assert none == "random masks agree on no head, so there is nothing to close."


def test_a_run_is_named_after_its_sources(tmp_path: Path) -> None:
    sources = [HeadMovement(seed=i) for i in range(3)]
    about = [leave_masks(tmp_path, run, heads(independent(1)[0])) for run in sources]
    names = " ".join(f"HeadMovement/{digest(run)}" for run in sources)
    run = OftenClosed(sources=names, match="layers")
    frame = pd.concat([pd.DataFrame(about), intervention(run, 0.1)], ignore_index=True)
    expected = "3 runs of heads (value), last/token, random heads in the same layers"
    assert interventions(frame)["run"].unique().tolist() == [expected]
    assert draw_interventions(frame).keys() == {expected}


def often_closed_notebook(run: OftenClosed) -> dict[str, Any]:
    """The names the notebook ends with."""
    notebook = nbformat.read(project_root() / "nbs" / "experiments" / "often_closed.ipynb", 4)
    names: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "often_closed", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters(run))
    return names


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three finished runs on the tiny encoder that agree on two of eight heads, one of blocks."""
    folder = tmp_path / "OftenClosed" / "0"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PRUNING_BIAS_RUN_FOLDER", str(folder))
    model = load_encoder("tiny").model
    plans = [head_plan(model)] * 2 + [head_plan(model, tied=True), block_plan(model, 16)]
    for number, plan in enumerate(plans):
        closed = {"0/value": 3, "1/value": number, "0/heads": 3, "1/heads": 0}
        gates = attach_(
            model,
            plan,
            lambda name, shape, closed=closed: FixedGate(
                (torch.arange(shape[0]) != closed.get(name, -1))[:, None].expand(shape)
            ),
        )
        run = tmp_path / "HeadMovement" / f"run{number}"
        run.mkdir(parents=True)
        save(gates, run / "masks.safetensors")
        (run / "done.json").write_text("{}")
        gates.detach_()
    return "HeadMovement/run0 HeadMovement/run1 HeadMovement/run2"


@pytest.mark.parametrize("match", ["size", "layers"])
def test_exactly_the_often_closed_heads_are_closed(sources: str, match: str) -> None:
    names = often_closed_notebook(OftenClosed(sources=sources, match=match, draws=2))
    assert [k[:, 0].tolist() for k in names["keep"].values()] == [
        [True, True, True, False],
        [False, True, True, True],
    ]
    left = names["folder"]
    assert read_keep(left / "masks.safetensors").keys() == names["keep"].keys()
    assert not (left / "history.csv").exists()
    rows = pd.DataFrame(json.loads((left / "metrics.json").read_text()))
    counts = rows.set_index("metric")["value"]
    assert (counts["closed"], counts["groups"], counts["density"]) == (2, 8, 0.75)
    assert rows.groupby("state")["draw"].nunique().to_dict() == {
        "before": 1,
        "after": 1,
        "random": 2,
    }
    drawn = [names["heads_at_random"]() for _ in range(20)]
    per_layer = {tuple(int((~k).sum()) for k in keep.values()) for keep in drawn}
    assert per_layer == ({(1, 1)} if match == "layers" else per_layer)
    assert {sum(each) for each in per_layer} == {2}
    found = interventions(
        rows.assign(experiment="OftenClosed", digest="0", **parameters(OftenClosed()))
    )
    beats = rows[rows["metric"] == "beats"].set_index("test")
    found = found.set_index("test").loc[beats.index]
    assert np.allclose(1 - found["as_low"], beats["value"])
    assert np.allclose(found["p_value"], beats["p_value"])


def test_closing_no_head_is_the_dense_encoder(sources: str) -> None:
    names = often_closed_notebook(OftenClosed(sources=sources, share=1.5, draws=1))
    sizes = {
        state: [
            row["value"] for row in names["metrics"] if row["state"] == state and "p_value" in row
        ]
        for state in ("before", "after")
    }
    assert sizes["before"] == sizes["after"][: len(sizes["before"])]


def test_sources_that_are_not_there_or_closed_blocks_are_refused(sources: str) -> None:
    with pytest.raises(ValueError, match="no finished run HeadMovement/nowhere"):
        often_closed_notebook(OftenClosed(sources="HeadMovement/nowhere"))
    with pytest.raises(ValueError, match="run3 closed no whole heads"):
        often_closed_notebook(OftenClosed(sources="HeadMovement/run3"))
