"""How time and memory grow with the corpus, the sentence and the batch."""

import resource
import time
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch

from pruning_bias import synthetic
from pruning_bias.anatomy import load_encoder
from pruning_bias.corpus import Sentence, find_sentence, lines
from pruning_bias.encoding import Batch, encode
from pruning_bias.settings import data_folder, find_data
from pruning_bias.texts import choose_lexicon

from .measuring import Figure, Pair, Part, all_cores, held, median, text
from .steps import BATCH, our_step, published_step, value_heads

SIZES, LENGTHS, BATCHES = (256, 1024, 4096), (16, 32, 64, 128), (8, 16, 32)


def measure_scanning(part: Part) -> None:
    """Find and encode the sentences of every corpus in the data folder, or of built-in text."""
    corpora = sorted((data_folder() / "corpora").glob("*.txt.gz"))
    lexicon = choose_lexicon("published" if find_data("words/male.txt") else "builtin")
    stream = chain.from_iterable(map(lines, corpora)) if corpora else synthetic.sentences(10**5, 0)
    tokenizer = load_encoder("packaged").tokenizer
    before, start, rows = _peak(), time.perf_counter(), []

    def found() -> Iterator[Sentence]:
        seen = 0
        for seen, line in enumerate(stream, 1):
            if (sentence := find_sentence(line, lexicon)) is not None:
                yield sentence
            if seen & (seen - 1) == 0 and seen >= 2**13:  # at every power of two
                rows.append((seen, time.perf_counter() - start, _peak() - before))
        rows.append((seen, time.perf_counter() - start, _peak() - before))

    encoded = encode(tokenizer, found())
    names = "sentences", "seconds", "memory_mib"
    table = [dict(zip(names, row, strict=True)) for row in rows]
    arrays = sum(x.nbytes for x in (encoded.ids, encoded.words, encoded.offsets, encoded.kinds))
    part.numbers = {"corpora": len(corpora), "encoded": len(encoded), "growth": table,
                    "arrays_mib": arrays / 2**20}  # fmt: skip
    some, whole = ([row["seconds"] / row["sentences"] * 1e6 for row in table][i] for i in (1, -1))
    part.figures = [
        Figure("scanning and encoding corpora, per sentence",
               f"{whole / some:.2f} times the time, {rows[-1][0] / rows[1][0]:.0f} times the text",
               f"{whole:.0f} us of {rows[-1][0]} sentences, {rows[-1][2]:.0f} MiB more memory",
               f"{some:.0f} us of the first {rows[1][0]}", "-", torch.get_num_threads())
    ]  # fmt: skip


def _peak() -> float:  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_growth(part: Part) -> None:
    """Time per sentence over sizes of the corpus and lengths; memory over batches."""
    given, threads = text(), all_cores()
    a = given.prototypes()
    step = our_step(a, value_heads)
    corpus = {}
    for size in SIZES:
        pairs = given.pairs(BATCH, 4, size)
        seconds = [_steady(step, pair) for pair in pairs]
        real = sum(int(batch.attention.sum()) for pair in pairs for batch in pair)
        corpus[size] = {"ms_per_sentence": sum(seconds) / 4 / 2 / BATCH * 1e3,
                        "us_per_piece": sum(seconds) / real * 1e6}  # fmt: skip
    lengths = {
        length: _steady(step, drawn(length), 3) / 2 / BATCH * 1e3 for length in LENGTHS
    }  # ms per sentence
    ways = {"ours": our_step(a, value_heads), "published": published_step(a, True, True)}
    memory = {name: {} for name in ways}
    for size in BATCHES:
        pair = given.pairs(size, 2)[1]
        for name, way in ways.items():
            own = pair if name == "ours" else given.padded(pair)
            if name == "ours":
                way(own)  # the teacher's states are kept, and no part of the step
            memory[name][size] = held(lambda: way(own))  # noqa: B023
    part.numbers = {"text": given.name, "corpus": corpus, "ms_by_length": lengths,
                    "step_mib_by_batch": memory}  # fmt: skip
    part.figures = _lines(corpus, lengths, memory, threads)


def _steady(step, pair: Pair, rounds: int = 2) -> float:
    step(pair)
    return median(lambda: step(pair), rounds)


def drawn(length: int) -> Pair:
    """Random word pieces, so that all sentences are of one length."""
    generator, shape = torch.Generator().manual_seed(length), (BATCH, length)
    index = torch.arange(BATCH) - 10 * BATCH * length  # no sentence of any corpus
    return tuple(
        Batch(torch.randint(1000, 30000, shape, generator=generator), torch.ones(shape).long(),
              torch.ones(shape), index - i * BATCH) for i in (0, 1)
    )  # fmt: skip


def _lines(corpus: dict, lengths: dict, memory: dict, threads: int) -> list[Figure]:
    small, large = (corpus[size]["us_per_piece"] for size in (SIZES[0], SIZES[-1]))
    short, long = (lengths[length] for length in (LENGTHS[0], LENGTHS[-1]))
    exponent = np.polyfit(np.log(LENGTHS), np.log(list(lengths.values())), 1)[0]
    few, many = (memory["ours"][size] for size in (BATCHES[0], BATCHES[-1]))
    theirs, both = memory["published"][BATCHES[-1]], f"{BATCH} + {BATCH}"
    return [
        Figure("step, per word piece, over sizes of the corpus",
               f"{large / small:.2f} times the time",
               f"{large:.0f} us, {SIZES[-1]} sentences of a class at most",
               f"{small:.0f} us, {SIZES[0]}", both, threads),
        Figure("step, per sentence, over lengths", f"grows with the length to the {exponent:.2f}",
               f"{long:.1f} ms at {LENGTHS[-1]} pieces", f"{short:.1f} ms at {LENGTHS[0]}",
               both, threads),
        Figure("memory of a step over batches", f"{many / few:.1f} times the memory",
               f"{many:.0f} MiB", f"{few:.0f} MiB", f"{BATCHES[-1]} against {BATCHES[0]}", threads),
        Figure("memory of a step against the published way", f"{many / theirs:.2f} of the memory",
               f"{many:.0f} MiB", f"{theirs:.0f} MiB", both, threads),
    ]  # fmt: skip
