"""A gated difference of all weights: its gradients, its switching, its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pruning_bias.changes import Dense, Entries
from pruning_bias.differences import (
    Difference,
    difference_,
    every_weight,
    keep_largest_,
    learning,
    penalty,
    penalty_weights,
)
from pruning_bias.files import load, save, weights_sha256
from pruning_bias.gates import HardConcreteGate
from pruning_bias.plans import head_plan
from pruning_bias.subnetworks import active, attach_, dense, fold, subnetworks

FAMILIES = ("bert", "roberta", "electra", "distilbert", "albert")
TEXT = torch.tensor([[3, 9, 4, 21, 7], [3, 5, 6, 2, 8]])


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit, signs of zeros included."""
    return all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def sparse(model: torch.nn.Module, seed: int, density: float = 0.1) -> Difference:
    """A random difference whose entries are chosen."""
    made, generator = difference_(model), torch.Generator().manual_seed(seed)
    for part in made.parts.values():
        part.delta.data.normal_(generator=generator)
    keep_largest_(made, density)
    return made


@pytest.mark.parametrize("place", [0, 1, 2], ids=["plain", "structured", "louizos_bounds"])
def test_gates_are_those_of_the_published_code(
    place: int, golden: Callable[[str], dict[str, Any]]
) -> None:
    """Noisy and noiseless gates, the shifted weight, L0 and every gradient, within 2e-6."""
    case = golden("gates")["cases"][place]
    bounds = {"lower": case["concrete_lower"], "upper": case["concrete_upper"]}
    core = torch.tensor(case["X"])
    part = Dense(
        core,
        lambda shape: HardConcreteGate(shape, **bounds),
        structured=case["structured"],
        gradient="published_code",
    )
    part.delta.data = torch.tensor(case["finetune"]) - core
    for gate, kind in zip(part.gates, ("", "_group"), strict=False):
        gate.scores.data = torch.tensor(case[f"alpha{kind}"]).view_as(gate.scores)
        gate.noise = torch.logit(torch.tensor(case[f"u{kind}"]), eps=1e-4).view_as(gate.scores)

    def close(came: Tensor, wanted: list) -> bool:
        return torch.allclose(came.flatten(), torch.tensor(wanted).flatten(), rtol=0, atol=2e-6)

    for mode in ("train", "eval"):
        part.train(mode == "train")
        assert close(part.z(), case[mode]["z"])
        shifted = core.clone()
        with torch.no_grad():
            part.add_(shifted, 1.0)
        assert close(shifted, case[mode]["W_eff"])
    part.train()
    with torch.no_grad():
        part.pull_(torch.tensor(case["upstream_grad"]), 1.0)
    assert close(part.delta.grad, case["train"]["grad_finetune"])
    assert close(part.gates[0].scores.grad, case["train"]["grad_alpha"])
    if case["structured"]:
        assert close(part.gates[1].scores.grad, case["train"]["grad_alpha_group"])
    part.zero_grad()
    part.penalty().backward()
    assert part.penalty().item() == pytest.approx(case["l0"]["value"], rel=1e-6)
    assert close(part.gates[0].scores.grad, case["l0"]["grad_alpha"])


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_gives_what_autograd_gives(family: str, structured: bool) -> None:
    """Of a model called with W0 + z * delta in the place of its weights."""
    model = small_encoder(family).requires_grad_(False)
    made = difference_(model, structured=structured).double()
    generator = torch.Generator().manual_seed(1)
    for part in made.parts.values():
        part.delta.data.normal_(std=0.1, generator=generator)
        for gate in part.gates:
            gate.scores.data.normal_(generator=generator)
    made.draw_(generator)
    core = bits(model)
    changed = {
        name.replace("/", "."): core[name.replace("/", ".")] + part.z() * part.delta
        for name, part in made.parts.items()
    }
    wanted_loss = torch.func.functional_call(model, changed, (TEXT,))[0][:, 0].pow(2).sum()
    parameters = dict(made.named_parameters())
    wanted = torch.autograd.grad(wanted_loss, list(parameters.values()), allow_unused=True)
    with learning(made):
        loss = model(TEXT)[0][:, 0].pow(2).sum()
        loss.backward()
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-12)
        assert all(weight.grad is None for weight in model.parameters())
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()
    }
    assert any(each.abs().max() > 0.01 for each in found.values())
    for each, expected in zip(found.values(), wanted, strict=True):
        expected = torch.zeros_like(each) if expected is None else expected
        assert torch.allclose(each, expected, rtol=1e-9, atol=1e-10)
    assert same(bits(model), core)
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_adds_up_and_off_gives_the_bits_back(family: str) -> None:
    """In any order, nested, at any strength, through an exception."""
    model = small_encoder(family).requires_grad_(False)
    core, hashed = bits(model), weights_sha256(model)
    one, two = sparse(model, 1), sparse(model, 2)
    with pytest.raises(RuntimeError, match="in the middle"), active(one, two):
        both = bits(model)
        with active(two):
            only = bits(model)
            with one.off(), two.off():
                assert same(bits(model), core)
            assert same(bits(model), only)
        assert same(bits(model), both) and weights_sha256(model) == hashed
        with dense(model):
            assert same(bits(model), core)
        two.scale = 0.5
        raise RuntimeError("in the middle")
    assert same(bits(model), core) and not one.on and not two.on
    two.scale = 1.0
    with active(one):
        first = bits(model)
    for name in core:
        change = (first[name] - core[name]) + (only[name] - core[name])
        assert torch.allclose(both[name] - core[name], change, atol=1e-12)
    assert subnetworks(model) == [one, two]
    one.detach_()
    two.detach_()
    assert not subnetworks(model)


def test_a_difference_goes_with_masks() -> None:
    """The mask acts on the shifted weight, and folding gives an ordinary model with both."""
    model = small_encoder().requires_grad_(False)
    heads = attach_(model, head_plan(model), lambda _, shape: HardConcreteGate(shape).eval())
    heads.double().gates["1/value"].scores.data[1] = -3
    gender = sparse(model, 3)
    with active(heads):
        masked = model(TEXT)[0]
    with active(heads, gender):
        both = model(TEXT)[0]
        folded = fold(model)
    assert torch.allclose(folded(TEXT)[0], both, atol=1e-12)
    assert not torch.allclose(both, masked, atol=1e-3)
    assert not subnetworks(folded)


def test_the_density_is_exact_and_the_largest_changes_stay() -> None:
    """Over all weights together, without noise."""
    model = small_encoder().requires_grad_(False)
    made, generator = difference_(model).double(), torch.Generator().manual_seed(0)
    for part in made.parts.values():
        part.delta.data.normal_(generator=generator)
        part.gates[0].scores.data.normal_(generator=generator)
    made.draw_(generator)
    made.eval()
    before = torch.cat([each.abs().flatten() for each in made.changes().values()])
    keep_largest_(made, 0.05)
    after = torch.cat([each.abs().flatten() for each in made.changes().values()])
    assert len(after) == round(0.05 * len(before))
    assert torch.equal(after.sort().values, before.sort().values[-len(after) :])
    assert made.density() == pytest.approx(0.05, abs=1e-3)


def test_where_fewer_gates_are_alive_a_warning_says_so() -> None:
    """Nothing that changes nothing is kept."""
    model = small_encoder().requires_grad_(False)
    made = difference_(model)
    next(iter(made.parts.values())).delta.data.flatten()[:7] = 1.0
    with pytest.warns(UserWarning, match="7 of .* entries change anything"):
        keep_largest_(made, 0.5)
    assert sum(len(part.index) for part in made.parts.values()) == 7
    with pytest.raises(ValueError, match="density is 0"):
        keep_largest_(made, 0)


def test_chosen_entries_learn_as_the_dense_difference_would() -> None:
    """The gradient of a value is that of delta at its place."""
    model = small_encoder().requires_grad_(False)
    made = sparse(model, 4, 0.02)
    core = bits(model)
    for _ in range(2):
        with learning(made):
            model(TEXT)[0][:, 0].pow(2).sum().backward()
    changed = {name: weight.clone().requires_grad_() for name, weight in core.items()}
    for name, weight in made.weights():
        part, own = made.parts[name], changed[name.replace("/", ".")]
        assert weight.grad is None
        own.data.view(-1)[part.index] += part.values.data
    torch.func.functional_call(model, changed, (TEXT,))[0][:, 0].pow(2).sum().backward()
    for name, _ in made.weights():
        part, own = made.parts[name], changed[name.replace("/", ".")]
        if own.grad is None:
            assert part.values.grad is None
        else:
            assert torch.allclose(part.values.grad, 2 * own.grad.view(-1)[part.index], atol=1e-9)


def test_a_core_that_is_trained_between_keeps_what_it_learned() -> None:
    """Parallel training: what is put back is what stood there last."""
    model = small_encoder()
    made = sparse(model, 5)
    with active(made):
        pass
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    core = bits(model)
    made.on = True
    made.on = False
    assert same(bits(model), core)


def test_only_what_is_on_learns() -> None:
    """Another difference that is on, or off, gets no gradient."""
    model = small_encoder().requires_grad_(False)
    one, two = sparse(model, 1), sparse(model, 2)
    two.on = True
    with learning(one):
        model(TEXT)[0][:, 0].pow(2).sum().backward()
    assert any(part.values.grad is not None for part in one.parts.values())
    assert all(part.values.grad is None for part in two.parts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scope_is_all_weights_or_those_of_the_layers(family: str) -> None:
    """Embeddings are layer 0, the pooler counts with the last."""
    model = small_encoder(family, layers=2)
    every, layers = every_weight(model), every_weight(model, "layers")
    assert every.keys() == dict(model.named_parameters()).keys()
    assert layers.keys() == {name for name in every if "layer" in name.split("LayerNorm")[0]}
    assert set(every.values()) == set(range(max(every.values()) + 1))
    assert all(every[name] == 0 for name in every if name.startswith("embeddings."))
    with pytest.raises(ValueError, match="scope is 'heads'"):
        every_weight(model, "heads")


def test_the_penalty_is_a_sum_over_gates_with_a_weight_per_layer() -> None:
    """L0 of Louizos et al. at the paper's bounds, where it is the sigmoid of the score."""
    model = small_encoder(layers=2)
    made = difference_(model).double()
    places = every_weight(model)
    expected = [0.0, 0.0, 0.0]
    for name, part in made.parts.items():
        part.gates[0].scores.data.normal_()
        place = places[name.replace("/", ".")]
        expected[place] += torch.sigmoid(part.gates[0].scores).sum().item()
    for by_layer, wanted in (("", sum(expected)), ("0 3 0", 3 * expected[1])):
        weights = penalty_weights(1.0, by_layer, model)
        assert penalty(made, weights).item() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="2 penalties; expected 3"):
        penalty_weights(1.0, "1 2", model)


def test_a_file_gives_the_same_difference_back(tmp_path: Path) -> None:
    """Sparse, with what its reader should know."""
    model = small_encoder().requires_grad_(False)
    gender = sparse(model, 6)
    with active(gender):
        changed = bits(model)
    path = save(gender, tmp_path / "gender.safetensors", attribute="gender", seed=6)
    gender.detach_()
    again = load(path, model)
    assert not again.on and not any(p.requires_grad for p in again.parameters())
    with active(again):
        assert same(bits(model), changed)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert about["attribute"] == "gender" and about["base_sha256"] == weights_sha256(model)


def rewritten(path: Path, change: str) -> None:
    """A file that was tampered with and whose hash was left out or made to fit."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(".index"))
    shapes = json.loads(about["shapes"])
    if change != "altered":
        del about["sha256"]
    if change == "altered":
        tensors[name.replace("index", "values")][0] += 1
    elif change == "place":
        tensors[name][-1] = 10**6
    elif change == "length":
        tensors[name] = tensors[name][1:].clone()
    elif change == "shape":
        shapes[name.removesuffix(".index")] = [1, 2]
    elif change == "name":
        shapes["no/such/weight"] = [1]
    save_file(tensors, path, about | {"shapes": json.dumps(shapes)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("altered", "was altered"),
        ("place", "do not belong"),
        ("length", "do not belong"),
        ("shape", "is \\[1, 2\\], the model's is"),
        ("name", "no/such/weight|no attribute"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: str, message: str) -> None:
    """And the model is left as it was."""
    model = small_encoder().requires_grad_(False)
    gender = sparse(model, 6)
    path = save(gender, tmp_path / "gender.safetensors")
    gender.detach_()
    core = bits(model)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load(path, model)
    assert same(bits(model), core) and not subnetworks(model)


def test_a_file_for_another_base_or_cut_off_is_refused(tmp_path: Path) -> None:
    """By the hash of the weights, and by safetensors."""
    model = small_encoder().requires_grad_(False)
    path = save(sparse(model, 6), tmp_path / "gender.safetensors")
    other = small_encoder(seed=1)
    with pytest.raises(ValueError, match="was made for"):
        load(path, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole safetensors"):
        load(path, model)
    assert not subnetworks(other)


def test_the_published_gradient_differs_where_gates_are_closed() -> None:
    """A closed entry keeps learning there; by the equation it does not."""
    weight, gradient = torch.zeros(4), torch.ones(4)
    found = {}
    for kind in ("exact", "published_code"):
        part = Dense(weight, gradient=kind).eval()
        part.gates[0].scores.data.fill_(-3)
        with torch.no_grad():
            part.pull_(gradient, 1.0)
        found[kind] = part.delta.grad
    assert found["exact"].tolist() == [0] * 4 and found["published_code"].tolist() == [1] * 4
    with pytest.raises(ValueError, match="gradient is 'approximate'"):
        Dense(weight, gradient="approximate")


def test_a_difference_of_no_weights_is_nothing() -> None:
    """An empty part changes nothing and can be saved."""
    weight = torch.randn(3)
    part = Entries(torch.empty(0, dtype=torch.int64), torch.empty(0))
    with torch.no_grad():
        part.add_(changed := weight.clone(), 1.0)
    assert torch.equal(changed, weight) and F.relu(part.penalty()) == 0
