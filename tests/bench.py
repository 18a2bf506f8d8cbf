"""Speed as ratios inside one run: `make bench` writes results/bench/*.json and prints a table.

Every figure is the median over rounds in which the two ways take turns on the same sentences.
"""

import json
import math
import random
import resource
import statistics
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.optim import AdamW

from pruning_bias import synthetic
from pruning_bias.anatomy import load_encoder
from pruning_bias.associations import association_tests
from pruning_bias.benchmarks import association, builtin_tests, p_value, seat
from pruning_bias.corpus import find_sentence, lines
from pruning_bias.debias import Teacher, debias_loss, hidden_states, prototypes
from pruning_bias.encoding import batches, encode, in_order
from pruning_bias.environment import environment
from pruning_bias.fidelity import Fidelity
from pruning_bias.gates import ThresholdGate
from pruning_bias.plans import head_plan
from pruning_bias.settings import data_folder, project_root, write_atomic
from pruning_bias.subnetworks import attach_
from pruning_bias.texts import choose_lexicon, divide, read_classes

BATCH, ROUNDS = 16, 5


def in_turn(ways: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each way; one round each to warm up, then in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def training_step() -> dict:
    """One step on heads: as the package does it, padded to 128, and gated in the weights."""
    encoder = load_encoder("packaged")
    text = read_classes(encoder.tokenizer, "synthetic", "builtin", limit=400, seed=0)
    train, _ = divide(text)
    male, female = (list(in_order(text, train[kind][:64])) for kind in ("male", "female"))
    a = prototypes(encoder.model, male, female, "last")

    def way(pad_to: int, remember: bool, in_weights: bool) -> Callable[[], None]:
        own = load_encoder("packaged").model
        subnetwork = attach_(
            own, head_plan(own), lambda name, shape: ThresholdGate(shape), in_weights=in_weights
        )
        optimizer = AdamW(subnetwork.parameters(), lr=0.01)

        def teach(batch):
            with subnetwork.off():
                return hidden_states(own, batch)

        teacher = Teacher(teach, room=2**31 if remember else 0)
        generator = torch.Generator().manual_seed(0)
        targets, attributes = (
            batches(text, train[kind][: 8 * BATCH], BATCH, generator, pad_to=pad_to)
            for kind in ("target", "attributes")
        )

        def epoch() -> None:
            for _ in range(8):
                losses = debias_loss(
                    own, teacher, next(targets), next(attributes), a,
                    layer="last", mode="token", fidelity=Fidelity(),
                )  # fmt: skip
                optimizer.zero_grad()
                losses["loss"].backward()
                optimizer.step()

        return epoch

    seconds = in_turn(
        {
            "ours": way(0, remember=True, in_weights=False),
            "gated in weights": way(0, remember=True, in_weights=True),
            "padded to 128, teacher in every step": way(128, remember=False, in_weights=True),
        },
        rounds=3,
    )
    return {
        "what": f"8 training steps on value heads, {BATCH} targets and {BATCH} attributes each",
        "seconds": seconds,
        "ratio": {name: s / seconds["ours"] for name, s in seconds.items()},
    }


def seat_tests() -> dict:
    """All built-in tests against one sentence at a time and a Python loop over divisions."""
    encoder, tests, draws = load_encoder("packaged"), builtin_tests(), 2000

    @torch.no_grad()
    def embed(text: str) -> torch.Tensor:
        inputs = encoder.tokenizer(text, padding="max_length", max_length=128, return_tensors="pt")
        return encoder.model(**inputs).last_hidden_state[0, 0]

    def plainly() -> None:
        for sets in association_tests().values():
            x, y, a, b = (torch.stack([embed(s) for s in sets[k]["examples"]]) for k in sets)
            s = [*association(x, a, b).tolist(), *association(y, a, b).tolist()]
            observed, rng = sum(s[: len(x)]) - sum(s[len(x) :]), random.Random(0)
            hits = 0
            for _ in range(draws):
                rng.shuffle(s)
                hits += sum(s[: len(x)]) - sum(s[len(x) :]) >= observed

    ways = {"ours": lambda: seat(encoder.model, encoder.tokenizer, tests, draws)}
    seconds = in_turn(ways | {"one at a time": plainly}, rounds=1)
    return {
        "what": f"six association tests with p-values over {draws} divisions",
        "seconds": seconds,
        "ratio": {name: s / seconds["ours"] for name, s in seconds.items()},
    }


def permutation_test() -> dict:
    """The p-value alone: one matrix product against a Python loop."""
    rng, draws = np.random.default_rng(0), 20_000
    x, y = rng.normal(0.1, 1, 64), rng.normal(0, 1, 64)

    def loop() -> None:
        s, order = [*x, *y], random.Random(0)
        observed = sum(s[:64])
        for _ in range(draws):
            order.shuffle(s)
            math.fsum(s[:64]) >= observed  # noqa: B015

    seconds = in_turn({"ours": lambda: p_value(x, y, draws), "a loop": loop}, rounds=3)
    return {
        "what": f"{draws} random divisions of 64 + 64 associations",
        "seconds": seconds,
        "ratio": {name: s / seconds["ours"] for name, s in seconds.items()},
    }


def scanning() -> dict:
    """Find and encode the sentences of all corpora in the data folder, or of built-in text."""
    corpora = sorted((data_folder() / "corpora").glob("*.txt.gz"))
    name = "published" if (data_folder() / "words" / "male.txt").is_file() else "builtin"
    lexicon, tokenizer = choose_lexicon(name), load_encoder("packaged").tokenizer
    stream = (
        chain.from_iterable(map(lines, corpora)) if corpora else iter(synthetic.sentences(10**5, 0))
    )
    seen, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def counted():
        nonlocal seen
        for line in stream:
            seen += 1
            if (sentence := find_sentence(line, lexicon)) is not None:
                yield sentence

    start = time.perf_counter()
    encoded = encode(tokenizer, counted())
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    arrays = sum(part.nbytes for part in (encoded.ids, encoded.words, encoded.offsets)) / 2**20
    return {
        "what": f"{seen} sentences scanned, {len(encoded)} encoded",
        "corpora": len(corpora),
        "seconds": {"all": seconds},
        "per_second": seen / seconds,
        "memory_mib": {"arrays": arrays, "peak grew by": grown},
    }


def main() -> None:
    """Run every benchmark, write its figures, print the table."""
    folder, rows = project_root() / "results" / "bench", []
    folder.mkdir(parents=True, exist_ok=True)
    for bench in (scanning, permutation_test, seat_tests, training_step):
        start = time.perf_counter()
        found = bench()
        machine = environment(time.perf_counter() - start) | {"threads": torch.get_num_threads()}
        write_atomic(
            Path(folder) / f"{bench.__name__}.json",
            json.dumps(found | {"machine": machine}, indent=1),
        )
        for name, seconds in found["seconds"].items():
            rows.append((found["what"], name, seconds, found.get("ratio", {}).get(name)))
    print(
        tabulate(rows, ["what", "way", "seconds", "times ours"], tablefmt="github", floatfmt=".3g")
    )
    print(f"\nfigures: {folder}")


if __name__ == "__main__":
    main()
