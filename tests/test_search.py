"""Propositions about the search for a ticket: its steps, its journal, and many masks at once."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_encoder
from torch import Tensor, nn

from pruning_bias.anatomy import tiny_encoder
from pruning_bias.gates import FixedGate
from pruning_bias.glue import TASKS
from pruning_bias.importance import all_open, component_gates, importance, set_gates_
from pruning_bias.plans import head_plan
from pruning_bias.qualities import mask_logits, qualities, removal_losses, without_each
from pruning_bias.search import (
    Phase,
    State,
    Step,
    advance,
    candidate,
    close_weakest,
    paper_phases,
    read_journal,
    search,
    size,
    ticket,
)
from pruning_bias.subnetworks import attach_
from pruning_bias.tasks import Classifier, EncodedTask, evaluate_task
from pruning_bias.tickets import Keep

torch.set_num_threads(1)

# Searches in made-up landscapes


def everything(layers: int, heads: int) -> Keep:
    return {f"{i}/value": torch.ones(heads, 1).bool() for i in range(layers)} | {
        f"{i}/mlp": torch.ones(1, 1).bool() for i in range(layers)
    }


class Landscape:
    """Scores at random for each mask, and a quality that falls as more is closed."""

    def __init__(self, seed: int, layers: int = 4, heads: int = 5, slope: float = 1.0) -> None:
        self.seed, self.slope, self.start = seed, slope, everything(layers, heads)
        self.asked: list[str] = []  # what was measured, in order
        self.worth = self._draw("worth")

    def _draw(self, of: str) -> dict[str, Tensor]:
        digest = hashlib.sha256(f"{self.seed} {of}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        return {n: torch.from_numpy(rng.random(z.shape)) for n, z in self.start.items()}

    def scores(self, keep: Keep) -> dict[str, Tensor]:
        self.asked.append("scores")
        return self._draw(name(keep))

    def quality(self, keep: Keep) -> float:
        self.asked.append("quality")
        lost = sum(float(self.worth[n][~z].sum()) for n, z in keep.items())
        return math.exp(-self.slope * lost / sum(map(size_of, keep.values())))

    def search(self, **options: Any) -> list[Step]:
        options = {"phases": paper_phases(self.start)} | options
        return search(self.start, self.scores, self.quality, **options)


def size_of(mask: Tensor) -> int:
    return mask.numel()


def name(keep: Keep) -> str:
    return "".join(str(int(bit)) for z in keep.values() for bit in z.flatten())


def names(steps: list[Step]) -> list[tuple[int, str, float, bool]]:
    return [(step.phase, name(step.keep), step.quality, step.accepted) for step in steps]


def by_hand(land: Landscape, phases: tuple[Phase, ...], recompute: bool) -> tuple[list[str], str]:
    """The loop of the published code as its description has it, in plain lists: what it tried."""
    parts = ["mlp" if n.endswith("mlp") else "value" for n, z in land.start.items() for _ in z]
    tried: list[str] = []

    def as_keep(bits: list[int]) -> Keep:
        pieces = torch.tensor(bits).bool().split([z.numel() for z in land.start.values()])
        return {n: p.view_as(z) for (n, z), p in zip(land.start.items(), pieces, strict=True)}

    def scores(bits: list[int]) -> list[float]:
        return torch.cat([z.flatten() for z in land.scores(as_keep(bits)).values()]).tolist()

    def quality(bits: list[int]) -> float:
        tried.append(name(as_keep(bits)))
        return land.quality(as_keep(bits))

    bits = [1] * len(parts)
    bound, score = 0.9 * quality(bits), scores(bits)
    for phase in phases:
        while all(any(b for b, p in zip(bits, parts, strict=True) if p == part) for part in phase):
            new = list(bits)
            for part, count in phase.items():
                living = [i for i, b in enumerate(bits) if b and parts[i] == part]
                for i in sorted(living, key=score.__getitem__)[:count]:
                    new[i] = 0
            good = quality(new) >= bound
            if not good and recompute:
                score = scores(bits)
                break
            score = scores(new)
            if not good:
                break
            bits = new
    return tried, name(as_keep(bits))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("parts", ["both", "heads", "mlps"])
def test_a_search_tries_what_the_written_out_loop_tries(parts: str, reuse: bool) -> None:
    ends = set()
    for seed in range(40):
        slope = (0.05, 0.3, 1.0, 4.0)[seed % 4]  # from all may go to nothing may
        land = Landscape(seed, slope=slope)
        phases = paper_phases(land.start, parts, heads=seed % 5)
        steps = land.search(phases=phases, reuse_failed=reuse)
        tried, end = by_hand(Landscape(seed, slope=slope), phases, recompute=not reuse)
        assert [name(step.keep) for step in steps] == tried
        assert name(ticket(steps)) == end
        ends.add(end)
    assert len(ends) > 5


def test_scores_after_a_failure_decide_what_follows() -> None:
    """Or the switch would be one without an effect."""
    ends = [
        {name(ticket(Landscape(seed).search(reuse_failed=reuse))) for seed in range(20)}
        for reuse in (False, True)
    ]
    assert ends[0] != ends[1]


def test_nothing_is_measured_that_nobody_needs() -> None:
    land = Landscape(0)
    steps = land.search()
    accepted = sum(step.accepted for step in steps)
    assert land.asked.count("quality") == len(steps) > accepted == land.asked.count("scores")
    land = Landscape(0)
    steps = land.search(reuse_failed=True)
    assert land.asked.count("scores") == len(steps)


def test_step_sizes_of_bert_base_are_the_papers() -> None:
    start = everything(12, 12)
    assert paper_phases(start) == ({"value": 14, "mlp": 1}, {"value": 7}, {"mlp": 1})
    assert paper_phases(start, "heads") == ({"value": 14},)
    assert paper_phases(start, "mlps", mlps=2) == ({"mlp": 2},)
    assert paper_phases(everything(1, 3))[1] == {"value": 1}
    with pytest.raises(ValueError, match="parts is 'layers'; expected one of both, heads, mlps"):
        paper_phases(start, "layers")


def test_the_weakest_go_whatever_closed_ones_score() -> None:
    keep = everything(2, 3)
    keep["0/value"][1] = False
    scores = {n: torch.arange(len(z), dtype=torch.float64)[:, None] for n, z in keep.items()}
    scores["0/value"][1] = -5.0
    closed = close_weakest(keep, scores, {"value": 3})
    assert name(closed) == "001001" + "11"  # 0 of both layers, then 1 of the second
    assert name(keep) == "101111" + "11"  # as it was
    assert size(close_weakest(keep, scores, {"value": 99}), "value") == 0


def test_a_failed_step_goes_back_and_a_phase_ends_when_a_part_is_gone() -> None:
    keep, phases = everything(1, 4), ({"value": 2, "mlp": 1}, {"value": 1}, {"mlp": 1})
    scores = {n: torch.arange(len(z), dtype=torch.float64)[:, None] for n, z in keep.items()}
    state = State(0, keep, scores)
    place, tried = candidate(state, phases)
    assert (place, name(tried)) == (0, "00110")
    went = advance(state, Step(place, tried, 1.0, True, scores))
    place, tried = candidate(went, phases)  # no MLP is left
    assert (place, name(tried)) == (1, "00010")
    failed = advance(went, Step(place, tried, 0.0, False, None))
    assert failed == State(2, went.keep, scores) and candidate(failed, phases) is None


# The journal


def test_a_search_that_was_cut_off_anywhere_ends_the_same(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    wanted = names(Landscape(3).search(journal=whole))
    content = whole.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == 10]
    cuts = {*range(0, len(content), 211), *ends, *(i + 1 for i in ends), len(content)}
    assert len(wanted) > 5 and len(cuts) > 30
    for cut in sorted(cuts):
        part.write_bytes(content[:cut])
        land = Landscape(3)
        assert names(land.search(journal=part)) == wanted
        assert part.read_bytes() == content
        done = max(0, content[:cut].count(b"\n") - 1)
        assert land.asked.count("quality") == len(wanted) - done


@pytest.mark.parametrize("what", ["scores", "quality"])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_search_that_fails_at_any_question_goes_on_there(
    what: str, reuse: bool, tmp_path: Path
) -> None:
    wanted = names(Landscape(5, slope=0.3).search(reuse_failed=reuse))
    journal, tries = tmp_path / "journal", 0
    while True:
        land, tries = Landscape(5, slope=0.3), tries + 1
        ask = getattr(land, what)

        def stop(keep: Keep, ask: Callable = ask, land: Landscape = land) -> Any:
            if land.asked.count(what) == 1:  # one answer per life
                raise KeyboardInterrupt
            return ask(keep)

        setattr(land, what, stop)
        try:
            came = names(land.search(reuse_failed=reuse, journal=journal))
        except KeyboardInterrupt:
            continue
        break
    assert came == wanted and tries > 3


def test_a_journal_says_what_was_measured(tmp_path: Path) -> None:
    journal = tmp_path / "new" / "folder" / "journal.jsonl"
    steps = Landscape(1).search(journal=journal, about={"model": "abc", "score": "paper"})
    terms, read = read_journal(journal)
    assert terms["model"] == "abc" and terms["share"] == 0.9
    assert names(read) == names(steps)
    for one, other in zip(steps, read, strict=True):
        assert (one.scores is None) == (other.scores is None) == (not one.accepted)
        for gate in one.scores or {}:
            assert torch.equal(one.scores[gate], other.scores[gate])
    assert read_journal(tmp_path / "none") == ({}, [])
    for line in journal.read_text().splitlines():
        json.loads(line)


def test_a_finished_search_asks_nothing(tmp_path: Path) -> None:
    wanted = names(Landscape(1).search(journal=tmp_path / "journal"))
    land = Landscape(1)
    assert names(land.search(journal=tmp_path / "journal")) == wanted and not land.asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.8}, "of another search: its share is 0.9, this one's is 0.8; name another"),
        ({"reuse_failed": True}, "its reuse_failed is False, this one's is True"),
        ({"phases": ({"mlp": 1},)}, "its phases is .*'value': 2.* this one's is .*'mlp': 1"),
        ({"about": {"task": "RTE"}}, "its task is CoLA, this one's is RTE"),
        ({"about": {}}, "its task is CoLA, this one's is None"),
        ({"about": {"task": "CoLA", "seed": 1}}, "its seed is None, this one's is 1"),
    ],
)
def test_the_journal_of_another_search_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    journal, about = tmp_path / "journal", {"task": "CoLA"}
    Landscape(1).search(journal=journal, about=about)
    before = journal.read_bytes()
    with pytest.raises(ValueError, match=message):
        Landscape(1).search(journal=journal, **({"about": about} | options))
    assert journal.read_bytes() == before


def test_the_journal_of_another_model_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    Landscape(1).search(journal=journal)
    other = Landscape(1, layers=3)
    with pytest.raises(ValueError, match="journal, line 2: another mask than this search tries"):
        other.search(journal=journal, phases=paper_phases(Landscape(1).start))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], lines[3]]))
    with pytest.raises(ValueError, match="journal, line 3: another mask than this search tries"):
        Landscape(1).search(journal=journal)


def test_a_file_that_is_no_journal_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("buy milk")
    with pytest.raises(ValueError, match="notes is no journal of a search: name another file"):
        Landscape(1).search(journal=file)
    assert file.read_text() == "buy milk"
    Landscape(1).search(journal=(journal := tmp_path / "journal"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b'{"phase": 0}\n', *lines[2:]]))
    with pytest.raises(ValueError, match="journal, line 2: no line of a journal"):
        Landscape(1).search(journal=journal)


# What cannot be searched


@pytest.mark.parametrize("full", [0.0, -0.1])
def test_a_full_model_without_quality_is_refused(full: float) -> None:
    land = Landscape(0)
    with pytest.raises(ValueError, match=rf"quality is {full}, of which 90% is no bound"):
        search(land.start, land.scores, lambda _: full, paper_phases(land.start))


def test_what_is_no_number_is_refused() -> None:
    land = Landscape(0)
    with pytest.raises(ValueError, match="the quality of a mask is nan"):
        search(land.start, land.scores, lambda _: math.nan, paper_phases(land.start))

    def broken(keep: Keep) -> dict[str, Tensor]:
        return land.scores(keep) | {"2/mlp": torch.tensor([[math.nan]])}

    with pytest.raises(ValueError, match=r"scores of 2/mlp are \[\[nan\]\]; expected finite"):
        search(land.start, broken, land.quality, paper_phases(land.start))


# Many masks at once


def classified(family: str, task: str = "MNLI", n: int = 9) -> tuple[Classifier, EncodedTask]:
    """A random classifier in float64 with large weights, and random examples of many lengths."""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(small_encoder(family, 3), TASKS[task].outputs).double()
        for layer in (classifier.dense, classifier.out):
            nn.init.normal_(layer.weight, std=0.4)
    lengths = rng.integers(3, 10, n)
    labels = rng.integers(0, 3, n) if TASKS[task].labels else rng.uniform(0, 5, n)
    ids = rng.integers(3, 50, lengths.sum()).astype(np.int32)
    types, offsets = np.zeros(len(ids), np.uint8), np.cumsum([0, *lengths])
    return classifier.eval(), EncodedTask(
        TASKS[task], ids, types, offsets, labels, classifier.encoder.config.pad_token_id or 0
    )


def some_masks(classifier: Classifier, n: int) -> list[Keep]:
    """All open, random ones, none open, one twice, and one that differs in one place alone."""
    generator, full = torch.Generator().manual_seed(0), all_open(classifier.encoder)
    masks = [full] + [
        {name: torch.rand(z.shape, generator=generator) < 0.6 for name, z in full.items()}
        for _ in range(n - 4)
    ]
    masks.append({name: torch.zeros_like(z) for name, z in full.items()})
    last = list(full)[-1]
    return [*masks, masks[1], masks[2] | {last: ~masks[2][last]}]


def one_by_one(classifier: Classifier, masks: list[Keep], data: EncodedTask) -> Tensor:
    """Logits of every mask and example, [K, N, outputs], each with gates and alone."""
    with component_gates(classifier) as gates, torch.no_grad():
        found = []
        for mask in masks:
            set_gates_(gates, {name: z.double() for name, z in mask.items()})
            found.append(torch.cat([classifier(data.batch([i])) for i in range(len(data))]))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "albert"])
def test_many_masks_at_once_are_each_alone(family: str) -> None:
    classifier, data = classified(family)
    masks = some_masks(classifier, 8)
    together = mask_logits(classifier, masks, data, size=4)
    assert (together - one_by_one(classifier, masks, data)).abs().max() < 1e-10
    assert torch.equal(together[1], together[-2])
    assert (together[0] - together[1]).abs().max() > 0.01
    assert (together[2] - together[-1]).abs().max() > 0.001
    assert (together[-3] - together[0]).abs().max() > 0.01  # with nothing open


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_masks_say_the_same_in_any_company(family: str) -> None:
    classifier, data = classified(family)
    masks = some_masks(classifier, 8)
    together = mask_logits(classifier, masks, data)
    for k, mask in enumerate(masks):
        (alone,) = mask_logits(classifier, [mask], data, size=3)
        assert (together[k] - alone).abs().max() < 1e-10
    assert torch.equal(mask_logits(classifier, masks[::-1], data), together.flip(0))


def test_gates_that_are_on_stay_on_under_a_mask() -> None:
    classifier, data = classified("bert")
    plain = mask_logits(classifier, [all_open(classifier.encoder)], data)
    encoder, generator = classifier.encoder, torch.Generator().manual_seed(1)
    gates = attach_(
        encoder,
        head_plan(encoder),
        lambda _, shape: FixedGate(torch.rand(shape, generator=generator) < 0.5).double(),
    )
    masks = some_masks(classifier, 5)
    found = mask_logits(classifier, masks, data)
    assert (found - one_by_one(classifier, masks, data)).abs().max() < 1e-10
    assert (found[0] - plain).abs().max() > 0.01
    with gates.off():
        assert (mask_logits(classifier, masks[:1], data) - plain).abs().max() < 1e-10


def test_training_goes_on_where_it_was() -> None:
    classifier, data = classified("bert")
    masks = some_masks(classifier, 5)
    wanted = mask_logits(classifier, masks, data)
    classifier.train()
    assert torch.equal(mask_logits(classifier, masks, data), wanted)  # without dropout
    assert all(module.training for module in classifier.modules())
    assert all(p.requires_grad for p in classifier.parameters())


@pytest.mark.parametrize("task", ["MNLI", "STS-B"])
def test_qualities_are_what_one_mask_at_a_time_has(task: str) -> None:
    classifier, data = classified("bert", task, 30)
    masks = some_masks(classifier, 6)
    del masks[3]  # none open: like first pieces tie, and rounding would rank them
    found = qualities(classifier, masks, data)
    assert found[0] == pytest.approx(evaluate_task(classifier, data)["score"], abs=1e-6)
    for mask, each in zip(masks, found, strict=True):
        assert qualities(classifier, [mask], data) == [pytest.approx(each, abs=1e-9)]
    assert len(set(found)) > 1


def computed(classifier: Classifier, masks: list[Keep], data: EncodedTask) -> list[list[int]]:
    """Of each layer, how many tokens every call of the MLP was given."""
    tokens: list[list[int]] = [[] for _ in classifier.encoder.encoder.layer]
    hooks = [
        layer.output.dense.register_forward_hook(
            lambda _, args, out, found=found: found.append(args[0][..., 0].numel())
        )
        for layer, found in zip(classifier.encoder.encoder.layer, tokens, strict=True)
    ]
    mask_logits(classifier, masks, data)
    for hook in hooks:
        hook.remove()
    return tokens


def test_layers_are_computed_once_below_a_difference_and_never_where_closed() -> None:
    classifier, data = classified("bert", n=1)
    (n,), full = data.lengths, all_open(classifier.encoder)
    heads = [full | {"1/value": torch.tensor([[k != 0], [k != 1], [k != 2]])} for k in range(4)]
    assert computed(classifier, heads, data) == [[n], [n] * 4, [1] * 4]
    closed = torch.zeros(1, 1).bool()
    mlps = [full | {f"{i}/mlp": closed} for i in range(3)] + [full]
    assert computed(classifier, mlps, data) == [[n], [n] * 2, [1] * 3]
    assert computed(classifier, [mask | {"0/mlp": closed} for mask in heads], data)[0] == []


def test_the_first_token_is_the_last_layers_only_one() -> None:
    classifier, data = classified("bert", n=1)
    seen: list[int] = []
    layer = classifier.encoder.encoder.layer[-1]
    layer.output.LayerNorm.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    mask_logits(classifier, some_masks(classifier, 5), data)
    assert {*seen} == {1} and data.lengths[0] > 1


@pytest.mark.parametrize("task", ["MNLI", "STS-B"])
def test_removal_losses_are_those_of_one_removal_at_a_time(task: str) -> None:
    classifier, data = classified("bert", task)
    keep = some_masks(classifier, 5)[1]
    found = removal_losses(classifier, data, keep)
    assert len(without_each(keep)) == sum(int(each.sum()) for each in keep.values())
    for name, each in keep.items():
        for i in range(len(each)):
            if not each[i]:
                assert found[name][i] == 0
                continue
            mask = {gate: z.clone() for gate, z in keep.items()}
            mask[name][i] = False
            (logits,) = one_by_one(classifier, [mask], data)
            labels = torch.from_numpy(data.labels)
            loss = (
                nn.functional.cross_entropy(logits, labels)
                if task == "MNLI"
                else (logits[:, 0] - labels).square().mean()
            )
            assert found[name][i].item() == pytest.approx(loss.item(), abs=1e-10)


def test_a_search_on_a_model_resumes_to_the_same_ticket(tmp_path: Path) -> None:
    classifier = Classifier(tiny_encoder(), 2)
    nn.init.normal_(classifier.out.weight, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    ids, offsets = rng.integers(1000, 2000, 24 * 6).astype(np.int32), np.arange(25) * 6
    types, labels = np.zeros(len(ids), np.uint8), np.zeros(24, int)
    data = EncodedTask(TASKS["SST-2"], ids, types, offsets, labels)
    start = all_open(classifier.encoder)
    data.labels[:] = mask_logits(classifier, [start], data)[0].argmax(1)  # the full one knows all

    def find(journal: Path) -> list[Step]:
        return search(
            start,
            lambda keep: importance(classifier, data, keep),
            lambda keep: qualities(classifier, [keep], data)[0],
            paper_phases(start, heads=2),
            journal=journal,
        )

    whole, part = tmp_path / "whole", tmp_path / "part"
    steps = find(whole)
    assert steps[0].quality == 1 and len(steps) > 3
    content = whole.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert names(find(part)) == names(steps) and part.read_bytes() == content
