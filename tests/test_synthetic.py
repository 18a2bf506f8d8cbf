"""Propositions about the built-in text and the built-in association tests."""

import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from pruning_bias.associations import association_tests
from pruning_bias.lexicon import LEXICON, PAIRS
from pruning_bias.phrases import NAMES
from pruning_bias.synthetic import draw, render, sentences, stream

SEAT = Path(__file__).parents[2] / "shared" / "data" / "seat"
needs_seat = pytest.mark.skipif(not SEAT.is_dir(), reason=f"the official files are not in {SEAT}")
N = 30_000


def words(line: str) -> list[str]:
    """The lower-case words of a line, by a split that the package does not use."""
    return "".join(c if c.isalpha() else " " for c in line.lower()).split()


def kind(line: str) -> str:
    """The class of a line as the debias data define it."""
    male, female, target = (not LEXICON[k].isdisjoint(words(line)) for k in LEXICON)
    if male and female:
        return "both"
    return "male" if male else "female" if female else "target" if target else "none"


@pytest.fixture(scope="module")
def text() -> list[str]:
    return sentences(N, seed=0)


@pytest.fixture(scope="module")
def by_kind(text: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text:
        found.setdefault(kind(line), []).append(line)
    return found


def test_lexicon_is_three_disjoint_sets_of_plain_words() -> None:
    male, female, target = (LEXICON[k] for k in ("male", "female", "target"))
    assert not male & female and not male & target and not female & target
    assert all(re.fullmatch("[a-z]+", word) for group in LEXICON.values() for word in group)
    assert {m for m, _ in PAIRS} == male and {f for _, f in PAIRS} == female
    assert len(male) >= 45 and len(female) >= 45 and len(target) >= 120


def test_classes_are_pure_distinct_and_of_equal_share(text: list[str], by_kind: dict) -> None:
    assert len(set(text)) == len(text) == N
    assert set(by_kind) == {"male", "female", "target"}
    assert all(abs(len(lines) / N - 1 / 3) < 0.005 for lines in by_kind.values())


def test_order_is_shuffled(text: list[str]) -> None:
    kinds = [kind(line) for line in text[:3000]]
    follows = Counter(pairwise(kinds))
    # A class follows itself only across blocks of three: a ninth of a third of all places.
    assert len(follows) == 9 and min(follows.values()) > 3000 / 27 / 2


def test_every_word_of_the_lexicon_is_used(text: list[str], by_kind: dict) -> None:
    for name, lines in by_kind.items():
        used = Counter(word for line in lines for word in set(words(line)))
        rare = {word for word in LEXICON[name] if used[word] < 20}
        assert not rare, f"{name}: {rare}"


def test_lengths_are_those_of_news(text: list[str]) -> None:
    lengths = [len(line.split()) for line in text]
    assert min(lengths) >= 8 and max(lengths) <= 40
    assert 18 <= sum(lengths) / N <= 25


def test_contexts_are_many(text: list[str]) -> None:
    openings = {tuple(words(line)[:4]) for line in text}
    assert len({word for line in text for word in words(line)}) > 500
    assert len(openings) > N / 10


def test_lines_are_well_formed(text: list[str]) -> None:
    for line in text:
        assert re.fullmatch(r'"?[A-Z].*[a-z]\.', line), line
        assert not re.search(r"[{}/|<>]|\s\s|,,|\.\.|\s[,.]|\d", line), line
        assert line.count('"') in (0, 2), line
        assert not re.search(r"(?i)\b(?:he|she|i) were\b|\b(?:they|we) was\b", line), line
        assert not re.search(r"\b(\w+) \1\b", line.replace("had had", "")), line


def test_articles_agree(text: list[str]) -> None:
    sounded = {"heir": "an", "heiress": "an", "honorary": "an", "used": "a"}
    for line in text:
        for article, word in re.findall(r"\b(an?) (\w+)", line.lower()):
            expected = sounded.get(word, "an" if word[0] in "aeiou" else "a")
            assert article == expected, f"{article} {word}: {line}"


def test_minimal_pairs_differ_in_paired_words_alone() -> None:
    rng = random.Random(5)
    first_names = set()
    for _ in range(2000):
        skeleton = draw(True, rng)
        male, female = (words(render(skeleton, k)) for k in ("male", "female"))
        assert kind(render(skeleton, "male")) == "male"
        assert kind(render(skeleton, "female")) == "female"
        other = {(m, f) for m, f in zip(male, female, strict=True) if m != f} - set(PAIRS)
        first_names |= other - {("a", "an"), ("an", "a")}
    assert ("john", "amy") in first_names and len(first_names) <= 20


def test_gender_is_the_only_systematic_difference(by_kind: dict) -> None:
    """No word outside the pairs is commoner with one gender than chance allows."""
    male, female = (
        Counter(word for line in by_kind[k] for word in set(words(line)))
        for k in ("male", "female")
    )
    names = {name.lower() for pair in NAMES["first"] for name in pair.split("/")}
    common = (set(male) | set(female)) - LEXICON["male"] - LEXICON["female"] - names - {"a", "an"}
    z = [(male[w] - female[w]) / (male[w] + female[w]) ** 0.5 for w in common]
    assert len(z) > 300 and max(map(abs, z)) < 5
    assert 0.8 < sum(v * v for v in z) / len(z) < 1.25


def test_gendered_sentences_have_a_target_word_one_time_in_three(by_kind: dict) -> None:
    for name in ("male", "female"):
        lines = by_kind[name]
        share = sum(not LEXICON["target"].isdisjoint(words(line)) for line in lines) / len(lines)
        assert 0.28 < share < 0.40


def test_gendered_words_stand_in_every_role(by_kind: dict) -> None:
    male, female = " ".join(by_kind["male"]), " ".join(by_kind["female"])
    for he, him, his, whose, lines in (
        ("he", "him", "his", "his", male),
        ("she", "her", "her", "hers", female),
    ):
        for phrase in (f"after {he} had", f"wished {him} well", f"thanked {his}", f"of {whose} at"):
            assert phrase in lines
    assert "The woman's" in female and "The man's" in male


def test_target_sentences_name_nobody(text: list[str], by_kind: dict) -> None:
    def capitals(lines: list[str]) -> set[str]:
        return {w for line in lines for w in re.findall(r"(?<=[a-z,] )[A-Z]\w+", line)}

    people = capitals(by_kind["male"]) - capitals(by_kind["target"])
    assert {"John", "Carter", "Mr"} <= people
    openings = {line.split()[0].strip('",') for line in by_kind["target"]}
    assert not openings & people


def test_text_depends_on_the_seed_alone() -> None:
    code = "from pruning_bias.synthetic import sentences as s; print(*s(200, seed=3), sep='\\n')"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hashseed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashseed in ("1", "2")
    ]
    here = sentences(200, seed=3)
    assert runs[0] == runs[1] == "\n".join(here) + "\n"
    assert len(set(here) & set(sentences(200, seed=4))) <= 2


def test_longer_text_continues_the_shorter(text: list[str]) -> None:
    assert sentences(500, seed=0) == text[:500]
    assert sentences(0, seed=0) == []


def test_the_stream_keeps_nothing() -> None:
    lines = stream(seed=1)
    next(islice(lines, 3000, None))
    tracemalloc.start()
    next(islice(lines, 3000, None))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000


@pytest.mark.parametrize("kinds", [("male",), ("target",), ("female", "male")])
def test_only_the_kinds_asked_for(kinds: tuple[str, ...]) -> None:
    found = Counter(kind(line) for line in sentences(300, seed=2, kinds=kinds))
    assert found == {k: 300 // len(kinds) for k in kinds}


@pytest.mark.parametrize("kinds", [("men",), (), "male"])
def test_unknown_kinds_are_refused(kinds: object) -> None:
    with pytest.raises(ValueError, match=r"expected one or more of .*male.*female.*target"):
        sentences(1, seed=0, kinds=kinds)  # type: ignore[arg-type]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot write -1 sentences"):
        sentences(-1, seed=0)


TESTS = association_tests()


@pytest.mark.parametrize("name", TESTS)
def test_association_sets(name: str) -> None:
    test = TESTS[name]
    assert list(test) == ["targ1", "targ2", "attr1", "attr2"]
    assert all(set(part) == {"category", "examples"} for part in test.values())
    sets = [part["examples"] for part in test.values()]
    assert len(sets[0]) == len(sets[1])
    assert all(len(set(s)) == len(s) and 30 <= len(s) <= 60 for s in sets)
    everything = [line for s in sets for line in s]
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"[A-Z][A-Za-z ]+\.", line) for line in everything)


def test_association_names() -> None:
    assert list(TESTS) == [f"builtin-{n}{b}" for n in (6, 7, 8) for b in ("", "b")]
    json.dumps(TESTS)


def all_examples() -> set[str]:
    return {e for test in TESTS.values() for part in test.values() for e in part["examples"]}


def test_association_templates_are_not_seats() -> None:
    seat = (
        r"(This|That|There|Here|It) is .*|(These|Those|They) are .*|.* (is|are) (here|there)\."
        r"|.* (is a|are) (person|people|things?)\.|The person's name is .*"
    )
    assert not [e for e in all_examples() if re.fullmatch(seat, e)]


def test_association_sentences_are_not_in_the_text(text: list[str]) -> None:
    assert not all_examples() & set(text)


@needs_seat
def test_no_sentence_is_an_official_one(text: list[str]) -> None:
    official = set()
    for path in SEAT.glob("*.jsonl"):
        parts = json.loads(path.read_text(encoding="utf-8"))
        official |= {e for part in parts.values() for e in part["examples"]}
    assert official and not (all_examples() | set(text)) & official


@needs_seat
@pytest.mark.parametrize("name", TESTS)
def test_association_words_are_the_published_ones(name: str) -> None:
    path = SEAT / f"{name.replace('builtin-', 'weat')}.jsonl"
    for part, published in json.loads(path.read_text(encoding="utf-8")).items():
        examples = TESTS[name][part]["examples"]
        counts = [
            sum(bool(re.search(rf"\b{word}\b", e)) for e in examples)
            for word in published["examples"]
        ]
        assert len(set(counts)) == 1 and sum(counts) == len(examples)
