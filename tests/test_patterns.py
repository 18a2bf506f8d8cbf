"""Attention maps, raw and normed, the shapes they have, and the experiment that counts them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from helpers import in_process
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from pruning_bias.anatomy import Encoder, anatomy, load_encoder, tiny_encoder
from pruning_bias.files import save
from pruning_bias.gates import FixedGate
from pruning_bias.patterns import attention_maps, head_vectors
from pruning_bias.plans import head_plan
from pruning_bias.runs import AttentionPatterns
from pruning_bias.shapes import (
    SHAPES,
    SMALLEST,
    THRESHOLDS,
    by_rows,
    draw_map,
    draw_maps,
    marks,
    rule,
)
from pruning_bias.shapes_cnn import ShapeCNN, learn_shapes, load_cnn, save_cnn
from pruning_bias.shares import (
    head_shares,
    heterogeneity,
    published_shares,
    share_figure,
    shares,
    surviving_heads,
)
from pruning_bias.subnetworks import attach_, fold
from pruning_bias.tasks import TaskBatch

FAMILIES: dict[str, tuple[type, type]] = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    "albert": (transformers.AlbertConfig, transformers.AlbertModel),
}


def family_model(family: str) -> PreTrainedModel:
    """A random encoder in float64: 3 layers (of ALBERT one, passed thrice), 4 heads of 8."""
    make_config, make_model = FAMILIES[family]
    config = make_config(vocab_size=100, pad_token_id=0, embedding_size=16)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    for name, value in (small | {"intermediate_size": 64, "initializer_range": 0.2}).items():
        setattr(config, config.attribute_map.get(name, name), value)
    torch.manual_seed(0)
    return make_model(config).double().eval()


def batch_of(lengths: list[int], seed: int = 0, pad_to: int = 0) -> TaskBatch:
    """Random pieces; the second half of each example is its second sentence."""
    size = max(*lengths, pad_to)
    pieces = np.random.default_rng(seed).integers(5, 100, (len(lengths), max(lengths)))
    ids, attention, types = (torch.zeros(len(lengths), size, dtype=torch.long) for _ in range(3))
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.from_numpy(pieces[row, :n])
        attention[row, :n] = 1
        types[row, n // 2 : n] = 1
    rows = torch.arange(len(lengths))
    return TaskBatch(ids, attention, types, torch.zeros_like(rows), rows)


# maps


def summed(model: PreTrainedModel, batch: TaskBatch, row_slices: bool) -> list[tuple[Tensor, ...]]:
    """Of each layer what its heads' vectors sum to, and what its output map gives, less bias."""
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    found, hooks = anatomy(model), []
    for layer in found.layers:
        value, out = (model.get_submodule(n) for n in (layer.value, layer.attention_output))
        hooks.append(value.register_forward_hook(lambda _, i, o: values.append(o)))
        hooks.append(out.register_forward_hook(lambda m, i, o: outputs.append(o - m.bias)))
    maps = attention_maps(model, batch)
    for hook in hooks:
        hook.remove()
    pairs = []
    for depth, (value, output) in enumerate(zip(values, outputs, strict=True)):
        name = found.layers[depth % len(found.layers)].attention_output
        f = head_vectors(value, model.get_submodule(name).weight, found.heads, row_slices)
        alpha = torch.stack([each.raw[depth] for each in maps])
        pairs.append((torch.einsum("bhij,bjhd->bid", alpha, f), output))
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_vectors_sum_to_the_attention_output_and_cut_by_rows_they_do_not(
    family: str,
) -> None:
    model, batch = family_model(family), batch_of([9, 9])
    with torch.no_grad():
        right = summed(model, batch, row_slices=False)
        published = summed(model, batch, row_slices=True)
    assert len(right) == 3
    for (vectors, output), (wrong, _) in zip(right, published, strict=True):
        assert (vectors - output).abs().max() <= 1e-12 * max(1, output.abs().max())
        assert (wrong - output).norm() > 0.5 * output.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_normed_maps_are_the_lengths_of_the_vectors_that_are_summed(family: str) -> None:
    """The vectors of all pairs, written out, have the lengths that are never written out."""
    model, batch = family_model(family), batch_of([6])
    values: list[Tensor] = []
    found = anatomy(model)
    value = model.get_submodule(found.layers[-1].value)
    hook = value.register_forward_hook(lambda _, i, o: values.append(o))
    (maps,) = attention_maps(model, batch)
    hook.remove()
    weight = model.get_submodule(found.layers[-1].attention_output).weight
    f = head_vectors(values[-1], weight, found.heads)[0].detach()
    pairs = torch.einsum("hij,jhd->hijd", maps.raw[-1], f)
    torch.testing.assert_close(maps.normed[-1], pairs.norm(dim=-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_map(family: str) -> None:
    model, lengths = family_model(family), [5, 11, 8]
    together = attention_maps(model, batch_of(lengths, pad_to=16))
    for row, maps in enumerate(together):
        whole = batch_of(lengths)
        cut = [t[row : row + 1, : lengths[row]] for t in whole[:3]]
        (alone,) = attention_maps(model, TaskBatch(*cut, whole.labels[:1], whole.index[:1]))
        assert maps.raw.shape == (3, 4, lengths[row], lengths[row])
        for one, other in zip(maps, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(maps.raw.sum(-1), torch.ones_like(maps.raw[..., 0]))


def test_the_encoder_is_left_as_it_was() -> None:
    model, batch = tiny_encoder().train(), batch_of([7, 4])
    was = model.config._attn_implementation
    torch.manual_seed(1)
    one, other = attention_maps(model, batch)[0], attention_maps(model, batch)[0]
    assert torch.equal(one.normed, other.normed), "no dropout in the maps"
    assert model.training and model.config._attn_implementation == was
    values = (model.get_submodule(layer.value) for layer in anatomy(model).layers)
    assert not any(value._forward_hooks for value in values)


def test_token_types_count_unless_the_published_code_is_asked_for() -> None:
    model, batch = family_model("bert"), batch_of([8])
    typed, untyped = (attention_maps(model, batch, segments=s)[0] for s in (True, False))
    assert not torch.allclose(typed.raw, untyped.raw)
    plain = batch._replace(types=torch.zeros_like(batch.types))
    torch.testing.assert_close(attention_maps(model, plain)[0].raw, untyped.raw)


def test_published_slices_change_norms_and_nothing_else() -> None:
    model, batch = family_model("bert"), batch_of([8])
    right, wrong = (attention_maps(model, batch, row_slices=s)[0] for s in (False, True))
    assert torch.equal(right.raw, wrong.raw) and not torch.allclose(right.normed, wrong.normed)


def test_gates_are_refused_and_a_folded_closed_head_adds_nothing() -> None:
    model, batch = family_model("bert"), batch_of([8])
    keep = torch.tensor([[True], [False], [True], [True]])
    gates = attach_(model, head_plan(model), lambda name, shape: FixedGate(keep))
    with pytest.raises(ValueError, match=r"has gates on it.*fold"):
        attention_maps(model, batch)
    (maps,) = attention_maps(fold(model), batch)
    gates.detach_()
    assert not maps.normed[:, 1].any() and maps.normed[:, [0, 2, 3]].all()


# shapes


@settings(max_examples=50, deadline=None)
@given(shape=st.sampled_from(SHAPES), n=st.integers(SMALLEST, 60), seed=st.integers(0, 2**31))
def test_drawn_maps_are_attention_and_marks_are_shares(shape: str, n: int, seed: int) -> None:
    drawn = draw_map(shape, n, np.random.default_rng(seed))
    assert drawn.shape == (n, n) and (drawn >= 0).all()
    np.testing.assert_allclose(drawn.sum(1), 1)
    assert all(0 <= mark <= 1 + 1e-9 for mark in marks(drawn))
    np.testing.assert_array_equal(drawn, draw_map(shape, n, np.random.default_rng(seed)))


def test_pure_shapes_are_what_they_are() -> None:
    n, place = 20, np.arange(20)
    columns = np.zeros((n, n))
    columns[:, [0, 7]] = 0.5
    band = np.eye(n, k=1)
    block = 1.0 * ((place[:, None] < 9) == (place < 9))
    pure = np.stack([columns, band, 0.5 * columns + 0.5 * band, block, np.ones((n, n))])
    assert rule(pure).tolist() == list(range(5))
    np.testing.assert_allclose(marks(columns), (1, 0, 0), atol=0.01)
    assert marks(block).blocks == pytest.approx(1) and marks(band).band > 0.9
    assert marks(np.ones((n, n))) == pytest.approx((0, 0, 0), abs=1e-9)


def test_many_maps_are_told_as_one_by_one_and_at_any_scale() -> None:
    """A stack of maps is its maps; a number per row is not looked at."""
    rng = np.random.default_rng(0)
    stack = np.array([[draw_map(s, 18, rng) for s in SHAPES] for _ in range(3)])
    scale = rng.uniform(0.1, 9, (*stack.shape[:-1], 1))
    assert rule(stack).shape == (3, 5)
    for place in np.ndindex(3, 5):
        assert rule(stack)[place] == rule(stack[place])
    np.testing.assert_array_equal(rule(stack), rule(stack * scale))
    assert rule(np.zeros((15, 15))) == SHAPES.index("heterogeneous")
    assert not np.isnan(by_rows(np.zeros((3, 3)))).any()


def test_higher_thresholds_find_fewer_shapes() -> None:
    maps, _ = draw_maps(100, np.random.default_rng(3))
    found = [
        sum(rule(each, THRESHOLDS._make(t * k for t in THRESHOLDS)) == 4 for each in maps)
        for k in (0.5, 1, 2, 99)
    ]
    assert all(a <= b for a, b in pairwise(found)) and found[-1] == len(maps)


@pytest.mark.parametrize("largest", [32, 64])
def test_the_rule_finds_most_shapes_of_seeds_it_was_not_made_on(largest: int) -> None:
    maps, places = draw_maps(500, np.random.default_rng(99), largest)
    told = np.array([rule(each) for each in maps])
    assert min((told == places)[places == k].mean() for k in range(5)) > 0.6
    assert (told == places).mean() > 0.8
    assert {len(each) for each in maps} <= set(range(SMALLEST, largest + 1))


@pytest.mark.parametrize(("shape", "n"), [("stripes", 20), ("block", 11)])
def test_other_shapes_and_small_maps_are_not_drawn(shape: str, n: int) -> None:
    with pytest.raises(
        ValueError, match=f"a '{shape}' map of {n} pieces; expected one of vertical"
    ):
        draw_map(shape, n, np.random.default_rng(0))


@pytest.mark.parametrize("size", [(11, 11), (20, 30)])
def test_maps_that_are_small_or_not_square_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"a map of \[{size[0]}, {size[1]}\]; expected a square"):
        rule(np.ones(size))


# the network


def test_the_network_is_the_papers() -> None:
    cnn = ShapeCNN(seed=3)
    assert sum(p.numel() for p in cnn.parameters()) == 72_917
    assert torch.equal(cnn.layers[0].weight, ShapeCNN(seed=3).layers[0].weight)
    assert all(not p.any() for n, p in cnn.named_parameters() if n.endswith("bias"))
    assert cnn(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="31 places"):
        ShapeCNN(31)


@pytest.mark.parametrize("n", [12, 31, 32, 33, 50])
def test_maps_stand_in_the_middle_of_their_square(n: int) -> None:
    cnn, drawn = ShapeCNN(32), draw_map("block", n, np.random.default_rng(n))
    framed = cnn.frame(drawn).numpy()
    assert framed.shape == (32, 32)
    if n <= 32:
        at = (32 - n) // 2
        np.testing.assert_allclose(framed[at : at + n, at : at + n], drawn, rtol=1e-5)
        assert framed.sum() == pytest.approx(n, rel=1e-5)
    else:
        at = (n - 32) // 2
        np.testing.assert_allclose(framed, drawn[at : at + 32, at : at + 32], rtol=1e-5)


def test_learning_is_decided_by_its_seed_and_beats_chance() -> None:
    one, again, other = (learn_shapes(120, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert one.history == again.history and one.held_out == again.held_out
    assert one.history != other.history
    weights = zip(one.cnn.parameters(), again.cnn.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert len(one.history) == 2
    with pytest.raises(ValueError, match="10 maps to learn from"):
        learn_shapes(10)


def test_the_network_learns_the_shapes() -> None:
    learned = learn_shapes(300, epochs=8)
    assert learned.held_out["cnn"] > 0.6 and learned.held_out["rule"] > 0.7
    assert learned.history[-1]["loss"] < learned.history[0]["loss"]


def test_a_network_is_read_as_it_was_written_and_other_files_are_refused(tmp_path: Path) -> None:
    cnn = ShapeCNN(40, seed=1)
    again = load_cnn(save_cnn(cnn, tmp_path / "cnn.safetensors"))
    maps = np.stack([draw_map(s, 30, np.random.default_rng(0)) for s in SHAPES])
    assert again.side == 40 and torch.equal(
        cnn(cnn.frame(maps)[:, None]), again(again.frame(maps)[:, None])
    )
    model = tiny_encoder()
    gates = attach_(model, head_plan(model), lambda name, shape: FixedGate(torch.ones(shape)))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for wrong in (save(gates, tmp_path / "masks.safetensors"), tmp_path / "broken.safetensors"):
        with pytest.raises(ValueError, match=r"\w+.safetensors holds no network for shapes"):
            load_cnn(wrong)


# shares

TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE")


def test_shares_are_counts_over_maps() -> None:
    found = np.array([[[0, 4], [1, 1]], [[0, 0], [1, 3]]])
    among = np.array([[True, False], [True, False]])
    assert shares(found) == dict(zip(SHAPES, (3 / 8, 3 / 8, 0, 1 / 8, 1 / 8), strict=True))
    assert shares(found, among)["vertical"] == shares(found, among)["diagonal"] == 0.5
    assert np.isnan(list(shares(found, ~among & among).values())).all()
    per_head = head_shares(found)
    assert per_head.loc[(0, 1), "heterogeneous"] == 0.5 and (per_head.sum(1) == 1).all()
    assert heterogeneity(found, ~among) == pytest.approx(np.sqrt(1 / 7))
    assert np.isnan(heterogeneity(found, among | ~among))


def test_survivors_are_what_every_ticket_keeps() -> None:
    tickets = [
        {"0/value": [[1], [1], [0], [0]], "1/value": [[0], [1], [1], [1]]},
        {"0/value": [[1], [0], [0], [1]], "1/value": [[1], [1], [1], [0]]},
    ]
    kept = surviving_heads([each | {"0/mlp": [[1]]} for each in tickets], tiny_encoder())
    assert kept.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    shared = surviving_heads(
        [{"0/value": each["0/value"]} for each in tickets], family_model("albert")
    )
    assert shared.astype(int).tolist() == [[1, 0, 0, 0]] * 3
    with pytest.raises(ValueError, match="2 layers of 4 heads, the encoder has 3 of 4"):
        surviving_heads(tickets, family_model("bert"))
    with pytest.raises(ValueError, match="run 1 has other gates than run 0"):
        surviving_heads([tickets[0], {"0/value": tickets[0]["0/value"]}], tiny_encoder())
    with pytest.raises(ValueError, match="without whole heads"):
        surviving_heads([tickets[0], {"0/mlp": [[1]]}], tiny_encoder())


def test_published_shares_sum_to_one() -> None:
    for task in TASKS:
        sums = published_shares(task).groupby(["attention", "state"])["value"].sum()
        assert len(sums) == 4 and (abs(sums - 1) < 0.0021).all(), task
    assert published_shares("acceptability").empty
    assert published_shares("SST-2_sentences").equals(published_shares("SST-2"))


def test_published_shares_are_the_stored_ones(shared_data: Path) -> None:
    reference = shared_data.parent / "reference" / "lottery"
    if not (path := reference / "attention_patterns_from_notebook.json").is_file():
        pytest.skip("no stored outputs of the authors' notebook here")
    stored = json.loads(path.read_text())["shares"]
    names = {"mix": "vertical+diagonal", "other": "heterogeneous"}
    who = {"all heads": "all heads", "super-survivors": "super-survivor heads"}
    kind = {"raw": "attention", "normed": "weight normed"}
    for task in TASKS:
        for row in published_shares(task).itertuples():
            there = stored[f"{who[row.state]}, fine-tuned"][task][kind[row.attention]]
            there = {n.lower().replace(" ", ""): v for n, v in there.items()}
            there = {names.get(name, name): value for name, value in there.items()}
            assert row.value == pytest.approx(there[row.shape], abs=6e-4)


def test_the_figure_stacks_every_share() -> None:
    figure = share_figure(published_shares("MNLI"))
    assert [ax.get_title() for ax in figure.axes] == ["raw", "normed"]
    for ax in figure.axes:
        assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2, abs=0.01)
    assert len(figure.axes[0].get_yticklabels()) == 2


# the experiment


@pytest.fixture(scope="module")
def patterns() -> dict:
    """What the experiment leaves on a random encoder, in small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
        return in_process(AttentionPatterns(examples=4, drawn=40, epochs=1))


def frame_of(names: dict) -> pd.DataFrame:
    """The metrics, missing columns filled."""
    return pd.DataFrame(names["metrics"]).fillna("")


def test_the_experiment_counts_all_heads(patterns: dict) -> None:
    rows = frame_of(patterns)
    found = rows[rows.metric == "share"].groupby(["attention", "classifier", "state"])["value"]
    assert set(found.groups) == {
        (kind, who, "all heads") for kind in ("raw", "normed") for who in ("rule", "cnn")
    }
    assert np.allclose(found.sum().astype(float), 1)
    assert rows[rows.metric == "counted"]["value"].tolist() == [8]
    assert set(rows[rows.metric == "kappa"].state) == {"drawn maps", "all heads"}
    assert not set(rows.columns) & {each for each in vars(AttentionPatterns()) if each != "value"}
    assert patterns["told"]["raw", "rule"].shape == (4, 2, 4)


def leave_ticket(root: Path, name: str, closed: tuple[int, ...]) -> str:
    """A finished run that closed these heads in both layers of the random encoder."""
    model = load_encoder("tiny").model
    keep = torch.ones(4, 1, dtype=torch.bool)
    keep[list(closed)] = False
    gates = attach_(model, head_plan(model), lambda *_: FixedGate(keep))
    folder = root / "Ticket" / name
    folder.mkdir(parents=True)
    save(gates, folder / "masks.safetensors")
    (folder / "done.json").write_text("{}")
    return f"Ticket/{name}"


def test_the_experiment_tells_super_survivors_apart_and_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets = [leave_ticket(tmp_path, "one", (0,)), leave_ticket(tmp_path, "two", (0, 3))]
    folder = tmp_path / "AttentionPatterns" / "run"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PRUNING_BIAS_RUN_FOLDER", str(folder))
    run = AttentionPatterns(
        examples=3, drawn=40, epochs=1, maps="normed", tickets=" ".join(tickets),
        fidelity="published_code",
    )  # fmt: skip
    names = in_process(run)
    rows = frame_of(names)
    assert rows[rows.metric == "counted"]["value"].tolist() == [8, 4]
    assert set(rows[rows.metric == "share"].attention) == {"normed"}
    mine = names["told"]["normed", "rule"][:, :, 1:3]
    share = rows.query("metric == 'share' and state == 'super-survivors' and classifier == 'rule'")
    assert share["value"].tolist() == [float((mine == k).mean()) for k in range(5)]
    assert len(rows[rows.metric == "heterogeneity"]) == 2
    assert len(json.loads((folder / "metrics.json").read_text())) == len(rows)
    per_head = pd.read_csv(folder / "heads.csv")
    assert len(per_head) == 2 * 8 and np.allclose(per_head[list(SHAPES)].sum(1), 1)
    assert load_cnn(folder / "cnn.safetensors").side == run.max_length
    with pytest.raises(ValueError, match="no finished run Ticket/three"):
        in_process(AttentionPatterns(tickets="Ticket/three"))


def test_examples_that_are_all_too_short_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    with pytest.raises(ValueError, match="no dev example of acceptability has 33 word pieces"):
        in_process(AttentionPatterns(min_pieces=33))


def test_real_maps_of_unlike_sizes_have_shapes(packaged: Encoder) -> None:
    """Attention to [CLS] and [SEP], strong in the raw maps, is weaker by what it adds."""
    batch = batch_of([30, 14])
    found = [[rule(getattr(m, kind).numpy()) for m in attention_maps(packaged.model, batch)]
             for kind in ("raw", "normed")]  # fmt: skip
    raw, normed = (np.stack(each) for each in found)
    assert raw.shape == (2, 6, 12) and (raw == 0).mean() > (normed == 0).mean()
