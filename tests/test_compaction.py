"""Compact equals gated, whatever is closed; nothing else changes, and files come back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pruning_bias.anatomy import Encoder, anatomy
from pruning_bias.compaction import compact, cut_, dense_shaped, load_compact, needed, sizes
from pruning_bias.differences import difference_
from pruning_bias.files import weights_sha256
from pruning_bias.gates import FixedGate
from pruning_bias.plans import (
    Plan,
    block_plan,
    ffn_plan,
    head_output_plan,
    head_plan,
    mlp_plan,
    weight_plan,
)
from pruning_bias.subnetworks import active, attach_, fold

FAMILIES = ("bert", "roberta", "electra", "distilbert", "albert")
VOCABULARY, HEADS, HEAD_SIZE, UNITS = 40, 3, 4, 10
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
QKV = ("query", "key", "value")

PLANS: dict[str, Callable[[PreTrainedModel], Plan]] = {
    "value heads": head_plan,
    "separate heads": lambda m: head_plan(m, QKV),
    "tied heads": lambda m: head_plan(m, QKV, tied=True),
    "head outputs": head_output_plan,
    "blocks": lambda m: block_plan(m, 2),
    "units": ffn_plan,
    "MLPs": mlp_plan,
    "weights": weight_plan,
    "blocks and units": lambda m: block_plan(m, 4) | ffn_plan(m),
    "everything": lambda m: head_plan(m, QKV) | head_output_plan(m) | ffn_plan(m) | mlp_plan(m),
}


def encoder(
    family: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kind: type = AutoModel,
) -> PreTrainedModel:
    """A tiny random encoder with biases that are not zero."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        embedding_size=6 if family in ("albert", "electra") else HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=UNITS,
        max_position_embeddings=20,
        pad_token_id=0,
    )
    if family == "distilbert":
        config.hidden_dim = UNITS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def run(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """All hidden states of three sentences, the second and the third padded, in float64."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    attention = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    states = model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
    return torch.stack(states.hidden_states).double() * attention[..., None]


def at_random(seed: int, share: float = 0.5) -> Callable[[str, tuple[int, int]], FixedGate]:
    """Gates of which this share is open, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, shape: FixedGate(torch.rand(shape, generator=generator) < share)


def closed(_: str, shape: tuple[int, int]) -> FixedGate:
    """Gates that let nothing through."""
    return FixedGate(torch.zeros(shape))


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def same(one: Tensor, other: Tensor, within: float = 1e-5) -> bool:
    return (one - other).abs().max().item() <= within


# The same function


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_compact_equals_gated(family: str, plan: str, tmp_path: Path) -> None:
    """In both precisions and kinds of attention, with padding; and after saving and loading."""
    draws = ((torch.float32, 0.6), (torch.float64, 0.2), (torch.float32, 0.9))
    for seed, (dtype, share) in enumerate(draws):
        model = encoder(family, seed, dtype)
        before = weights_sha256(model), model.config.to_dict()
        attach_(model, PLANS[plan](model), at_random(seed, share))
        small = compact(model)
        assert type(small) is type(model) and not small.training
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            small.set_attn_implementation(attention)
            assert same(run(small), run(model), TOLERANCE[dtype])
        small.save_pretrained(tmp_path / str(seed))
        again = load_compact(tmp_path / str(seed))
        assert torch.equal(run(again), run(small)) and again.dtype == dtype
        assert weights_sha256(again) == weights_sha256(small)
        assert (weights_sha256(model), model.config.to_dict()) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_layer_may_lose_all_its_heads_and_units(
    family: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer or every layer; fused attention, which may divide by it, never sees zero heads."""
    fused = F.scaled_dot_product_attention

    def counted(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert query.shape[1] > 0
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for make in (head_plan, head_output_plan, ffn_plan, mlp_plan, PLANS["everything"]):
        for layers in ((0,), None):
            model = encoder(family)
            model.set_attn_implementation(attention)
            everything = make(model)
            plan = {k: v for k, v in everything.items() if layers is None or k.startswith("0/")}
            attach_(model, plan, closed)
            small = compact(model)
            assert same(run(small), run(model))
            kept = small.config.kept_units if make in (ffn_plan, mlp_plan) else None
            assert (kept or [len(h) for h in small.config.kept_heads])[0] == 0
            small.save_pretrained(tmp_path)
            again = load_compact(tmp_path)
            again.set_attn_implementation(attention)
            assert torch.equal(run(again), run(small))
    maps = [
        name
        for name, m in small.named_modules()
        if isinstance(m, nn.Linear) and not m.weight.numel()
    ]
    assert len(maps) == 6 * len(anatomy(model).layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_closed_group_still_adds_is_kept(family: str) -> None:
    """Weights zero and biases not: a head adds its value bias, a unit its activated bias."""
    model = encoder(family, dtype=torch.float64)
    weights = weight_plan(model)
    parts = {k: v for k, v in weights.items() if k.endswith(("/value", "/intermediate"))}
    attach_(model, parts, closed)
    small = compact(model)
    assert not any(small.config.kept_heads) and not any(small.config.kept_units)
    assert same(run(small), run(model), 1e-12)
    o = anatomy(model).layers[0].attention_output
    assert not torch.equal(small.get_submodule(o).bias, model.get_submodule(o).bias)


def test_a_head_leaves_where_values_and_outputs_are_closed_by_halves() -> None:
    """Blocks that free no whole row leave nothing; complementary ones free the head."""
    model = encoder("bert")
    value, output = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        value.weight[:2], output.weight[:, 2:] = 0, 0
    assert needed(value, output, 2).tolist() == [False, False]
    assert needed(value, nn.Linear(4, 4), 2).tolist() == [False, True]
    subnetwork = attach_(model, block_plan(model, 4), at_random(0, 0.6))
    assert not all(keep.all() for keep in subnetwork.keep().values())
    assert parameters(compact(model)) == parameters(fold(model))


def test_a_head_without_queries_or_keys_stays() -> None:
    """It still adds the mean of its values; removing it is the published code's slip."""
    for parts in (("query",), ("key",), ("query", "key")):
        model = encoder("bert")
        attach_(model, head_plan(model, parts), closed)
        small = compact(model)
        assert small.config.kept_heads == [[0, 1, 2]] * 2
        assert same(run(small), run(model))
        published = cut_(fold(model), [[0], [0]], [range(UNITS)] * 2)
        assert not same(run(published), run(model), 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_active_subnetworks_count_and_no_others(family: str) -> None:
    """Several at once, one of them only, masks and differences, half strength."""
    model = encoder(family)
    dense = run(model)
    heads = attach_(model, head_plan(model), at_random(1))
    units = attach_(model, ffn_plan(model), at_random(2))  # masks first: what is closed is closed
    shift = difference_(model)
    for part in shift.parts.values():
        nn.init.normal_(part.delta, std=0.1)
    for wanted in ([heads, units], [heads], [units, shift], [heads, units, shift]):
        with active(*wanted):
            small = compact(model)
            assert same(run(small), run(model))
        assert parameters(small) < parameters(fold(model))
    with heads.off(), units.off(), shift.off():
        assert torch.equal(run(compact(model)), dense)
    heads.scale, units.scale = 0.5, 0.5
    with shift.off():
        assert parameters(compact(model)) == parameters(fold(model))
        assert same(run(compact(model)), run(model))


# What does not change


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_compact_to_the_dense_model(family: str) -> None:
    """To the byte."""
    model = encoder(family)
    dense, sha = run(model), weights_sha256(model)
    attach_(model, PLANS["everything"](model), lambda _, shape: FixedGate(torch.ones(shape)))
    small = compact(model)
    assert weights_sha256(small) == sha and torch.equal(run(small), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_compacting_twice_changes_nothing(family: str) -> None:
    """The same bytes, the same config; and gates on a compact model work like any."""
    model = encoder(family)
    attach_(model, head_plan(model) | ffn_plan(model), at_random(5, 0.7))
    small = compact(model)
    twice = compact(small)
    assert weights_sha256(twice) == weights_sha256(small)
    assert twice.config.to_dict() == small.config.to_dict()
    attach_(small, head_plan(small) | ffn_plan(small), at_random(6, 0.5))
    thrice = compact(small)
    assert same(run(thrice), run(small)) and parameters(thrice) < parameters(twice)
    for before, after in zip(twice.config.kept_heads, thrice.config.kept_heads, strict=True):
        assert set(after) <= set(before)  # numbered as in the dense model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_shrinks_by_what_left(family: str, tmp_path: Path) -> None:
    """Parameters and bytes of the file."""
    model = encoder(family)
    attach_(model, head_plan(model) | ffn_plan(model), at_random(5))
    small, dense = compact(model), fold(model)
    hidden, files = HEADS * HEAD_SIZE, {}
    gone = sum(
        (HEADS - len(heads)) * HEAD_SIZE * (4 * hidden + 3) + (UNITS - units) * (2 * hidden + 1)
        for heads, units in zip(small.config.kept_heads, small.config.kept_units, strict=True)
    )
    assert parameters(dense) - parameters(small) == gone > 0
    for name, each in (("dense", dense), ("small", small)):
        each.save_pretrained(tmp_path / name)
        files[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert abs(files["dense"] - files["small"] - 4 * gone) <= 256  # the header's own digits


@pytest.mark.parametrize("family", FAMILIES)
def test_anyone_can_read_the_dense_shape(family: str, tmp_path: Path) -> None:
    """Made from the gated or from the compact model; a compact one is refused, not mended."""
    model = encoder(family)
    attach_(model, head_plan(model) | ffn_plan(model), at_random(5))
    small = compact(model)
    for each in (model, small):
        dense_shaped(each).save_pretrained(tmp_path / "dense")
        again = AutoModel.from_pretrained(tmp_path / "dense").eval()
        assert same(run(again), run(model))
        assert not hasattr(again.config, "kept_heads")
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_a_model_with_a_head_on_top_compacts_too(family: str, kind: type, tmp_path: Path) -> None:
    """Tied weights of a masked-LM head stay tied."""
    model = encoder(family, kind=kind)
    if kind is AutoModelForMaskedLM:
        model.tie_weights()
    attach_(model, head_plan(model) | ffn_plan(model), at_random(5))
    small = compact(model)
    small.save_pretrained(tmp_path)
    again = load_compact(tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    assert same(small(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)
    assert parameters(again) == parameters(small) < parameters(fold(model))


# Broken folders


def _config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "config.json").write_text("{"),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04N."),
        lambda f: _cut_off(f / "model.safetensors"),
        lambda f: _config(f, kept_heads=None),
        lambda f: _config(f, kept_units=None),
        lambda f: _config(f, kept_heads=[[0, 1, 2]]),
        lambda f: _config(f, kept_heads=[[0, 1, 2], [0, 1, 2]]),
        lambda f: _config(f, kept_heads=[[0, 7], [1]]),
        lambda f: _config(f, kept_heads="all"),
        lambda f: _config(f, kept_units=[10, 10]),
        lambda f: _config(f, kept_units=["a", 10]),
        lambda f: _config(f, architectures=None),
        lambda f: _config(f, architectures=["AutoModel"]),
        lambda f: _config(f, architectures=["RobertaModel"]),
        lambda f: _config(f, model_type="gpt2"),
    ],
)
def test_a_broken_folder_is_refused(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    """Whatever is missing, torn or does not fit."""
    model = encoder("bert")
    attach_(model, head_plan(model) | ffn_plan(model), at_random(5))
    compact(model).save_pretrained(tmp_path)
    load_compact(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match="no whole compact model"):
        load_compact(tmp_path)


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_an_ordinary_folder_is_refused(tmp_path: Path) -> None:
    """And the error says who reads it; a folder that is not there is not sought on the hub."""
    encoder("bert").save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere", "bert-base-uncased"):
        with pytest.raises(ValueError, match="from_pretrained"):
            load_compact(folder)


# The packaged encoder, and what was gained


def test_the_packaged_encoder_shrinks_and_stays_the_same(packaged: Encoder, tmp_path: Path) -> None:
    """Half of its heads and units leave; sizes says what that gave."""
    model = packaged.model
    subnetwork = attach_(model, head_plan(model) | ffn_plan(model), at_random(0))
    try:
        small = compact(model)
        small.save_pretrained(tmp_path)
        again = load_compact(tmp_path)
        texts = ["The nurse said that she would come.", "A doctor came."]
        batch = packaged.tokenizer(texts, padding=True, return_tensors="pt")
        mask = batch.attention_mask[..., None]
        gated, compacted = model(**batch)[0] * mask, small(**batch)[0] * mask
        assert same(compacted, gated)
        assert torch.equal(again(**batch)[0] * mask, compacted)
        rows = sizes(model, small, [(batch.input_ids, batch.attention_mask)], rounds=1)
    finally:
        subnetwork.detach_()
    found = {(row["state"], row["metric"]): row["value"] for row in rows}
    assert {row["draw"] for row in rows} == {0} and len(rows) == len(found) == 6
    assert found["before", "parameters"] == parameters(model)
    assert found["after", "parameters"] == parameters(small) < 0.8 * parameters(model)
    file = (tmp_path / "model.safetensors").stat().st_size
    assert found["after", "megabytes"] == pytest.approx(file / 1e6, rel=1e-3)
    assert all(value > 0 for value in found.values())
