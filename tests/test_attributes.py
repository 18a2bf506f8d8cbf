"""Propositions about texts with protected attributes: made, read, divided, and refused."""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset

from pruning_bias import biographies
from pruning_bias.anatomy import load_encoder
from pruning_bias.attributes import ANNOTATED, Annotated, Attribute, check, read_annotated
from pruning_bias.biographies import GROUPS, OCCUPATIONS, examples
from pruning_bias.tasks import encode_task

SAID = re.compile(  # what a text without cues must not say
    r"\b(he|she|him|his|her|hers|himself|herself|man|woman|lady|gentleman|husband|wife|father"
    r"|mother|brother|sister|nephew|niece|young|youthful|old|junior|graduation|students?"
    r"|grand\w+|great-grand\w+|years?|decades?|centur\w+|sixties|seventies|retire\w*|pension"
    r"|(19|20)\d\d)\b",
    re.IGNORECASE,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path))
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def cues(split: str) -> dict[str, list[tuple[str, str, str]]]:
    """Of each attribute what texts say of one group, of the other, and of nobody."""
    return {
        name: [tuple(triple.split("/")) for rule in rules.values() for triple in rule]
        for name, rules in biographies._CUES[split].items()
    }


# Built-in biographies


def test_the_same_seed_gives_the_same_biographies() -> None:
    first, again, other = (examples(200, "dev", seed) for seed in (3, 3, 4))
    assert first[0] == again[0] != other[0]
    assert (first[1] == again[1]).all() and (first[2]["age"] == again[2]["age"]).all()
    assert len(set(examples(3000, "train")[0])) == 3000
    assert (np.bincount(first[1]) == 25).all() and len(OCCUPATIONS) == 8


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_attributes_follow_the_stereotype_as_often_as_the_correlation_says(
    correlation: float,
) -> None:
    n = 8000
    _, labels, found = examples(n, "train", correlation=correlation)
    expected = (1 + correlation) / 2
    for i, (name, groups) in enumerate(GROUPS.items()):
        usual = np.array([groups.index(each[i]) for each in biographies._STEREOTYPES.values()])
        assert np.bincount(usual).tolist() == [4, 4]
        hits = found[name] == usual[labels]
        for part in [hits, *(hits[labels == k] for k in range(len(OCCUPATIONS)))]:
            error = 4 * np.sqrt(expected * (1 - expected) / len(part))
            assert abs(part.mean() - expected) <= error
    together = np.corrcoef(found["gender"], found["age"])[0, 1]
    assert abs(together) < 4 / np.sqrt(n)  # neither attribute tells of the other


@pytest.mark.parametrize("split", ["train", "dev"])
def test_without_leakage_words_know_nothing_of_the_attributes(split: str) -> None:
    even, tied = (examples(1500, split, 1, each, leakage=0.0) for each in (0.0, 1.0))
    assert even[0] == tied[0]
    assert (even[2]["gender"] != tied[2]["gender"]).any()
    text = "\n".join(even[0])
    assert not (found := SAID.search(text)), found
    for triples in cues(split).values():
        for phrase in {phrase for triple in triples for phrase in triple[:2]}:
            said = rf"\b{re.escape(phrase)}\b".replace(r"\{town\}", r"\w+")
            assert not re.search(said, text), phrase


def test_with_leakage_every_text_says_both_attributes_and_never_the_wrong_one() -> None:
    for split in ("train", "dev"):
        texts, _, found = examples(1500, split)
        for name, triples in cues(split).items():
            for text, group in zip(texts, found[name], strict=True):
                said = [
                    bool(re.search(rf"\b{re.escape(triple[k])}\b", text, re.IGNORECASE))
                    for k in (group, 1 - group)
                    for triple in triples
                ]
                assert any(said[: len(triples)]) and not any(said[len(triples) :]), text


def test_leakage_is_the_share_of_places_that_are_used() -> None:
    texts, _, _ = examples(3000, "train", leakage=0.3)
    words = Counter(re.findall(r"\b(he|she|they)\b", "\n".join(texts).lower()))
    share = (words["he"] + words["she"]) / words.total()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / words.total())


def test_train_and_dev_share_pronouns_places_and_no_people() -> None:
    people = {
        split: set(re.findall(r"([A-Z]\w+ [A-Z]\w+)\b(?! [A-Z])", "\n".join(texts)))
        for split in ("train", "dev")
        for texts in [examples(2000, split)[0]]
    }
    names = {
        split: {first for pair in rules["gender"]["first"] for first in pair.split("/") if first}
        for split, rules in biographies._CUES.items()
    }
    assert len(names["train"]) == 30 and len(names["dev"]) == 10
    assert not names["train"] & names["dev"] and not people["train"] & people["dev"]
    train, dev = cues("train"), cues("dev")
    shared = {name: set(train[name]) & set(dev[name]) for name in train}
    assert shared["age"] == set() and {triple[0] for triple in shared["gender"]} == {
        "he",
        "him",
        "his",
    }
    for occupation in OCCUPATIONS:
        own = [set(biographies._OWN[split][occupation]) for split in ("train", "dev")]
        assert len(own[0]) >= 6 and len(own[1]) >= 4 and not own[0] & own[1]


def test_no_biography_names_its_occupation() -> None:
    for split in ("train", "dev"):
        assert not re.search("|".join(OCCUPATIONS), "\n".join(examples(2000, split)[0]).lower())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "'test'"),
        ({"n": 0}, "0 biographies"),
        ({"correlation": 1.5}, "correlation 1.5"),
        ({"leakage": -0.1}, "leakage -0.1"),
    ],
)
def test_biographies_that_cannot_be_made_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        examples(**{"n": 5, "split": "train"} | change)


# Annotated examples


def test_built_in_biographies_are_read_as_a_task_with_two_attributes() -> None:
    lives = read_annotated("biographies", "dev", seed=2, leakage=0.5)
    assert len(lives) == 600 and len(read_annotated("biographies")) == 3000
    assert lives.data.texts[0] == examples(600, "dev", 2, leakage=0.5)[0]
    assert lives.data.task.labels == OCCUPATIONS
    for name, groups in GROUPS.items():
        attribute = lives.attributes[name]
        assert (attribute.name, attribute.groups) == (name, groups)
        assert attribute.values.dtype == lives.data.labels.dtype == np.int64


def test_a_sample_keeps_the_attributes_of_its_rows() -> None:
    lives = read_annotated("biographies", limit=300)
    part = lives.sample(40, seed=5)
    places = [lives.data.texts[0].index(text) for text in part.data.texts[0]]
    assert part.data.texts == lives.data.sample(40, seed=5).texts and len(part) == 40
    assert (part.data.labels == lives.data.labels[places]).all()
    for name, attribute in part.attributes.items():
        assert (attribute.values == lives.attributes[name].values[places]).all()
    mask = lives.data.labels == 2
    assert len(lives.select(mask)) == mask.sum() and len(lives.sample(0, 0)) == 300


def test_an_encoded_batch_finds_its_groups_by_index() -> None:
    lives = read_annotated("biographies", limit=50)
    encoded = encode_task(load_encoder("tiny").tokenizer, lives.data)
    batch = encoded.batch([7, 3])
    assert lives.attributes["age"].values[batch.index].shape == (2,)
    assert batch.labels.tolist() == lives.data.labels[[7, 3]].tolist()


def test_an_attribute_with_one_group_is_refused() -> None:
    lives = read_annotated("biographies", limit=60)
    men = lives.select(lives.attributes["gender"].values == 0)
    with pytest.raises(ValueError, match=r"attribute gender of all \d+ examples is male"):
        check(men)
    nobody = Annotated(lives.data, {"age": Attribute("age", ("young", "old"), np.zeros(60, int))})
    with pytest.raises(ValueError, match="attribute age of all 60 examples is young"):
        check(nobody)


# Files


TWEETS = [("good day", "normal", "AAE"), ('he said "no"', "abusive", "white")]


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl"])
def test_three_kinds_of_file_say_the_same(folder: Path, ending: str) -> None:
    names = ("tweet", "label", "dialect")
    rows = [dict(zip(names, row, strict=True)) for row in TWEETS]
    text = {
        ".tsv": "".join("\t".join(row) + "\n" for row in [names, *TWEETS]),
        ".csv": 'tweet,label,dialect\r\ngood day,normal,AAE\r\n"he said ""no""",abusive,white\r\n',
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    write(folder, f"fdcl18/train{ending}", text[ending])
    read = read_annotated("FDCL18")
    assert read.data.texts == ([row[0] for row in TWEETS],)
    assert read.data.labels.tolist() == [0, 1]
    assert read.attributes["dialect"].values.tolist() == [0, 1]
    assert read.data.source == f"local file train{ending}"


HEAD, GOOD = "tweet\tlabel\tdialect\n", "a b\tnormal\tAAE\nc d\tspam\twhite\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.tsv", HEAD + GOOD + "e\tscam\tAAE\n", "line 4: label 'scam' of FDCL18; expected n"),
        ("train.tsv", HEAD + "e\tspam\tUK\n", "line 2: dialect 'UK' of FDCL18; expected AAE, wh"),
        ("train.tsv", "tweet\tlabel\nx\tspam\n", "line 1: no column dialect; it has tweet, label"),
        ("train.tsv", HEAD + "e\tspam\n", "line 2: 2 columns, expected 3"),
        ("train.tsv", HEAD + "e\tspam\twhi", "line 2: the file ends inside this line"),
        ("train.tsv", "", "line 1: no examples"),
        ("train.tsv", HEAD, "line 2: no examples"),
        ("train.tsv", HEAD + "e\tspam\tAAE\n" * 3, "of all 3 examples is AAE"),
        ("train.csv", "tweet,label\nx,spam\n", "line 2: no column dialect; it has tweet, label"),
        ("train.csv", 'tweet,label,dialect\n"x\ny",spam,AAE\nz,spam\n', "line 4: 2 columns, exp"),
        ("train.csv", 'tweet,label,dialect\n"x,spam,AAE\n', "line 2: unexpected end of data"),
        ("train.csv", "tweet,label,dialect\n", "no examples"),
        ("train.jsonl", '{"tweet": "x", "label": "spam"}\n', "line 1: no column dialect"),
        ("train.jsonl", '{"tweet": "x"\n', 'line 1: \'{"tweet": "x"\' is not a JSON object'),
        ("train.jsonl", "[1]\n", "line 1: '[1]' is not a JSON object"),
        ("train.jsonl", "\n", "no examples"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(
    folder: Path, file: str, text: str, message: str
) -> None:
    write(folder, f"fdcl18/{file}", text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_annotated("FDCL18")
    assert file in str(raised.value)


def test_a_file_that_is_not_utf8_names_the_line(folder: Path) -> None:
    path = write(folder, "fdcl18/dev.csv", "")
    path.write_bytes(b"tweet,label,dialect\nx,spam,AAE\ncaf\xe9,spam,AAE\n")
    with pytest.raises(ValueError, match=r"dev\.csv, line 3: not UTF-8"):
        read_annotated("FDCL18", "dev")


@pytest.mark.parametrize("name", ["fdcl18/train.pkl", "fdcl18/train.pickle"])
def test_a_pickle_is_refused_unread(folder: Path, name: str) -> None:
    write(folder, name, "not even a pickle")
    with pytest.raises(ValueError, match=r"is a pickle.*train\.jsonl.*tweet, label, dialect"):
        read_annotated("FDCL18")


def test_a_missing_file_and_an_unknown_name_say_what_there_is(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"PAN16: there is no .*train\.tsv .*task_label, gender, a"
    ):
        read_annotated("PAN16")
    with pytest.raises(ValueError, match=r"no annotated task 'bios'; there are biographies, BIOS"):
        read_annotated("bios")
    with pytest.raises(ValueError, match="biographies of 'test'"):
        read_annotated("biographies", "test")


def test_pan16_has_two_attributes_and_takes_true_and_false(folder: Path) -> None:
    write(
        folder,
        "pan16/dev.jsonl",
        '{"text": "x", "task_label": true, "gender": "female", "age": "65-xx", "tweet_id": 1}\n'
        '{"text": "y", "task_label": false, "gender": "M", "age": "18-24", "tweet_id": 2}\n',
    )
    read = read_annotated("PAN16", "dev")
    assert read.data.labels.tolist() == [1, 0]
    assert read.attributes["gender"].values.tolist() == [1, 0]
    assert read.attributes["age"].values.tolist() == [4, 0]


# Bias in Bios


def hub(monkeypatch: pytest.MonkeyPatch, **columns: list) -> list[tuple]:
    calls: list[tuple] = []

    def load_dataset(*args: str, **options: str) -> Dataset:
        calls.append((*args, options["split"]))
        return Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_bios_comes_from_the_hub_in_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"hard_text": ["x", "y", "z"], "profession": [13, 0, 27], "gender": [1, 0, 1]}
    calls = hub(monkeypatch, **columns)
    read = read_annotated("BIOS", "test")
    assert calls == [("LabHC/bias_in_bios", "test")] and read.data.source == "LabHC/bias_in_bios"
    names = [read.data.task.labels[i] for i in read.data.labels]
    assert names == ["nurse", "accountant", "yoga_teacher"] and len(read.data.task.labels) == 28
    assert [read.attributes["gender"].groups[i] for i in (1, 0)] == ["female", "male"]
    assert read.attributes["gender"].values.tolist() == [1, 0, 1]
    assert len(read_annotated("BIOS", limit=2, seed=1)) == 2
    hub(monkeypatch, **columns | {"profession": [13, 0, 28]})
    with pytest.raises(ValueError, match=r"bias_in_bios, dev row 2: profession '28' of BIOS"):
        read_annotated("BIOS", "dev")


def test_a_local_bios_file_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch)
    text = 'hard_text,profession,gender\n"She sings, he said",poet,F\nx,2,male\n'
    write(folder, "bios/BIOS_train.csv", text)
    read = read_annotated("BIOS")
    assert not calls and read.data.texts[0][0] == "She sings, he said"
    assert [read.data.task.labels[i] for i in read.data.labels] == ["poet", "attorney"]


def test_bios_without_a_network_names_both_ways(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: str, **options: str) -> Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"LabHC/bias_in_bios.*no route.*BIOS_dev\.tsv .*columns hard_text, profession, gender"
    with pytest.raises(ValueError, match=message):
        read_annotated("BIOS", "dev")


# Files that have no splits


def test_a_person_stands_on_one_side_only(folder: Path) -> None:
    rng, header = np.random.default_rng(0), "name,gender,occupation,text\n"
    people = [f"P{i},{'FM'[i % 2]},{'chefs' if i % 3 else 'models'}" for i in range(120)]
    lines = [f"{people[i]},text {i} {j}\n" for i in range(120) for j in range(1 + i % 3)]
    text = header + "".join(rng.permutation(lines))
    write(folder, "bios/wiki_bios_sample.csv", text)
    train, dev = (read_annotated("wiki_bios", split) for split in ("train", "dev"))
    sides = [{text.split()[1] for text in each.data.texts[0]} for each in (train, dev)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 120
    assert len(sides[1]) == 30 and len(train) + len(dev) == len(lines)
    write(folder, "bios/wiki_bios_sample.csv", header + "".join(sorted(lines)))
    again = read_annotated("wiki_bios", "dev")
    assert sorted(again.data.texts[0]) == sorted(dev.data.texts[0])  # not by the order of lines
    with pytest.raises(ValueError, match="wiki_bios has train and dev, no 'test'"):
        read_annotated("wiki_bios", "test")


def test_the_wiki_sample_is_divided_by_person(shared_data: Path) -> None:
    import pandas as pd

    frame = pd.read_csv(shared_data / "bios" / "wiki_bios_sample.csv")
    name = dict(zip(frame.text, frame.name, strict=True))
    train, dev = (read_annotated("wiki_bios", split) for split in ("train", "dev"))
    people = [{name[text] for text in each.data.texts[0]} for each in (train, dev)]
    assert not people[0] & people[1] and len(people[0] | people[1]) == frame.name.nunique()
    assert len(train) + len(dev) == len(frame) == 554
    assert 0.2 < len(dev) / 554 < 0.3 and np.bincount(dev.data.labels).min() >= 10
    labels = dict(zip(frame.text, frame.occupation, strict=True))
    assert all(
        labels[text] == train.data.task.labels[i]
        for text, i in zip(train.data.texts[0], train.data.labels, strict=True)
    )


def test_the_equity_corpus_is_divided_by_template(shared_data: Path) -> None:
    train, dev = (read_annotated("EEC", split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (4000, 1600)
    assert "3040 of 8640 rows" in dev.data.source and "2 of 7" in dev.data.source
    for each in (train, dev):
        assert len(set(np.bincount(each.data.labels).tolist())) == 1
        cells = np.bincount(each.attributes["gender"].values * 2 + each.attributes["race"].values)
        assert (cells == len(each) / 4).all()
    heads = {text.split()[0] for text in dev.data.texts[0]} - {"I"}
    assert heads <= {text.split()[0] for text in train.data.texts[0]}  # no new names
    assert all(re.match(r"I made \w+ feel|\w+ told us", text) for text in dev.data.texts[0])
    assert not any(re.match(r"I made \w+ feel|\w+ told us", t) for t in train.data.texts[0])


def test_every_annotated_task_says_what_it_holds() -> None:
    for name, source in ANNOTATED.items():
        assert name == source.task.name and len(source.task.text) == 1
        assert len(set(source.task.labels)) == source.task.outputs >= 4 or name == "PAN16"
        for groups in source.attributes.values():
            assert len(set(groups)) == len(groups) >= 2
        for column, others in source.aliases.items():
            known = source.attributes.get(column, source.task.labels)
            assert set(others.values()) <= set(known)
