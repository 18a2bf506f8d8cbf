"""Probes: they find what is there and only that, and never choose by what they report on."""

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from pruning_bias.probes import (
    Probed,
    distance_to_optimum,
    gap_rms,
    hold_out,
    linear_probe,
    probe,
    tpr_gaps,
    train_probe,
)

How = Callable[..., Probed]
few = settings(max_examples=10, derandomize=True, deadline=None)
SEED = st.integers(0, 2**16)
quick = partial(probe, epochs=3, learning_rate=1e-2)
strong = partial(probe, learning_rate=1e-2)


def corners(n: int = 600, width: int = 6, seed: int = 0) -> Tensor:
    """States around the corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (n, width), generator=generator) - 1
    return signs + 0.3 * torch.randn(n, width, generator=generator)


def planted(h: Tensor, kind: str) -> Tensor:
    """An attribute of the states: along one coordinate, of two signs, of four corners."""
    a, b = (h[:, 0] > 0).long(), (h[:, 1] > 0).long()
    return {"linear": a, "xor": a ^ b, "four": 2 * a + b}[kind]


def probed(how: How, h: Tensor, groups: Tensor, n: int = 2) -> Probed:
    return how(h[:400], groups[:400], h[400:], groups[400:], n)


# What a probe finds


@pytest.mark.parametrize("kind, groups", [("linear", 2), ("xor", 2), ("four", 4)])
def test_a_probe_finds_a_planted_attribute(kind: str, groups: int) -> None:
    h = corners()
    found = probed(strong, h, planted(h, kind), groups)
    assert found.balanced_accuracy > 0.9 and found.chance == 1 / groups and found.n == 200


def test_a_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    h = corners()
    assert probed(linear_probe, h, planted(h, "linear")).balanced_accuracy > 0.95
    assert probed(linear_probe, h, planted(h, "four"), 4).balanced_accuracy > 0.95
    assert probed(linear_probe, h, planted(h, "xor")).balanced_accuracy < 0.65


@pytest.mark.parametrize("how", [quick, linear_probe])
def test_noise_is_told_as_well_as_by_tossing_a_coin(how: How) -> None:
    low, high = binom.interval(0.999, 200, 0.5)
    generator = torch.Generator().manual_seed(3)
    for seed in range(3):
        found = probed(how, corners(seed=seed), torch.randint(2, (600,), generator=generator))
        assert low <= found.accuracy * 200 <= high
        assert abs(found.balanced_accuracy - 0.5) < 0.15


def test_groups_of_unequal_size_do_not_hide_an_attribute() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = (torch.rand(600, generator=generator) < 0.1).long()
    h = torch.randn(600, 6, generator=generator) + 1.2 * groups[:, None]
    fair, leaning = (
        probed(partial(strong, epochs=8, balanced=b), h, groups) for b in (True, False)
    )
    assert fair.balanced_accuracy > leaning.balanced_accuracy + 0.05
    assert fair.majority == leaning.majority == np.bincount(groups[400:]).max() / 200


def test_standardized_probes_do_not_mind_the_scale_of_a_coordinate() -> None:
    h = corners()
    scaled, flat = h * torch.logspace(-3, 3, 6) + 5, torch.full((600, 2), 0.1)
    groups = planted(h, "linear")
    one, other = (probed(partial(quick, standardize=True), each, groups) for each in (h, scaled))
    assert one == pytest.approx(other, abs=0.02) and one.balanced_accuracy > 0.95
    constant = probed(partial(quick, standardize=True), torch.cat([h, flat], 1), groups)
    assert constant.balanced_accuracy > 0.95  # a coordinate that never changes is no fault


# The choice of the epoch


@few
@given(SEED, st.sampled_from([0.1, 0.2, 0.5]))
def test_every_group_is_on_both_sides_of_the_division(seed: int, share: float) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [2, 9, 40]))
    kept, held = hold_out(groups, share, seed)
    assert sorted([*kept, *held]) == list(range(51))
    assert set(groups[kept]) == set(groups[held]) == {0, 1, 2}
    expected = [max(1, round(share * size)) for size in (2, 9, 40)]
    assert np.bincount(groups[held]).tolist() == expected


def test_dev_groups_change_the_figure_and_nothing_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h = corners()
    groups, fitted = planted(h, "xor"), []

    def remembered(*args, **kwargs):
        fitted.append(train_probe(*args, **kwargs))
        return fitted[-1]

    monkeypatch.setattr("pruning_bias.probes.train_probe", remembered)
    swapped = torch.cat([groups[:400], 1 - groups[400:]])
    one, other = (probed(quick, h, each) for each in (groups, swapped))
    assert one.balanced_accuracy == pytest.approx(1 - other.balanced_accuracy)
    assert one.epoch == other.epoch
    states = [b"".join(p.numpy().tobytes() for p in a.state_dict().values()) for a, _ in fitted]
    assert states[0] == states[1]


def test_the_kept_epoch_is_the_best_of_the_validation_part() -> None:
    h = corners()
    y = planted(h, "xor").numpy()
    fit = partial(train_probe, h[:400], y[:400], h[400:], y[400:], 2, learning_rate=3e-3)
    scores = []
    for epochs in range(1, 7):  # the same start, batches and dropout: a run is the next one's begin
        adversary, epoch = fit(epochs=epochs)
        scores.append((epoch, adversary.weights[0].detach().numpy().tobytes()))
    for epochs, (epoch, weights) in enumerate(scores, 1):
        assert epoch <= epochs and weights == scores[epoch - 1][1]
        assert not fit(epochs=epoch)[0].training


def test_the_published_code_chooses_on_dev_by_the_least_loss() -> None:
    h = corners()
    groups = planted(h, "linear")
    told = torch.cat([groups[:400], 1 - groups[400:]])  # dev contradicts: the loss only rises
    assert probed(partial(quick, published_code=True), h, told).epoch == 1
    assert probed(partial(quick, published_code=True), h, groups).epoch == 3


@pytest.mark.parametrize("how", [quick, linear_probe])
def test_a_seed_decides_everything(how: How) -> None:
    h = corners()
    groups = planted(h, "xor")
    torch.manual_seed(5)
    one, drawn = probed(how, h, groups), torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():  # as in an evaluation
        assert probed(how, h, groups) == one
    assert torch.rand(1) == drawn  # the global draws are left alone
    assert probed(how, h.numpy(), groups.numpy()) == one
    assert all(type(value) in (int, float) for value in one)


def test_another_seed_is_another_probe() -> None:
    h = corners(60)
    y = planted(h, "linear").numpy()
    one, other = (train_probe(h, y, h, y, 2, epochs=1, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.weights[0], other.weights[0])


# Errors


@pytest.mark.parametrize("how", [quick, linear_probe])
def test_what_cannot_be_probed_is_refused(how: How) -> None:
    h, ones = corners(20), torch.ones(20, dtype=torch.long)
    groups = torch.arange(20) % 2
    broken = h.clone()
    broken[3, 1] = torch.nan
    alone = torch.tensor([1] + [0] * 19)
    for args, said in (
        ((h, ones, h, groups, 2), r"train: texts per group are \{1: 20\}.* from 0 to 1"),
        ((h, groups, h, ones, 2), r"dev: texts per group are \{1: 20\}"),
        ((h, 0 * ones, h, 0 * ones, 1), "every group from 0 to 1"),
        ((h, groups, h, groups + 1, 2), r"dev: texts per group are \{1: 10, 2: 10\}"),
        ((h, groups - 1, h, groups, 2), r"\{-1: 10, 0: 10\}"),
        ((h, alone, h, groups, 2), "at least 2 of every group"),
        ((broken, groups, h, groups, 2), "train: a state is not finite"),
        ((h, groups, broken, groups, 2), "dev: a state is not finite"),
        ((h, groups[:9], h, groups, 2), r"states of \(20, 6\) for 9 groups; expected \(9, 6\)"),
        ((h, groups, h[:, :4], groups, 2), r"dev: states of \(20, 4\).*expected \(20, 6\)"),
        ((h[0], groups, h, groups, 2), r"train: states of \(6,\)"),
        ((h[:0], groups[:0], h, groups, 2), "train: texts per group are {}"),
    ):
        with pytest.raises(ValueError, match=said):
            how(*args)


def test_a_probe_that_breaks_down_is_no_erasure() -> None:
    h = corners(60) * 1e30
    with pytest.raises(FloatingPointError, match="epoch 1: a logit of the probe is not finite"):
        probe(h, planted(h, "linear"), h, planted(h, "linear"), 2, learning_rate=1e20)


# Fairness of a task


def test_equal_predictors_have_no_gap_and_groups_have_no_order() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(4, size=200), rng.integers(3, size=200)
    assert gap_rms(labels, labels, groups, 3) == (0.0, 4, 0)
    assert gap_rms(labels, 0 * labels, groups, 3) == (0.0, 4, 0)  # wrong for all of them alike
    told = np.where(rng.random(200) < 0.7, labels, rng.integers(4, size=200))
    for names in ([0, 2, 1], [1, 2, 0]):
        assert gap_rms(labels, told, np.array(names)[groups], 3) == gap_rms(labels, told, groups, 3)


def test_gaps_are_those_computed_by_hand() -> None:
    labels = np.repeat([3, 5, 7], [6, 4, 2])
    groups = np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 2, 0, 1])
    told = np.array([3, 3, 3, 5, 5, 5, 5, 3, 5, 3, 7, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaps = tpr_gaps(labels, told, groups, 3)
        assert gaps == {3: 1.0, 5: 1.0, 7: pytest.approx(np.nan, nan_ok=True)}
        assert gap_rms(labels, told, groups, 3) == (1.0, 2, 1)
        two = tpr_gaps(labels, told, groups.clip(max=1), 2)
        assert two == {3: 0.75, 5: pytest.approx(2 / 3), 7: 0.0}
        expected = np.sqrt((0.75**2 + (2 / 3) ** 2) / 3)
        assert gap_rms(labels, told, groups.clip(max=1), 2).rms == pytest.approx(expected)
        nothing = gap_rms(labels, told, 0 * groups, 2)
    assert np.isnan(nothing.rms) and nothing[1:] == (0, 3)
    with pytest.raises(ValueError, match="12 labels, 11 predictions and 12 groups"):
        tpr_gaps(labels, told[:-1], groups, 3)


def test_the_distance_to_the_optimum_is_euclidean() -> None:
    assert distance_to_optimum(0.7, 0.4) == pytest.approx(0.5)
    assert distance_to_optimum(0.9, 0.5, best_task=0.9, best_leakage=0.5) == 0
    assert distance_to_optimum(0.9, 0.6) < distance_to_optimum(0.9, 0.7)
    with pytest.raises(ValueError, match=r"leakage is 61.6; expected a share in \[0, 1\]"):
        distance_to_optimum(0.8, 61.6)
