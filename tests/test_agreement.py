"""Statistics over seeds: by definition, by the libraries, and on the lottery authors' masks."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pruning_bias.agreement import (
    across_seeds,
    against_chance,
    bootstrap,
    cochran,
    krippendorff_alpha,
    leave_one_out,
    pairs_alike,
    task_overlap,
)
from pruning_bias.lottery_audit import lottery_audit
from pruning_bias.masks import closed_groups, common, fleiss_kappa, jaccard, mean_jaccard
from pruning_bias.plans import random_like
from pruning_bias.stability import agreement
from pruning_bias.tickets import bad_like, read_masks, write_masks

SEEDS = (1337, 166, 42, 71, 86)
TASKS = ("CoLA", "MNLI", "MRPC", "QQP", "SST-2")
PARTS = {"heads": "value", "mlps": "mlp"}


def seeds(seed: int, runs: int = 5, groups: int = 144, alike: bool = True) -> np.ndarray:
    """Seeds of different sizes that keep some groups more readily, or any."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(1.5, 1.2, groups) if alike else np.full(groups, 0.55)
    return rng.random((runs, groups)) < np.clip(rates + rng.normal(0, 0.12, (runs, 1)), 0, 1)


def published(folder: Path, task: str, part: str, kind: str = "heads_mlps") -> np.ndarray:
    """What the five seeds of a task keep, bool [5, 12, G]."""
    place = folder / "lottery_masks" / kind / task
    if not place.is_dir():
        pytest.skip(f"no masks of the lottery paper in {folder}")
    return ~closed_groups([read_masks(place / f"seed_{seed}") for seed in SEEDS])[PARTS[part]]


# Definitions


def alpha_by_definition(kept: np.ndarray) -> float:
    """Krippendorff (2011): coincidences of the values within units, of nominal data."""
    coincidences = np.zeros((2, 2))
    for values in kept.T.astype(int):
        for i, j in itertools.permutations(range(len(values)), 2):
            coincidences[values[i], values[j]] += 1 / (len(values) - 1)
    n = coincidences.sum(0)
    return 1 - (n.sum() - 1) * coincidences[0, 1] / (n[0] * n[1])


def test_alpha_is_that_of_the_definition() -> None:
    for seed in range(6):
        kept = seeds(seed, runs=2 + seed % 4, groups=12 + seed)
        found = krippendorff_alpha(common(kept), kept.shape[1])
        assert np.isclose(found, alpha_by_definition(kept))
    same = np.ones((3, 9), bool)
    assert np.isnan(krippendorff_alpha(common(same), 9))


def test_cochrans_q_is_that_of_the_definition() -> None:
    for seed in range(6):
        kept = seeds(seed, runs=2 + seed % 4).astype(int)
        k, columns, rows = len(kept), kept.sum(1), kept.sum(0)
        upper = (k - 1) * (k * (columns**2).sum() - columns.sum() ** 2)
        q = upper / (k * columns.sum() - (rows**2).sum())
        found = cochran(kept == 1)
        assert np.isclose(found.q, q) and found.df == k - 1
        assert np.isclose(found.p_value, stats.chi2.sf(q, k - 1))


def test_cochrans_q_sees_sizes_and_nothing_else() -> None:
    apart = np.eye(3, dtype=bool).repeat(12, axis=1)
    assert not jaccard(common(apart))[0, 1]
    assert cochran(apart)[::2] == (0, 1) and pairs_alike(apart) == 3
    nearly = np.repeat(seeds(0, runs=1), 2, axis=0)
    nearly[1] |= np.arange(144) < 40
    assert jaccard(common(nearly))[0, 1] > 0.8 and cochran(nearly).p_value < 0.001
    same = np.repeat(nearly[:1], 2, axis=0)
    assert np.isnan(cochran(same).p_value) and pairs_alike(same) == 0


def test_what_two_masks_share_by_chance_is_hypergeometric() -> None:
    kept = seeds(1, runs=2)
    ratio, p = against_chance(common(kept), 144)
    rng = np.random.default_rng(0)
    drawn = (rng.permuted(np.repeat(kept[:1], 20_000, axis=0), axis=1) & kept[1]).sum(1)
    shared = (kept[0] & kept[1]).sum()
    assert np.isclose(shared / drawn.mean(), ratio[0, 1], rtol=0.01)
    assert np.isclose((drawn >= shared).mean(), p[0, 1], atol=0.01)
    assert np.isnan(np.diagonal(ratio)).all() and np.isnan(np.diagonal(p)).all()
    assert np.isnan(against_chance(common(np.zeros((2, 9), bool)), 9)[0]).all()


# Intervals


def test_leaving_one_out_covers_the_agreement_of_many_seeds() -> None:
    many = seeds(7, runs=1200)
    truth = fleiss_kappa(common(many), 144)
    covers, lifted = [], []
    rng = np.random.default_rng(0)
    for each in many.reshape(240, 5, 144):
        low, high = leave_one_out(each)
        covers.append(low <= truth <= high)
        i = rng.integers(5, size=5)
        lifted.append(fleiss_kappa(common(each[i]), 144))
    assert np.mean(covers) > 0.9
    assert np.nanmean(lifted) > truth + 0.05  # why seeds are not drawn with replacement
    assert np.isnan(leave_one_out(many[:2])).all()


def test_the_bootstrap_of_means_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).random((8, 3))
    low, high = bootstrap(values, draws=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert np.allclose(low, theirs.confidence_interval.low, atol=0.01)
    assert np.allclose(high, theirs.confidence_interval.high, atol=0.01)
    assert bootstrap(np.full(5, 3.0), draws=50) == (3.0, 3.0)


def test_agreement_is_told_from_chance() -> None:
    table = across_seeds({"alike": seeds(3), "any": seeds(4, alike=False)}, draws=2000)
    alike, chance = table.to_dict("records")
    assert alike["p_holm"] < 0.01 < 0.05 < chance["p_holm"]
    assert 0 < alike["low"] < alike["kappa"] < alike["high"] and chance["low"] < 0 < chance["high"]
    assert alike["times_chance"] > 1.05 and abs(chance["times_chance"] - 1) < 0.05
    assert alike["kappa"] < alike["alpha"]
    assert across_seeds({}).empty


# The lottery authors' masks


@pytest.mark.parametrize("kind", ["heads_mlps", "heads", "mlps"])
def test_statistics_of_the_published_masks(
    kind: str, shared_data: Path, golden: Callable[[str], dict[str, Any]]
) -> None:
    for task, known in golden("lottery_masks")["seeds"][kind].items():
        for part, expected in known.items():
            kept = published(shared_data, task, part, kind).reshape(5, -1)
            both, groups, q = common(kept), kept.shape[1], cochran(kept)
            found = {"fleiss_kappa": fleiss_kappa(both, groups)}
            found |= {"krippendorff_alpha": krippendorff_alpha(both, groups)}
            found |= {"mean_pairwise_jaccard": mean_jaccard(both, groups)}
            found |= {"cochran_Q": q.q, "df": q.df, "p": q.p_value}
            found |= {"pairs_not_rejected": pairs_alike(kept)}
            for name, value in found.items():
                assert abs(value - expected[name]) < 1e-6, (task, part, name)
            for pair, values in expected["pairs"].items():
                i, j = (SEEDS.index(int(name[5:])) for name in pair.split("|"))
                assert abs(jaccard(both)[i, j] - values["jaccard"]) < 1e-6
                if values["p"] is not None:
                    assert abs(cochran(kept[[i, j]]).p_value - values["p"]) < 1e-6


@pytest.mark.parametrize("kind", ["heads_mlps", "heads", "mlps"])
def test_heat_maps_of_the_published_masks(
    kind: str, shared_data: Path, golden: Callable[[str], dict[str, Any]]
) -> None:
    for task, known in golden("lottery_masks")["heatmaps"][kind].items():
        for part, expected in known.items():
            kept = published(shared_data, task, part, kind)
            mean, sd = kept.mean(0), kept.std(0, ddof=1)
            assert np.abs(mean.squeeze() - expected["mean"]).max() < 1e-6
            assert np.abs(sd.squeeze() - expected["std_ddof1"]).max() < 1e-6
            assert abs(mean.mean() - expected["mean_survival"]) < 1e-6
            assert abs(sd.mean() - expected["mean_of_std"]) < 1e-6
            assert (mean == 1).sum() == expected["n_survive_all_seeds"]
            assert (mean == 0).sum() == expected["n_survive_no_seed"]


def test_heads_shared_by_tasks_are_those_of_figure_5(shared_data: Path) -> None:
    printed = {  # mean and standard deviation over the seeds
        ("CoLA", "CoLA"): (92.2, 18.9),
        ("CoLA", "MNLI"): (62.4, 10.2),
        ("CoLA", "SST-2"): (49.6, 13.0),
        ("MNLI", "MRPC"): (64.4, 7.8),
        ("MRPC", "QQP"): (52.2, 7.4),
        ("QQP", "SST-2"): (38.2, 10.2),
        ("SST-2", "SST-2"): (67.0, 15.7),
    }
    kept = np.stack([published(shared_data, task, "heads").reshape(5, -1) for task in TASKS])
    mean, sd = task_overlap(kept)
    for (one, other), (expected, spread) in printed.items():
        at = TASKS.index(one), TASKS.index(other)
        assert np.isclose(mean[at], expected, atol=1e-9)
        assert abs(sd[at] - spread) < 0.0501


def test_published_seeds_of_equal_size_have_p_1_whatever_they_share(shared_data: Path) -> None:
    least = 1.0
    for task in TASKS:
        kept = published(shared_data, task, "heads").reshape(5, -1)
        for i, j in itertools.combinations(range(5), 2):
            if kept[i].sum() == kept[j].sum():
                assert cochran(kept[[i, j]]).p_value == 1
                least = min(least, jaccard(common(kept))[i, j])
    assert least < 0.5
    assert agreement(published(shared_data, "MNLI", "heads"), draws=500).p_value < 0.01


# The audit


def test_the_audit_of_the_published_masks(shared_data: Path) -> None:
    published(shared_data, "CoLA", "heads")
    audit = lottery_audit().set_index("claim")
    assert audit.index.is_unique and (audit["recomputed"] != "").all()
    says = {claim: row["recomputed"] + " | " + row["verdict"] for claim, row in audit.iterrows()}
    expected = {
        "Fleiss' kappa": "0.191 (QQP) to 0.325 (SST-2) | holds; lowest +0.04, highest +0.00",
        "Cochran's Q rejects": "in 4 of 5 tasks; p at most 0.395 | does not hold: not in MNLI",
        "Cochran's Q tells": "does not hold: it compares sizes",
        "random tickets are": "heads -8 to +14",
        "random: each head": "25 of 25 masks come out of RandomState(13) | holds",
        "bad tickets are": "MLPs +0 to +0 (0.00) | holds",
        "a bad ticket is": "45% (SST-2) to 88% (CoLA) of the MLPs | does not hold",
        "weights of good tickets (%), by": "CoLA 65±5, SST-2 47±5, MRPC 57±5, QQP 53±5, MNLI 55±5",
        "weights of good tickets (%), of": "MNLI 69±6 | does not hold",
        "weights of super": "5 of 5 are what all seeds keep",
        "heads go by": "25 of 25 masks lack a multiple of 7 | holds",
        "magnitude pruning": "5% gives 9 of 9 titles | does not hold",
        "heads that survive": "does not hold",
        "MLPs that survive": "possible",
        "MRPC shares": "52.2 and 64.4 heads",
    }
    for start, words in expected.items():
        claim = next(claim for claim in says if claim.startswith(start))
        assert words in says[claim], (claim, says[claim])
    assert len(expected) == len(says)


def test_the_verdict_follows_the_masks(tmp_path: Path) -> None:
    assert lottery_audit(tmp_path).empty
    rng = torch.Generator().manual_seed(0)
    one = {f"{i}/value": torch.rand(12, 1, generator=rng) < 0.3 for i in range(12)}
    one |= {f"{i}/mlp": torch.tensor([[i < 5]]) for i in range(12)}
    for seed in SEEDS:
        good = random_like(one, rng)
        made = dict.fromkeys(("heads_mlps", "heads", "mlps", "heads_mlps_super"), good)
        made |= {
            "heads_mlps_random": random_like(good, rng),
            "heads_mlps_bad_1": bad_like(good, rng),
        }
        for kind, keep in made.items():
            write_masks(keep, tmp_path / kind / "QNLI" / f"seed_{seed}")
    verdict = lottery_audit(tmp_path).set_index("claim")["verdict"]
    assert verdict["random tickets are as large as the good ones"] == "holds"
    assert verdict["a bad ticket is the worst possible one of its size"] == "holds"
    assert "5 do not" in verdict["random: each head by itself, with the share of the good ticket"]
    file = tmp_path / "heads" / "QNLI" / "seed_42" / "head_mask.npy"
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(ValueError, match="seed_42/head_mask"):
        lottery_audit(tmp_path)
