"""What each form of the debias loss can see: leanings, their shares, and what descent leaves."""

import numpy as np
import pytest
import torch
from helpers import in_process
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning_bias.debias import orthogonality, pool
from pruning_bias.encoding import Batch, Encoded, in_order
from pruning_bias.leanings import forms, leanings
from pruning_bias.runs import Blindness

FORMS = {
    "equation": {},
    "published": {"squared_sum": True},
    "kaneko_script": {"squared_mean": True},
}


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_batch(sentences: int, pieces: int) -> Batch:
    """Sentences of as many pieces, the first of which is the found word."""
    ones = torch.ones(sentences, pieces, dtype=torch.long)
    words = torch.zeros(sentences, pieces)
    words[:, 0] = 1
    return Batch(ones, ones, words, torch.arange(sentences))


def seen(states: Tensor, pair: Tensor, mode: str = "sentence") -> dict[str, float]:
    """The forms of states [L, B, T, D]."""
    batch = one_batch(*states.shape[1:3])
    return forms(leanings(lambda _: states, [batch], pair, "all", mode))


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(2, 8))


# shares


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31), mode=st.sampled_from(["sentence", "token"]))
def test_shares_sum_to_one(shape: tuple[int, ...], seed: int, mode: str) -> None:
    """What the published form sees and what it ignores are all there is, twice."""
    found = seen(drawn(seed, *shape), drawn(seed + 1, shape[0], 2, shape[-1]), mode)
    assert found["published"] + found["ignored"] == pytest.approx(2 * found["equation"], rel=1e-12)
    share = found["published"] / (2 * found["equation"])
    assert share + found["ignored_share"] == pytest.approx(1, rel=1e-12)
    assert -1e-12 <= found["ignored_share"] <= 1 + 1e-12


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_the_script_never_sees_more_than_the_equation(shape: tuple[int, ...], seed: int) -> None:
    """The square of a mean is at most the mean of squares; one state alone is seen whole."""
    states, pair = drawn(seed, *shape), drawn(seed + 1, shape[0], 2, shape[-1])
    found = seen(states, pair)
    assert 0 <= found["kaneko_share"] <= 1 + 1e-12
    alone = seen(states[:1, :1, :1], pair[:1])
    assert alone["kaneko_share"] == pytest.approx(1, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_the_forms_are_what_a_run_minimizes(shape: tuple[int, ...], seed: int) -> None:
    """Moments of leanings give each loss, over several layers as well."""
    states, pair = drawn(seed, *shape), drawn(seed + 1, shape[0], 2, shape[-1])
    found, weights = seen(states, pair), torch.ones(shape[1] * shape[2]).double()
    for name, slips in FORMS.items():
        loss = orthogonality(states.flatten(1, 2), pair, weights, **slips)
        assert loss.item() == pytest.approx(found[name], rel=1e-12, abs=1e-15)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_leanings_are_the_same_in_any_batches(seed: int, sizes: tuple[int, int]) -> None:
    """Sentences of unlike length weigh by their pieces, whoever they are batched with."""
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *rng.integers(1, 9, 7)])
    words = np.zeros(offsets[-1], np.uint8)
    words[offsets[:-1]] = 1
    ids = rng.integers(0, 50, offsets[-1]).astype(np.int32)
    text = Encoded(ids, words, offsets, np.zeros(7, np.uint8))
    table, pair = drawn(seed, 50, 4), drawn(seed + 1, 1, 2, 4)
    for mode in ("sentence", "token"):
        first, second = (
            leanings(
                lambda b: table[b.ids][None], in_order(text, np.arange(7), n), pair, "all", mode
            )
            for n in sizes
        )
        torch.testing.assert_close(first, second)


# what is not seen


def test_a_pure_difference_is_nothing_to_the_published_form() -> None:
    """A state leans to one gender as much as away from the other; only the equation sees it."""
    pair = torch.eye(2, dtype=torch.float64)[None]
    apart = torch.tensor([[[[3.0, -3.0]]]]).double()
    found = seen(apart, pair)
    assert found["published"] == 0 and found["equation"] == 18 and found["ignored_share"] == 1
    states, weights = apart.flatten(1, 2).requires_grad_(), torch.ones(1).double()
    grads = {
        name: torch.autograd.grad(orthogonality(states, pair, weights, **slips), states)[0]
        for name, slips in FORMS.items()
    }
    assert not grads["published"].any() and grads["equation"].flatten().tolist() == [6, -6]


def descend(states: Tensor, pair: Tensor, **slips: bool) -> Tensor:
    """Where states go that descend a form of the loss."""
    states = states.clone().requires_grad_()
    weights = torch.ones(states.shape[1]).double()
    for _ in range(400):
        loss = orthogonality(states, pair, weights, **slips)
        states.data -= 0.2 * states.shape[1] * torch.autograd.grad(loss, states)[0]
    return states.detach()


def test_descent_leaves_what_its_form_does_not_see() -> None:
    """The equation takes both leanings away, the published form their sum, the script the mean."""
    states, pair = drawn(0, 1, 20, 6), torch.linalg.qr(drawn(1, 6, 2)).Q.T[None]
    before = (states @ pair[0].T)[0]
    after = {name: (descend(states, pair, **s) @ pair[0].T)[0] for name, s in FORMS.items()}
    assert after["equation"].abs().max() < 1e-9
    assert after["published"].sum(1).abs().max() < 1e-9
    torch.testing.assert_close(after["published"].diff(dim=1), before.diff(dim=1))
    assert after["kaneko_script"].mean(0).abs().max() < 1e-9
    torch.testing.assert_close(after["kaneko_script"], before - before.mean(0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_prototypes_of_equal_length_hide_their_difference(seed: int) -> None:
    """The published gradient has no part along the male minus the female prototype."""
    states, pair = drawn(seed, 1, 5, 6).requires_grad_(), drawn(seed + 1, 1, 2, 6)
    pair = pair / pair.norm(dim=-1, keepdim=True)
    loss = orthogonality(states, pair, torch.ones(5).double(), squared_sum=True)
    (grad,) = torch.autograd.grad(loss, states)
    assert (grad @ (pair[0, 0] - pair[0, 1])).abs().max() <= 1e-12 * grad.abs().max()


def test_pooled_prototypes_are_their_mean_in_every_layer() -> None:
    pair = drawn(0, 3, 2, 4)
    assert torch.equal(pool(pair), pair.mean(0, keepdim=True).expand(3, -1, -1))


# the experiment


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], float]:
    """What the experiment measures on a random encoder: (place, metric) -> value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
        rows = in_process(Blindness(sentences=24))["metrics"]
    assert len(rows) == len({(row["test"], row["metric"]) for row in rows})
    return {(row["test"], row["metric"]): row["value"] for row in rows}


def test_the_experiment_measures_every_layer_and_every_place(
    measured: dict[tuple[str, str], float],
) -> None:
    """Layers one by one, the layers that a loss takes together, and with pooled prototypes."""
    one_by_one = ["0", "1", "2"]
    together = ["first", "last", "all", "all, pooled", "intermediate", "intermediate, pooled"]
    places = {f"{name}/{mode}" for name in one_by_one + together for mode in ("sentence", "token")}
    assert {place for place, _ in measured} == places
    for place in places:
        equation = measured[place, "equation"]
        parts = measured[place, "published"] + measured[place, "ignored"]
        assert parts == pytest.approx(2 * equation, rel=1e-9)
        assert 0 < measured[place, "ignored_share"] < 1
        assert 0 < measured[place, "kaneko_share"] <= 1


def test_layers_taken_together_are_the_mean_of_layers(
    measured: dict[tuple[str, str], float],
) -> None:
    """The first and the last layer are layers 0 and L; all is their mean, but not the script's."""
    for mode in ("sentence", "token"):
        for form in ("equation", "published", "ignored"):
            each = [measured[f"{depth}/{mode}", form] for depth in range(3)]
            assert measured[f"first/{mode}", form] == pytest.approx(each[0], rel=1e-5)
            assert measured[f"last/{mode}", form] == pytest.approx(each[2], rel=1e-5)
            assert measured[f"all/{mode}", form] == pytest.approx(np.mean(each), rel=1e-5)
        assert all(-1 <= measured[f"{depth}/{mode}", "cosine"] <= 1 for depth in range(3))
