"""The published training run a second time, slowly and from its formulae alone, beside our engine.

The second implementation knows an ordinary BertModel in float64 and nothing else of the package's
engine: every mask is written out as large as its matrix, a score's gradient is the sum of
dL/d(mask) over its block, Adam and the schedule stand here as they are defined. What is compared,
step by step: thresholds, losses, penalty, density and all scores; masks at the end bit for bit.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from helpers import density
from torch import Tensor
from torch.func import functional_call
from torch.optim import AdamW
from transformers import BertModel

from pruning_bias.anatomy import load_encoder
from pruning_bias.debias import Teacher, debias_loss, hidden_states, prototypes
from pruning_bias.encoding import Batch, Encoded
from pruning_bias.fidelity import Fidelity
from pruning_bias.gates import ThresholdGate
from pruning_bias.plans import block_plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.subnetworks import Subnetwork, attach_
from pruning_bias.texts import read_classes
from pruning_bias.training import cubic, fit, fold_epsilon_

PUBLISHED = Fidelity.parse("published_code")
STEPS, SIZE, EPOCH, HEAD, HIDDEN, UNITS = 6, 3, 4, 16, 64, 128
PAD = 32  # pieces; 128 in the published run, where it is only slower
ATTENTION = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
}
PARTS = (*ATTENTION, "ffn")
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One configuration of the published code."""

    block: int | None = None  # side of the attention's blocks; None = whole heads
    layer: str = "last"
    mode: str = "sentence"
    trained: tuple[str, ...] = PARTS  # the others keep their scores, and count in the penalty
    one_storage: bool = False  # query, key and value share their scores, as on a CPU
    frozen: bool = True
    dropout: bool = False
    scores: tuple[float, float] = (-2.6, -1.8)  # uniform between these at the start
    ends: tuple[float, float] = (0.1, 0.1)  # thresholds
    rate: float = 0.03
    seed: int = 0


RISING = {"scores": (-0.9, 0.1), "ends": (0.0, 0.1), "rate": 0.3}
CASES = {
    "heads": Case(),
    "blocks": Case(block=16),
    "blocks, all layers, words, from open": Case(block=32, layer="all", mode="token", **RISING),
    "blocks, first layer": Case(block=64, layer="first", seed=1),
    "heads, all layers": Case(layer="all", seed=2),
    "heads, intermediate layers, from open": Case(layer="intermediate", **RISING),
    "heads, first layer, words": Case(layer="first", mode="token"),
    "values and outputs": Case(trained=("value", "attention_output")),
    "attention only": Case(block=16, trained=tuple(ATTENTION), mode="token"),
    "one storage": Case(one_storage=True, trained=tuple(ATTENTION)),
    "one storage, units as well": Case(one_storage=True, mode="token", **RISING),
    "weights train as well": Case(block=16, frozen=False),
    "heads, weights train as well": Case(frozen=False, layer="all", mode="token"),
    "dropout": Case(dropout=True),
    "dropout, another seed": Case(dropout=True, seed=3, **RISING),
    "dropout, blocks, words": Case(dropout=True, block=16, layer="all", mode="token"),
    "dropout, weights train as well": Case(dropout=True, block=32, frozen=False),
}  # fmt: skip


# what both start from


@cache
def dense() -> BertModel:
    """A random encoder in float64."""
    return load_encoder("tiny").model.double()


@cache
def text() -> Encoded:
    """Built-in sentences, their words marked as the published code marks them."""
    return read_classes(load_encoder("tiny").tokenizer, "synthetic", "builtin", 10, 0, pieces=True)


def picks(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which targets and attributes each step takes."""
    rng = np.random.default_rng(case.seed)
    gendered = np.concatenate([text().where("male"), text().where("female")])
    return [
        (rng.choice(text().where("target"), SIZE, False), rng.choice(gendered, SIZE, False))
        for _ in range(STEPS)
    ]


def first_scores(case: Case) -> Scores:
    """Scores of every gate, [R, C]; units stand in a column."""
    side = case.block
    shapes = dict.fromkeys(ATTENTION, (HIDDEN // side,) * 2 if side else (HIDDEN // HEAD, 1))
    shapes |= {"ffn": (UNITS, 1)} | ({} if side else {"attention_output": (1, HIDDEN // HEAD)})
    generator = torch.Generator().manual_seed(case.seed)
    low, high = case.scores
    return {
        f"{i}/{part}": torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low)
        + low
        for i in range(2)
        for part, shape in shapes.items()
    }


# the slow implementation


@dataclass
class Slow:
    """The run from its formulae."""

    case: Case
    scores: Scores = field(init=False)
    weights: dict[str, Tensor] = field(init=False)
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(dense())
        self.model.config._attn_implementation = "eager"
        self.original = {name: p.clone() for name, p in self.model.named_parameters()}
        self.weights = {name: p.clone() for name, p in self.original.items()}
        self.scores = first_scores(self.case)
        if self.case.one_storage:
            for i in range(2):
                for part in ("key", "value"):
                    self.scores[f"{i}/{part}"] = self.scores[f"{i}/query"]

    def places(self) -> Iterator[tuple[str, str, bool]]:
        """Gate, matrix, and whether the matrix reads the gate as columns."""
        for i in range(2):
            start = f"encoder.layer.{i}."
            for part, name in ATTENTION.items():
                yield f"{i}/{part}", start + name, False
            yield f"{i}/ffn", start + "intermediate.dense", False
            yield f"{i}/ffn", start + "output.dense", True

    def masks(self, threshold: float) -> dict[str, Tensor]:
        """1[sigmoid(S) > threshold], written out as large as each matrix."""
        found = {}
        for gate, matrix, columns in self.places():
            z = (1 / (1 + torch.exp(-self.scores[gate])) > threshold).double()
            z, shape = (z.T if columns else z), self.weights[f"{matrix}.weight"].shape
            found[matrix] = torch.kron(
                z, torch.ones([n // g for n, g in zip(shape, z.shape, strict=True)])
            )
        return found

    def hidden(self, batch: Batch, weights: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """All hidden states by masked weights; a bias goes with its row, if all of it is closed."""
        given = dict(weights)
        for matrix, mask in masks.items():
            given[f"{matrix}.weight"] = mask * weights[f"{matrix}.weight"]
            alive = (mask.detach() != 0).any(1).double()
            given[f"{matrix}.bias"] = alive * weights[f"{matrix}.bias"]
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention}
        output = functional_call(self.model, given, (), inputs | {"output_hidden_states": True})
        return torch.stack(output.hidden_states)

    def words(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[L, B, D]: sum(mask * h) / sum(mask), sentence by sentence."""
        rows = [
            (weights[:, None].double() * hidden[:, b]).sum(1) / weights.sum()
            for b, weights in enumerate(batch.words)
        ]
        return torch.stack(rows, 1)

    def chosen(self, hidden: Tensor) -> Tensor:
        """The layers asked for."""
        last = len(hidden)
        some = {
            "first": [0],
            "last": [last - 1],
            "all": range(last),
            "intermediate": range(1, last),
        }
        return hidden[list(some[self.case.layer])]

    @torch.no_grad()
    def centroids(self) -> Tensor:
        """[2, D], over sentences and layers, in evaluation mode, at the final threshold."""
        self.model.eval()
        masks, both = self.masks(self.case.ends[1]), []
        for kind in ("male", "female"):
            batch = text().batch(text().where(kind), PAD)
            states = self.words(self.hidden(batch, self.weights, masks), batch)
            both.append(self.chosen(states).mean((0, 1)))
        return torch.stack(both)

    def penalty(self) -> Tensor:
        """Half the mean over the attention's modules and half over the units'."""
        open_ = {gate: (1 / (1 + torch.exp(-s))).mean() for gate, s in self.scores.items()}
        units = [value for gate, value in open_.items() if gate.endswith("ffn")]
        others = [value for gate, value in open_.items() if not gate.endswith("ffn")]
        return sum(units) / len(units) / 2 + sum(others) / len(others) / 2

    def step(self, step: int, pick: tuple[np.ndarray, np.ndarray], pair: Tensor) -> dict:
        """One step; what it saw, and the scores that it left."""
        case, (low, high) = self.case, self.case.ends
        left = 1 - (step + 1) / (STEPS + 11)
        threshold = high + (low - high) * left**3
        weights = {n: w.clone().requires_grad_(not case.frozen) for n, w in self.weights.items()}
        masks = {name: mask.requires_grad_() for name, mask in self.masks(threshold).items()}
        targets, attributes = (text().batch(each, PAD) for each in pick)
        self.model.train(case.dropout)
        # the order in which the published step calls its models, and so of all draws of dropout
        seen = self.hidden(targets, weights, masks)
        moved = self.words(self.hidden(attributes, weights, masks), attributes)
        with torch.no_grad():
            fixed = self.words(self.hidden(attributes, self.original, {}), attributes)
        rows = self.words(seen, targets) if case.mode == "token" else seen
        bias = (self.chosen(rows).reshape(-1, HIDDEN) @ pair.T).sum(1).pow(2).mean()
        drift = (moved - fixed).pow(2).sum(-1).mean()
        (0.2 * bias + 0.8 * drift).backward()
        row = {"threshold": threshold, "bias": bias.item(), "drift": drift.item()}
        row |= {"penalty": self.penalty().item(), "density": self.density(masks)}
        row["loss"] = 0.2 * row["bias"] + 0.8 * row["drift"] + row["penalty"]
        self.update(step + 1, masks, weights)
        return row | {"scores": {gate: s.clone() for gate, s in self.scores.items()}}

    def density(self, masks: dict[str, Tensor]) -> float:
        """Open weights of the masked matrices over all their weights."""
        kept = sum(int(mask.sum()) for mask in masks.values())
        return kept / sum(mask.numel() for mask in masks.values())

    def update(self, t: int, masks: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Every score, one after the other, then every weight."""
        grads = {gate: self.penalty_gradient(gate) for gate in self.scores}
        for gate, matrix, columns in self.places():
            grad = masks[matrix].grad.T if columns else masks[matrix].grad
            R, C = self.scores[gate].shape
            grads[gate] += grad.reshape(R, grad.shape[0] // R, C, -1).sum((1, 3))
        for gate, grad in grads.items():
            if gate.split("/")[1] in self.case.trained:
                self.scores[gate] -= self.adam(gate, grad, t, self.case.rate)
        for name, weight in weights.items():
            if weight.grad is not None:
                self.weights[name] -= self.adam(name, weight.grad, t, 1e-3)

    def penalty_gradient(self, gate: str) -> Tensor:
        """Half of sigma' over the modules of its kind and over its scores."""
        s, modules = 1 / (1 + torch.exp(-self.scores[gate])), 2 if gate.endswith("ffn") else 8
        return s * (1 - s) / (2 * modules * s.numel())

    def adam(self, name: str, grad: Tensor, t: int, rate: float) -> Tensor:
        """Hugging Face's step: epsilon 1e-6 beside a second moment that is not corrected."""
        m, v = self.moments.get(name, (torch.zeros_like(grad),) * 2)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        self.moments[name] = m, v
        return rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)


def slowly(case: Case) -> tuple[list[dict], Scores]:
    """The trace and the masks at its end."""
    slow, trace = Slow(case), []
    torch.manual_seed(case.seed)
    for step, pick in enumerate(picks(case)):
        if step % EPOCH == 0:
            pair = slow.centroids()
        trace.append(slow.step(step, pick, pair))
    final = {gate: torch.sigmoid(s) > case.ends[1] for gate, s in slow.scores.items()}
    return trace, final


# our engine, as anyone may call it


def gated(case: Case, model: BertModel) -> Subnetwork:
    """Gates with the case's scores; those that do not train stand there all the same."""
    if case.block:
        plan = block_plan(model, case.block)
    else:
        plan = head_plan(model, ("query", "key", "value")) | head_output_plan(model)
    subnetwork = attach_(model, plan | ffn_plan(model), lambda _, shape: ThresholdGate(shape))
    subnetwork.double()
    for name, scores in first_scores(case).items():
        subnetwork.gates[name].scores.data.copy_(scores)
        subnetwork.gates[name].requires_grad_(name.split("/")[1] in case.trained)
    if case.one_storage:
        for i in range(2):
            for part in ("key", "value"):
                gate = subnetwork.gates[f"{i}/{part}"]
                gate.scores.data = subnetwork.gates[f"{i}/query"].scores.data
    return subnetwork


def ours(case: Case) -> tuple[list[dict], Scores]:
    """The same run through the public interface."""
    model = copy.deepcopy(dense())
    original = model if case.frozen else copy.deepcopy(model)
    subnetwork, trace, now = gated(case, model), [], {}
    learned = [{"params": [g.scores for g in subnetwork.gates.values()], "lr": case.rate}]
    if not case.frozen:
        model.requires_grad_(True)
        learned.append({"params": list(model.parameters()), "lr": 1e-3})
    optimizer = AdamW(learned, weight_decay=0.0, fused=True)  # as the experiments have it

    def teach(batch: Batch) -> Tensor:
        with subnetwork.off():
            return hidden_states(original, batch)

    teacher = Teacher(teach, room=0 if case.dropout else 2**30)

    def before_step(step: int) -> None:
        if step % EPOCH == 0:
            model.eval()
            subnetwork.set_threshold_(case.ends[1])
            sides = ([text().batch(text().where(kind))] for kind in ("male", "female"))
            now["pair"] = prototypes(model, *sides, case.layer, pooled=PUBLISHED.pooled_prototypes)
        model.train(case.dropout)
        original.train(case.dropout)
        threshold = cubic(step, STEPS, *case.ends, warmup=-1, cooldown=-10)
        subnetwork.set_threshold_(threshold)
        fold_epsilon_(optimizer, step)
        trace.append({"threshold": threshold, "density": density(subnetwork)})
        if step:
            trace[-2]["scores"] = scores_of(subnetwork)

    def loss_fn(pick: tuple[np.ndarray, np.ndarray]) -> dict[str, Tensor]:
        # only dropout can tell how far attributes are padded: it draws for padding as well
        some, others = text().batch(pick[0], PAD), text().batch(pick[1], PAD * case.dropout)
        found = debias_loss(
            model, teacher, some, others, now["pair"],
            layer=case.layer, mode=case.mode, fidelity=PUBLISHED,
        )  # fmt: skip
        found["penalty"] = subnetwork.penalty()
        found["loss"] = found["loss"] + found["penalty"]
        trace[-1] |= {name: value.item() for name, value in found.items()}
        return found

    torch.manual_seed(case.seed)
    fit(iter(picks(case)), loss_fn, optimizer, steps=STEPS, before_step=before_step)
    trace[-1]["scores"] = scores_of(subnetwork)
    subnetwork.set_threshold_(case.ends[1])
    return trace, subnetwork.keep()


def scores_of(subnetwork: Subnetwork) -> Scores:
    """All scores as they are."""
    return {name: gate.scores.detach().clone() for name, gate in subnetwork.gates.items()}


# step by step


@pytest.mark.parametrize("name", CASES)
def test_our_engine_walks_the_published_path(name: str) -> None:
    """Losses, densities and scores of every step, in float64; the last masks to the bit."""
    case = CASES[name]
    (expected, final), (came, keep) = slowly(case), ours(case)
    for step, (row, wanted) in enumerate(zip(came, expected, strict=True)):
        assert row.keys() == wanted.keys()
        assert row["density"] == wanted["density"], step
        for what in ("threshold", "bias", "drift", "penalty", "loss"):
            assert row[what] == pytest.approx(wanted[what], rel=1e-9, abs=1e-15), (step, what)
        for gate, scores in row["scores"].items():
            torch.testing.assert_close(scores, wanted["scores"][gate], rtol=1e-9, atol=1e-9)
    assert keep.keys() == final.keys()
    for gate, mask in keep.items():
        assert torch.equal(mask, final[gate]), gate
    start = {gate: torch.sigmoid(s) > case.ends[1] for gate, s in first_scores(case).items()}
    turned = sum(int((mask != start[gate]).sum()) for gate, mask in final.items())
    assert turned > 0, "a trace in which nothing opens or closes shows nothing"
