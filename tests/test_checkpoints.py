"""State dicts of nn_pruning, read into a subnetwork: the hidden states are those of the run."""

import copy
import re
from pathlib import Path

import pytest
import torch
from nn_pruning_reference import Patched, patch_
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

from pruning_bias.anatomy import Encoder, anatomy, tiny_encoder
from pruning_bias.benchmarks import builtin_tests, seat
from pruning_bias.checkpoints import read_scores
from pruning_bias.edits import GatedLinear
from pruning_bias.subnetworks import fold

LIGHTNING = "model_debias.model."
HEADS = {"rows": 16, "cols": 64}


def finished(
    model: BertModel, rows: int, cols: int, method: str = "sigmoied_threshold", **rest: object
) -> Patched:
    """A run's end on a copy of a model: random scores, final threshold, evaluation mode."""
    patched = patch_(copy.deepcopy(model).eval(), rows, cols, method, **rest)
    generator = torch.Generator().manual_seed(1)
    for scores in patched.scores().values():
        scores.data = torch.randn(scores.shape, generator=generator) * 2 - 1
    return patched


def state_of(patched: Patched, prefix: str = LIGHTNING) -> dict[str, Tensor]:
    """Its state dict under another prefix."""
    state = patched.host.state_dict()
    return {prefix + name.removeprefix("bert."): value for name, value in state.items()}


@torch.no_grad()
def states(model: BertModel) -> Tensor:
    """The last hidden states of two short sentences."""
    ids = torch.randint(1000, 20000, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).last_hidden_state


@pytest.fixture
def model() -> BertModel:
    """The encoder before the run."""
    return tiny_encoder().eval().requires_grad_(False)


def check(model: BertModel, patched: Patched, state: dict[str, Tensor], **how: object) -> None:
    """Our hidden states are its own to the bit, by weights and by activations."""
    dense = states(model)
    expected = states(patched.host.bert)
    for in_weights in (True, False):
        subnetwork = read_scores(state, model, in_weights=in_weights, **how)
        assert torch.equal(states(model), expected)
        subnetwork.detach_()
    assert not torch.equal(expected, dense)


@pytest.mark.parametrize("ffn", [True, False], ids=["ffn", "attention only"])
@pytest.mark.parametrize(
    ("rows", "cols"), [(16, 64), (8, 8), (32, 32), (16, 32)], ids=["heads", "8", "32", "16x32"]
)
def test_hidden_states_are_those_of_the_run(
    model: BertModel, rows: int, cols: int, ffn: bool
) -> None:
    """Plan and grids come from the shapes of the scores alone."""
    patched = finished(model, rows, cols, ffn=ffn)
    check(model, patched, state_of(patched))
    subnetwork = read_scores(state_of(patched), model)
    assert subnetwork.keep().keys() == patched.scores().keys()
    assert len(subnetwork.plan.get("0/ffn", ())) == 2 * ffn


def test_values_only(model: BertModel) -> None:
    """Scores of 420 hold query and key open."""
    patched = finished(model, **HEADS)
    for name, scores in patched.scores().items():
        if name.endswith(("query", "key")):
            scores.data.fill_(420)
    check(model, patched, state_of(patched))
    keep = read_scores(state_of(patched), model).keep()
    assert keep["0/query"].all() and keep["1/key"].all() and not keep["1/value"].all()


def test_shared_scores(model: BertModel) -> None:
    """Query, key and value that point at one storage, as they did on the CPU."""
    patched = finished(model, **HEADS)
    scores = patched.scores()
    for i, part in ((i, part) for i in range(2) for part in ("key", "value")):
        scores[f"{i}/{part}"].data = scores[f"{i}/query"].data
    check(model, patched, state_of(patched))


@pytest.mark.parametrize("prefix", [LIGHTNING, "model_debias.", "bert.", ""])
def test_prefixes(model: BertModel, prefix: str) -> None:
    """Whatever stands before the encoder's names, and the frozen original beside it."""
    patched = finished(model, **HEADS)
    original = {f"model_original.model.{n}": value for n, value in model.state_dict().items()}
    check(model, patched, original | state_of(patched, prefix))


def test_unfrozen(model: BertModel) -> None:
    """Other weights are refused, or taken on demand; the frozen original's are never taken."""
    patched = finished(model, **HEADS)
    with torch.no_grad():
        for parameter in patched.host.bert.parameters():
            if parameter.dim() == 2 and len(parameter) == 64:
                parameter.mul_(1.1)
    original = {f"model_original.model.{n}": value for n, value in model.state_dict().items()}
    state = original | state_of(patched)
    with pytest.raises(ValueError, match=r"weights differ from the model's.*weights=True"):
        read_scores(state, model)
    assert not any(isinstance(module, GatedLinear) for module in model.modules())
    check(model, patched, state, weights=True)
    read_scores(state, model).detach_()  # now they are the model's


def test_into_a_classifier(model: BertModel) -> None:
    """A model with a head on top takes the scores of its encoder, and keeps its head."""
    patched = finished(model, **HEADS)
    classifier = BertForSequenceClassification(model.config).eval().requires_grad_(False)
    head = classifier.classifier.weight.clone()
    read_scores(state_of(patched), classifier, weights=True)
    ids = torch.arange(1000, 1008)[None]
    expected = patched.host.bert(ids).pooler_output
    assert torch.equal(classifier(ids).logits, classifier.classifier(expected))
    assert torch.equal(classifier.classifier.weight, head)
    plain = fold(classifier)
    torch.testing.assert_close(plain(ids).logits, classifier(ids).logits)


@pytest.mark.parametrize(
    ("method", "rule", "level"),
    [("threshold", "threshold", -1.5), ("topK", "topk", 0.75), ("l0", "l0", 0.0)],
)
def test_rules(model: BertModel, method: str, rule: str, level: float) -> None:
    """The other rules, read by our names of them."""
    patched = finished(model, 16, 16, method)
    patched.set_threshold_(level)
    expected = states(patched.host.bert)
    read_scores(state_of(patched), model, rule=rule, threshold=level, in_weights=True)
    assert torch.equal(states(model), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_output_with_dense": True},
        {"dense_pruning_method": "sigmoied_threshold", "dense_block_rows": 8},
        {"dense_block_rows": 4, "dense_block_cols": 4},
    ],
    ids=["output with dense", "blocks of the FFN", "groups of units"],
)
def test_other_configurations(model: BertModel, settings: dict[str, object]) -> None:
    """What the published runs did not use, the library's own default among it."""
    patched = patch_(copy.deepcopy(model), 16, 16, **settings)
    generator = torch.Generator().manual_seed(1)
    for scores in (p for n, p in patched.host.named_parameters() if n.endswith("mask_scores")):
        scores.data = torch.randn(scores.shape, generator=generator) * 2 - 1
    check(model, patched, state_of(patched))


def test_files(model: BertModel, tmp_path: Path) -> None:
    """A safetensors file is read; a pickle is its owner's to open, in one line."""
    patched = finished(model, **HEADS)
    expected = states(patched.host.bert)
    torch.save({"epoch": 99, "state_dict": state_of(patched)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"no \.safetensors file.*weights_only=True"):
        read_scores(tmp_path / "last.ckpt", model)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    path = tmp_path / "last.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, path)
    read_scores(path, model)
    assert torch.equal(states(model), expected)
    path.write_bytes(path.read_bytes()[:1000])
    for broken in (path, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            read_scores(broken, model)


def test_two_lines_to_seat(packaged: Encoder) -> None:
    """A run's file and the encoder it began with are enough for its association tests."""
    head_size = anatomy(packaged.model).head_size
    patched = finished(packaged.model, head_size, packaged.model.config.hidden_size)
    expected = seat(patched.host.bert, packaged.tokenizer, builtin_tests()[:2], draws=100)
    model = copy.deepcopy(packaged.model)
    read_scores(state_of(patched), model, threshold=0.1)
    found = seat(model, packaged.tokenizer, builtin_tests()[:2], draws=100)
    for ours, theirs in zip(found, expected, strict=True):  # weights masked, or what they give
        assert ours == pytest.approx(theirs, abs=1e-6)


# what is refused


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Keys with one part of their names changed."""
    return {name.replace(old, new): value for name, value in state.items()}


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Tensors whose names do not match."""
    return {name: value for name, value in state.items() if not re.search(part, name)}


def changed(state: dict[str, Tensor], part: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor put in another's place."""
    return {name: value if re.search(part, name) else own for name, own in state.items()}


SCORES = r"mask_module.*mask_scores"
REFUSED = {
    "layers that the model lacks": (
        lambda s: renamed(s, "layer.1.", "layer.11."),
        r"layer\.11\.\S+ belongs to no linear map of BertModel with 2 layers",
    ),
    "a layer without scores": (
        lambda s: without(s, rf"layer\.1\.attention.self.value.{SCORES}"),
        "no scores for 1/value, though other layers have them",
    ),
    "scores that do not divide": (
        lambda s: changed(s, rf"layer\.0\.attention.self.key.{SCORES}", torch.zeros(5, 1)),
        r"self\.key: 5x1 scores do not divide its weight of 64x64",
    ),
    "units that differ": (
        lambda s: changed(s, rf"layer\.1\.output.dense.{SCORES}", torch.zeros(128)),
        "layer 1: the scores of its units are not the same",
    ),
    "no scores": (lambda s: without(s, "mask_scores"), "mask scores of 0 models"),
    "scores of two models": (
        lambda s: s | renamed(s, "model_debias", "model_other"),
        "mask scores of 2 models",
    ),
    "another width": (
        lambda s: changed(s, r"word_embeddings", torch.zeros(5, 64)),
        r"word_embeddings.weight is \(5, 64\), the model's is \(30522, 64\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(model: BertModel, case: str) -> None:
    """What does not fit is refused in a sentence, and the model is as it was."""
    break_, message = REFUSED[case]
    state = break_(state_of(finished(model, **HEADS)))
    for weights in (False, True):
        with pytest.raises(ValueError, match=message):
            read_scores(state, model, weights=weights)
    assert not any(isinstance(module, GatedLinear) for module in model.modules())


def test_weights_that_are_not_there(model: BertModel) -> None:
    """Scores alone are enough; weights that are asked for must all be there."""
    patched = finished(model, **HEADS)
    scores = {n: v for n, v in state_of(patched).items() if n.endswith("mask_scores")}
    check(model, patched, scores)
    with pytest.raises(ValueError, match="weights are not there"):
        read_scores(scores, model, weights=True)


def test_rules_without_scores_and_masks_of_two_sides(model: BertModel) -> None:
    """Magnitudes need no checkpoint; a mask of rows times columns is none of ours."""
    patched = finished(model, **HEADS)
    with pytest.raises(ValueError, match="has no scores"):
        read_scores(state_of(patched), model, rule="magnitude")
    sides = patch_(copy.deepcopy(model), 16, 64, dense_pruning_method="sigmoied_threshold:1d")
    with pytest.raises(ValueError, match="scores of rows and of columns"):
        read_scores(state_of(sides), model)
