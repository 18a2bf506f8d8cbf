"""Bad input: a clear sentence, nothing half-written, and the model as it was."""

import copy
import gzip
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from pruning_bias import anatomy as anatomy_module
from pruning_bias.anatomy import (
    Encoder,
    anatomy,
    load_encoder,
    packaged_folder,
    select_layers,
    tiny_encoder,
)
from pruning_bias.benchmarks import choose_tests, read_sets, read_test
from pruning_bias.corpus import Lexicon, lines, read_lexicon
from pruning_bias.debias import Teacher, debias_loss, hidden_states
from pruning_bias.differences import difference_
from pruning_bias.edits import Site
from pruning_bias.encoding import Encoded
from pruning_bias.fidelity import Fidelity
from pruning_bias.files import load, save
from pruning_bias.gates import FixedGate, ThresholdGate, openness
from pruning_bias.grids import Grid
from pruning_bias.plans import Plan, block_plan, ffn_plan, head_plan
from pruning_bias.subnetworks import attach_, subnetworks
from pruning_bias.texts import divide, read_classes
from pruning_bias.training import fit

MALE = "The king told his brother about it.\n"
FEMALE = "The queen told her sister about it.\n"
TARGET = "The engineer and the nurse talked about it.\n"
NOBODY = "It rained on the roof all night.\n"


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    """A random encoder of two layers."""
    return load_encoder("tiny")


@pytest.fixture
def untouched(tiny: Encoder) -> Iterator[PreTrainedModel]:
    """A copy of its model; afterwards it must be what it was, to the bit."""
    model, ids = copy.deepcopy(tiny.model), torch.arange(100, 110)[None]
    before, names = model(ids).last_hidden_state, [name for name, _ in model.named_modules()]
    yield model
    assert [name for name, _ in model.named_modules()] == names and not subnetworks(model)
    assert torch.equal(model(ids).last_hidden_state, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def shut(_: str, shape: tuple[int, int]) -> FixedGate:
    """A closed gate."""
    return FixedGate(torch.zeros(shape))


# Corpora


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (MALE * 3 + TARGET, "female"),
        (FEMALE * 3 + TARGET, "male"),
        (MALE + FEMALE, "target"),
        (MALE.strip() + " " + FEMALE + TARGET, "male"),
        (NOBODY * 5, "male"),
        ("\n\n\n", "male"),
    ],
    ids=["no female", "no male", "no target", "both in one", "nobody", "blank lines"],
)
def test_a_class_without_sentences(tmp_path: Path, tiny: Encoder, text: str, missing: str) -> None:
    """The message names the corpus and the class."""
    path = tmp_path / "some.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"some\.txt has 0 sentences with a {missing} word"):
        read_classes(tiny.tokenizer, str(path), "builtin", 10, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]


def test_a_class_that_cannot_be_divided(tmp_path: Path, tiny: Encoder) -> None:
    """One sentence is too few to train on and to measure."""
    (tmp_path / "few.txt").write_text(MALE + FEMALE * 9 + TARGET * 9)
    encoded = read_classes(tiny.tokenizer, str(tmp_path / "few.txt"), "builtin", 0, 0)
    with pytest.raises(ValueError, match="1 male sentences cannot be divided"):
        divide(encoded)


LINES = (MALE + FEMALE + TARGET).encode() * 40
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", r"a\.txt is empty"),
    "empty gzip": ("a.txt.gz", gzip.compress(b""), r"a\.txt\.gz is empty"),
    "no bytes for a gzip": ("a.txt.gz", b"", r"a\.txt\.gz"),
    "binary": ("a.txt", LINES[:74] + b"\x00\x01" + LINES[74:], r"a\.txt, line 3: .*binary"),
    "a picture": ("a.txt", b"\x89PNG\r\n\x1a\n\x00\x00", r"a\.txt, line 1: "),
    "UTF-16": ("a.txt", MALE.encode("utf-16"), r"a\.txt, line 1: "),
    "Latin-1": ("a.txt", LINES + "The café.\n".encode("latin-1"), r"a\.txt, line 121: not UTF-8"),
    "Latin-1 at once": ("a.txt", "Café\n".encode("latin-1"), r"a\.txt, line 1: not UTF-8"),
    "Latin-1 in gzip": (
        "a.txt.gz",
        gzip.compress(LINES + b"\xff\n"),
        r"a\.txt\.gz, line 121: not UTF-8",
    ),
    "cut gzip": ("a.txt.gz", gzip.compress(LINES)[:-30], r"a\.txt\.gz, after line \d+: .*gzip"),
    "text named gzip": ("a.txt.gz", LINES, r"a\.txt\.gz, after line 0: .*gzip"),
    "wrong checksum": (
        "a.txt.gz",
        gzip.compress(LINES)[:-8] + b"\0" * 8,
        r"a\.txt\.gz, after line 120: .*gzip",
    ),
    "spoilt gzip": (
        "a.txt.gz",
        gzip.compress(LINES)[:40] + b"\xff" * 40 + gzip.compress(LINES)[80:],
        r"a\.txt\.gz, after line \d+: .*gzip",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_corpus_that_is_no_text(tmp_path: Path, tiny: Encoder, what: str) -> None:
    """The message names the file, and the line where one can be named."""
    name, content, message = BROKEN[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(lines(tmp_path / name))
    with pytest.raises(ValueError, match=message):
        read_classes(tiny.tokenizer, str(tmp_path / name), "builtin", 0, 0)


@pytest.mark.parametrize("name", ["none.txt", "none.txt.gz", "", "  ", "."])
def test_a_corpus_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A missing file, a folder, or no name at all."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no corpus at .*expected a text file"):
        list(lines(name))


def test_a_lexicon_that_is_none(tmp_path: Path, tiny: Encoder) -> None:
    """A folder without lists, an empty list, and a name that is no folder."""
    with pytest.raises(ValueError, match=r"no word list .*male\.txt"):
        read_lexicon(tmp_path)
    for name in ("male", "female", "stereotype"):
        (tmp_path / f"{name}.txt").write_text("word\n")
    (tmp_path / "female.txt").write_text("")
    with pytest.raises(ValueError, match=r"female\.txt is empty"):
        read_lexicon(tmp_path)
    (tmp_path / "female.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="list of female words is empty"):
        read_lexicon(tmp_path)
    with pytest.raises(ValueError, match="list of target words is empty"):
        Lexicon(frozenset({"he"}), frozenset({"she"}), frozenset())
    with pytest.raises(ValueError, match="nowhere"):
        read_classes(tiny.tokenizer, "synthetic", "nowhere", 10, 0)


# Names


def test_unknown_names(tiny: Encoder) -> None:
    """Each message says what came and what there is."""
    with pytest.raises(ValueError, match=r"'middle'.*first, last, all, intermediate"):
        select_layers((torch.zeros(1),), "middle")
    with pytest.raises(ValueError, match=r"'seat'.*builtin, official, both"):
        choose_tests("seat")
    with pytest.raises(ValueError, match=r"'l2'.*'l1' or 'l0'"):
        openness(torch.zeros(1), "l2")
    for text in ("paper", "", " ", "+dropout", "published"):
        with pytest.raises(ValueError, match=r"fidelity is .*'equations' or 'published_code'"):
            Fidelity.parse(text)
    for text in ("equations+speed", "published_code -dropout +", "equations+Dropout"):
        with pytest.raises(ValueError, match=r"fidelity has no switch .*squared_sum"):
            Fidelity.parse(text)


def small_batch() -> Encoded:
    """Two sentences of three pieces."""
    flat = np.ones(6)
    offsets, kinds = np.array([0, 3, 6]), np.zeros(2, np.uint8)
    return Encoded(flat.astype(np.int32), flat.astype(np.uint8), offsets, kinds)


@pytest.mark.parametrize(("layer", "mode"), [("last", "word"), ("last", ""), ("top", "token")])
def test_unknown_layer_or_mode_of_a_loss(untouched: PreTrainedModel, layer: str, mode: str) -> None:
    """Both are refused wherever they are used."""
    batch, pair = small_batch().batch([0, 1]), torch.zeros(1, 2, 64)
    teacher = Teacher(lambda b: hidden_states(untouched, b))
    with pytest.raises(ValueError, match=f"{'mode' if layer == 'last' else 'layer'} is "):
        debias_loss(untouched, teacher, batch, batch, pair, layer=layer, mode=mode)


def test_unknown_encoders(tmp_path: Path, tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder, a folder without weights, a family that we do not know, weights as a pickle."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "no such/model/at-all", str(tmp_path)):
        with pytest.raises(ValueError, match=f"no encoder '{name}'"):
            load_encoder(name)
    other = GPT2Model(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match="'gpt2'; known are bert"):
        anatomy(other)
    other.save_pretrained(tmp_path / "gpt")
    tiny.tokenizer.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match="'gpt2'; known are bert"):
        load_encoder(str(tmp_path / "gpt"))
    tiny_encoder().save_pretrained(tmp_path / "pickled")
    tiny.tokenizer.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_encoder().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_encoder(str(tmp_path / "pickled"))


def test_the_packaged_encoder_must_be_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file under its name, another hash expected, or no package at all."""
    monkeypatch.setattr(anatomy_module, "PACKAGED_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"sha256 53aa5117.* expected 0000"):
        load_encoder("packaged")
    monkeypatch.undo()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    find = "importlib.util.find_spec"
    elsewhere = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(find, lambda *_: elsewhere)
    with pytest.raises(ValueError, match=r"expected 53aa5117.*reinstall"):
        packaged_folder()
    monkeypatch.setattr(find, lambda *_: None)
    with pytest.raises(ValueError, match="not installed: pip install"):
        packaged_folder()


def test_association_tests_that_are_none(tmp_path: Path) -> None:
    """A set that is missing or empty, and files that are not JSON."""
    sets = {k: {"examples": ["one"]} for k in ("targ1", "targ2", "attr1", "attr2")}
    assert read_test("mine", sets).x == ("one",)
    for broken in (sets | {"attr1": {"examples": []}}, {k: sets[k] for k in sets if k != "attr1"}):
        with pytest.raises(ValueError, match="test mine has no sentences in attr1"):
            read_test("mine", broken)
    path = tmp_path / "mine.jsonl"
    for content in (b"", b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.jsonl is no association test"):
            read_sets(path)


# Plans that do not fit


def bad_plans(model: PreTrainedModel) -> dict[str, tuple[Plan, str]]:
    """Plans whose fault comes after sites that fit."""
    first = head_plan(model)
    name = "encoder.layer.1.attention.self.query"
    return {
        "block": (block_plan(model, 48), "64x64 cannot be cut into groups of 48x48"),
        "block of none": (block_plan(model, 0), "64x64 cannot be cut into groups of 0x0"),
        "late block": (
            first | {"1/x": (Site(name, Grid(5, 64)),)},
            "64x64 cannot be cut into groups of 5x64",
        ),
        "no such map": (
            first | {"1/x": (Site("encoder.layer.7.output.dense", Grid(1, 1)),)},
            "BertModel has no linear map called 'encoder.layer.7.output.dense'",
        ),
        "no linear map": (
            first | {"1/x": (Site("encoder.layer.1", Grid(1, 1)),)},
            "no linear map called 'encoder.layer.1'",
        ),
        "bias": (
            first | {"1/x": (Site(name, Grid(64, 1), bias="gated"),)},
            "a bias can be gated only where groups are whole rows",
        ),
        "tie": (
            ffn_plan(model) | {"1/x": (Site(name, Grid(1, 64)), Site(name, Grid(2, 64)))},
            r"gate '1/x' is \(64, 1\), its site .*query needs \(32, 1\)",
        ),
    }


@pytest.mark.parametrize(
    "what", ["block", "block of none", "late block", "no such map", "no linear map", "bias", "tie"]
)
def test_plans_that_do_not_fit(untouched: PreTrainedModel, what: str) -> None:
    """Nothing is attached before everything is known to fit."""
    plan, message = bad_plans(untouched)[what]
    with pytest.raises(ValueError, match=message):
        attach_(untouched, plan, shut)


def test_gates_that_do_not_fit(untouched: PreTrainedModel) -> None:
    """A gate of another shape, a gate that raises, a layer that is not there."""
    wrong = iter([FixedGate(torch.zeros(4, 1)), FixedGate(torch.zeros(3, 1))])
    with pytest.raises(ValueError, match=r"gate '1/value' is \(3, 1\), its site .* needs \(4, 1\)"):
        attach_(untouched, head_plan(untouched), lambda name, shape: next(wrong))
    masks = {"0/value": torch.zeros(4, 1)}
    with pytest.raises(KeyError):
        attach_(untouched, head_plan(untouched), lambda name, shape: FixedGate(masks[name]))
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"no layer {layer}: bert has 2"):
            head_plan(untouched, layers=(0, layer))
    with pytest.raises(ValueError, match=r"'values'.*query, key, value"):
        head_plan(untouched, ("values",))


def test_a_gated_model_is_not_saved(tmp_path: Path, untouched: PreTrainedModel) -> None:
    """Its file would lose the gates; after they are off it can be saved again."""
    first, second = (attach_(untouched, head_plan(untouched), shut) for _ in range(2))
    for subnetwork in (first, second):
        with pytest.raises(RuntimeError, match=r"save\(subnetwork, path\)"):
            untouched.save_pretrained(tmp_path / "model")
        subnetwork.detach_()
    assert not list(tmp_path.iterdir())
    untouched.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


# Training


def test_a_loss_that_is_not_finite(untouched: PreTrainedModel) -> None:
    """The message names the first such step and which value it was."""
    subnetwork = attach_(untouched, head_plan(untouched), lambda _, shape: ThresholdGate(shape))
    optimizer = AdamW(subnetwork.parameters(), lr=0.01)
    steps: list[int] = []

    def loss_fn(batch: int) -> dict[str, Tensor]:
        found = sum(gate.scores.square().sum() for gate in subnetwork.gates.values())
        factor = {17: float("nan"), 18: float("inf")}.get(batch, 1.0)
        return {"loss": found * factor, "penalty": found}

    with pytest.raises(FloatingPointError, match="step 17: loss is nan"):
        fit(iter(range(99)), loss_fn, optimizer, steps=30, before_step=steps.append)
    assert steps == list(range(20))  # looked at once in ten steps, named to the step
    subnetwork.detach_()


def test_batches_that_end_early(untouched: PreTrainedModel) -> None:
    """Too few batches are named as such."""
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"3 .*5"):
        fit(iter(range(3)), lambda _: {"loss": weight.sum()}, AdamW([weight]), steps=5)


# Saved subnetworks


@pytest.fixture
def saved(tmp_path: Path, untouched: PreTrainedModel) -> Path:
    """A subnetwork's file, the model free of it."""
    subnetwork = attach_(untouched, head_plan(untouched), shut)
    path = save(subnetwork, tmp_path / "heads.safetensors")
    subnetwork.detach_()
    return path


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Alter the tensors or the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    change(tensors, about)
    save_file(tensors, path, metadata=about)


@pytest.mark.parametrize("left", [0, 4, 60, -300, -20, -1])
def test_a_subnetwork_cut_short(saved: Path, untouched: PreTrainedModel, left: int) -> None:
    """In its length, its header or its tensors."""
    saved.write_bytes(saved.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load(saved, untouched)


def test_a_file_that_is_no_subnetwork(saved: Path, untouched: PreTrainedModel) -> None:
    """Garbage, another kind of safetensors file, and no file."""
    save_file({"x": torch.zeros(1)}, saved)
    with pytest.raises(ValueError, match=r"heads\.safetensors is no saved subnetwork: it lacks"):
        load(saved, untouched)
    saved.write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load(saved, untouched)
    saved.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"heads\.safetensors"):
        load(saved, untouched)


ALTERED: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    "mask gone": lambda tensors, about: tensors.pop("1/value.keep"),
    "mask of another shape": lambda t, about: t.update({"1/value.keep": torch.zeros(5, 1)}),
    "plan no JSON": lambda tensors, about: about.update(plan="{"),
    "plan a list": lambda tensors, about: about.update(plan="[]"),
    "plan of another map": lambda tensors, about: about.update(
        plan=about["plan"].replace("layer.1", "layer.9")
    ),
    "plan without grid": lambda tensors, about: about.update(
        plan=about["plan"].replace("16, 64, ", "")
    ),
    "grid no number": lambda tensors, about: about.update(
        plan=about["plan"].replace("16, 64", '"16", 64')
    ),
    "another base": lambda tensors, about: about.update(base_sha256="0" * 64),
}


@pytest.mark.parametrize("what", list(ALTERED))
def test_a_subnetwork_that_was_altered(saved: Path, untouched: PreTrainedModel, what: str) -> None:
    """Masks, plan and base that do not belong together."""
    rewritten(saved, ALTERED[what])
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load(saved, untouched)


def test_saving_fails_whole(tmp_path: Path, untouched: PreTrainedModel) -> None:
    """A full disk leaves the old file and nothing else; a folder that is not there, nothing."""
    subnetwork = attach_(untouched, head_plan(untouched), shut)
    path = save(subnetwork, tmp_path / "heads.safetensors")
    before = path.read_bytes()
    with smallest_files(100), pytest.raises(OSError, match="too large"):
        save(subnetwork, path, note="a longer file")
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
    with pytest.raises(OSError, match="none"):
        save(subnetwork, tmp_path / "none" / "heads.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    subnetwork.detach_()


@contextmanager
def smallest_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the disk is as good as full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_difference_is_saved_when_its_entries_are_chosen(
    tmp_path: Path, untouched: PreTrainedModel
) -> None:
    """With a gate for every weight it would be three times its base."""
    subnetwork = difference_(untouched)
    with pytest.raises(ValueError, match="keep_largest_"):
        save(subnetwork, tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())
    subnetwork.detach_()
