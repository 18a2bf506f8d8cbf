"""What must hold for every encoder, plan and input, on random shapes."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from pruning_bias.anatomy import LAYERS, anatomy, first_piece_only, select_layers, tiny_encoder
from pruning_bias.benchmarks import association, effect_size, p_value
from pruning_bias.corpus import KINDS, Sentence, sample
from pruning_bias.debias import Teacher, debias_loss, hidden_states, token_states, word_states
from pruning_bias.encoding import Batch, Encoded, batches
from pruning_bias.fidelity import Fidelity
from pruning_bias.files import load, save
from pruning_bias.gates import FixedGate, HardConcreteGate, ThresholdGate, TopKGate
from pruning_bias.grids import Grid
from pruning_bias.plans import (
    Plan,
    block_plan,
    ffn_plan,
    head_output_plan,
    head_plan,
    mlp_plan,
    random_like,
    weight_plan,
)
from pruning_bias.subnetworks import Subnetwork, active, attach_, fold, subnetworks
from pruning_bias.training import cubic, linear

FAMILIES = ("bert", "roberta", "electra", "distilbert", "albert")
VOCABULARY, LONGEST = 50, 12
SEEDS = st.integers(0, 2**16)


def quick(examples: int) -> Callable:
    """The same few examples every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


# Encoders, plans and inputs at random


@st.composite
def encoders(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A small random encoder of any family, with biases that are not zero."""
    family, heads = draw(st.sampled_from(FAMILIES)), draw(st.sampled_from([1, 2, 3]))
    hidden = heads * draw(st.sampled_from([4, 8]))
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        embedding_size=hidden if family in ("bert", "roberta", "distilbert") else 6,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.sampled_from([1, 2])),
        intermediate_size=(units := draw(st.sampled_from([5, 12]))),
        max_position_embeddings=32,
    )
    if family == "distilbert":
        config.hidden_dim = units
    with torch.random.fork_rng():
        torch.manual_seed(draw(SEEDS))
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


PLANS: dict[str, Callable[[PreTrainedModel], Plan]] = {
    "value heads": head_plan,
    "tied heads": lambda m: head_plan(m, ("query", "key", "value"), tied=True),
    "separate heads": lambda m: head_plan(m, ("query", "key", "value")),
    "head outputs": head_output_plan,
    "blocks": lambda m: block_plan(m, 4),
    "units": ffn_plan,
    "MLPs": mlp_plan,
    "weights": weight_plan,
    "blocks and units": lambda m: block_plan(m, 2) | ffn_plan(m),
    "everything": lambda m: head_plan(m) | head_output_plan(m) | ffn_plan(m) | mlp_plan(m),
}
plans = st.sampled_from(list(PLANS))


def some_ids(model: PreTrainedModel, seed: int) -> Tensor:
    """Three sentences of word pieces, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (3, 7), generator=generator)


def run(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """All hidden states, [L, B, T, D]."""
    return torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)


def gate_at_random(seed: int) -> Callable[[str, tuple[int, int]], nn.Module]:
    """Gates of either kind with random scores, about half of them open."""
    generator = torch.Generator().manual_seed(seed)

    def make(_: str, shape: tuple[int, int]) -> nn.Module:
        gate = (ThresholdGate, TopKGate)[seed % 2](shape)
        gate.threshold, gate.density = 0.5, 0.5
        gate.scores.data.normal_(generator=generator)
        return gate.double()

    return make


def fractions(seed: int) -> Callable[[str, tuple[int, int]], FixedGate]:
    """Gates of random size, a third of them closed."""
    generator = torch.Generator().manual_seed(seed)

    def make(_: str, shape: tuple[int, int]) -> FixedGate:
        values = torch.rand(shape, generator=generator) * 1.5 - 0.5
        return FixedGate(values.clamp(0, 1)).double()

    return make


OPEN: dict[str, Callable[[str, tuple[int, int]], nn.Module]] = {
    "threshold": lambda _, shape: ThresholdGate(shape),
    "raw threshold": lambda _, shape: ThresholdGate(shape, threshold=-1.0, sigmoid=False),
    "top k": lambda _, shape: TopKGate(shape),
    "hard concrete": lambda _, shape: HardConcreteGate(shape).eval(),
    "fixed": lambda _, shape: FixedGate(torch.ones(shape)),
}


# Open, off, active


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@quick(25)
@given(st.data(), plans, st.sampled_from(list(OPEN)), st.booleans(), SEEDS)
def test_open_gates_give_the_dense_bytes(
    dtype: torch.dtype, data: st.DataObject, plan: str, gate: str, in_weights: bool, seed: int
) -> None:
    """Whatever the plan and the gate, and wherever it acts."""
    model = data.draw(encoders(dtype))
    ids = some_ids(model, seed)
    dense = run(model, ids)
    attach_(model, PLANS[plan](model), OPEN[gate], in_weights=in_weights)
    assert torch.equal(run(model, ids), dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", list(PLANS))
def test_every_plan_fits_every_family(family: str, plan: str) -> None:
    """Open gates give the dense bytes, closed ones do not, and taking them off restores."""
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=2, num_hidden_layers=2
    )
    config.intermediate_size = config.hidden_dim = 6
    config.embedding_size = 4
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    ids = some_ids(model, 0)
    dense = run(model, ids)
    subnetwork = attach_(model, PLANS[plan](model), lambda _, shape: ThresholdGate(shape))
    assert torch.equal(run(model, ids), dense)
    subnetwork.set_threshold_(1.0)
    assert not any(keep.any() for keep in subnetwork.keep().values())
    assert not torch.equal(run(model, ids), dense)
    assert torch.equal(run(subnetwork.detach_(), ids), dense) and not subnetworks(model)


@quick(30)
@given(encoders(), plans, SEEDS)
def test_the_first_piece_alone_is_that_of_all(model: PreTrainedModel, plan: str, seed: int) -> None:
    """Of every family, gated, padded or not; and what follows is whole again."""
    ids, mask = some_ids(model, seed), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    attach_(model, PLANS[plan](model), fractions(seed))
    whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
    with first_piece_only(model):
        first = model(input_ids=ids, attention_mask=mask).last_hidden_state
    few = model.config.model_type in ("bert", "roberta", "electra")
    assert first.shape[1] == (1 if few else 7)
    torch.testing.assert_close(first[:, 0], whole[:, 0], rtol=0, atol=1e-12)
    again = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(again, whole)


@quick(20)
@given(encoders(torch.float32), plans, SEEDS)
def test_off_gives_the_dense_bytes(model: PreTrainedModel, plan: str, seed: int) -> None:
    """In a `with`, in a `with` inside it, and after an exception; and nothing stays off."""
    ids = some_ids(model, seed)
    dense = run(model, ids)
    subnetwork = attach_(model, PLANS[plan](model), lambda _, shape: FixedGate(torch.zeros(shape)))
    gated = run(model, ids)
    assert not torch.equal(gated, dense)
    with pytest.raises(KeyError), subnetwork.off():
        with subnetwork.off():
            assert torch.equal(run(model, ids), dense)
        assert torch.equal(run(model, ids), dense)
        raise KeyError
    assert torch.equal(run(model, ids), gated)
    subnetwork.scale = 0.0
    assert torch.equal(run(model, ids), dense)


@quick(10)
@given(encoders(), st.permutations(list(PLANS)), SEEDS)
def test_active_in_any_combination(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Only the wanted ones act, as if the others had never been attached, and all is restored."""
    ids = some_ids(model, seed)
    subs = [attach_(model, PLANS[n](model), fractions(seed + i)) for i, n in enumerate(names[:3])]
    subs[1].on = False
    assert subnetworks(model) and set(subnetworks(model)) == set(subs)
    for size in (1, 2, 3):
        for wanted in combinations(subs, size):
            with active(*wanted):
                assert [s.on for s in subs] == [s in wanted for s in subs]
                came = run(model, ids)
                folded = fold(model)
                with pytest.raises(KeyError), active(subs[0]):
                    raise KeyError
                assert [s.on for s in subs] == [s in wanted for s in subs]
            assert [s.on for s in subs] == [True, False, True]
            assert torch.allclose(run(folded, ids), came, rtol=0, atol=1e-11)


def test_active_with_none_is_refused() -> None:
    """It cannot know whose subnetworks to switch off, so it must not leave them on silently."""
    with pytest.raises(ValueError, match="at least one"), active():
        pass


# Fold, save, load


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@quick(25)
@given(st.data(), plans, st.booleans(), SEEDS)
def test_fold_equals_gated(
    dtype: torch.dtype,
    atol: float,
    data: st.DataObject,
    plan: str,
    in_weights: bool,
    seed: int,
) -> None:
    """An ordinary model computes the same, and the gated one is left as it was."""
    model = data.draw(encoders(dtype))
    ids = some_ids(model, seed)
    subnetwork = attach_(model, PLANS[plan](model), fractions(seed), in_weights)
    subnetwork.to(dtype).scale = data.draw(st.sampled_from([1.0, 0.5]))
    gated = run(model, ids)
    folded = fold(model)
    assert type(folded) is type(model) and not subnetworks(folded)
    unit = unit_of(gated.detach())
    assert torch.allclose(run(folded, ids), gated, rtol=0, atol=atol * unit)
    assert torch.equal(run(model, ids), gated)


@quick(15)
@given(encoders(torch.float32), plans, SEEDS)
def test_save_and_load_give_the_same_masks(
    tmp_path: Path, model: PreTrainedModel, plan: str, seed: int
) -> None:
    """The same open groups and the same function, on the same base and on no other."""
    ids = some_ids(model, seed)
    subnetwork = attach_(model, PLANS[plan](model), gate_at_random(seed))
    subnetwork.float()
    keep, gated = subnetwork.keep(), run(model, ids)
    path = save(subnetwork, tmp_path / "mask.safetensors", corpus="none")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    dense = subnetwork.detach_()
    loaded = load(path, dense)
    assert loaded.plan == subnetwork.plan and loaded.keep().keys() == keep.keys()
    assert all(torch.equal(mask, loaded.keep()[name]) for name, mask in keep.items())
    assert torch.equal(run(model, ids), gated)
    loaded.detach_()
    next(model.parameters()).data[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        load(path, model)
    assert not subnetworks(model)


def test_the_hash_of_the_base_ignores_gates(tmp_path: Path) -> None:
    """A second subnetwork can be saved and loaded while a first one is attached."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    model = AutoModel.from_config(config)
    first = attach_(model, head_plan(model), OPEN["threshold"])
    path = save(first, tmp_path / "first.safetensors")
    second = load(path, model)
    assert subnetworks(model) == [first, second]


# Gradients


def loss_of(states: Tensor, seed: int) -> Tensor:
    """A smooth scalar that looks at every state."""
    weights = torch.randn(
        states.shape, generator=torch.Generator().manual_seed(seed), dtype=states.dtype
    )
    return (states * weights).sum() + (states * weights).square().mean()


def gradients(subnetwork: Subnetwork) -> dict[str, Tensor]:
    """The gradient of every score."""
    return {name: gate.scores.grad for name, gate in subnetwork.gates.items()}


@quick(25)
@given(encoders(), plans.filter(lambda plan: plan != "everything"), st.booleans(), SEEDS)
def test_a_scores_gradient_is_the_block_sum(
    model: PreTrainedModel, plan: str, in_weights: bool, seed: int
) -> None:
    """Of weight times weight gradient, over all the sites of the gate, shared layers included.

    Where two gates act on one map ("everything"), a gate sees the weight as the other leaves it.
    """
    ids = some_ids(model, seed)
    subnetwork = attach_(model, PLANS[plan](model), gate_at_random(seed), in_weights=in_weights)
    loss_of(run(model, ids), seed).backward()
    folded = fold(model).requires_grad_(True)
    loss_of(run(folded, ids), seed).backward()
    maps = dict(folded.named_modules())
    for name, sites in subnetwork.plan.items():
        expected = 0.0
        for site in sites:
            dense = model.get_submodule(site.linear)
            came = site.grid.sums(dense.weight * maps[site.linear].weight.grad)
            if site.bias == "gated":
                rows = (dense.bias * maps[site.linear].bias.grad).view(-1, site.grid.rows)
                came = came + rows.sum(1, keepdim=True)
            expected = expected + (came.T if site.transposed else came)
        came = gradients(subnetwork)[name]
        assert torch.allclose(came, expected, rtol=1e-9, atol=1e-9 * unit_of(expected)), name


def unit_of(tensor: Tensor) -> float:
    """The size of its largest number, at least 1."""
    return max(1.0, float(tensor.abs().max()))


@quick(25)
@given(encoders(), st.sampled_from(["keep", "alive", "gated"]), st.data(), SEEDS)
def test_gates_on_activations_equal_gates_on_weights(
    model: PreTrainedModel, bias: str, data: st.DataObject, seed: int
) -> None:
    """Rows and columns, outputs and gradients, for every rule of the bias."""
    names = ["value heads", "tied heads", "separate heads", "MLPs"]
    if bias != "gated":
        names += ["head outputs", "units", "everything"]
    plan = {
        name: tuple(site._replace(bias=bias) for site in sites)
        for name, sites in PLANS[data.draw(st.sampled_from(names))](model).items()
    }
    ids, came = some_ids(model, seed), []
    for in_weights in (False, True):
        subnetwork = attach_(model, plan, gate_at_random(seed), in_weights=in_weights)
        states = run(model, ids)
        loss_of(states, seed).backward()
        came.append((states.detach(), gradients(subnetwork)))
        subnetwork.detach_()
    (a, grads_a), (b, grads_b) = came
    assert torch.allclose(a, b, rtol=0, atol=1e-12 * unit_of(a))
    for name, grad in grads_a.items():
        assert torch.allclose(grad, grads_b[name], rtol=1e-9, atol=1e-11 * unit_of(grad)), name


@quick(15)
@given(encoders(), plans, st.booleans(), SEEDS)
def test_a_scores_gradient_is_a_finite_difference(
    model: PreTrainedModel, plan: str, noisy: bool, seed: int
) -> None:
    """Of the loss, where the gate is smooth: hard concrete, between its clips."""
    generator = torch.Generator().manual_seed(seed)
    ids = some_ids(model, seed)
    subnetwork = attach_(model, PLANS[plan](model), lambda _, shape: HardConcreteGate(shape))
    subnetwork.double().train(noisy)
    for gate in subnetwork.gates.values():
        gate.scores.data.uniform_(0.3, 1.2, generator=generator)
        gate.noise = torch.zeros_like(gate.scores).uniform_(-0.2, 0.2, generator=generator)
    loss_of(run(model, ids), seed).backward()
    for gate in islice(subnetwork.gates.values(), 4):
        place, step = int(torch.randint(gate.scores.numel(), (), generator=generator)), 1e-6
        flat, losses = gate.scores.data.view(-1), []
        for sign in (1, -1):
            flat[place] += sign * step
            losses.append(loss_of(run(model, ids), seed).item())
            flat[place] -= sign * step
        came = float(gate.scores.grad.view(-1)[place])
        difference = (losses[0] - losses[1]) / (2 * step)
        assert came == pytest.approx(difference, rel=1e-5, abs=1e-6 * max(1, abs(losses[0])))


@quick(25)
@given(*(st.integers(1, 4) for _ in range(4)), SEEDS)
def test_sums_are_the_adjoint_of_expand(rows: int, cols: int, r: int, c: int, seed: int) -> None:
    """<expand(z), w> = <z, sums(w)> for every grid."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(r, c, generator=generator, dtype=torch.float64)
    w = torch.randn(r * rows, c * cols, generator=generator, dtype=torch.float64)
    grid = Grid(rows, cols)
    assert grid.shape(w) == (r, c)
    assert torch.allclose((grid.expand(z) * w).sum(), (z * grid.sums(w)).sum())


# ALBERT


def test_one_gate_set_serves_all_shared_layers() -> None:
    """ALBERT's layers are one set of weights: one of gates, and no layer of its own to ask for."""
    config = AutoConfig.for_model(
        "albert",
        vocab_size=VOCABULARY,
        hidden_size=8,
        embedding_size=4,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=6,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    found = anatomy(model)
    assert found.shared and found.depth == 3 and len(found.layers) == 1
    plan = head_plan(model)
    assert list(plan) == ["0/value"]
    for make in (head_plan, head_output_plan, ffn_plan, mlp_plan, weight_plan):
        with pytest.raises(ValueError, match="3 layers share weights"):
            make(model, layers=(1,))
    with pytest.raises(ValueError, match="3 layers share weights"):
        block_plan(model, 4, layers=(1,))
    ids = some_ids(model, 0)
    dense = run(model, ids)
    attach_(model, plan, lambda _, shape: FixedGate(torch.tensor([[0.0], [1.0]])))
    moved = (run(model, ids) - dense).abs().amax((1, 2, 3))
    assert moved[0] == 0 and (moved[1:] > 0).all()


# Losses


@st.composite
def texts(draw: st.DrawFn, model: PreTrainedModel, n: int) -> Encoded:
    """Sentences of random word pieces and lengths, each with at least one found word."""
    rng = np.random.default_rng(draw(SEEDS))
    lengths = rng.integers(3, LONGEST + 1, n)
    words = [np.zeros(length, np.uint8) for length in lengths]
    for row in words:
        found = rng.choice(len(row), rng.integers(1, len(row)), replace=False)
        row[found] = rng.integers(1, 3, len(found))
    ids = rng.integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kinds = np.zeros(n, np.uint8)
    return Encoded(ids, np.concatenate(words), offsets, kinds, model.config.pad_token_id)


@quick(20)
@given(st.data(), st.sampled_from(LAYERS), st.sampled_from(["sentence", "token"]), SEEDS)
def test_padding_and_company_change_no_loss(
    data: st.DataObject, layer: str, mode: str, seed: int
) -> None:
    """Tight, padded, or each sentence alone: the same loss; only `padded_states` counts padding."""
    model = data.draw(encoders())
    moved = fold(model)
    for parameter in moved.parameters():
        parameter.mul_(1.1)
    text = data.draw(texts(model, 5))
    teacher = Teacher(lambda batch: hidden_states(model, batch), room=0)
    generator = torch.Generator().manual_seed(seed)
    states = select_layers(tuple(hidden_states(model, text.batch([0]))), layer)
    shape = len(states), 2, model.config.hidden_size
    pair = torch.randn(shape, generator=generator, dtype=torch.float64)

    def losses(
        index: list[int], pad_to: int = 0, fidelity: Fidelity = Fidelity()
    ) -> dict[str, float]:
        batch = text.batch(index, pad_to)
        found = debias_loss(
            moved, teacher, batch, batch, pair, layer=layer, mode=mode, fidelity=fidelity
        )
        return {name: float(value) for name, value in found.items()}

    whole, padded = losses(list(range(5))), losses(list(range(5)), LONGEST + 4)
    assert padded == pytest.approx(whole, rel=1e-10)
    alone = [losses([i]) for i in range(5)]
    lengths = text.lengths
    by_word = lengths / lengths.sum()
    weights = {"bias": by_word if mode == "sentence" else np.full(5, 0.2), "drift": by_word}
    for name, share in weights.items():
        assert np.dot(share, [each[name] for each in alone]) == pytest.approx(
            whole[name], rel=1e-10
        )
    published = Fidelity(padded_states=True)
    tight, long = losses([0], 0, published), losses([0], LONGEST + 4, published)
    assert (tight["bias"] == pytest.approx(long["bias"], rel=1e-6)) == (mode == "token")
    assert tight["drift"] == pytest.approx(long["drift"], rel=1e-10)


@quick(15)
@given(st.data(), SEEDS)
def test_word_states_are_weighted_means(data: st.DataObject, seed: int) -> None:
    """A word piece that counts twice counts twice; all others do not count."""
    text = data.draw(texts(data.draw(encoders()), 4))
    batch = text.batch(range(4))
    states = torch.randn(
        2, *batch.ids.shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    came, weights = word_states(states, batch)
    for i in range(4):
        pieces = [j for j, n in enumerate(batch.words[i].int().tolist()) for _ in range(n)]
        assert torch.allclose(came[:, i], states[:, i, pieces].mean(1))
    assert weights.tolist() == [1.0] * 4


def test_layers_are_those_of_the_paper() -> None:
    """Embeddings, output, all of them, or what layers 1 to 4 give."""
    states = tuple(torch.tensor(float(i)) for i in range(13))
    chosen = {layer: [int(s) for s in select_layers(states, layer)] for layer in LAYERS}
    assert chosen == {
        "first": [0],
        "last": [12],
        "all": list(range(13)),
        "intermediate": [1, 2, 3, 4],
    }


@quick(15)
@given(st.data(), st.sampled_from([0, 2_000, 2**30]), st.booleans(), SEEDS)
def test_the_teachers_memory_equals_recomputation(
    data: st.DataObject, room: int, words: bool, seed: int
) -> None:
    """For sentences in any company and order, with room for none, for some, or for all."""
    model = data.draw(encoders())
    text, rng, calls = data.draw(texts(model, 6)), np.random.default_rng(seed), []
    reduce = word_states if words else token_states

    def compute(batch: Batch) -> Tensor:
        calls.append(batch)
        states = hidden_states(model, batch)
        return word_states(states, batch)[0] if words else states

    teacher = Teacher(compute, room)
    for _ in range(12):
        index = rng.choice(6, rng.integers(1, 6), replace=False)
        batch = text.batch(index, int(rng.integers(0, 16)))
        expected, weights = reduce(hidden_states(model, batch), batch)
        came = teacher(batch) if words else token_states(teacher(batch), batch)[0]
        real = weights > 0  # what stands at padding has no weight and may differ
        assert torch.allclose(came[:, real], expected[:, real], rtol=0, atol=1e-10)
    if room == 0:
        assert not teacher.kept and len(calls) == 12
    elif room > 2**20:
        assert len(calls) <= len(teacher.kept) <= 6  # each call met somebody new


# Measuring


def vectors(seed: int, sizes: tuple[int, ...], dim: int) -> list[Tensor]:
    """Random sets of vectors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.3 for n in sizes]


sizes = st.tuples(*(st.integers(2, 7) for _ in range(4)))


@quick(25)
@given(sizes, st.integers(2, 9), SEEDS)
def test_effect_size_turns_with_its_sets(sizes: tuple[int, ...], dim: int, seed: int) -> None:
    """X and Y swapped, or A and B: the other sign; both: the same. Lengths do not matter."""
    x, y, a, b = vectors(seed, sizes, dim)
    d = effect_size(x, y, a, b)
    assert effect_size(y, x, a, b) == pytest.approx(-d, rel=1e-9, abs=1e-12)
    assert effect_size(x, y, b, a) == pytest.approx(-d, rel=1e-9, abs=1e-12)
    assert effect_size(y, x, b, a) == pytest.approx(d, rel=1e-9, abs=1e-12)
    lengths = vectors(seed + 1, sizes, 1)
    longer = [v * r.exp() for v, r in zip((x, y, a, b), lengths, strict=True)]
    assert effect_size(*longer) == pytest.approx(d, rel=1e-9, abs=1e-12)
    assert abs(d) <= 2 * math.sqrt(max(sizes[:2]) / min(sizes[:2])) + 1e-9
    assert association(x, a, b).abs().max() <= 2


@quick(25)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=4),
    st.lists(st.integers(-3, 3), min_size=1, max_size=4),
)
def test_few_partitions_are_all_looked_at(x: list[int], y: list[int]) -> None:
    """The exact p-value, ties included, is brute force in exact arithmetic."""
    both, k = [Fraction(v, 3) for v in x + y], len(x)

    def statistic(chosen: tuple[int, ...]) -> Fraction:
        rest = [both[i] for i in range(len(both)) if i not in chosen]
        return sum(both[i] for i in chosen) / k - sum(rest) / len(rest)

    all_of_them = [statistic(c) for c in combinations(range(len(both)), k)]
    expected = sum(s >= statistic(tuple(range(k))) for s in all_of_them) / len(all_of_them)
    assert p_value(np.array(x) / 3, np.array(y) / 3) == pytest.approx(expected, rel=1e-12)


def test_p_values_are_uniform_under_the_null() -> None:
    """Three hundred divisions at random: Kolmogorov and Smirnov have no objection."""
    rng = np.random.default_rng(0)
    draws, n = 1000, 300
    came = [p_value(*np.split(rng.standard_t(3, 24), [10]), draws=draws, seed=i) for i in range(n)]
    assert stats.kstest(came, "uniform").pvalue > 0.05
    assert 1 / draws <= min(came) and max(came) <= 1
    for level in (0.05, 0.2):
        assert stats.binomtest(sum(p <= level for p in came), n, level).pvalue > 0.01


def test_drawn_p_values_estimate_the_exact_one() -> None:
    """Half a set of divisions drawn, against all of them."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, y = rng.normal(0.4, 1, 7), rng.normal(0, 1, 6)
        exact = p_value(x, y)
        drawn = p_value(x, y, draws=1500)
        assert abs(exact - drawn) < 5 * math.sqrt(exact * (1 - exact) / 1500) + 1 / 1500


# Chance


@quick(20)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=8), SEEDS)
def test_random_masks_close_as_many_of_each_part(shapes: list[tuple[int, int]], seed: int) -> None:
    """Over the layers together; the generator alone decides which."""
    rng, parts = np.random.default_rng(seed), ("value", "ffn", "mlp")
    keep = {f"{i}/{parts[i % 3]}": torch.tensor(rng.random(s) < 0.6) for i, s in enumerate(shapes)}
    drawn, again = (random_like(keep, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert drawn.keys() == keep.keys()
    assert all(
        drawn[n].shape == m.shape and torch.equal(drawn[n], again[n]) for n, m in keep.items()
    )
    for part in parts:
        open_groups = [
            sum(int(m.sum()) for n, m in masks.items() if n.endswith(part))
            for masks in (keep, drawn)
        ]
        assert open_groups[0] == open_groups[1]


def plain(lengths: list[int]) -> Encoded:
    """Sentences that matter only by their lengths."""
    flat = np.ones(sum(lengths))
    return Encoded(
        flat.astype(np.int32),
        flat.astype(np.uint8),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.zeros(len(lengths), np.uint8),
    )


def epochs(text: Encoded, size: int, seed: int, n: int, **rest: int) -> list[list[int]]:
    """The first `n` batches, as the sentences in them."""
    generator = torch.Generator().manual_seed(seed)
    among = np.arange(len(text))
    return [b.index.tolist() for b in islice(batches(text, among, size, generator, **rest), n)]


@quick(20)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), SEEDS)
def test_an_epoch_holds_every_sentence_once(size: int, many: int, window: int, seed: int) -> None:
    """And the generator alone decides the order."""
    rng = np.random.default_rng(seed)
    text = plain(rng.integers(1, 20, size * many).tolist())
    came = epochs(text, size, seed, 3 * many, window=window)
    assert all(len(batch) == size for batch in came)
    for start in range(0, 3 * many, many):
        epoch = list(itertools.chain(*came[start : start + many]))
        assert sorted(epoch) == list(range(size * many))
    torch.manual_seed(seed + 1)
    np.random.seed(seed % 7)
    assert epochs(text, size, seed, 3 * many, window=window) == came


def test_no_sentence_is_left_out_for_its_length() -> None:
    """Where the size does not divide, another rest stays behind in each epoch."""
    text = plain(list(range(1, 12)))
    came = epochs(text, 4, 0, 400)
    assert all(len(batch) == 4 for batch in came)
    seen = Counter(i for batch in came for i in batch)
    assert set(seen) == set(range(11))
    assert stats.chisquare([seen[i] for i in range(11)]).pvalue > 0.01


def test_samples_are_uniform() -> None:
    """Of a stream of 20, every sentence is among the 5 kept as often as any other."""
    n, limit, times = 20, 5, 3000
    stream = [Sentence(str(i), kind, ("w",), ((0, 1),)) for i in range(n) for kind in KINDS]
    seen = Counter((s.text, s.kind) for seed in range(times) for s in sample(stream, limit, seed))
    share = limit / n
    for kind in KINDS:
        counts = np.array([seen[str(i), kind] for i in range(n)])
        assert counts.sum() == limit * times
        distance = ((counts - times * share) ** 2).sum() / (times * share * (1 - share))
        assert stats.chi2.sf(distance * (n - 1) / n, n - 1) > 0.01
    assert [s.kind for s in sample(stream, limit, 0)] == [k for k in KINDS for _ in range(limit)]
    assert len(sample(stream, 99, 0)) == len(stream)


# Schedules


@quick(25)
@given(
    st.integers(1, 60),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(-1, 8),
    st.integers(-10, 8),
)
def test_the_threshold_moves_one_way(
    total: int, initial: float, final: float, warmup: int, cooldown: int
) -> None:
    """From its first value to its last, which it has from the cooldown on, and no further."""
    values = [cubic(t, total, initial, final, warmup, cooldown) for t in range(total + 20)]
    steps = np.diff(values) * (1 if final >= initial else -1)
    assert (steps >= -1e-12).all()
    low, high = sorted((initial, final))
    assert low - 1e-12 <= min(values) and max(values) <= high + 1e-12
    assert values[max(total - cooldown, warmup, 0) + 1] == pytest.approx(final, abs=1e-12)
    if 0 <= warmup < total - cooldown:
        assert values[: warmup + 1] == pytest.approx([initial] * (warmup + 1), abs=1e-12)


@quick(20)
@given(st.integers(1, 60), st.integers(0, 10))
def test_the_rate_rises_and_falls(total: int, warmup: int) -> None:
    """To 1 at the end of the warm-up and to 0 at the end of the run, never beyond."""
    values = [linear(t, total, warmup) for t in range(total + 5)]
    assert all(0 <= v <= 1 for v in values)
    if warmup < total:
        assert values[warmup] == 1 and values[total:] == [0] * 5
        assert all(np.diff(values[: warmup + 1]) > 0) and all(
            np.diff(values[warmup : total + 1]) < 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_attention_sees_the_same_padding(dtype: torch.dtype) -> None:
    model = tiny_encoder().to(dtype).eval()
    batch = Batch(
        torch.tensor([[101, 2002, 2003, 102], [101, 2016, 102, 0]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[0.0, 1, 0, 0], [0, 1, 0, 0]]),
        torch.arange(2),
    )
    found = hidden_states(model, batch)
    alone = Batch(*(part[1:, :3] for part in batch[:3]), batch.index[1:])
    torch.testing.assert_close(found[:, 1:, :3], hidden_states(model, alone))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(hidden_states(model, batch), found)
