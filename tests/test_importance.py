"""Propositions about importance: whose gradient it is, and what each score adds up.

The reference figures are of the packaged encoder in float64, with a linear head on its pooler and
64 invented sentences; the published program, run unmodified, gave its own scores and masks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_encoder
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_bias.anatomy import Encoder
from pruning_bias.edits import GatedLinear
from pruning_bias.gates import FixedGate
from pruning_bias.glue import TASKS
from pruning_bias.importance import (
    SCORES,
    Gradients,
    all_open,
    component_gates,
    example_gradients,
    importance,
    losses,
    normalize,
    raw_scores,
    set_gates_,
)
from pruning_bias.plans import head_plan, mlp_plan
from pruning_bias.qualities import mask_logits, qualities
from pruning_bias.search import close_weakest, paper_phases, search, size, ticket
from pruning_bias.subnetworks import attach_, subnetworks
from pruning_bias.tasks import Classifier, EncodedTask, predict
from pruning_bias.tickets import Keep

torch.set_num_threads(1)

FAMILIES = ("bert", "roberta", "electra", "distilbert", "albert")


def examples(task: str, n: int, pad_id: int = 0, seed: int = 0) -> EncodedTask:
    """Random word pieces and labels, of 3 to 9 pieces."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 10, n)
    classes = len(TASKS[task].labels)
    return EncodedTask(
        TASKS[task],
        rng.integers(3, 50, lengths.sum()).astype(np.int32),
        np.zeros(lengths.sum(), np.uint8),
        np.cumsum([0, *lengths]),
        rng.integers(0, classes, n) if classes else rng.uniform(0, 5, n),
        pad_id,
    )


def classified(model: PreTrainedModel, task: str = "SST-2", n: int = 11, seed: int = 0) -> Any:
    """A classifier on top, with large weights, and examples for it."""
    classifier = Classifier(model, TASKS[task].outputs, seed).double()
    nn.init.normal_(classifier.out.weight, generator=torch.Generator().manual_seed(seed))
    return classifier, examples(task, n, model.config.pad_token_id or 0, seed)


def at_random(model: PreTrainedModel, seed: int) -> Keep:
    """A mask with about half of everything closed, and nothing open in the first layer's heads."""
    generator = torch.Generator().manual_seed(seed)
    keep = {n: torch.rand(z.shape, generator=generator) < 0.5 for n, z in all_open(model).items()}
    keep["0/value"][:] = False
    return keep


def stacked(values: dict[str, Tensor], part: str) -> Tensor:
    """All layers of a part, [..., L, G]."""
    return torch.stack([each[..., 0] for n, each in values.items() if n.endswith(f"/{part}")], -2)


# What the gates are


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ticket_means_the_same_on_the_context_and_on_the_values(family: str) -> None:
    classifier, data = classified(small_encoder(family))
    keep = at_random(classifier.encoder, 1)
    (here,) = mask_logits(classifier, [keep], data)
    plan = head_plan(classifier.encoder) | mlp_plan(classifier.encoder)
    there = attach_(classifier.encoder, plan, lambda name, _: FixedGate(keep[name]))
    torch.testing.assert_close(predict(classifier, data), here.float())
    with there.off():
        assert (predict(classifier, data) - here).abs().max() > 0.01


def test_measuring_leaves_the_classifier_as_it_was() -> None:
    classifier, data = classified(small_encoder())
    classifier.train()
    classifier.out.bias.requires_grad_(False)
    before = {name: p.clone() for name, p in classifier.named_parameters()}
    needed = {name: p.requires_grad for name, p in classifier.named_parameters()}
    with component_gates(classifier):
        assert not any(p.requires_grad for p in classifier.parameters())
        assert not classifier.training
    with torch.no_grad():
        importance(classifier, data)
    assert classifier.training and not subnetworks(classifier.encoder)
    assert not any(isinstance(module, GatedLinear) for module in classifier.modules())
    assert {name: p.requires_grad for name, p in classifier.named_parameters()} == needed
    for name, p in classifier.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_gates_go_away_even_when_measuring_fails() -> None:
    classifier, data = classified(small_encoder())
    broken = EncodedTask(data.task, data.ids + 1000, data.types, data.offsets, data.labels)
    with pytest.raises(IndexError):
        example_gradients(classifier, broken)
    assert not subnetworks(classifier.encoder)
    assert all(p.requires_grad for p in classifier.parameters())


# Whose gradient it is


@pytest.mark.parametrize("task", ["SST-2", "MNLI", "STS-B"])
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_each_example_gets_the_gradient_that_it_has_alone(family: str, task: str) -> None:
    classifier, data = classified(small_encoder(family), task)
    keep = at_random(classifier.encoder, 2)
    together = example_gradients(classifier, data, keep).examples
    with component_gates(classifier) as gates:
        for i in range(len(data)):
            batch = data.batch([i])
            set_gates_(gates, {name: z.double() for name, z in keep.items()})
            leaves = [gate.values.requires_grad_() for gate in gates.gates.values()]
            (loss,) = losses(data.task, classifier(batch), batch.labels)
            alone = torch.autograd.grad(loss, leaves)
            for name, g in zip(gates.gates, alone, strict=True):
                torch.testing.assert_close(together[name][i], g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_finite_differences(seed: int) -> None:
    classifier, data = classified(small_encoder(), seed=seed)
    keep = at_random(classifier.encoder, seed) if seed else all_open(classifier.encoder)
    found, batch = example_gradients(classifier, data, keep).examples, data.batch(range(len(data)))

    @torch.no_grad()
    def loss(name: str, place: int, step: float) -> Tensor:
        values = {n: z.double() for n, z in keep.items()}
        values[name][place] += step
        with component_gates(classifier) as gates:
            set_gates_(gates, values)
            return losses(data.task, classifier(batch), batch.labels)

    for name, z in keep.items():
        for place in range(len(z)):
            slope = (loss(name, place, 1e-5) - loss(name, place, -1e-5)) / 2e-5
            torch.testing.assert_close(found[name][:, place, 0], slope, rtol=1e-6, atol=1e-8)
            assert slope.any()


def test_neither_batches_nor_padding_matter() -> None:
    classifier, data = classified(small_encoder())
    one, many = (example_gradients(classifier, data, size=size) for size in (1, 64))
    for kind in ("examples", "tokens"):
        for name, each in getattr(one, kind).items():
            torch.testing.assert_close(each, getattr(many, kind)[name], rtol=0, atol=1e-12)


# What the scores add up


def test_published_scores_are_those_of_gradients_that_nobody_clears() -> None:
    classifier, data = classified(small_encoder(), n=10)
    keep = at_random(classifier.encoder, 3)
    names = list(keep)
    uncleared, cleared = ({n: torch.zeros(z.shape) for n, z in keep.items()} for _ in range(2))
    with component_gates(classifier) as gates:
        set_gates_(gates, {name: z.double() for name, z in keep.items()})
        leaves = [gates.gates[name].values.requires_grad_() for name in names]
        for start in range(0, 10, 4):  # the last batch is smaller
            batch = data.batch(range(start, min(start + 4, 10)))
            before = [0 if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
            losses(data.task, classifier(batch), batch.labels).mean().backward()
            for name, leaf, was in zip(names, leaves, before, strict=True):
                uncleared[name] = uncleared[name] + leaf.grad.abs()
                cleared[name] = cleared[name] + (leaf.grad - was).abs()
    gradients = example_gradients(classifier, data, keep)
    for score, wanted in (("published_code", uncleared), ("zeroed_batch", cleared)):
        raw = raw_scores(gradients, score, batch_size=4)
        for name in names:
            torch.testing.assert_close(raw[name], wanted[name].double(), rtol=0, atol=1e-12)


def test_one_batch_that_is_cleared_or_not_is_the_same() -> None:
    gradients = example_gradients(*classified(small_encoder()))
    one, other = (raw_scores(gradients, score, 64) for score in ("published_code", "zeroed_batch"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_single_examples_without_cancelling_are_the_papers_expectation() -> None:
    gradients = example_gradients(*classified(small_encoder(), n=7))
    paper, alone = raw_scores(gradients), raw_scores(gradients, "zeroed_batch", batch_size=1)
    for name in paper:
        torch.testing.assert_close(7 * paper[name], alone[name])


def test_no_score_is_below_that_of_the_batches_it_pools() -> None:
    gradients = example_gradients(*classified(small_encoder(), n=12))
    pooled = raw_scores(gradients, "zeroed_batch", batch_size=4)
    assert all((3 * z >= pooled[name] - 1e-12).all() for name, z in raw_scores(gradients).items())


def test_michels_score_is_context_times_its_gradient_at_every_token() -> None:
    classifier, data = classified(small_encoder(), n=6)
    gradients, contexts = example_gradients(classifier, data), []

    def remember(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        contexts.append(args[0])

    for layer in classifier.encoder.encoder.layer:
        layer.attention.output.dense.register_forward_pre_hook(remember)
    classifier.eval()
    batch = data.batch(range(6))
    losses(data.task, classifier(batch), batch.labels).mean().backward()
    raw = raw_scores(gradients, "michel")
    for i, (context, count) in enumerate(zip(contexts, (data.lengths.sum(), 6), strict=True)):
        products = (context * context.grad).unflatten(-1, (3, 4)).sum(-1).abs()
        wanted = products.sum((0, 1)) / int(count)
        torch.testing.assert_close(raw[f"{i}/value"][:, 0], wanted, rtol=0, atol=1e-12)
    assert torch.equal(raw["1/mlp"], raw_scores(gradients)["1/mlp"])


def test_an_unknown_score_is_refused() -> None:
    gradients = Gradients({}, {}, torch.ones(1))
    with pytest.raises(ValueError, match="score is 'fisher'; expected one of paper, published"):
        raw_scores(gradients, "fisher")


# What layers are made of


def test_closed_heads_count_in_the_norm_only_as_published() -> None:
    raw = {
        "0/value": torch.tensor([[3.0], [4.0], [12.0]]),
        "1/value": torch.tensor([[1.0], [1.0], [1.0]]),
        "0/mlp": torch.tensor([[2.0]]),
        "1/mlp": torch.tensor([[6.0]]),
    }
    keep = {name: torch.ones_like(each).bool() for name, each in raw.items()}
    keep["0/value"][2] = False
    scores, published = normalize(raw, keep), normalize(raw)
    values = torch.tensor([0.6, 0.8, 3**-0.5])  # the living, layer by layer
    low, high = values.min(), values.max()
    wanted = (values - low) / (high - low)
    torch.testing.assert_close(scores["0/value"][:, 0], torch.tensor([*wanted[:2], 0.0]))
    torch.testing.assert_close(scores["1/value"][:, 0], wanted[2].expand(3))
    values = torch.tensor([3 / 13, 4 / 13, 12 / 13, 3**-0.5])
    torch.testing.assert_close(published["1/value"][0, 0], (values[3] - 3 / 13) / (9 / 13))
    assert published["0/value"][2] == 1 and published["0/value"][0] == 0
    assert scores["0/mlp"] == published["0/mlp"] == 0 < scores["1/mlp"] == published["1/mlp"] == 1


def test_a_part_of_which_nothing_or_one_is_left_has_scores_still() -> None:
    raw = {"0/value": torch.rand(3, 1), "0/mlp": torch.rand(1, 1)}
    keep = {"0/value": torch.zeros(3, 1).bool(), "0/mlp": torch.ones(1, 1).bool()}
    assert not any(each.any() for each in normalize(raw, keep).values())


# The reference

TOKENS = 761


@pytest.fixture(scope="module")
def lottery(golden: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return golden("lottery")


@pytest.fixture
def on_packaged(
    lottery: dict[str, Any], packaged: Encoder, packaged64: Encoder
) -> Iterator[Callable[[str, torch.dtype], tuple[Classifier, EncodedTask]]]:
    """The packaged encoder with one of the reference's two heads, and its sentences."""
    mask = np.array(lottery["attention_mask"], bool)
    ids = np.array(lottery["input_ids"], np.int32)[mask]
    offsets = np.cumsum([0, *mask.sum(1)])
    labels = np.array(lottery["labels"])
    data = EncodedTask(TASKS["SST-2"], ids, np.zeros(len(ids), np.uint8), offsets, labels)

    def make(head: str, dtype: torch.dtype) -> tuple[Classifier, EncodedTask]:
        encoder = packaged64 if dtype == torch.float64 else packaged
        classifier = Classifier(encoder.model, 2).to(dtype).eval()
        classifier.out.weight.data = torch.tensor(lottery[head]["W"], dtype=dtype)
        classifier.out.bias.data = torch.tensor(lottery[head]["b"], dtype=dtype)
        return classifier, data

    yield make
    for encoder in (packaged, packaged64):
        encoder.model.requires_grad_(False)


def test_gradients_and_scores_are_the_references(
    lottery: dict[str, Any], on_packaged: Callable[..., tuple[Classifier, EncodedTask]]
) -> None:
    classifier, data = on_packaged("seeded_head", torch.float64)
    gradients = example_gradients(classifier, data)
    for part, name in (("value", "heads"), ("mlp", "mlps")):
        wanted = torch.tensor(lottery["gradients"][name], dtype=torch.float64)
        came = stacked(gradients.examples, part)
        assert (came - wanted.view_as(came)).abs().max() < 1e-8
    for score in SCORES:
        raw = raw_scores(gradients, score, batch_size=16)
        kept = lottery["scores"][score]
        for kind, values in (("raw", raw), ("normalised", normalize(raw))):
            for part, name in (("value", "heads"), ("mlp", "mlps")):
                if f"{kind}_{name}" in kept:
                    wanted = torch.tensor(kept[f"{kind}_{name}"], dtype=torch.float64)
                    came = stacked(values, part)
                    per_token = (kind, name) == ("raw", "mlps") and score != "paper"
                    came = came / TOKENS if per_token else came
                    assert (came - wanted.view_as(came)).abs().max() < 1e-8, (score, kind)
        if "next_heads_removed" in kept:
            keep = all_open(classifier.encoder)
            closed = close_weakest(keep, normalize(raw), {"value": 7, "mlp": 1})
            gone = {tuple(place) for place in (~stacked(closed, "value")).nonzero().tolist()}
            assert gone == {tuple(place) for place in kept["next_heads_removed"]}
            assert not closed[f"{kept['next_mlp_removed']}/mlp"].any()


def test_the_published_loop_ends_where_the_authors_program_ended(
    on_packaged: Callable[..., tuple[Classifier, EncodedTask]],
) -> None:
    """Their program, unmodified: 40 heads and 4 MLPs after 12 evaluations, from 59 of 64 right."""
    classifier, data = on_packaged("fitted_head", torch.float32)
    start = all_open(classifier.encoder)
    published = {"score": "published_code", "batch_size": 16, "closed_in_norm": True}
    steps = search(
        start,
        lambda keep: importance(classifier, data, keep, **published),
        lambda keep: qualities(classifier, [keep], data)[0],
        paper_phases(start),
        reuse_failed=True,
    )
    assert steps[0].quality == 59 / 64 and len(steps) == 12
    assert (size(ticket(steps), "value"), size(ticket(steps), "mlp")) == (40, 4)
    assert [step.phase for step in steps if not step.accepted] == [0, 1, 2]
