"""The published code's own figures (Joniak and Aizawa 2022), reproduced under `published_code`.

`golden/` holds numbers that the original modules gave on the packaged encoder, and sentences
written for that purpose. Word lists and SEAT sentences of others are read from the data folder.
"""

import copy
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import density
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import BertConfig, BertModel, PreTrainedModel

from pruning_bias.anatomy import Encoder
from pruning_bias.benchmarks import effect_size, official_tests, p_value, seat
from pruning_bias.corpus import KINDS, find_sentence, read_lexicon
from pruning_bias.debias import (
    Teacher,
    bias_loss,
    debias_loss,
    drift,
    hidden_states,
    prototypes,
    token_states,
)
from pruning_bias.edits import Site
from pruning_bias.encoding import Encoded, encode
from pruning_bias.fidelity import Fidelity
from pruning_bias.gates import HardConcreteGate, ThresholdGate, TopKGate, openness
from pruning_bias.grids import Grid
from pruning_bias.plans import Plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.subnetworks import Subnetwork, attach_, fold
from pruning_bias.training import cubic, fit, fold_epsilon_, linear

PUBLISHED, EQUATIONS = Fidelity.parse("published_code"), Fidelity()
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}


def encoded(rows: list[dict[str, Any]]) -> Encoded:
    """Sentences from their word pieces and weights; their class does not matter here."""
    ids = np.concatenate([np.array(row["ids"], np.int32) for row in rows])
    weights = [row["weights"].get(str(i), 0) for row in rows for i in range(len(row["ids"]))]
    offsets = np.cumsum([0, *(len(row["ids"]) for row in rows)])
    return Encoded(ids, np.array(weights, np.uint8), offsets, np.zeros(len(rows), np.uint8))


class Remembering:
    """A model that answers the same batch from memory, so that many losses cost one pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config, self.known = model, model.config, {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, **rest: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, **rest)
        return self.known[key]


# sentences


def test_keywords(golden: Any, packaged: Encoder, shared_data: Path) -> None:
    """Class, words, word pieces and weights of every sentence are the published code's."""
    figures = golden("keywords")
    lexicon = read_lexicon(shared_data / "words")
    assert figures["unique_words"] == {
        "male": len(lexicon.male),
        "female": len(lexicon.female),
        "stereotype": len(lexicon.target),
    }
    found = [find_sentence(case["text"], lexicon, pieces=True) for case in figures["cases"]]
    came = [(s.kind, list(s.words)) if s else (None, []) for s in found]
    assert came == [(case["kind"], case["words"]) for case in figures["cases"]]

    coded = encode(packaged.tokenizer, [s for s in found if s], pieces=True)
    kept = [case for case in figures["cases"] if case["kept"]]
    expected = encoded(kept)
    assert np.array_equal(coded.offsets, expected.offsets)
    assert np.array_equal(coded.ids, expected.ids)
    assert np.array_equal(coded.words, expected.words)
    assert [KINDS[k] for k in coded.kinds] == [case["kind"] for case in kept]


def test_batches_of_losses(golden: Any, packaged: Encoder, shared_data: Path) -> None:
    """From the sentences of the losses and traces to their word pieces and weights."""
    lexicon = read_lexicon(shared_data / "words")
    for name, texts, rows in loss_sides(golden("losses")) + trace_sides(golden("training")):
        found = [find_sentence(text, lexicon, pieces=True) for text in texts]
        coded, expected = encode(packaged.tokenizer, found, pieces=True), encoded(rows)
        assert np.array_equal(coded.ids, expected.ids), name
        assert np.array_equal(coded.words, expected.words), name


def loss_sides(figures: dict[str, Any]) -> list[tuple[str, list[str], list[dict[str, Any]]]]:
    """The two batches of `losses` with their texts."""
    return [
        (f"losses, {side}s", figures[f"{side}_texts"], figures[f"{side}s"])
        for side in ("target", "attribute")
    ]


def trace_sides(figures: dict[str, Any]) -> list[tuple[str, list[str], list[dict[str, Any]]]]:
    """The sentences of the training traces in their natural order; attributes male first."""
    texts = {
        "target": figures["targets"],
        "attribute": figures["attributes_male"] + figures["attributes_female"],
    }
    sides = []
    for side in texts:
        rows = [row for batch in figures["batches"] for row in batch[f"{side}s"]]
        place = np.argsort(figures[f"{side}_order"])
        sides.append((f"training, {side}s", texts[side], [rows[i] for i in place]))
    return sides


# losses


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def setting(request: pytest.FixtureRequest, golden: Any) -> SimpleNamespace:
    """The batches of `losses`, a frozen and a perturbed encoder, in one precision."""
    wide = request.param == torch.float64
    frozen = request.getfixturevalue("packaged64" if wide else "packaged").model
    moved = copy.deepcopy(frozen)
    moved.encoder.layer[0].attention.self.query.weight.mul_(0.9)
    figures = golden("losses")
    return SimpleNamespace(
        dtype=request.param,
        relative=RELATIVE[request.param],
        figures=figures,
        targets=encoded(figures["targets"]),
        attributes=encoded(figures["attributes"]),
        models={None: Remembering(frozen), "layer0.query.weight*0.9": Remembering(moved)},
    )


@pytest.fixture(params=["last/sentence", "last/token", "all/sentence", "all/token"])
def figure(request: pytest.FixtureRequest, setting: SimpleNamespace) -> dict[str, Any]:
    """The figures of one layer and mode."""
    runs = {f"{run['layer']}/{run['mode']}": run for run in setting.figures["runs"]}
    assert len(runs) == len(setting.figures["runs"]) == 4
    return runs[request.param]


def close(came: Tensor | float, expected: float, relative: float) -> bool:
    """Equal within a relative tolerance; zero means zero up to the rounding of hidden states."""
    return math.isclose(float(came), expected, rel_tol=relative, abs_tol=relative * 1e-4)


def wide(setting: SimpleNamespace, rows: list[list[float]], layers: int) -> Tensor:
    """The one pair of prototypes of the published code, for every layer."""
    return torch.tensor(rows, dtype=setting.dtype).expand(layers, -1, -1)


def losses(
    setting: SimpleNamespace,
    run: dict[str, Any],
    case: dict[str, Any],
    fidelity: Fidelity,
) -> dict[str, Tensor]:
    """What `debias_loss` makes of one case."""
    rows = (
        setting.figures["fixed_prototypes"] if case["centroids"] == "fixed" else run["prototypes"]
    )
    pad_to = 128 if fidelity.padded_states and run["mode"] == "sentence" else 0
    return debias_loss(
        setting.models[case["perturbation"]],
        Teacher(lambda batch: hidden_states(setting.models[None], batch)),
        setting.targets.batch(range(16), pad_to),
        setting.attributes.batch(range(16)),
        wide(setting, rows, {"last": 1, "all": 7}[run["layer"]]),
        layer=run["layer"],
        mode=run["mode"],
        alpha=setting.figures["alpha"],
        beta=setting.figures["beta"],
        fidelity=fidelity,
    )


def test_prototypes(setting: SimpleNamespace, figure: dict[str, Any]) -> None:
    """One pair of prototypes, averaged over the layers."""
    male, female = (setting.attributes.batch(range(a, a + 8)) for a in (0, 8))
    came = prototypes(setting.models[None], [male], [female], figure["layer"], pooled=True)
    assert came.dtype == setting.dtype
    scale = float(np.abs(figure["prototypes"]).max())
    expected = wide(setting, figure["prototypes"], len(came))
    assert torch.allclose(came, expected, rtol=setting.relative, atol=setting.relative * scale)


def test_published_losses(setting: SimpleNamespace, figure: dict[str, Any]) -> None:
    """Loss, bias and drift as the published code computes them."""
    for case in figure["cases"]:
        came, expected = losses(setting, figure, case, PUBLISHED), case["original_code"]
        assert close(came["bias"], expected["loss_debias"], setting.relative), case["perturbation"]
        assert close(came["drift"], expected["loss_regularize"], setting.relative)
        assert close(came["loss"], expected["loss"], setting.relative)


def test_equations(setting: SimpleNamespace, figure: dict[str, Any]) -> None:
    """The equations, and each switch between them and the code, against the recorded variants."""
    words = figure["mode"] == "token"
    names = {
        EQUATIONS: "sum_of_squares_mean" if words else "nonpad_sum_of_squares_mean",
        Fidelity(squared_sum=True): "coded_mean_of_square_of_sum" if words else "nonpad_coded",
        Fidelity(padded_states=True): "sum_of_squares_mean",
        Fidelity(squared_mean=True): "kaneko_code_sum_g_square_of_mean"
        if words
        else "nonpad_kaneko_code",
        Fidelity(squared_mean=True, padded_states=True): "kaneko_code_sum_g_square_of_mean",
    }
    for case in figure["cases"]:
        for fidelity, name in names.items():
            came = losses(setting, figure, case, fidelity)
            assert close(came["bias"], case["ours_debias_variants"][name], setting.relative), name
            expected = case["ours_regularize_variants"]["nonpad_positions_sum_dim_mean"]
            assert close(came["drift"], expected, setting.relative)


OBJECTIVES = {  # as coded; sum of squares; script of 2021; as coded, without padding
    "first/sentence": (32.508, 19.232, 5.836, 88.796),
    "last/sentence": (47.937, 25.974, 15.535, 58.778),
    "all/sentence": (248.707, 126.150, 68.291, 697.658),
    "intermediate/sentence": (480.655, 241.932, 187.793, 1679.400),
    "first/token": (418.687, 223.734, 175.274),
    "last/token": (175.403, 117.996, 57.833),
    "all/token": (2003.876, 1022.490, 828.641),
    "intermediate/token": (4405.419, 2225.360, 2112.849),
}
COSINES = {"first": 0.50, "last": 0.21, "all": 0.61, "intermediate": 0.71}
SWITCHES = (
    Fidelity(squared_sum=True, padded_states=True),
    Fidelity(padded_states=True),
    Fidelity(squared_mean=True, padded_states=True),
    Fidelity(squared_sum=True),
)


@pytest.mark.parametrize("setting", [torch.float64], indirect=True, ids=str)
@pytest.mark.parametrize("place", OBJECTIVES)
def test_three_objectives_of_every_layer(setting: SimpleNamespace, place: str) -> None:
    """What each form of the loss makes of 16 targets and the prototypes of 8 + 8 attributes."""
    (layer, mode), model = place.split("/"), setting.models[None]
    male, female = (setting.attributes.batch(range(a, a + 8)) for a in (0, 8))
    pair = prototypes(model, [male], [female], layer, pooled=True)
    assert torch.cosine_similarity(*pair[0], dim=0).item() == pytest.approx(
        COSINES[layer], abs=0.01
    )
    batch = setting.targets.batch(range(16), 128)
    for switches, expected in zip(SWITCHES, OBJECTIVES[place], strict=False):
        came = bias_loss(model, batch, pair, layer=layer, mode=mode, fidelity=switches)
        assert came.item() == pytest.approx(expected, rel=1e-5, abs=6e-4), switches


@pytest.mark.parametrize("setting", [torch.float64], indirect=True, ids=str)
def test_drift_over_padding(setting: SimpleNamespace) -> None:
    """Drift over all 128 positions is recorded too; `token_states` can be asked for it."""
    batch = setting.attributes.batch(range(16), 128)
    moved, frozen = (hidden_states(model, batch) for model in reversed(setting.models.values()))
    came = drift(token_states(moved, batch, True)[0], *token_states(frozen, batch, True))
    case = setting.figures["runs"][0]["cases"][-1]
    assert case["perturbation"]
    expected = case["ours_regularize_variants"]["all_positions_sum_dim_mean"]
    assert close(came, expected, setting.relative)


# penalties, schedule, optimizer


def grouped(per_module: dict[str, float | Tensor]) -> float:
    """The published penalty: half the mean over the attention's modules, half over the others'."""
    groups = {True: [], False: []}
    for name, value in per_module.items():
        groups["attention" in name].append(float(value))
    return sum(sum(values) / len(values) / 2 for values in groups.values())


@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_penalties(golden: Any, norm: str) -> None:
    """Openness per module, and the mean of means that is added to the loss."""
    cases = {case["norm"]: case for case in golden("regularization")["cases"]}
    came = {}
    for name, scores in cases["l1"]["per_module"].items():
        scores = torch.tensor(scores).reshape(len(scores), -1)
        gate = ThresholdGate(tuple(scores.shape), norm=norm)
        gate.scores.data.copy_(scores)
        came[name] = gate.penalty().item()
        expected = cases["l0"]["per_module"][name][{"l1": "mean_sigmoid", "l0": "mean_l0"}[norm]]
        assert math.isclose(came[name], expected, rel_tol=1e-6), name
    assert len(came) == 30
    assert math.isclose(grouped(came), cases[norm]["penalty"], rel_tol=1e-6)


def test_schedule(golden: Any) -> None:
    """Thresholds of six settings, step by step; a warm-up of -1 is the published one."""
    rows = 0
    for run in golden("schedule")["schedules"]:
        first, last = run["initial_threshold"], run["final_threshold"]
        warmup, cooldown = (
            run[k] * run["warmup_steps"] for k in ("initial_warmup", "final_warmup")
        )
        for row in run["values"]:
            came = last
            if row["training"]:
                came = cubic(row["step"], run["total_step"], first, last, warmup, cooldown)
            assert math.isclose(came, row["threshold"], rel_tol=1e-12, abs_tol=1e-15), (run, row)
            ramp = run["regularization_final_lambda"] * came / last
            assert math.isclose(ramp, row["regu_lambda"], rel_tol=1e-12, abs_tol=1e-15)
            rows += 1
    assert rows > 500


@pytest.mark.parametrize(
    ("name", "epsilon", "folded"),
    [
        ("hf_AdamW_default(eps1e-6,correct_bias)", 1e-6, True),
        ("hf_AdamW_eps1e-8", 1e-8, True),
        ("torch_AdamW_eps1e-6_wd0", 1e-6, False),
        ("torch_AdamW_eps1e-8_wd0", 1e-8, False),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_optimizer(golden: Any, name: str, epsilon: float, folded: bool, fused: bool) -> None:
    """Torch's AdamW walks the old Hugging Face one's path once epsilon is folded."""
    figures = golden("optimizer")
    grads = torch.tensor(figures["grads"], dtype=torch.float64)
    weights = nn.Parameter(torch.full_like(grads[0], figures["init"]))
    optimizer = AdamW([weights], lr=0.01, eps=epsilon, weight_decay=0.0, fused=fused)
    for step, (grad, expected) in enumerate(zip(grads, figures["trajectories"][name], strict=True)):
        if folded:
            fold_epsilon_(optimizer, step, epsilon)
        weights.grad = grad
        optimizer.step()
        expected = torch.tensor(expected, dtype=torch.float64)
        assert torch.allclose(weights.data, expected, rtol=1e-12, atol=0), step


def test_linear_rate(golden: Any) -> None:
    """The rate that the published code stepped once an epoch."""
    for epoch, expected in enumerate(golden("optimizer")["lr_by_epoch"]):
        assert math.isclose(0.01 * linear(epoch, 24600), expected, rel_tol=1e-12)


# gates on one linear map


MAP = "encoder.layer.0.intermediate.dense"


def one_map(figures: dict[str, Any], dtype: torch.dtype) -> BertModel:
    """An encoder whose first feed-forward matrix is the 16 x 32 one of the figures."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = BertModel(config).eval().requires_grad_(False).to(dtype)
    for name in ("weight", "bias"):
        getattr(model.get_submodule(MAP), name).copy_(torch.tensor(figures[name], dtype=dtype))
    return model


def masked_plan(case: dict[str, Any]) -> Plan:
    """The sites of a case: blocks, or one score per row or column."""
    grids = {
        "scores": Grid(case["block_rows"], case["block_cols"]),
        "row": Grid(1, 32),
        "col": Grid(16, 1),
    }
    bias = "alive" if case["bias_mask"] else "keep"
    return {f"0/{part}": (Site(MAP, grids[part], bias),) for part in case["scores"]}


def make_gate(case: dict[str, Any], _: str, shape: tuple[int, int]) -> nn.Module:
    """The gate of a case's method."""
    if case["method"] == "topK":
        return TopKGate(shape, density=case["threshold"])
    if case["method"] == "l0":
        return HardConcreteGate(shape, lower=-0.1, upper=1.1)
    sigmoid = {"sigmoied_threshold": True, "threshold": False}[case["method"]]
    return ThresholdGate(shape, threshold=case["threshold"], sigmoid=sigmoid)


def masked_cases(golden: Any) -> list[dict[str, Any]]:
    """All cases but the magnitude ones."""
    return [case for case in golden("masked_linear")["cases"] if case["method"] != "magnitude"]


@pytest.mark.parametrize("in_weights", [False, True], ids=["where it may", "in weights"])
def test_masked_linear(golden: Any, in_weights: bool) -> None:
    """Masks, biases, outputs, score gradients and penalties of one gated map."""
    figures = golden("masked_linear")
    cases = masked_cases(golden)
    assert len(cases) > 60
    for case in cases:
        dtype = getattr(torch, case["dtype"])
        model = one_map(figures, dtype)
        subnetwork = attach_(
            model, masked_plan(case), partial(make_gate, case), in_weights=in_weights
        )
        subnetwork.to(dtype).train(case["training"])
        for name, gate in subnetwork.gates.items():
            scores = torch.tensor(case["scores"][name[2:]], dtype=dtype)
            gate.scores.data.copy_(scores.view_as(gate.scores))
        check_masked(case, figures, model, subnetwork)


def check_masked(
    case: dict[str, Any], figures: dict[str, Any], model: BertModel, subnetwork: Subnetwork
) -> None:
    """Hold one gated map against its case."""
    what = {k: v for k, v in case.items() if isinstance(v, str | int | float | bool)}
    dtype, exact = getattr(torch, case["dtype"]), {"rtol": 0, "atol": 0}
    near = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    x, upstream = (torch.tensor(figures[k], dtype=dtype) for k in ("x", "grad_output"))
    y = model.get_submodule(MAP)(x)
    (y * upstream).sum().backward()
    folded = fold(model).get_submodule(MAP)
    mask = torch.tensor([[float(v) for v in row] for row in case["mask"]], dtype=dtype)
    weight = torch.tensor(figures["weight"], dtype=dtype)
    tight = exact if case["method"] != "l0" else near
    torch.testing.assert_close(folded.weight.data, mask * weight, **tight, msg=str(what))
    bias = torch.tensor(case["masked_bias"], dtype=dtype)
    torch.testing.assert_close(folded.bias.data, bias, **exact, msg=str(what))
    torch.testing.assert_close(y.detach(), torch.tensor(case["output"], dtype=dtype), **near)
    for name, gate in subnetwork.gates.items():
        expected = torch.tensor(case["grad_scores"][name[2:]], dtype=dtype)
        torch.testing.assert_close(gate.scores.grad, expected.view_as(gate.scores), **near)
        for norm, values in (case.get("regularization") or {}).items():
            came = openness(gate.scores, norm).item()
            assert math.isclose(came, values[name[2:]], rel_tol=1e-5), what


def test_magnitude(golden: Any) -> None:
    """The largest weights, element by element: top-k over their magnitudes."""
    figures = golden("masked_linear")
    cases = [case for case in figures["cases"] if case["method"] == "magnitude"]
    assert cases
    for case in cases:
        gate = TopKGate((16, 32), density=case["threshold"])
        gate.scores.data.copy_(torch.tensor(figures["weight"]).abs())
        came = ["".join(str(int(v)) for v in row) for row in gate.keep()]
        assert came == case["mask"]


# SEAT


def turned(scores: list[float]) -> Tensor:
    """Vectors whose association with (1, 0) against (-1, 0) is the given one."""
    half = torch.tensor(scores, dtype=torch.float64) / 2
    return torch.stack([half, (1 - half.square()).sqrt()], dim=1)


def seat_figures(golden: Any) -> list[tuple[str, dict[str, Any]]]:
    """The six tests."""
    return list(golden("seat")["tests"].items())


def test_effect_sizes_from_associations(golden: Any) -> None:
    """The effect size of recorded associations, by the sample's spread, not the population's."""
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for name, test in seat_figures(golden):
        x, y = (turned(test[f"association_scores_targ{i}"]) for i in (1, 2))
        came = effect_size(x, y, a, -a)
        assert math.isclose(came, test["original_weat_effect_size_float64"], rel_tol=1e-9), name
        n = len(x) + len(y)
        population = came * math.sqrt(n / (n - 1))
        assert math.isclose(population, test["effect_size_population_std_ddof0"], rel_tol=1e-9)


def test_p_values(golden: Any) -> None:
    """Permutation tests agree within the sampling error of both (five of its deviations)."""
    for name, test in seat_figures(golden):
        s_x, s_y = (np.array(test[f"association_scores_targ{i}"]) for i in (1, 2))
        draws, theirs = 20_000, test["sentbias_p_n_samples"]
        came, expected = p_value(s_x, s_y, draws), test["sentbias_p_value"]
        spread = math.sqrt(expected * (1 - expected) * (1 / draws + 1 / theirs))
        assert abs(came - expected) <= 5 * spread + 2 / draws, name


def test_official_seat(golden: Any, packaged: Encoder, shared_data: Path) -> None:
    """SEAT-6, 7 and 8 of the dense packaged encoder, from the official sentences."""
    rows = seat(packaged.model, packaged.tokenizer, official_tests(), draws=1000)
    figures = dict(seat_figures(golden))
    assert len(rows) == len(figures) == 6
    for row in rows:
        test = figures[row["test"].replace("SEAT-", "sent-weat")]
        expected = test["original_weat_effect_size_float32"]
        assert math.isclose(row["effect_size"], expected, abs_tol=1e-4), row
        spread = 5 * math.sqrt(test["sentbias_p_value"] / 1000) + 2 / 1000
        assert abs(row["p_value"] - test["sentbias_p_value"]) <= spread


# training


PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "ffn",
    "output.dense": "ffn",
}


def gate_name(module: str) -> str:
    """encoder.layer.0.attention.self.query -> 0/query."""
    layer, part = module.removeprefix("encoder.layer.").split(".", 1)
    return f"{layer}/{PARTS[part]}"


def movement(model: PreTrainedModel, run: dict[str, Any]) -> Subnetwork:
    """The gates of a trace at its start: query and key pushed open where only values are pruned."""
    dtype, start = model.dtype, 420 if run["init_scores"] else 0
    plan = head_plan(model, ("query", "key", "value")) | head_output_plan(model) | ffn_plan(model)
    subnetwork = attach_(model, plan, lambda _, shape: ThresholdGate(shape, initial_score=start))
    subnetwork.to(dtype)
    for module, scores in run["init_scores"].items():
        gate = subnetwork.gates[gate_name(module)]
        gate.scores.data.copy_(torch.tensor(scores, dtype=dtype).view_as(gate.scores))
    trained = {gate_name(module) for module in run["trainable"]}
    for name, gate in subnetwork.gates.items():
        gate.requires_grad_(name in trained)
    return subnetwork


def pair_of(model: PreTrainedModel, attributes: Encoded, layer: str) -> Tensor:
    """The prototypes of 80 male and 80 female sentences in chunks of 32."""
    sides = [[attributes.batch(range(a, min(a + 32, end))) for a in range(end - 80, end, 32)]
             for end in (80, 160)]  # fmt: skip
    return prototypes(model, *sides, layer, pooled=PUBLISHED.pooled_prototypes)


def train(
    model: PreTrainedModel,
    subnetwork: Subnetwork,
    figures: dict[str, Any],
    run: dict[str, Any],
    steps: int,
) -> list[dict[str, Any]]:
    """A trace through the public interface; its losses as they were, not as `fit` rounds them."""
    targets, attributes = (encoded(rows) for _, _, rows in trace_sides(figures))
    ends = run["initial_threshold"], run["final_threshold"]
    trained = [p for p in subnetwork.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=0.01, weight_decay=0.0)
    subnetwork.set_threshold_(ends[1])
    pair = pair_of(model, attributes, run["layer"])
    trace: list[dict[str, Any]] = [{"prototypes": pair[0]}]

    def reference(batch: Any) -> Tensor:
        with subnetwork.off():
            return hidden_states(model, batch)

    teacher = Teacher(reference)

    def before_step(step: int) -> None:
        after(trace[-1], subnetwork)
        threshold = cubic(step, len(figures["batches"]), *ends, warmup=-1, cooldown=-10)
        subnetwork.set_threshold_(threshold)
        fold_epsilon_(optimizer, step)
        trace.append({"threshold": threshold, "density": density(subnetwork)})

    def loss_fn(batch: tuple[list[int], list[int]]) -> dict[str, Tensor]:
        some, others = targets.batch(batch[0], 128), attributes.batch(batch[1])
        where = {"layer": run["layer"], "mode": run["mode"]}
        found = debias_loss(model, teacher, some, others, pair, **where, fidelity=PUBLISHED)
        penalty = subnetwork.penalty()
        found |= {"penalty": penalty, "debias": found["loss"], "loss": found["loss"] + penalty}
        trace[-1] |= {name: value.item() for name, value in found.items()}
        return found

    orders = (np.reshape(figures[f"{side}_order"], (-1, 8)) for side in ("target", "attribute"))
    fit(iter(zip(*orders, strict=True)), loss_fn, optimizer, steps=steps, before_step=before_step)
    after(trace[-1], subnetwork)
    return trace


def after(row: dict[str, Any], subnetwork: Subnetwork) -> None:
    """Add what a step left behind: scores, and the gradients that moved them."""
    gates = {name: gate.scores for name, gate in subnetwork.gates.items()}
    row["scores"] = {name: scores.detach().clone() for name, scores in gates.items()}
    row["grads"] = {n: s.grad.clone() for n, s in gates.items() if s.grad is not None}


NAMES = {
    "loss_debias": "bias",
    "loss_regularize": "drift",
    "loss": "debias",
    "loss_prune_regularize": "penalty",
    "total": "loss",
}
WHOLE = os.environ.get("PRUNING_BIAS_WHOLE_TRACES")  # all 20 float64 steps take minutes


@pytest.mark.parametrize(
    ("name", "dtype", "steps"),
    [
        ("head_default", torch.float32, 5),
        *[
            (name, *how)
            for name in ("head_near", "head_near_values_only")
            for how in ((torch.float64, 20 if WHOLE else 2), (torch.float32, 20))
        ],
    ],
    ids=str,
)
def test_training(
    golden: Any, request: pytest.FixtureRequest, name: str, dtype: torch.dtype, steps: int
) -> None:
    """Losses, penalties, densities, scores and final masks of a run, step by step."""
    figures = golden("training")
    run = next(run for run in figures["runs"] if run["name"] == name)
    model = request.getfixturevalue("packaged64" if dtype == torch.float64 else "packaged").model
    subnetwork = movement(model, run)
    try:
        start, *trace = train(model, subnetwork, figures, run, steps)
        keep = subnetwork.keep()
    finally:
        subnetwork.detach_()
    relative = RELATIVE[dtype]
    # those figures are float32 themselves, and Adam amplifies the rounding of both
    within = 1e-3 if name == "head_default" else relative
    assert_near(start["prototypes"], run["prototypes"], relative)
    for module, expected in run["first_gradients"].items():
        assert_near(trace[0]["grads"][gate_name(module)], expected, relative)
    for came, expected in zip(trace, run["steps"], strict=steps == 20):
        assert came["threshold"] == pytest.approx(expected["threshold"], rel=1e-12)
        assert came["density"] == expected["density"], expected["step"]
        for theirs, ours in NAMES.items():
            assert came[ours] == pytest.approx(expected[theirs], rel=relative), expected["step"]
        for module, scores in expected.get("attention_scores", {}).items():
            assert_near(came["scores"][gate_name(module)], scores, within)
    if steps == 20:
        bits = {n: "".join(str(int(v)) for v in mask.flatten()) for n, mask in keep.items()}
        assert bits == {gate_name(module): mask for module, mask in run["final_keep"].items()}
        for module, expected in run["final_density"].items():
            share = keep[gate_name(module)].float().mean().item()
            assert share == pytest.approx(expected, rel=1e-6)


def assert_near(came: Tensor, expected: list[Any], relative: float) -> None:
    """Equal to within a share of the largest number."""
    expected = torch.tensor(expected, dtype=came.dtype).view_as(came)
    worst = (came - expected).abs().max() / expected.abs().max()
    assert worst <= relative, float(worst)
