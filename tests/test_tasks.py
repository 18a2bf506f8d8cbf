"""Propositions about tasks: what is read, what is measured, and what training leaves alone."""

import math
import random
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import small_encoder
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModel, PreTrainedModel

from pruning_bias import acceptability
from pruning_bias.acceptability import FAULTS, spoil
from pruning_bias.anatomy import Encoder, load_encoder, tiny_encoder
from pruning_bias.differences import difference_
from pruning_bias.encoding import in_order
from pruning_bias.gates import FixedGate, ThresholdGate
from pruning_bias.glue import TASKS, TaskData, majority, measure, quality, read_task, read_tsv
from pruning_bias.hans import (
    HANS_TASKS,
    HEURISTICS,
    by_heuristic,
    read_hans,
    read_two_way,
    two_way,
)
from pruning_bias.plans import block_plan, ffn_plan, head_plan
from pruning_bias.subnetworks import attach_, fold
from pruning_bias.tasks import (
    Classifier,
    EncodedTask,
    encode_task,
    evaluate_task,
    fine_tune,
    predict,
)
from pruning_bias.vocabulary import occurring

torch.set_num_threads(1)

# rows by the data folder's README, which counted them apart from this package
ROWS = {
    ("CoLA", "train"): 8551,
    ("CoLA", "dev"): 1043,
    ("SST-2", "train"): 67349,
    ("SST-2", "dev"): 872,
    ("MRPC", "train"): 3668,
    ("MRPC", "dev"): 408,
    ("RTE", "train"): 2490,
    ("RTE", "dev"): 277,
    ("STS-B", "train"): 5749,
    ("STS-B", "dev"): 1500,
    ("WNLI", "train"): 635,
    ("WNLI", "dev"): 71,
    ("QNLI", "dev"): 5463,
    ("SST-2_sentences", "train"): 6920,
    ("SST-2_sentences", "dev"): 872,
    ("SST-2_sentences", "test"): 1821,
    ("MNLI", "dev"): 9815,
    ("QQP", "train_sample"): 23496,
}


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return load_encoder("tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder."""
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path))
    return tmp_path


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / "glue" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def some(task: str, n: int, seed: int = 0) -> TaskData:
    """Examples with random words and labels, for what does not depend on meaning."""
    rng = np.random.default_rng(seed)
    words = ["rain", "tea", "snow", "bread", "river", "stone", "glass", "cloud", "paper", "salt"]
    texts = tuple(
        [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(n)]
        for _ in TASKS[task].text
    )
    classes = len(TASKS[task].labels)
    labels = rng.integers(0, classes, n) if classes else rng.uniform(0, 5, n)
    return TaskData(TASKS[task], "train", texts, labels, "random words")


# Reading


@pytest.mark.parametrize(("task", "split"), ROWS, ids=lambda part: part)
def test_every_local_file_is_read_whole(task: str, split: str, shared_data: Path) -> None:
    data = read_task(task, split)
    assert len(data) == ROWS[task, split] == len(data.texts[0])
    assert len(data.texts) == len(TASKS[task].text)
    if not TASKS[task].labels:
        assert 0 <= data.labels.min() < data.labels.max() <= 5
    elif task != "WNLI" or split == "train":
        assert set(data.labels.tolist()) == set(range(len(TASKS[task].labels)))


def test_labels_are_those_of_the_files(shared_data: Path) -> None:
    rte = read_task("RTE", "dev")
    assert "Christopher Reeve had an accident" in rte.texts[1][0]
    assert TASKS["RTE"].labels[rte.labels[0]] == "not_entailment"
    assert TASKS["MNLI"].labels[read_task("MNLI", "dev").labels[0]] == "neutral"
    assert abs(majority(read_task("CoLA", "dev"))["accuracy"] - 0.6913) < 1e-4
    assert sum('"' in text for text in read_task("MRPC", "dev").texts[0]) > 10


def test_a_split_that_is_not_there_is_not_made_up(shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"MNLI has no train split.*only dev_matched\.tsv"):
        read_task("MNLI")


def test_a_task_without_folder_is_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*name: str, split: str) -> Dataset:
        asked.append((*name, split))
        kinds = ClassLabel(names=["entailment", "neutral", "contradiction"])
        features = Features(
            {"premise": Value("string"), "hypothesis": Value("string"), "label": kinds}
        )
        return Dataset.from_dict(
            {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}, features
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = read_task("MNLI", "dev")
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]
    assert data.texts == (["a", "b"], ["c", "d"]) and data.labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"RTE on the hub has labels .*neutral"):
        read_task("RTE")


def test_a_hub_that_does_not_answer_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"RTE: no folder .*the hub gave none \(no network\)"):
        read_task("RTE")


HEADER = "index\tsentence1\tsentence2\tlabel"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["index\tsentence1\tlabel"], "line 1: no column sentence2"),
        ([HEADER, "0\ta\tb\tentailment", "1\ta\tb"], "line 3: 3 columns, expected 4"),
        ([HEADER, "0\ta\tb\tmaybe"], "line 2: label 'maybe' of RTE; expected entailment, not"),
        ([HEADER, "0\ta\tb\t2"], "line 2: label '2'"),
        ([HEADER, "0\ta\tb\t-1"], "line 2: label '-1'"),
        ([HEADER, "0\ta\tb\t0", ""], "line 3: 1 columns, expected 4"),
        ([HEADER], "line 2: no examples"),
        ([], "line 1: no examples"),
    ],
)
def test_a_broken_file_is_refused_by_name_and_line(
    lines: list[str], message: str, folder: Path
) -> None:
    write(folder, "RTE/train.tsv", *lines)
    with pytest.raises(ValueError, match=rf"RTE/train\.tsv.*{re.escape(message)}"):
        read_task("RTE")


WHOLE = {  # files of every kind of task: with and without header, the label first, inside, last
    "RTE/dev.tsv": (HEADER, "0\tça va\t“ja”\tentailment", '1\tc "d\te\tnot_entailment'),
    "CoLA/dev.tsv": ("gj04\t1\t\tÇa va.", "gj04\t0\t*\tva Ça “ja”."),
    "MRPC/dev.tsv": ("Quality\t#1 String\t#2 String", "1\té\tça", "0\t'\t\""),
    "STS-B/dev.tsv": ("sentence1\tsentence2\tscore", "ça\tva\t4.750", "a\tb\t0.25"),
    "HANS/heuristics_evaluation_set.txt": (
        "gold_label\tsentence1\tsentence2\theuristic",
        "non-entailment\tThe café saw me .\tI saw the café .\tlexical_overlap",
        "entailment\tI , saw\tI saw\tsubsequence",
    ),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("file", WHOLE)
def test_a_file_cut_anywhere_is_refused_by_line_or_has_whole_examples_only(
    file: str, end: str, folder: Path
) -> None:
    content = "".join(line + end for line in WHOLE[file]).encode()
    path, name = write(folder, file), file.split("/")[0]
    path.write_bytes(content)
    whole = read_task(name, "dev")
    assert len(whole) == 2
    before = len(WHOLE[file]) - 2  # lines of header
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        *done, rest = content[:cut].split(b"\n")
        n = len(done) - before
        if name == "RTE" and rest.removesuffix(b"\r").decode(errors="replace") in WHOLE[file][1:]:
            n, rest = n + 1, b""  # the label that ends a line is whole
        if n > 0 and not rest:
            part = read_task(name, "dev")
            assert part.texts == tuple(each[:n] for each in whole.texts)
            assert part.labels.tolist() == whole.labels[:n].tolist()
        else:
            with pytest.raises(ValueError, match=rf"{re.escape(file)}, line {len(done) + 1}: "):
                read_task(name, "dev")


@pytest.mark.parametrize("file", WHOLE)
def test_quotes_windows_ends_and_a_byte_order_mark_change_no_example(
    file: str, folder: Path
) -> None:
    name, (path, other) = file.split("/")[0], (write(folder, file, *WHOLE[file]), "\r\n")
    plain = read_task(name, "dev")
    path.write_bytes(b"\xef\xbb\xbf" + "".join(x + other for x in WHOLE[file]).encode())
    marked = read_task(name, "dev")
    assert plain.texts == marked.texts and (plain.labels == marked.labels).all()
    pieces = [cell for line in WHOLE[file] for cell in line.split("\t")]
    assert all(text in pieces for texts in plain.texts for text in texts)


def test_another_encoding_is_refused_by_line(folder: Path) -> None:
    lines = (HEADER, "0\ta\tb\t0", "1\tça\tva\t1", "")
    path = write(folder, "RTE/train.tsv")
    for encoding, line in (("latin-1", 3), ("utf-16", 1)):
        path.write_bytes("\n".join(lines).encode(encoding))
        with pytest.raises(ValueError, match=rf"RTE/train\.tsv, line {line}: not UTF-8"):
            read_task("RTE")


def test_a_number_out_of_range_is_refused(tmp_path: Path) -> None:
    for wrong in ("5.1", "nan", "-1", "five", ""):
        path = write(tmp_path, "STS-B/dev.tsv", "sentence1\tsentence2\tscore", f"a\tb\t{wrong}")
        with pytest.raises(ValueError, match=r"STS-B/dev\.tsv, line 2: label .*0 to 5"):
            read_tsv(path, TASKS["STS-B"])


def test_other_wrong_requests_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no task 'SST2'; there are CoLA, SST-2"):
        read_task("SST2")
    with pytest.raises(ValueError, match="SST-2_sentences has no train split"):
        read_task("SST-2_sentences")
    with pytest.raises(ValueError, match="of 'test'; expected at least 1, of train or dev"):
        read_task("acceptability", "test")
    path = write(folder, "RTE/train.tsv", HEADER)
    path.write_bytes(path.read_bytes() + b"0\t\xff\tb\t0\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: not UTF-8"):
        read_task("RTE")


def test_a_label_may_be_written_as_name_or_place(folder: Path) -> None:
    write(folder, "WNLI/dev.tsv", HEADER, "0\ta\tb\t1", "1\ta\tb\tentailment", '2\t"a\tb"\t0')
    data = read_task("WNLI", "dev")
    assert data.labels.tolist() == [1, 1, 0] and data.texts[0][2] == '"a'


def test_a_sample_is_seeded_and_in_order() -> None:
    data = some("RTE", 50)
    assert data.sample(0, 1) is data and data.sample(99, 1) is data
    once, again, other = data.sample(9, 1), data.sample(9, 1), data.sample(9, 2)
    assert len(once) == 9 and once.texts == again.texts != other.texts
    where = [data.texts[1].index(text) for text in once.texts[1]]
    assert where == sorted(where) and (data.labels[where] == once.labels).all()


# HANS, and two classes

FIRST = "gold_label\tsentence1_parse\tsentence1\tsentence2\tpairID\theuristic\tsubcase"


def write_hans(folder: Path, *heuristics: str) -> Path:
    labels = ("entailment", "non-entailment")
    lines = [f"{labels[i % 2]}\t( )\ta {i}\tb {i}\tex{i}\t{h}\tx" for i, h in enumerate(heuristics)]
    return write(folder, "HANS/heuristics_evaluation_set.txt", FIRST, *lines)


def test_hans_tells_which_heuristic_an_example_tests(folder: Path) -> None:
    write_hans(folder, *np.repeat(HEURISTICS, 4).tolist())
    data, heuristics = read_hans()
    assert data.task == TASKS["HANS"] and data.labels.tolist() == [0, 1] * 6
    assert data.texts == tuple([f"{x} {i}" for i in range(12)] for x in "ab")
    assert heuristics.tolist() == np.repeat(HEURISTICS, 4).tolist()
    again = read_task("HANS", "dev")
    assert again.texts == data.texts and (again.labels == data.labels).all()
    some, few = read_hans(seed=1, limit=5)
    where = [data.texts[0].index(text) for text in some.texts[0]]
    assert len(some) == 5 and (heuristics[where] == few).all()
    assert (data.labels[where] == some.labels).all()


def test_a_wrong_heuristic_or_file_of_hans_is_refused_by_line(folder: Path) -> None:
    write_hans(folder, "subsequence", "constituent", "overlap")
    with pytest.raises(ValueError, match=r"evaluation_set\.txt, line 4: heuristic 'overlap'; exp"):
        read_hans()
    with pytest.raises(
        ValueError, match=r"HANS has no train split.*heuristics_train_set\.txt, onl"
    ):
        read_hans("train")
    write(folder, "HANS/heuristics_evaluation_set.txt", FIRST.replace("heuristic", "kind"))
    with pytest.raises(ValueError, match=r"evaluation_set\.txt, line 1: no column heuristic"):
        read_hans()


def test_accuracies_by_heuristic_are_parts_of_the_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels, heuristics = rng.integers(0, 2, 300), rng.choice(HEURISTICS, 300)
    three = rng.integers(0, 3, 300)
    found = by_heuristic(labels, three, heuristics)
    assert list(found) == [(h, label) for h in HEURISTICS for label in TASKS["HANS"].labels]
    counts = {
        (h, label): ((heuristics == h) & (labels == i)).sum()
        for h in HEURISTICS
        for i, label in enumerate(TASKS["HANS"].labels)
    }
    hits = sum(found[key] * counts[key] for key in found)
    assert hits == pytest.approx(((three > 0) == labels).sum())
    assert found == by_heuristic(labels, two_way(three), heuristics)
    swapped = np.array([0, 2, 1])[three]  # neutral or contradiction is the same answer here
    assert found == by_heuristic(labels, swapped, heuristics)
    alone = by_heuristic(labels[:1], three[:1], heuristics[:1])
    assert len(alone) == 1  # what has no examples has no accuracy


def test_tasks_of_two_classes_are_made_of_hans_and_mnli(folder: Path) -> None:
    three = ("entailment", "neutral", "contradiction")
    lines = [f"p{i}\th{i}\t{three[i % 3]}" for i in range(9)]
    for split in ("train", "dev_matched"):
        write(folder, f"MNLI/{split}.tsv", "sentence1\tsentence2\tgold_label", *lines)
    write_hans(folder, *["constituent"] * 4)
    dev = {name: read_two_way(name, "dev") for name in HANS_TASKS}
    assert {name: len(data) for name, data in dev.items()} == {
        "HANS": 4, "HANS_MNLI": 13, "MNLI_TWO": 9, "MNLI_TWO_HALF": 9
    }  # fmt: skip
    assert dev["MNLI_TWO"].labels.tolist() == [0, 1, 1] * 3
    assert dev["HANS_MNLI"].texts[0] == dev["HANS"].texts[0] + dev["MNLI_TWO"].texts[0]
    assert all(data.task.name == name and data.task.outputs == 2 for name, data in dev.items())
    whole = read_two_way("MNLI_TWO")
    half, again = (read_two_way("MNLI_TWO_HALF", seed=1) for _ in range(2))
    assert len(half) == 4 and half.texts == again.texts
    assert {*half.texts[0]} < {*whole.texts[0]}
    assert half.texts != read_two_way("MNLI_TWO_HALF", seed=2).texts
    assert len(read_two_way("HANS_MNLI", "dev", limit=3)) == 3
    with pytest.raises(ValueError, match="no task 'RTE' of two classes; there are HANS, HANS_MN"):
        read_two_way("RTE")


# The built-in task


def test_the_built_in_task_is_balanced_seeded_and_new_in_dev() -> None:
    train, dev = (read_task("acceptability", split, 3, 600) for split in ("train", "dev"))
    for data in (train, dev):
        assert data.labels.mean() == 0.5 and len(set(data.texts[0])) == len(data)
    again, other = (read_task("acceptability", "train", seed, 100) for seed in (3, 4))
    assert again.texts[0] == acceptability.examples(100, "train", 3)[0] != other.texts[0]
    known, new = ({w for line in d.texts[0] for w in line.split()} for d in (train, dev))
    assert len(new - known) > len(new) / 3
    assert not set(train.texts[0]) & set(dev.texts[0])


def test_every_fault_is_one_small_change() -> None:
    rng = random.Random(0)
    sentences, labels = acceptability.examples(600, "train")
    seen = set()
    for sentence in (s for s, label in zip(sentences, labels, strict=True) if label):
        spoilt, kind = spoil(sentence, rng)
        seen.add(kind)
        before, after = sentence.split(), spoilt.split()
        changed = sum(a != b for a, b in zip(before, after, strict=False))
        if kind == "missing":
            assert len(after) == len(before) - 1
        elif kind == "order":
            assert changed == 2 and sorted(re.findall(r"\w+", sentence)) == sorted(
                re.findall(r"\w+", spoilt)
            )
        else:
            assert changed == 1 and len(after) == len(before)
    assert seen == set(FAULTS)


def test_what_the_built_in_task_asks_is_in_the_states_and_not_in_the_words() -> None:
    found = load_encoder("packaged")
    del found.model.encoder.layer[2:]  # syntax lies low in this encoder
    sets = [read_task("acceptability", split, 0, n) for split, n in (("train", 1000), ("dev", 400))]
    states = []
    for data in sets:
        encoded = encode_task(found.tokenizer, data)
        mean = torch.empty(len(data), 384)
        for batch in in_order(encoded, np.arange(len(data))):
            with torch.no_grad():
                hidden = found.model(batch.ids, batch.attention).last_hidden_state
            weight = batch.attention[:, :, None] / batch.attention.sum(1)[:, None, None]
            mean[batch.index] = (hidden * weight).sum(1)
        states.append(mean.numpy())
    counts = CountVectorizer(token_pattern=r"\w+").fit(sets[0].texts[0])
    words = [counts.transform(data.texts[0]) for data in sets]
    probe = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(C=0.01, max_iter=500))
    by_state, by_word = (
        probe.fit(known, sets[0].labels).score(new, sets[1].labels)
        for known, new in (states, words)
    )
    assert by_word < 0.6 < by_state, (by_word, by_state)


# Metrics


def test_metrics_are_those_worked_out_by_hand() -> None:
    labels, predicted = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 0, 0, 1])
    # 2 hits, 1 miss, 1 false alarm, 2 right refusals
    assert measure(TASKS["SST-2"], labels, predicted) == {"score": 4 / 6, "accuracy": 4 / 6}
    found = measure(TASKS["QQP"], labels, predicted)
    assert found["f1"] == pytest.approx(4 / 6) and found["score"] == pytest.approx(4 / 6)
    found = measure(TASKS["CoLA"], labels, predicted)
    assert found["score"] == found["matthews"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    numbers, guesses = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.0, 1.0, 4.0, 9.0])
    found = measure(TASKS["STS-B"], numbers, guesses)
    pearson = 26 / math.sqrt(14.0 * 49.0)  # sums of products of deviations from 2 and 3.5
    assert found["spearman"] == 1 and found["pearson"] == pytest.approx(pearson, abs=1e-12)
    assert found["score"] == pytest.approx((1 + pearson) / 2)


@pytest.mark.parametrize("task", ["CoLA", "MRPC", "STS-B", "MNLI"])
def test_a_constant_answer_has_finite_scores(task: str) -> None:
    found = majority(some(task, 40))
    assert all(math.isfinite(value) for value in found.values())
    if task in ("CoLA", "STS-B"):
        assert found["score"] == 0


STOP = {  # lottery paper, and its code
    "CoLA": ("matthews",),
    "STS-B": ("pearson", "spearman"),
    **dict.fromkeys(("SST-2", "MRPC", "QQP", "MNLI", "QNLI", "RTE", "WNLI"), ("accuracy",)),
}


@pytest.mark.parametrize("task", STOP)
def test_a_search_stops_by_the_metric_of_the_paper(task: str) -> None:
    rng, data = np.random.default_rng(1), some(task, 60)
    predicted = np.where(rng.random(60) < 0.6, data.labels, rng.permutation(data.labels))
    found = measure(TASKS[task], data.labels, predicted)
    assert TASKS[task].stop == STOP[task]
    mean = sum(found[name] for name in STOP[task]) / len(STOP[task])
    assert quality(TASKS[task], data.labels, predicted) == pytest.approx(mean, abs=1e-15)
    if task in ("MRPC", "QQP"):
        assert found["score"] == (found["accuracy"] + found["f1"]) / 2 != mean


def test_labels_that_are_all_the_same_are_refused_where_a_metric_needs_two() -> None:
    same, rng = np.ones(9, int), np.random.default_rng(0)
    with pytest.raises(ValueError, match="CoLA: all 9 labels are acceptable, so matthews cannot"):
        quality(TASKS["CoLA"], same, rng.integers(0, 2, 9))
    with pytest.raises(
        ValueError, match=r"STS-B: all 9 labels are 2\.5, so pearson and spearman c"
    ):
        quality(TASKS["STS-B"], same * 2.5, rng.random(9))
    for task in ("SST-2", "MRPC", "MNLI"):
        assert quality(TASKS[task], same, same) == 1
    assert quality(TASKS["CoLA"], rng.permutation([0, 1] * 4), np.ones(8, int)) == 0


# Batches and the classifier


def test_pairs_get_token_types_and_single_sentences_none(tiny: Encoder) -> None:
    pairs, singles = (encode_task(tiny.tokenizer, some(name, 9)) for name in ("MRPC", "CoLA"))
    batch = pairs.batch(np.arange(9))
    second = (batch.ids == tiny.tokenizer.sep_token_id).cumsum(1) - (
        batch.ids == tiny.tokenizer.sep_token_id
    ).long()
    assert torch.equal(batch.types, (second == 1).long() * batch.attention)
    assert (batch.types.sum(1) > 0).all() and not singles.batch(np.arange(9)).types.any()


def test_a_long_pair_is_cut_in_its_longer_half(tiny: Encoder) -> None:
    data = TaskData(TASKS["RTE"], "dev", (["rain " * 300], ["snow and tea"]), np.array([1]), "")
    encoded = encode_task(tiny.tokenizer, data, 32)
    assert encoded.lengths.tolist() == [32] and encoded.types.sum() == 4


def encoder_of(family: str) -> PreTrainedModel:
    """A small random encoder with the packaged vocabulary's size."""
    config = AutoConfig.for_model(
        family,
        vocab_size=30522,
        hidden_size=24,
        dim=24,
        embedding_size=24,
        num_attention_heads=2,
        n_heads=2,
        num_hidden_layers=2,
        n_layers=2,
        intermediate_size=32,
        hidden_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    return AutoModel.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "albert"])
@pytest.mark.parametrize("task", ["CoLA", "STS-B", "MNLI"])
def test_padding_changes_no_logit(family: str, task: str, tiny: Encoder) -> None:
    data = encode_task(tiny.tokenizer, some(task, 7), 48)
    model = Classifier(encoder_of(family), TASKS[task].outputs).eval()
    tight, padded = (model(data.batch(np.arange(7), pad_to=n)) for n in (0, 60))
    assert tight.shape == (7, TASKS[task].outputs)
    assert (tight - padded).abs().max() < 1e-5
    alone = torch.cat([model(data.batch([i])) for i in range(7)])
    assert (predict(model, data) - alone).abs().max() < 1e-5


def test_bert_keeps_its_pooler_and_others_get_a_seeded_layer() -> None:
    bert = tiny_encoder()
    assert Classifier(bert, 2).dense is bert.pooler.dense
    for family in ("roberta", "electra", "distilbert", "albert"):
        encoder = encoder_of(family)
        one, same, other = (Classifier(encoder, 2, seed).dense.weight for seed in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)


def test_making_a_classifier_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Classifier(tiny_encoder(), 2, seed=9)
    assert torch.equal(torch.rand(3), expected)


# Fine-tuning


def train(model: PreTrainedModel, data: EncodedTask, **options: float) -> Classifier:
    settings = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8} | options
    classifier = Classifier(model, data.task.outputs).to(model.dtype)
    fine_tune(classifier, data, data, **settings)
    return classifier


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


PLANS: dict[str, Callable] = {
    "heads": head_plan,
    "blocks and units": lambda model: block_plan(model, 16) | ffn_plan(model),
}


@pytest.mark.parametrize("plan", PLANS)
def test_closed_groups_stay_closed_while_weights_train(plan: str, tiny: Encoder) -> None:
    model, data = tiny_encoder(), encode_task(tiny.tokenizer, some("RTE", 32))
    generator = torch.Generator().manual_seed(0)
    subnetwork = attach_(
        model,
        PLANS[plan](model),
        lambda _, shape: FixedGate(torch.rand(shape, generator=generator) < 0.5),
    )
    before, keep = fold(model).state_dict(), subnetwork.keep()
    classifier = train(model, data, weight_decay=0.1)
    after, now = fold(model), subnetwork.keep()
    assert all(torch.equal(keep[name], now[name]) and not keep[name].all() for name in keep)
    for name, sites in subnetwork.plan.items():
        for site in sites:
            z = keep[name].T if site.transposed else keep[name]
            mask = site.grid.expand(z.float()).bool()
            was, weight = before[f"{site.linear}.weight"], after.get_submodule(site.linear).weight
            assert not weight[~mask].any()
            assert (weight != was)[mask].float().mean() > 0.9
    gated = predict(classifier, data)
    classifier.encoder = after
    assert (predict(classifier, data) - gated).abs().max() < 1e-5


def test_scores_of_gates_are_not_trained(tiny: Encoder) -> None:
    model, data = tiny_encoder(), encode_task(tiny.tokenizer, some("CoLA", 16))
    subnetwork = attach_(model, head_plan(model), lambda _, shape: ThresholdGate(shape))
    before = weights(subnetwork)
    train(model, data)
    assert weights(subnetwork) == before
    assert all(p.grad is None for p in subnetwork.parameters())


@pytest.mark.parametrize("task", ["MNLI", "STS-B"])
def test_the_same_seed_gives_the_same_bytes(task: str, tiny: Encoder) -> None:
    data = encode_task(tiny.tokenizer, some(task, 32))
    torch.manual_seed(1)
    one = train(tiny_encoder(), data, seed=4)
    torch.manual_seed(2)
    same = train(tiny_encoder(), data, seed=4)
    other = train(tiny_encoder(), data, seed=5)
    assert weights(one) == weights(same) != weights(other)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "albert"])
def test_a_table_of_the_pieces_that_occur_learns_what_the_whole_table_learns(
    family: str, tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode_task(tiny.tokenizer, some("CoLA", 24))
    models = [small_encoder(family, vocab_size=len(tiny.tokenizer)) for _ in range(2)]
    before = models[0].get_input_embeddings().weight.detach().clone()
    train(models[0], data)
    monkeypatch.setattr("pruning_bias.tasks.occurring", lambda *_, **__: nullcontext())
    train(models[1], data)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9), name
    after = models[0].get_input_embeddings().weight
    moved = (after != before).any(1).nonzero()[:, 0].tolist()
    assert set(moved) <= set(data.ids.tolist()) and len(moved) > len(set(data.ids)) / 2


def test_the_whole_table_is_back_after_an_error(tiny: Encoder) -> None:
    model = tiny_encoder()
    whole, before = model.get_input_embeddings(), weights(model)
    few, other = (encode_task(tiny.tokenizer, some("CoLA", n)) for n in (2, 40))
    with pytest.raises(IndexError), occurring(model, few):
        predict(Classifier(model, 2), other)
    assert model.get_input_embeddings() is whole and weights(model) == before


def test_a_table_that_decays_or_carries_a_difference_stays_whole(tiny: Encoder) -> None:
    model, data = tiny_encoder(), encode_task(tiny.tokenizer, some("CoLA", 2))
    with occurring(model, data, decay=0.1):
        assert len(model.get_input_embeddings().weight) == model.config.vocab_size
    difference_(model.requires_grad_(False))
    with occurring(model, data):
        assert len(model.get_input_embeddings().weight) == model.config.vocab_size


def test_decay_spares_biases_and_norms(tiny: Encoder) -> None:
    data = encode_task(tiny.tokenizer, some("CoLA", 16))
    plain, decayed = (
        train(tiny_encoder(), data, epochs=1, warmup=0.0, batch_size=16, weight_decay=decay)
        for decay in (0.0, 0.5)
    )
    pairs = zip(plain.named_parameters(), decayed.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        spared = name.endswith("bias") or "LayerNorm" in name
        assert torch.equal(a, b) == spared, name


def test_history_has_a_row_per_epoch_with_the_dev_set(tiny: Encoder) -> None:
    data, dev = (encode_task(tiny.tokenizer, some("MRPC", n, seed=n)) for n in (41, 13))
    classifier = Classifier(tiny_encoder(), 2)
    history = fine_tune(classifier, data, dev, epochs=3, batch_size=8)
    assert [(row["epoch"], row["step"]) for row in history] == [(1, 5), (2, 10), (3, 15)]
    found = evaluate_task(classifier, dev)
    assert {k.removeprefix("dev "): v for k, v in history[-1].items() if "dev" in k} == found
    assert found["n"] == 13 and not classifier.training


def test_loss_of_evaluation_is_the_mean_over_examples(tiny: Encoder) -> None:
    data = encode_task(tiny.tokenizer, some("STS-B", 70))
    classifier = Classifier(tiny_encoder(), 1).eval()
    error = (predict(classifier, data)[:, 0].numpy() - data.labels) ** 2
    assert evaluate_task(classifier, data)["loss"] == pytest.approx(error.mean(), rel=1e-5)


def test_bfloat16_trains_weights_that_stay_float32(tiny: Encoder) -> None:
    data = encode_task(tiny.tokenizer, some("CoLA", 16))
    classifier = train(tiny_encoder(), data, autocast=torch.bfloat16)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in classifier.parameters())
