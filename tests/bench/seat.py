"""SEAT with p-values: all tests at once, and one sentence and one partition at a time."""

import random
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pruning_bias.anatomy import Encoder, load_encoder
from pruning_bias.benchmarks import (
    AssociationTest,
    builtin_tests,
    p_value,
    read_sets,
    read_test,
    seat,
)
from pruning_bias.settings import data_folder

from .measuring import Figure, Part, all_cores, median

DRAWS, EVERY, SOME = 10_000, 100, 500  # permutations; every 100th sentence, 500 permutations timed


def all_tests() -> tuple[str, list[AssociationTest]]:
    """Every file of the data folder, or the built-in tests."""
    files = sorted(Path(data_folder() / "seat").rglob("*.jsonl"))
    if not files:
        return "built-in tests (no seat/ in the data folder)", builtin_tests()
    return f"all {len(files)} files of seat/", [read_test(f.stem, read_sets(f)) for f in files]


def one_at_a_time(
    encoder: Encoder, texts: list[str], pad: bool
) -> float:  # seconds for all of them
    """A forward pass for each text of each set, timed on some of them."""
    some = texts[::EVERY]
    options = {"padding": "max_length", "max_length": 128} if pad else {}

    @torch.no_grad()
    def embed(each: str) -> Tensor:
        inputs = encoder.tokenizer(each, truncation=True, return_tensors="pt", **options)
        return encoder.model(**inputs).last_hidden_state[0, 0]

    embed(some[0])
    return sum(median(lambda: embed(each), 1) for each in some) * len(texts) / len(some)  # noqa: B023


def loop(s: list[float], k: int) -> int:
    """How many of some partitions are as uneven as the first; sums in plain Python."""
    observed, order, hits = sum(s[:k]) - sum(s[k:]), random.Random(0), 0
    for _ in range(SOME):
        order.shuffle(s)
        hits += sum(s[:k]) - sum(s[k:]) >= observed
    return hits


def array_loop(s: np.ndarray, k: int) -> int:
    """The same with NumPy's shuffle and sum in the loop."""
    observed, order, hits = s[:k].sum() - s[k:].sum(), np.random.default_rng(0), 0
    for _ in range(SOME):
        order.shuffle(s)
        hits += s[:k].sum() - s[k:].sum() >= observed
    return hits


def measure_seat(part: Part) -> None:
    """All tests with their p-values, each way; what is too slow is timed in part and scaled."""
    (name, tests), encoder = all_tests(), load_encoder("packaged")
    all_cores()
    encoder.model.set_attn_implementation("eager")
    texts = list(chain.from_iterable((*t.x, *t.y, *t.a, *t.b) for t in tests))
    theirs = {
        "padded to 128": one_at_a_time(encoder, texts, True),
        "not padded": one_at_a_time(encoder, texts, False),
    }
    encoder.model.set_attn_implementation("sdpa")
    ours = median(lambda: seat(encoder.model, encoder.tokenizer, tests, DRAWS))
    rng, times = np.random.default_rng(0), {"ours": 0.0, "Python": 0.0, "NumPy in a loop": 0.0}
    for test in tests:
        s, k = rng.normal(size=len(test.x) + len(test.y)), len(test.x)
        times["ours"] += median(lambda: p_value(s[:k], s[k:], DRAWS), 1)  # noqa: B023
        times["Python"] += median(lambda: loop(s.tolist(), k), 1) * DRAWS / SOME  # noqa: B023
        times["NumPy in a loop"] += median(lambda: array_loop(s.copy(), k), 1) * DRAWS / SOME  # noqa: B023
    part.numbers = {
        "tests": name, "sentences": len(texts), "different_sentences": len(set(texts)),
        "permutations": DRAWS, "seconds": ours, "seconds_of_sentences": theirs,
        "seconds_of_permutations": times,
        "timed_in_part": f"every {EVERY}th sentence, {SOME} permutations, scaled up",
    }  # fmt: skip
    part.figures = _lines(name, ours, theirs, times)


def _lines(
    name: str, ours: float, theirs: dict[str, float], times: dict[str, float]
) -> list[Figure]:
    shared = {"batch": "128 against 1", "threads": torch.get_num_threads()}

    def line(what: str, own: float, slow: float, how: str, **more: object) -> Figure:
        sides = f"{own:.1f} s", f"{slow:.0f} s: {how}"
        return Figure(what, f"{slow / own:.0f} times as fast", *sides, **shared, **more)

    whole = theirs["padded to 128"] + times["Python"]
    plain = theirs["not padded"] + times["NumPy in a loop"]
    return [
        line(f"SEAT with p-values of {DRAWS} permutations, {name}", ours, whole,
             "a sentence at a time, padded to 128, partitions in a Python loop",
             mark=">= 50", reached=whole >= 50 * ours),
        line("the same", ours, plain, "a sentence at a time, not padded, NumPy in the loop"),
        line("its p-values alone", times["ours"], times["Python"], "partitions in a Python loop"),
    ]  # fmt: skip
