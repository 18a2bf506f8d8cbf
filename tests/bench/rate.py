"""How much of the machine's own matrix-product rate a frozen head-pruning step reaches."""

import statistics
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pruning_bias.plans import head_plan

from .measuring import Figure, Part, median, padding, product_rate, text
from .steps import BATCH, our_step

PAIRS, ROUNDS = 5, 3


def operations(
    lengths: np.ndarray,  # [B] real word pieces, no padding
    hidden: int,
    inner: int,
    layers: int,
) -> float:
    """Floating-point operations of the products of a step on value heads, forward and backward.

    The gradient of an input costs as much as the product itself; no gradient of a weight is
    formed. Below the first gate nothing is needed: layer 0 has neither queries, keys nor inputs.
    """
    square, wide = 2 * hidden * hidden, 2 * hidden * inner
    linear, attention = 4 * square + 2 * wide, 4 * hidden * lengths  # per word piece
    forward = layers * (linear + attention)
    backward = (layers - 1) * (linear + 2 * attention) + square + 2 * wide + attention / 2
    return float((lengths * (forward + backward)).sum())


def measure_rate(part: Part) -> None:
    """Rate of a step over rate of torch.mm, in turn; batches padded as those of an epoch are."""
    given = text()
    config, pairs = given.encoder.model.config, given.pairs(BATCH, PAIRS)
    shape = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    ways = {m: our_step(given.prototypes(), head_plan, m) for m in (False, True)}
    ways[True](tuple(batch.rows([0]) for batch in pairs[0]))
    (hidden, inner, _), rows = shape, BATCH * pairs[PAIRS // 2][0].ids.shape[1]
    products = [(1024,) * 3, (rows, hidden, hidden), (rows, hidden, inner), (rows, inner, hidden)]
    rates: dict[tuple, list[float]] = {product: [] for product in products}
    taken, asked = [], []
    for pair in pairs:
        ways[False](pair)  # the teacher's first time
        lengths = torch.cat([batch.attention.sum(1) for batch in pair]).numpy()
        asked.append(operations(lengths, *shape))
        seconds = []
        for _ in range(ROUNDS):
            seconds.append(median(lambda: ways[False](pair), 1))  # noqa: B023
            for product, found in rates.items():
                found.append(product_rate(*product, rounds=5))
        taken.append(statistics.median(seconds))
    pair = pairs[PAIRS // 2]
    few = tuple(batch.rows([0, 1]) for batch in pair)
    times = [median(lambda: ways[mixed](few), 2) for mixed in (False, True)]  # noqa: B023
    epoch = padding(chain(*(given.epoch(kind, BATCH) for kind in ("target", "attributes"))))
    rate = sum(asked) / sum(taken) * padding(chain(*pairs)) / epoch
    middle = {"x".join(map(str, p)): statistics.median(found) for p, found in rates.items()}
    part.numbers = {
        "text": given.name,
        "step_rate": rate,
        "step_rate_bfloat16": rate * times[0] / times[1],
        "product_rates": middle,
        "step_rate_by_pair": [a / t for a, t in zip(asked, taken, strict=True)],
        "padded_per_real_piece": {"these": padding(chain(*pairs)), "an epoch": epoch},
        "time_by_operator": _operators(lambda: ways[False](pair)),
    }  # fmt: skip
    part.figures = _lines(part.numbers)


def _operators(way: Callable[[], None]) -> dict[str, float]:
    """Shares of the time of a call that its slowest operators take."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        way()
    every = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    slowest = sorted(every, key=every.get, reverse=True)[:10]
    return {name: every[name] / sum(every.values()) for name in slowest}


def _lines(found: dict) -> list[Figure]:
    step, half = found["step_rate"], found["step_rate_bfloat16"]
    mm, *own = found["product_rates"].values()
    at = statistics.harmonic_mean(own)
    shared = {"batch": f"{BATCH} + {BATCH}", "threads": 1}

    def line(what: str, own: float, rate: float, of: str, **more: object) -> Figure:
        sides = f"{own / 1e9:.1f} GFLOP/s", f"{rate / 1e9:.1f} GFLOP/s: torch.mm, {of}"
        return Figure(what, f"{own / rate:.2f} of the rate", *sides, **shared, **more)

    square = "1024 x 1024 x 1024"
    return [
        line("rate of a frozen step on value heads", step, mm, square, mark=">= 0.75",
             reached=step >= 0.75 * mm),
        line("the same, against products of its own shapes", step, at, "at the encoder's shapes"),
        line("the same, bfloat16", half, mm, f"{square}, float32"),
    ]  # fmt: skip
