"""Erasure: the authors' figures, a gradient turned round, and what a distance of groups must do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_sync import Asks
from torch import Tensor
from torch.nn import functional as F

from pruning_bias.erasure import (
    Adversary,
    adversary_loss,
    balanced_weights,
    mmd,
    ramp,
    reverse_gradient,
    vote,
)

few = settings(max_examples=10, derandomize=True, deadline=None)
SEED = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(n: int, groups: int, seed: int = 0) -> Tensor:
    """Groups of unequal size in random order, all of them present."""
    members = torch.cat([torch.arange(groups), torch.arange(n - groups) ** 2 % groups])
    return members[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


# The authors' figures


def authors_heads(case: dict[str, Any]) -> Adversary:
    """An adversary with the weights of the authors' one; theirs are [out, in], ours [in, out]."""
    width, groups = len(case["x"][0]), max(2, case["num_labels"])
    adversary = Adversary(width, groups, case["adv_count"]).eval()
    for layer, place in enumerate((1, 4)):
        for head in range(case["adv_count"]):
            part = f"heads.{head}.classifier.{place}"
            weight, bias = (
                torch.tensor(case["state_dict"][f"{part}.{k}"]) for k in ("weight", "bias")
            )
            adversary.weights[layer].data[head] = weight.T
            adversary.biases[layer].data[head, 0] = bias
    return adversary


@pytest.fixture(params=range(4))
def case(request: pytest.FixtureRequest, golden: Callable[[str], Any]) -> dict[str, Any]:
    return golden("adversary")["cases"][request.param]


def test_losses_and_gradients_are_the_authors(case: dict[str, Any]) -> None:
    weights = case["class_weights"] and torch.tensor(case["class_weights"])
    for strength, expected in case["by_lambda"].items():
        for reverse, name in ((True, "grad_x"), (False, "grad_x_without_reversal")):
            adversary, x = authors_heads(case), torch.tensor(case["x"], requires_grad=True)
            h = reverse_gradient(x, float(strength)) if reverse else x
            loss = adversary_loss(adversary(h), torch.tensor(case["y"]), weights, True)
            loss.backward()
            first = adversary.weights[0].grad[0].T
            for ours, theirs in (
                (loss, expected["loss"]),
                (x.grad, expected[name]),
                (first, expected["grad_first_linear_of_head0"]),
            ):
                assert torch.allclose(ours, torch.tensor(theirs), rtol=0, atol=2e-6)


def test_votes_are_the_authors(case: dict[str, Any]) -> None:
    logits = authors_heads(case)(torch.tensor(case["x"]))
    heads = torch.stack([vote(each[None]) for each in logits])
    assert heads.tolist() == np.array(case["per_head_preds"]).reshape(heads.shape).tolist()
    assert vote(logits).tolist() == np.ravel(case["majority_vote"]).tolist()


# Reversal and ramp


@few
@given(SEED, st.sampled_from([0.0, 0.3, 1.0, 2.5]))
def test_reversal_is_the_identity_forward_and_a_factor_back(seed: int, strength: float) -> None:
    h = torch.cat([normal(4, 3, seed=seed), torch.tensor([[-0.0, torch.inf, -torch.inf]])])
    h.requires_grad_()
    out, gradient = reverse_gradient(h, strength), normal(5, 3, seed=seed + 1)
    assert out.detach().numpy().tobytes() == h.detach().numpy().tobytes()
    out.backward(gradient)
    assert torch.equal(h.grad, -strength * gradient)


def test_the_adversary_learns_the_same_at_any_strength() -> None:
    found = []
    for strength in (0.0, 1.0, 3.0):
        adversary = Adversary(4, 3).double().eval()
        loss = adversary_loss(adversary(reverse_gradient(normal(9, 4), strength)), drawn(9, 3))
        found.append(torch.autograd.grad(loss, adversary.weights[0])[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_ramp_rises_from_nothing_to_the_full_strength() -> None:
    steps = [ramp(step, 50) for step in range(51)]
    assert steps[0] == 0 and steps == sorted(steps) and 0.9999 < steps[-1] < 1


# The adversary


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_the_batched_heads_are_heads_one_at_a_time(groups: int, hidden: int) -> None:
    adversary, h = Adversary(6, groups, heads=3, hidden=hidden).double().eval(), normal(7, 6)
    for head, logits in enumerate(adversary(h)):
        x = h
        for layer, (weight, bias) in enumerate(
            zip(adversary.weights, adversary.biases, strict=True)
        ):
            x = F.linear(x.tanh() if layer else x, weight[head].T, bias[head, 0])
        assert torch.allclose(logits, x, atol=1e-12)
    assert len(adversary.weights) == hidden + 1


def test_heads_differ_and_a_seed_decides_them() -> None:
    one, same, other = (Adversary(8, 2, seed=seed).weights[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1]) and one.abs().max() <= 8**-0.5
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Adversary(8, 2)
    assert torch.equal(before, torch.get_rng_state())  # the global draws are left alone


def test_dropout_acts_in_training_only_and_on_each_head_by_itself() -> None:
    adversary = Adversary(8, 2, heads=2, hidden=0)
    for part in adversary.parameters():
        part.data.fill_(1.0)
    h = torch.ones(50, 8)
    one, other = adversary(h)
    assert not torch.equal(one, other)
    one, other = adversary.eval()(h)
    assert torch.equal(one, other)


def test_an_attribute_of_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 group\(s\) cannot be told; expected 2 or more"):
        Adversary(8, 1)


# The loss


@few
@given(SEED, st.sampled_from([2, 3, 5]))
def test_the_loss_is_the_mean_of_the_heads_means(seed: int, groups: int) -> None:
    told, logits = drawn(12, groups, seed), normal(5, 12, 1 if groups == 2 else groups, seed=seed)
    for weights in (None, balanced_weights(told, groups).double()):
        each = [adversary_loss(head[None], told, weights) for head in logits]
        assert torch.isclose(adversary_loss(logits, told, weights), torch.stack(each).mean())
    two = torch.cat([torch.zeros_like(logits), logits], -1) if groups == 2 else logits
    assert torch.isclose(adversary_loss(logits, told), adversary_loss(two, told))


@few
@given(SEED, st.sampled_from([2, 4]))
def test_balanced_weights_make_groups_count_alike(seed: int, groups: int) -> None:
    told, logits = drawn(30, groups, seed), normal(1, 30, 1 if groups == 2 else groups, seed=seed)
    weights = balanced_weights(told, groups).double()
    parts = [adversary_loss(logits[:, told == g], told[told == g]) for g in range(groups)]
    assert torch.isclose(adversary_loss(logits, told, weights), torch.stack(parts).mean())


def test_the_published_code_weighs_two_groups_otherwise_and_more_not_at_all() -> None:
    told, weights = drawn(12, 2), torch.tensor([0.6, 3.0]).double()
    logits = normal(2, 12, 1)
    theirs = F.binary_cross_entropy_with_logits(
        logits[..., 0], told.double().expand(2, -1), pos_weight=weights[1]
    )
    assert torch.isclose(adversary_loss(logits, told, weights, published_code=True), theirs)
    assert not torch.isclose(adversary_loss(logits, told, weights), theirs)
    logits, told, weights = normal(2, 12, 3), drawn(12, 3), torch.tensor([0.5, 1.0, 4.0]).double()
    plain = adversary_loss(logits, told)
    assert torch.equal(adversary_loss(logits, told, weights, published_code=True), plain)
    assert not torch.isclose(adversary_loss(logits, told, weights), plain)


@few
@given(SEED, st.sampled_from([1, 3]))
def test_a_vote_is_the_mode_of_the_heads(seed: int, outputs: int) -> None:
    logits = normal(4, 20, outputs, seed=seed)
    heads = logits.argmax(-1) if outputs > 1 else (logits[..., 0] > 0).long()
    assert torch.equal(vote(logits), heads.mode(0).values)  # on a CPU: the smallest of the modes


# Maximum mean discrepancy


@pytest.fixture(params=[2, 3])
def two_samples(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    groups = drawn(30, request.param)
    return normal(30, 5) + groups[:, None] * 0.7, groups, request.param


def test_equal_samples_are_at_no_distance_and_shifted_ones_are() -> None:
    sample, groups = normal(20, 5), torch.arange(60) // 20
    assert mmd(sample.repeat(3, 1), groups, 3).abs() < 1e-12
    distances = [
        mmd(torch.cat([sample, sample + shift]), groups[:40], 2).item() for shift in (0.3, 0.6, 1.2)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_order_names_place_and_rotation_do_not_matter(two_samples: tuple) -> None:
    h, groups, n = two_samples
    rng = torch.Generator().manual_seed(0)
    order, names = (torch.randperm(k, generator=rng) for k in (30, n))
    rotation = torch.linalg.qr(normal(5, 5)).Q
    expected = mmd(h, groups, n)
    for other in (
        mmd(h[order], groups[order], n),
        mmd(h, names[groups], n),
        mmd(h + 7, groups, n),
        mmd(h @ rotation, groups, n),
        mmd(3 * h, groups, n),  # the bandwidth goes with the scale
        mmd(h, groups, n + 2),  # groups that are not there
    ):
        assert torch.isclose(other, expected, rtol=1e-9)


@pytest.mark.parametrize("published_code", [False, True])
def test_its_gradient_is_that_of_finite_differences(published_code: bool) -> None:
    h, groups = normal(9, 3).requires_grad_(), drawn(9, 2)
    given_width = partial(mmd, bandwidth=2.0, published_code=published_code)
    assert torch.autograd.gradcheck(lambda h: given_width(h, groups, 2), h)
    if not published_code:
        assert torch.autograd.gradcheck(lambda h: given_width(h, drawn(9, 3), 3), h)


def test_no_gradient_goes_through_the_bandwidth() -> None:
    h, groups = normal(8, 3).requires_grad_(), drawn(8, 2)
    distances = torch.cdist(h, h).detach().square()
    by_batch, given_width = mmd(h, groups, 2), mmd(h, groups, 2, bandwidth=distances.sum() / 56)
    one, other = (torch.autograd.grad(each, h)[0] for each in (by_batch, given_width))
    assert torch.isclose(by_batch, given_width) and torch.allclose(one, other, atol=1e-12)


def test_several_groups_are_the_mean_over_their_pairs() -> None:
    h, groups = normal(24, 4) + drawn(24, 3)[:, None], drawn(24, 3)
    pairs = []
    for pair in ((0, 1), (0, 2), (1, 2)):
        some = (groups == pair[0]) | (groups == pair[1])
        pairs.append(mmd(h[some], (groups[some] == pair[1]).long(), 2, bandwidth=3.0))
    assert torch.isclose(mmd(h, groups, 3, bandwidth=3.0), torch.stack(pairs).mean())


@pytest.mark.parametrize("published_code", [False, True])
@pytest.mark.parametrize("n", [1, 6])
def test_one_group_alone_gives_nothing_to_learn(n: int, published_code: bool) -> None:
    for h in (normal(n, 4), torch.ones(n, 4)):
        h.requires_grad_()
        loss = mmd(h, torch.ones(n, dtype=torch.long), 2, published_code=published_code)
        loss.backward()
        assert loss == 0 and torch.equal(h.grad, torch.zeros_like(h))


def test_equal_states_leave_a_finite_gradient() -> None:
    h = torch.ones(6, 4, requires_grad=True)
    mmd(h, torch.arange(6) % 2, 2).backward()
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_samples_of_one_distribution_approach_each_other_as_they_grow() -> None:
    means = [
        np.mean([mmd(normal(n, 4, seed=s), torch.arange(n) % 2, 2).item() for s in range(10)])
        for n in (20, 80, 320)
    ]
    assert means[0] > 3 * means[1] > 9 * means[2] > 0  # a V-statistic: like 1 / n


@pytest.mark.parametrize("one_in", [2, 3, 5])
def test_the_published_form_repeats_the_rows_of_both_groups(one_in: int) -> None:
    h, groups = normal(23, 4), (torch.arange(23) % one_in == 0).long()
    sides = [h[groups == g] for g in (0, 1)]
    both = torch.cat([side[torch.arange(23) % len(side)] for side in sides])
    distances = torch.cdist(both, both).square()
    sigma = distances.sum() / (46 * 45)
    k = sum(torch.exp(-distances / (sigma * 2.0 ** (i - 2) + 1e-5)) for i in range(4))
    expected = (k[:23, :23] + k[23:, 23:] - k[:23, 23:] - k[23:, :23]).mean()
    assert torch.isclose(mmd(h, groups, 2, published_code=True), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="compares two groups, not 3"):
        mmd(h, groups, 3, published_code=True)


# In a step


def test_no_erasure_waits_for_the_device_and_all_of_it_is_float32() -> None:
    h, groups, adversary = torch.randn(12, 8), drawn(12, 3), Adversary(8, 3)
    exact = mmd(h, groups, 3)
    with Asks() as asks:
        weights = balanced_weights(groups, 3)
        adversary_loss(adversary(reverse_gradient(h.requires_grad_(), 1.0)), groups, weights)
        mmd(h, groups, 3).backward()
        mmd(h, groups.clamp(max=1), 2, published_code=True)
    assert asks.found == []
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd(h, groups, 3), exact)
        logits = adversary(h)
        assert logits.dtype == torch.bfloat16
        assert adversary_loss(logits, groups).dtype == torch.float32
        assert mmd(h.bfloat16(), groups, 3).dtype == torch.float32


def test_the_unbiased_mmd_is_nothing_on_average_and_pulls_nothing_together() -> None:
    """Over draws of one distribution its mean is 0, and so is its push along the states."""
    generator = torch.Generator().manual_seed(0)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(200):
        h = torch.randn(8, 4, generator=generator, requires_grad=True)
        for unbiased, rows in found.items():
            value = mmd(h, torch.arange(8) % 2, 2, bandwidth=8.0, unbiased=unbiased)
            (gradient,) = torch.autograd.grad(value, h)
            rows.append((value.item(), (gradient * h).sum().item()))
    biased, fair = (torch.tensor(found[each]) for each in (False, True))
    spread = fair.std(0) / len(fair) ** 0.5
    assert (fair.mean(0).abs() < 4 * spread).all()
    assert biased.mean(0)[0] > 0.3 and biased.mean(0)[1] > 10 * spread[1]


def test_a_group_of_one_has_no_unbiased_likeness() -> None:
    """Its pairs are left out, and the gradient is 0."""
    h = torch.randn(5, 4, requires_grad=True)
    value = mmd(h, torch.tensor([0, 0, 0, 0, 1]), 2, unbiased=True)
    (gradient,) = torch.autograd.grad(value, h)
    assert value == 0 and not gradient.any()
