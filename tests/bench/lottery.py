"""Importance against plain training passes; a search's masks together and one at a time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pruning_bias.anatomy import load_encoder
from pruning_bias.encoding import in_order
from pruning_bias.glue import TASKS
from pruning_bias.importance import (
    all_open,
    component_gates,
    example_gradients,
    losses,
    set_gates_,
)
from pruning_bias.qualities import mask_logits, without_each
from pruning_bias.search import close_weakest, paper_phases
from pruning_bias.tasks import Classifier, EncodedTask, TaskBatch
from pruning_bias.tickets import Keep

from .measuring import Figure, Part, Text, all_cores, median, text

BATCH, LENGTH = 64, 64
SENTENCES = 192  # enough that groups of like length are no handful
TRIED = 3  # masks that one at a time is timed on: it computes the same for every mask


def full_length(given: Text) -> EncodedTask:
    """Examples without padding: running text, LENGTH word pieces each."""
    return _examples(given.encoded.ids[: BATCH * LENGTH], [LENGTH] * BATCH)


def sentences(given: Text) -> EncodedTask:
    """Sentences as they come, cut to LENGTH word pieces where they are longer."""
    ids, offsets = given.encoded.ids, given.encoded.offsets
    rows = [ids[offsets[i] : offsets[i + 1]][:LENGTH] for i in given.train["target"][:SENTENCES]]
    return _examples(np.concatenate(rows), [len(row) for row in rows])


def _examples(ids: np.ndarray, lengths: list[int]) -> EncodedTask:
    labels = np.random.default_rng(0).integers(0, 2, len(lengths))
    offsets = np.cumsum([0, *lengths])
    return EncodedTask(TASKS["SST-2"], ids, np.zeros(len(ids), np.uint8), offsets, labels)


def plain_pass(classifier: Classifier, data: EncodedTask) -> Callable[[], None]:
    """Forward and backward to all parameters, as in training but without dropout."""
    batch = data.batch(np.arange(len(data)))

    def step() -> None:
        classifier.zero_grad(set_to_none=True)
        losses(data.task, classifier(batch), batch.labels).mean().backward()

    return step


def masks_of_a_search(start: Keep) -> list[list[Keep]]:
    """All that close one more, at two of the nine states of a search, a third from its ends.

    It takes the paper's steps and ends near the paper's mean: 53 % of the heads, 65 % of the MLPs.
    """
    joint, heads, _ = paper_phases(start)
    generator, states = torch.Generator().manual_seed(0), [start]
    for phase in (joint, joint, *[heads] * 6):
        scores = {n: torch.rand(z.shape, generator=generator) for n, z in start.items()}
        states.append(close_weakest(states[-1], scores, phase))
    return [[mask for *_, mask in without_each(state)] for state in states[2::4]]


def whole(classifier: Classifier, batch: TaskBatch) -> Tensor:
    """Logits [B, 2]; every layer computes every word piece, as in the published program."""
    states = classifier.encoder(batch.ids, batch.attention, batch.types).last_hidden_state
    return classifier.out(torch.tanh(classifier.dense(states[:, 0])))


def one_at_a_time(
    classifier: Classifier,
    masks: list[Keep],
    some: list[TaskBatch],
    logits: Callable[[Classifier, TaskBatch], Tensor] = whole,
) -> Tensor:
    """A pass for each mask, gates multiplying; logits [K, N, 2]."""
    found = []
    with component_gates(classifier) as gates, torch.no_grad():
        for mask in masks:
            set_gates_(gates, {name: z.to(classifier.out.weight) for name, z in mask.items()})
            found.append(torch.cat([logits(classifier, batch) for batch in some]))
    return torch.stack(found)


def seconds_together(classifier: Classifier, masks: list[list[Keep]], data: EncodedTask) -> float:
    """For all masks of all states."""
    return sum(median(lambda: mask_logits(classifier, some, data), 1) for some in masks)  # noqa: B023


def seconds_one_by_one(
    classifier: Classifier,
    masks: list[list[Keep]],
    some: list[TaskBatch],
    logits: Callable[[Classifier, TaskBatch], Tensor] = whole,
) -> float:
    """For all masks of all states, from a few."""
    tried = masks[0][:TRIED]
    one_at_a_time(classifier, tried[:1], some[:1], logits)
    seconds = median(lambda: one_at_a_time(classifier, tried, some, logits), 1)
    return seconds / len(tried) * sum(map(len, masks))


def measure_lottery(part: Part) -> None:
    """Importance of all heads and MLPs, and the masks of a search."""
    given, threads = text(), all_cores()
    classifier = Classifier(load_encoder("packaged").model, 2).eval()
    full, real = full_length(given), sentences(given)
    masks = masks_of_a_search(all_open(classifier.encoder))
    step = plain_pass(classifier, full)
    step()
    passes = median(step), median(lambda: example_gradients(classifier, full))
    alike = list(in_order(real, np.arange(len(real)), BATCH))
    parts = np.arange(len(real)).reshape(-1, BATCH)
    padded = [real.batch(each, pad_to=LENGTH) for each in parts]
    found = {
        "full length": (
            seconds_together(classifier, masks, full),
            seconds_one_by_one(classifier, masks, [full.batch(np.arange(BATCH))]),
        ),
        "sentences": (
            seconds_together(classifier, masks[1:], real),
            seconds_one_by_one(classifier, masks[1:], padded),
            seconds_one_by_one(classifier, masks[1:], alike),
            seconds_one_by_one(classifier, masks[1:], alike, Classifier.__call__),
        ),
    }
    part.numbers = {
        "text": given.name,
        "importance_seconds": dict(zip(("plain", "ours"), passes, strict=True)),
        "search_seconds": found,  # together, then one at a time
        "masks": [len(each) for each in masks],
        "mean_pieces_per_sentence": float(real.lengths.mean()),
    }
    shared = {"batch": f"{BATCH}", "threads": threads}

    def line(what: str, of: str, against: int, words: str, mark: str = "") -> Figure:
        ours, theirs = found[of][0], found[of][against]
        return Figure(
            what, f"{theirs / ours:.1f} times as fast", f"{ours:.1f} s",
            f"{theirs:.1f} s: one mask at a time, {words}", **shared,
            mark=mark, reached=theirs >= 4 * ours if mark else None,
        )  # fmt: skip

    part.figures = [
        Figure("importance of all heads and MLPs", f"{passes[1] / passes[0]:.2f} times the time",
               f"{passes[1]:.2f} s", f"{passes[0]:.2f} s: plain forward and backward", **shared,
               mark="<= 1.3", reached=passes[1] <= 1.3 * passes[0]),
        line("a search's masks together, sentences", "sentences", 1, f"padded to {LENGTH}", ">= 4"),
        line("the same, both in groups of like length", "sentences", 2, "as ours"),
        line("the same, both with [CLS] alone in the last layer", "sentences", 3, "as ours"),
        line(f"the same, all of {LENGTH} word pieces", "full length", 1, "nothing to pad", ">= 4"),
    ]  # fmt: skip
