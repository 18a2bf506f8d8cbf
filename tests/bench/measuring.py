"""What every part has in common: sentences, clocks, figures, and the machine they came from."""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pruning_bias.anatomy import Encoder, load_encoder
from pruning_bias.debias import prototypes
from pruning_bias.encoding import Batch, Encoded, batches, in_order
from pruning_bias.environment import cores, environment, output_of
from pruning_bias.settings import find_data, project_root, write_atomic
from pruning_bias.texts import divide, read_classes

BROWN = "corpora/brown.txt.gz"
FOLDER = project_root() / "results" / "bench"
Pair = tuple[Batch, Batch]  # targets, attributes


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    measured: str  # in words, with its unit
    ours: str  # one side of the ratio
    against: str  # the other
    batch: str
    threads: int
    mark: str = ""  # what issue 3 asks for
    reached: bool | None = None  # None: no mark, or none for this machine


@dataclass
class Part:
    """What one part found: lines of the table, and all numbers that they come from."""

    figures: list[Figure] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""  # why there is nothing


def median(
    way: Callable[[], Any],
    rounds: int = 3,
) -> float:  # seconds
    """The median time of a call."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def held(
    way: Callable[[], Any],
) -> float:  # MiB
    """The most that a call holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        way()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20


def product_rate(
    rows: int = 1024,
    inner: int = 1024,
    cols: int = 1024,
    rounds: int = 9,
) -> float:  # floating-point operations per second, float32
    """What torch.mm reaches here, now, with the threads that are set."""
    a, b = torch.randn(rows, inner), torch.randn(inner, cols)
    torch.mm(a, b)
    return 2 * rows * inner * cols / median(lambda: torch.mm(a, b), rounds)


class Text(NamedTuple):
    """Sentences to measure on."""

    name: str
    encoder: Encoder
    encoded: Encoded
    train: dict[str, np.ndarray]

    def epoch(self, kind: str, size: int, limit: int = 0) -> list[Batch]:
        """The batches of an epoch (of at most `limit` sentences), shortest first."""
        generator, among = torch.Generator().manual_seed(0), self.train[kind]
        if limit:
            order = torch.randperm(len(among), generator=generator)[:limit].numpy()
            among = among[order]
        epoch = islice(batches(self.encoded, among, size, generator), len(among) // size)
        return sorted(epoch, key=lambda batch: batch.ids.shape[1])

    def spread(self, kind: str, size: int, n: int, limit: int = 0) -> list[Batch]:
        """n batches of an epoch, as long on average as all are."""
        epoch = self.epoch(kind, size, limit)
        lengths = np.array([batch.ids.shape[1] for batch in epoch])
        groups = np.array_split(np.arange(len(epoch)), n)
        nearest = (g[np.abs(lengths[g] - lengths[g].mean()).argmin()] for g in groups)
        return [epoch[i] for i in nearest]

    def pairs(self, size: int, n: int, limit: int = 0) -> list[Pair]:
        """Batches of targets and of attributes."""
        both = (self.spread(kind, size, n, limit) for kind in ("target", "attributes"))
        return list(zip(*both, strict=True))

    def padded(self, pair: Pair) -> Pair:
        """The same sentences, padded to 128."""
        return tuple(self.encoded.batch(batch.index.numpy(), 128) for batch in pair)

    def prototypes(self) -> Tensor:
        """Gender prototypes of the encoder's last layer, from some sentences."""
        some = (list(in_order(self.encoded, self.train[k][:64])) for k in ("male", "female"))
        return prototypes(self.encoder.model, *some, "last")


@cache
def text() -> Text:
    """Brown where the data folder has it, built-in sentences elsewhere."""
    encoder, brown = load_encoder("packaged"), find_data(BROWN) and find_data("words/male.txt")
    where = (BROWN, "published", 0) if brown else ("synthetic", "builtin", 2000)
    encoded = read_classes(encoder.tokenizer, *where, seed=0)
    name = "Brown" if brown else "built-in text (no Brown in the data folder)"
    return Text(name, encoder, encoded, divide(encoded)[0])


def padding(
    some: Iterable[Batch],
) -> float:  # >= 1
    """Word pieces with padding, of one without."""
    counts = [(batch.ids.numel(), int(batch.attention.sum())) for batch in some]
    return sum(padded for padded, _ in counts) / sum(real for _, real in counts)


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    flags = output_of(["cat", "/proc/cpuinfo"])
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))


@contextmanager
def recorded(name: str) -> Iterator[Part]:
    """Write what a part finds, with the machine and what else it was doing."""
    torch.set_num_threads(1)
    machine, part = _machine(), Part()
    start, busy, own = time.perf_counter(), _busy(), time.process_time()
    yield part
    seconds = time.perf_counter() - start
    elsewhere = (_busy() - busy - (time.process_time() - own)) / seconds
    times = {"seconds": round(seconds, 1), "cores_busy_elsewhere": round(max(0.0, elsewhere), 2)}
    content = {"part": name} | asdict(part) | {"machine": machine | times}
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(FOLDER) / f"{name}.json", json.dumps(content, indent=1))


@cache
def _machine() -> dict[str, Any]:
    """Where this runs, asked before anything is written: a result makes the clone dirty."""
    names = "python", "platform", "cpu", "cores", "versions", "pruning_bias", "commit"
    found = environment(0)
    return {name: found[name] for name in names} | {"native_bfloat16": native_bfloat16()}


def _busy() -> float:
    """Seconds of all cores that were not idle, since the machine's start; 0 where unknown."""
    first = output_of(["cat", "/proc/stat"]).partition("\n")[0].split()[1:]
    ticks = [int(each) for each in first] or [0] * 8
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / 100


def all_cores() -> int:
    """Let torch use every core; how many."""
    torch.set_num_threads(cores())
    return cores()
