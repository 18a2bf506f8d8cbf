"""Training steps: ours, and the published way as it can be run today."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from nn_pruning_reference import patch_
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from pruning_bias.anatomy import load_encoder
from pruning_bias.debias import Teacher, debias_loss, hidden_states
from pruning_bias.gates import ThresholdGate
from pruning_bias.plans import Plan, block_plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.subnetworks import attach_

from .measuring import Figure, Pair, Part, Text, all_cores, median, native_bfloat16, text

BATCH, PAIRS = 32, 2
Step = Callable[[Pair], Tensor]  # the loss before the step


def value_heads(model: PreTrainedModel) -> Plan:
    """Rows of each value head and its columns of the attention output, as published."""
    return head_plan(model) | head_output_plan(model)


def blocks(model: PreTrainedModel) -> Plan:
    """Blocks of 32 x 32 and feed-forward units, as published."""
    return block_plan(model, 32) | ffn_plan(model)


def our_step(a: Tensor, make_plan: Callable[[PreTrainedModel], Plan], mixed: bool = False) -> Step:
    """A step of the package's experiments, on an encoder of its own."""
    model = load_encoder("packaged").model
    subnetwork = attach_(model, make_plan(model), lambda _, shape: ThresholdGate(shape))
    optimizer = AdamW(subnetwork.parameters(), lr=0.01, weight_decay=0, fused=True)

    def teach(batch):
        with subnetwork.off():
            return hidden_states(model, batch)

    teacher = Teacher(teach)

    def step(pair: Pair) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            losses = debias_loss(model, teacher, *pair, a, layer="last", mode="token")
            loss = losses["loss"] + subnetwork.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def published_step(a: Tensor, heads: bool, dropout: bool) -> Step:
    """Eager attention, a teacher of its own in every step, masked weights of nn_pruning."""
    model, original = (load_encoder("packaged").model for _ in range(2))
    for each in (model, original):
        each.set_attn_implementation("eager")
        each.train(dropout)  # the published code left the teacher's dropout on as well
    width, H = model.config.hidden_size, model.config.num_attention_heads
    patched = patch_(model, width // H if heads else 32, width if heads else 32, ffn=not heads)
    patched.host.train(dropout)
    scores = {
        name: score
        for name, score in patched.scores().items()
        if not heads or name.split("/")[1] in ("value", "attention_output")
    }
    patched.host.requires_grad_(False)
    optimizer = AdamW([score.requires_grad_() for score in scores.values()], lr=0.01)
    teacher, taken = Teacher(lambda batch: hidden_states(original, batch), room=0), 0

    def step(pair: Pair) -> Tensor:
        nonlocal taken
        for _ in pair:  # the published code set the threshold in every forward
            patched.schedule_(taken, 1000)
        losses = debias_loss(patched.host.bert, teacher, *pair, a, layer="last", mode="token")
        loss, taken = losses["loss"] + patched.penalty(), taken + 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compared(heads: bool, given: Text) -> dict[str, float]:  # seconds per step
    """Mean time of a step of each way over the same pairs of batches, taking turns."""
    a, plan = given.prototypes(), value_heads if heads else blocks
    few = tuple(batch.rows([0, 1]) for batch in given.pairs(BATCH, 1)[0])
    ways = {
        "ours": our_step(a, plan),
        "published": published_step(a, heads, dropout=True),
        "published without dropout": published_step(a, heads, dropout=False),
    }
    ways["ours"](few)
    for name in ("published", "published without dropout"):
        ways[name](given.padded(few))
    seconds = dict.fromkeys(["ours, first epoch", *ways], 0.0)
    pairs = given.pairs(BATCH, PAIRS)
    for pair in pairs:
        seconds["ours, first epoch"] += median(lambda: ways["ours"](pair), 1) / PAIRS  # noqa: B023
        for name, way in ways.items():
            given_to = pair if name == "ours" else given.padded(pair)
            seconds[name] += median(lambda: way(given_to)) / PAIRS  # noqa: B023
    half = our_step(a, plan, mixed=True)
    half(few)
    some = pairs[1] if native_bfloat16() else few  # without it, a full batch takes a minute
    ways["ours"](some)
    times = median(lambda: half(some), 1), median(lambda: ways["ours"](some))
    seconds["ours, bfloat16"] = seconds["ours"] * times[0] / times[1]
    return seconds


def measure_steps(part: Part, heads: bool) -> None:
    """A training step against the published one, for value heads or for blocks."""
    given, threads = text(), all_cores()
    seconds = compared(heads, given)
    ours, theirs = seconds["ours"], seconds["published"]
    pieces = [
        float(batch.attention.sum()) / BATCH for p in given.pairs(BATCH, PAIRS) for batch in p
    ]
    part.numbers = {
        "text": given.name,
        "seconds_per_step": seconds,
        "times_as_fast": {name: s / ours for name, s in seconds.items()},
        "mean_pieces_per_sentence": sum(pieces) / len(pieces),
    }
    kind = "value heads" if heads else "32 x 32 blocks and FFN units"
    shared = {"batch": f"{BATCH} + {BATCH}", "threads": threads}
    published = f"{theirs:.2f} s: padded to 128, eager, teacher every step, dropout, nn_pruning"

    def line(what: str, side: float, **more: object) -> Figure:
        measured = f"{theirs / side:.1f} times as fast"
        return Figure(what, measured, f"{side:.3f} s", published, **shared, **more)

    half, plainer = seconds["ours, bfloat16"], seconds["published without dropout"]
    without = f"{plainer:.2f} s: the published way, its dropout off"
    native = native_bfloat16()
    part.figures = [
        line(f"training step, {kind}", ours, mark=">= 8", reached=theirs >= 8 * ours),
        line(f"the same, bfloat16{'' if native else ' (not native here)'}", half,
             mark=">= 15" if native else ">= 15, on a processor with native bfloat16",
             reached=theirs >= 15 * half if native else None),
        line("the same, first epoch: the teacher is asked", seconds["ours, first epoch"]),
        Figure("the same, float32, against no dropout", f"{plainer / ours:.1f} times as fast",
               f"{ours:.3f} s", without, **shared),
    ]  # fmt: skip
