"""A debias subnetwork's steps, memory and file against plain fine-tuning and plain inference."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pruning_bias.anatomy import load_encoder
from pruning_bias.attributes import Attribute
from pruning_bias.differences import difference_, keep_largest_, learning, penalty, penalty_weights
from pruning_bias.erasers import Eraser
from pruning_bias.files import save
from pruning_bias.regimes import TaskModel, losses_of, scores_and_deltas
from pruning_bias.tasks import EncodedTask, TaskBatch
from pruning_bias.training import adam
from pruning_bias.vocabulary import occurring, word_pieces

from .lottery import BATCH, LENGTH, full_length, sentences
from .measuring import Figure, Part, all_cores, held, median, text

DENSITY = 0.01
FEW = 16  # sentences of a small batch
TURNS = 20  # of steps on them, one way after the other
STEPS = 4  # of a training that is timed; the demo's has 80
Step = Callable[[], None]


def fine_tuning_step(model: TaskModel, batch: TaskBatch) -> Step:
    """All weights, the task's loss, AdamW."""
    model.encoder.requires_grad_(True)
    optimizer = adam((model.encoder.parameters(), 1e-5, 0.0), (model.head.parameters(), 1e-4, 0.0))
    losses = losses_of(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(batch)["loss"].backward()
        optimizer.step()

    return step


def our_step(
    model: TaskModel,
    batch: TaskBatch,
    rows: torch.Tensor | None,
    fixed: bool,
    steps: int = 1,  # of one training
) -> Step:
    """A difference learns, with a gate for every weight or in chosen entries."""
    model.encoder.requires_grad_(False)
    difference = difference_(model.encoder, seen=rows)
    if fixed:
        for part in difference.parts.values():
            part.delta.data.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
        keep_largest_(difference, DENSITY)
    groups = Attribute("side", ("left", "right"), np.arange(BATCH) % 2)
    eraser = Eraser(groups, model.encoder.config.hidden_size)
    weights = penalty_weights(1.25e-7, "", model.encoder)
    losses = losses_of(model, [eraser], lambda: penalty(difference, weights))
    scores, deltas = scores_and_deltas(difference)
    optimizer = adam((deltas, 1e-5, 0.0), (scores, 0.1, 0.0), (eraser.parameters(), 1e-4, 0.0))
    noise = torch.Generator().manual_seed(0)

    def step() -> None:
        with learning(difference):
            for _ in range(steps):
                difference.draw_(noise)
                optimizer.zero_grad(set_to_none=True)
                losses(batch)["loss"].backward()
                optimizer.step()

    return step


def forward(model: TaskModel, batch: TaskBatch, frozen: bool = False) -> Step:
    """Inference that keeps its activations: those of weights' gradients, or of states' alone."""
    model.encoder.requires_grad_(not frozen)
    words = model.encoder.get_input_embeddings()

    def step() -> None:
        hook = words.register_forward_hook(lambda *found: found[2].requires_grad_(True))
        try:
            model.state(batch)
        finally:
            hook.remove()

    return step


def memory(step: Step, model: TaskModel) -> float:  # MiB
    """The model's weights, and the most that a step holds at once beyond what was there."""
    step()  # what lasts from step to step is there now, and is counted by `lasting`
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    return weights / 2**20 + held(step)


def lasting(model: TaskModel) -> float:  # MiB
    """Places, values and what Adam keeps of each: int64, and four float32."""
    difference = model.encoder.differences[-1]
    return sum(len(part.index) * (8 + 4 * 4) for part in difference.parts.values()) / 2**20


def fresh() -> TaskModel:
    """The packaged encoder with a head for two labels, in training mode."""
    return TaskModel(load_encoder("packaged").model, 2).train()


def seconds_with_tables(data: EncodedTask) -> list[float]:
    """Plain fine-tuning on a few sentences, with all word embeddings and with those that occur."""
    middle = data.lengths.argsort()[len(data) // 2 :][:FEW]
    models, batch = (fresh(), fresh()), data.batch(middle)
    with occurring(models[1].encoder, data):
        steps = [fine_tuning_step(model, batch) for model in models]
        taken = [[median(step, 1) for step in steps] for _ in range(TURNS + 1)]
    return np.median(taken[1:], 0).tolist()


def measure_differences(part: Part) -> None:
    """Learning and fixed-mask steps, the latter's memory, and a file's size."""
    given, threads = text(), all_cores()
    data: EncodedTask = full_length(given)
    batch = data.batch(np.arange(BATCH))
    seen = word_pieces(data)
    ways = {
        "fine-tuning": fine_tuning_step(fresh(), batch),
        "learning": our_step(fresh(), batch, None, False, STEPS),
        "learning, seen rows": our_step(fresh(), batch, seen, False, STEPS),
        "fixed": our_step(fresh(), batch, None, True, STEPS),
    }
    seconds = {name: median(step) for name, step in ways.items() if step() is None}
    seconds |= {name: seconds[name] / STEPS for name in seconds if name != "fine-tuning"}
    whole, some = seconds_with_tables(sentences(given))
    kept = memory(our_step(fixed := fresh(), batch, None, True), fixed) + lasting(fixed)
    plain, states = (memory(forward(m := fresh(), batch, frozen), m) for frozen in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        path = save(fixed.encoder.differences[-1], Path(folder) / "difference.safetensors")
        base = sum(4 * weight.numel() for weight in fixed.encoder.parameters())
        share = path.stat().st_size / base
    part.numbers = {"text": given.name, "seconds": seconds, "memory_mib": [kept, plain, states],
                    "seconds_with_tables": [whole, some],
                    "rows_of_word_embeddings": len(seen), "file_share": share}  # fmt: skip
    shared = {"batch": f"{BATCH} of {LENGTH}", "threads": threads}
    usual = seconds["fine-tuning"]

    def line(name: str, what: str, mark: float | None) -> Figure:
        ratio = seconds[name] / usual
        return Figure(
            what, f"{ratio:.2f} times the time", f"{seconds[name]:.2f} s",
            f"{usual:.2f} s: plain fine-tuning", **shared,
            mark=f"<= {mark}" if mark else "", reached=ratio <= mark if mark else None,
        )  # fmt: skip

    part.figures = [
        Figure("a step of fine-tuning, word embeddings only where they are used",
               f"{some / whole:.2f} times the time", f"{some:.3f} s",
               f"{whole:.3f} s: with all of them", f"{FEW}", threads),
        line("learning", "a difference's learning step, a gate for every weight", 2.0),
        line("learning, seen rows", "the same, rows of embeddings only where they are used", 2.0),
        line("fixed", f"a fixed-mask step at density {DENSITY}", 1.15),
        Figure("memory of a fixed-mask step", f"{kept / plain:.2f} of the memory",
               f"{kept:.0f} MiB", f"{plain:.0f} MiB: plain inference and its activations", **shared,
               mark="<= 1.1", reached=kept <= 1.1 * plain),
        Figure("the same, beside frozen weights", f"{kept / states:.2f} of the memory",
               f"{kept:.0f} MiB", f"{states:.0f} MiB: without what weights' gradients need",
               **shared),
        Figure(f"file of a difference at density {DENSITY}", f"{share:.2%} of its base",
               f"{path.name}", "the encoder's weights", "-", threads,
               mark="<= 3 %", reached=share <= 0.03),
    ]  # fmt: skip
