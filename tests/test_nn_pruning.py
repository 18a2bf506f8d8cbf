"""Our gates against nn_pruning 0.1.2, the engine of 2022, on the same weights and scores.

Equal to the last bit: masks, masked weights and biases, hidden states (whether we gate weights or
activations, as long as gates are 0 or 1), the threshold of every step. Equal to rounding, since
only the order of a sum differs: gradients of scores, penalties. With small integers every sum is
exact, and then the gradients are equal to the bit as well. What differs by more is said by name.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_pruning_reference import Patched, masked_nn, patch_
from torch import Tensor, nn
from transformers import BertModel

from pruning_bias.anatomy import Encoder, anatomy, tiny_encoder
from pruning_bias.gates import HardConcreteGate, ThresholdGate, TopKGate
from pruning_bias.plans import Plan, block_plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.subnetworks import Subnetwork, attach_, fold
from pruning_bias.training import cubic

LEVELS = {"sigmoied_threshold": 0.1, "threshold": -1.9, "topK": 0.75, "l0": 0.0}
ATTENTION = ("query", "key", "value", "attention_output")


def gates(method: str, level: float, norm: str = "l1") -> Callable[..., nn.Module]:
    """What makes our gates for one of its methods."""
    return {
        "sigmoied_threshold": lambda _, shape: ThresholdGate(shape, threshold=level, norm=norm),
        "threshold": lambda _, shape: ThresholdGate(shape, threshold=level, sigmoid=False),
        "topK": lambda _, shape: TopKGate(shape, density=level),
        "l0": lambda _, shape: HardConcreteGate(shape, lower=-0.1, upper=1.1, temperature=2 / 3),
    }[method]


def plan(model: BertModel, block: int | None, ffn: bool = True) -> Plan:
    """Its places: heads (None) or square blocks of the attention, units of the feed-forward."""
    if block:
        attention = block_plan(model, block)
    else:
        attention = head_plan(model, ("query", "key", "value")) | head_output_plan(model)
    return attention | ffn_plan(model) if ffn else attention


def theirs_on(
    model: BertModel, block: int | None, method: str = "sigmoied_threshold", **rest: object
) -> Patched:
    """nn_pruning on a copy of a model, with random scores; about a quarter of them closes."""
    size, hidden = anatomy(model).head_size, model.config.hidden_size
    own = copy.deepcopy(model).eval().requires_grad_(False)
    patched = patch_(own, block or size, block or hidden, method, **rest)
    patched.set_threshold_(LEVELS[method])
    generator = torch.Generator().manual_seed(1)
    for scores in patched.scores().values():
        scores.data = torch.randn(scores.shape, generator=generator) * 2 - 1
    return patched


def ours_on(
    model: BertModel, patched: Patched, plan: Plan, make: Callable, in_weights: bool
) -> Subnetwork:
    """Our gates on a model, with its scores."""
    subnetwork = attach_(model, plan, make, in_weights=in_weights).eval()
    theirs = patched.scores()
    assert subnetwork.gates.keys() == theirs.keys()
    for name, gate in subnetwork.gates.items():
        gate.scores.data.copy_(theirs[name].data.view_as(gate.scores))
    return subnetwork


def states(model: BertModel) -> Tensor:
    """The last hidden states of three short sentences, one of them padded."""
    ids = torch.randint(1000, 20000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def push(output: Tensor) -> None:
    """Send a random gradient back."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * upstream).sum().backward()


def gradients(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Flat gradients of scores."""
    return {name: scores.grad.flatten() for name, scores in named.items()}


def scores_of(subnetwork: Subnetwork) -> dict[str, nn.Parameter]:
    """Our scores by gate."""
    return {name: gate.scores for name, gate in subnetwork.gates.items()}


@pytest.fixture(params=["tiny", "packaged"])
def model(request: pytest.FixtureRequest) -> BertModel:
    """A random encoder, and the packaged one; both in evaluation mode."""
    if request.param == "tiny":
        return tiny_encoder().eval().requires_grad_(False)
    packaged: Encoder = request.getfixturevalue("packaged")
    return copy.deepcopy(packaged.model)


@pytest.mark.parametrize("method", LEVELS)
@pytest.mark.parametrize("block", [None, 16, 64], ids=lambda b: f"block{b}" if b else "heads")
def test_whole_model(model: BertModel, block: int | None, method: str) -> None:
    """Weights, biases and hidden states to the bit; gradients of scores to rounding."""
    patched = theirs_on(model, block, method)
    expected = states(patched.host.bert)
    push(expected)
    theirs = gradients(patched.scores())
    for in_weights in (True, False):
        make = gates(method, LEVELS[method])
        subnetwork = ours_on(model, patched, plan(model, block), make, in_weights)
        came = states(model)
        push(came)
        if in_weights:
            check_folded(patched, fold(model))
        if in_weights or method != "l0":
            assert torch.equal(came, expected)
        else:  # (x W) z rounds otherwise than x (W z) once z is a fraction
            assert (came - expected).abs().max() < 1e-5
        for name, ours in gradients(scores_of(subnetwork)).items():
            worst = (ours - theirs[name]).abs().max()
            assert worst <= 1e-4 * theirs[name].abs().max(), (name, in_weights)
        subnetwork.detach_()


def check_folded(patched: Patched, folded: BertModel) -> None:
    """Every masked weight and bias, to the bit."""
    kinds = masked_nn().MaskedLinear
    found = {n: m for n, m in patched.host.bert.named_modules() if isinstance(m, kinds)}
    assert len(found) == 6 * folded.config.num_hidden_layers
    closed = 0
    for name, masked in found.items():
        weight, bias = masked.get_masked_weights_bias()
        assert torch.equal(folded.get_submodule(name).weight, weight), name
        assert torch.equal(folded.get_submodule(name).bias, bias), name
        closed += (weight == 0).sum()
    assert closed


@pytest.mark.parametrize("method", LEVELS)
@pytest.mark.parametrize("in_weights", [True, False], ids=["in weights", "where it may"])
@pytest.mark.parametrize("block", [None, 8, 32], ids=lambda b: f"block{b}" if b else "heads")
def test_gradients_in_integers(block: int | None, in_weights: bool, method: str) -> None:
    """Where every sum is exact, outputs and gradients of scores are equal to the bit."""
    model, generator = tiny_encoder().eval().requires_grad_(False), torch.Generator().manual_seed(3)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    for parameter in model.parameters():
        parameter.copy_(whole(*parameter.shape))
    ffn = method != "l0"  # its FFN takes a sigmoid of every weight's score, and sums fractions
    patched = theirs_on(model, block, method, ffn=ffn)
    make = gates(method, LEVELS[method])
    subnetwork = ours_on(model, patched, plan(model, block, ffn), make, in_weights)
    for name in {site.linear for sites in subnetwork.plan.values() for site in sites}:
        ours, theirs = (m.get_submodule(name) for m in (model, patched.host.bert))
        x, upstream = whole(5, ours.in_features), whole(5, ours.out_features)
        (ours(x) * upstream).sum().backward()
        (theirs(x) * upstream).sum().backward()
        assert method == "l0" or torch.equal(ours(x), theirs(x)), name
    expected = gradients(patched.scores())
    assert any(grad.any() for grad in expected.values())
    for name, grad in gradients(scores_of(subnetwork)).items():
        assert torch.equal(grad, expected[name]), name


# l0 in training, and where the two part


def noisy_(patched: Patched) -> None:
    """Its gates in training mode, the encoder without dropout."""
    for module in patched.host.modules():
        if isinstance(module, masked_nn().MaskModule):
            module.train()


@pytest.mark.parametrize("block", [None, 16], ids=["heads", "block16"])
def test_l0_in_training_with_equal_noise(block: int | None) -> None:
    """With the noise that it draws from a seed, our noisy gates give its hidden states."""
    model = tiny_encoder().eval().requires_grad_(False)
    patched = theirs_on(model, block, "l0", ffn=False)
    noisy_(patched)
    torch.manual_seed(4)
    expected = states(patched.host.bert)
    make = gates("l0", 0.0)
    subnetwork = ours_on(model, patched, plan(model, block, ffn=False), make, True).train()
    torch.manual_seed(4)
    for name in (f"{i}/{part}" for i in range(2) for part in ATTENTION):  # the order of a forward
        gate = subnetwork.gates[name]
        u = torch.zeros_like(gate.scores.data).uniform_().clamp(0.0001, 0.9999)
        gate.noise = u.log() - (1 - u).log()
    assert torch.equal(states(model), expected)
    assert not torch.equal(states(model), states(patched.host.bert))  # it draws for every forward


def test_l0_of_units_draws_noise_for_every_weight() -> None:
    """In training its FFN masks are no longer rows and columns; ours have one draw per unit."""
    patched = theirs_on(tiny_encoder(), None, "l0")
    noisy_(patched)
    dense = patched.host.bert.encoder.layer[0].intermediate.dense
    mask = dense.mask_module(dense.weight, 0.0)
    assert (mask != mask[:, :1]).any(1).any()
    dense.mask_module.eval()
    mask = dense.mask_module(dense.weight, 0.0)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))


def test_top_k_of_units_may_cut_one_in_two() -> None:
    """It counts weights, we count units: 0.7 of 128 units leaves its 90th unit open in part."""
    patched = theirs_on(tiny_encoder(), None, "topK")
    dense = patched.host.bert.encoder.layer[0].intermediate.dense
    open_weights = dense.mask_module(dense.weight, 0.7).sum(1)
    partly = open_weights[(open_weights > 0) & (open_weights < 64)]
    assert (open_weights == 64).sum() == 89 and partly.tolist() == [int(0.7 * 128 * 64) - 89 * 64]
    gate = TopKGate((128, 1), density=0.7)
    gate.scores.data.copy_(patched.scores()["0/ffn"].data.view(-1, 1))
    assert torch.equal(gate.keep()[:, 0], open_weights == 64)


def test_magnitude_is_broken_in_theirs() -> None:
    """Magnitude masks raise in the published engine; nothing of it can be compared."""
    patched = patch_(tiny_encoder(), 16, 64, "magnitude", ffn=False)
    with pytest.raises(TypeError, match="not subscriptable"):
        states(patched.host.bert)


# penalties and thresholds


@pytest.mark.parametrize("norm", ["l1", "l0"])
@pytest.mark.parametrize("block", [None, 16], ids=["heads", "block16"])
def test_penalty(model: BertModel, block: int | None, norm: str) -> None:
    """Half the mean over the attention's gates and half over the others', and its gradient."""
    patched = theirs_on(model, block, regularization=norm)
    states(patched.host.bert)  # it counts open weights as it goes
    make = gates("sigmoied_threshold", 0.1, norm)
    subnetwork = ours_on(model, patched, plan(model, block), make, False)
    subnetwork.penalty().backward()
    patched.penalty().backward()
    assert math.isclose(subnetwork.penalty().item(), patched.penalty().item(), rel_tol=1e-6)
    theirs = gradients(patched.scores())
    for name, grad in gradients(scores_of(subnetwork)).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-6, atol=0)
    for scores in (*patched.scores().values(), *scores_of(subnetwork).values()):
        scores.data.zero_()  # as a run begins
    assert norm == "l0" or subnetwork.penalty() == patched.penalty() == 0.5


def test_penalty_of_hard_concrete_gates() -> None:
    """Its l0 penalty is the probability that our hard-concrete gates are not closed."""
    model = tiny_encoder()
    patched = theirs_on(model, None, "l0", regularization="l0")
    states(patched.host.bert)
    subnetwork = ours_on(model, patched, plan(model, None), gates("l0", 0.0), False)
    assert math.isclose(subnetwork.penalty().item(), patched.penalty().item(), rel_tol=1e-6)


def test_penalty_of_attention_alone_counts_half_in_theirs() -> None:
    """Without feed-forward scores its penalty is still halved; ours is the mean of what is."""
    model = tiny_encoder()
    patched = theirs_on(model, None, ffn=False)
    states(patched.host.bert)
    make = gates("sigmoied_threshold", 0.1)
    subnetwork = ours_on(model, patched, plan(model, None, ffn=False), make, False)
    assert math.isclose(subnetwork.penalty().item(), 2 * patched.penalty().item(), rel_tol=1e-6)


@pytest.fixture(scope="module")
def unpruned() -> Patched:
    """Its schedule, on whatever model."""
    return patch_(tiny_encoder(), 16, 64)


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(40, 30_000),
    ends=st.tuples(st.floats(0, 1), st.floats(0.001, 1)),
    warmups=st.tuples(st.integers(0, 3), st.integers(0, 10)),
    warmup_steps=st.sampled_from([-1, 1, 3]),
)
def test_threshold_of_every_step(
    unpruned: Patched,
    total: int,
    ends: tuple[float, float],
    warmups: tuple[int, int],
    warmup_steps: int,
) -> None:
    """The cubic schedule with its warm-up and cool-down, to the bit."""
    arguments = unpruned.coordinator.sparse_args
    arguments.initial_threshold, arguments.final_threshold = ends
    arguments.initial_warmup, arguments.final_warmup = warmups
    warmup, cooldown = (count * warmup_steps for count in warmups)
    for step in (0, 1, total // 3, total - 1, total):
        came = cubic(step, total, *ends, warmup, cooldown)
        expected = unpruned.schedule_(step, total, warmup_steps)
        if step == warmup == 0:  # theirs returns the initial threshold, ours computes it
            assert math.isclose(came, expected, rel_tol=1e-12, abs_tol=1e-15)
        else:
            assert came == expected, step
    assert unpruned.finish_() == ends[1]
