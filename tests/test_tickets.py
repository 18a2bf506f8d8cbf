"""Tickets: their sizes, what they hold of each other, and those that the lottery authors left."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification, BertModel

from pruning_bias.anatomy import tiny_encoder
from pruning_bias.compaction import compact
from pruning_bias.gates import FixedGate
from pruning_bias.magnitude import (
    WeightMask,
    by_bisection,
    by_magnitude,
    in_steps,
    least,
    load_mask,
    prunable,
    prune_,
    pruned,
    save_mask,
    survival,
)
from pruning_bias.plans import head_plan, mlp_plan, per_part, random_like
from pruning_bias.subnetworks import attach_
from pruning_bias.tickets import (
    Keep,
    bad_like,
    bernoulli_like,
    complement,
    read_masks,
    share_of_good,
    super_bad,
    super_random,
    survivors,
    ticket_size,
    write_masks,
)

ORDER = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")  # of the draws
TASKS = ("CoLA", "SST-2", "MRPC", "QQP", "MNLI")  # those whose masks are in the data folder
SEEDS = (1337, 42, 86, 71, 166)
few = settings(max_examples=10, derandomize=True, deadline=None)
SEED, SHARE = st.integers(0, 2**16), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])


def drawing(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_up(seed: int, share: float = 0.6) -> Keep:
    """A ticket of four layers with six heads and an MLP each."""
    rng = drawing(seed)
    keep = {f"{i}/value": torch.rand(6, 1, generator=rng) < share for i in range(4)}
    return keep | {f"{i}/mlp": torch.rand(1, 1, generator=rng) < share for i in range(4)}


def sizes(keep: Keep) -> Counter:
    counted: Counter = Counter({name.split("/")[1]: 0 for name in keep})
    for name, mask in keep.items():
        counted[name.split("/")[1]] += int(mask.sum())
    return counted


def held(one: Keep, other: Keep) -> Counter:
    return sizes(per_part(torch.logical_and, one, other))


def published(folder: Path, kind: str, task: str, seed: int) -> Keep:
    place = folder / "lottery_masks" / f"heads_mlps{kind}" / task / f"seed_{seed}"
    if not place.is_dir():
        pytest.skip(f"no masks of the lottery paper in {folder}")
    return read_masks(place)


# Draws


@few
@given(SEED, SHARE)
def test_random_and_bad_tickets_are_as_large_as_the_good_one(seed: int, share: float) -> None:
    good = made_up(seed, share)
    for drawn in (random_like(good, drawing(seed)), bad_like(good, drawing(seed))):
        assert sizes(drawn) == sizes(good)
        assert all(drawn[n].shape == good[n].shape for n in good) and drawn.keys() == good.keys()


@few
@given(SEED, SHARE)
def test_a_bad_ticket_holds_good_groups_only_when_all_pruned_ones_are_in(
    seed: int, share: float
) -> None:
    good = made_up(seed, share)
    bad, pruned = bad_like(good, drawing(seed)), {name: ~mask for name, mask in good.items()}
    for part, size in sizes(good).items():
        assert held(bad, pruned)[part] == min(size, sizes(pruned)[part])
        if size:
            assert share_of_good(bad, good)[part] == held(bad, good)[part] / size
        else:
            assert np.isnan(share_of_good(bad, good)[part])


def test_every_group_has_the_same_chance_to_fill_a_bad_ticket() -> None:
    good = {"0/value": torch.arange(8)[:, None] < 6}  # two pruned, so four of six are drawn
    drawn = [bad_like(good, drawing(seed))["0/value"][:, 0] for seed in range(800)]
    often = torch.stack(drawn).double().mean(0)
    assert torch.equal(often[6:], torch.ones(2).double())
    assert torch.allclose(often[:6], torch.tensor(4 / 6).double(), atol=0.06)


def test_a_bernoulli_ticket_has_the_size_only_on_average() -> None:
    good, rng = made_up(0), np.random.RandomState(0)
    drawn = [sizes(bernoulli_like(good, rng))["value"] for _ in range(200)]
    assert len(set(drawn)) > 5
    assert abs(np.mean(drawn) - sizes(good)["value"]) < 0.6


def test_draws_are_those_of_their_seed() -> None:
    good = made_up(0)
    for draw in (random_like, bad_like, complement):
        one, same, other = (draw(good, drawing(seed)) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in good)
        assert draw is complement or any(not torch.equal(one[n], other[n]) for n in good)


def test_a_complement_leaves_no_layer_without_heads() -> None:
    good = made_up(0) | {"2/value": torch.ones(6, 1, dtype=torch.bool)}
    rest = complement(good, drawing())
    assert int(rest["2/value"].sum()) == 1
    assert all(torch.equal(rest[name], ~good[name]) for name in good if name != "2/value")


# Several seeds


@few
@given(SEED, SHARE)
def test_super_tickets_have_one_size_and_take_the_least_kept_first(seed: int, share: float) -> None:
    good = [made_up(seed + i, share) for i in range(3)]
    kept = survivors(good)
    assert all(torch.equal(kept[n], torch.stack([m[n] for m in good]).all(0)) for n in kept)
    bad = super_bad(good, drawing(seed))
    other = super_random(good, bad, drawing(seed))
    assert sizes(kept) == sizes(bad) == sizes(other)
    for part, size in sizes(kept).items():
        whole = 24 if part == "value" else 4
        assert held(bad, kept)[part] == max(0, 2 * size - whole)
        used = sizes(per_part(torch.logical_or, kept, bad))[part]
        assert held(other, per_part(torch.logical_or, kept, bad))[part] == max(
            0, size - (whole - used)
        )
        never = per_part(lambda *rows: ~torch.stack(rows).any(0), *good)
        assert held(bad, never)[part] == min(size, sizes(never)[part])


# Sizes


def test_the_size_is_that_of_the_compact_model() -> None:
    model = tiny_encoder().eval().requires_grad_(False)
    keep = {"0/value": [1, 0, 0, 1], "1/value": [0, 1, 1, 1], "0/mlp": [1], "1/mlp": [0]}
    keep = {name: torch.tensor(mask)[:, None] == 1 for name, mask in keep.items()}
    assert ticket_size({}, model)["all"] == 1
    dense = sum(p.numel() for p in model.parameters())
    gates = attach_(
        model, head_plan(model) | mlp_plan(model), lambda name, shape: FixedGate(keep[name])
    )
    small = sum(p.numel() for p in compact(model).parameters())
    gates.detach_()
    assert abs(ticket_size(keep, model)["all"] * dense - small) <= 64  # an MLP's bias may stay


def test_sizes_of_the_published_tickets(
    shared_data: Path, golden: Callable[[str], dict[str, Any]]
) -> None:
    known = golden("lottery_masks")["sizes"]
    with torch.device("meta"):
        models = [BertForSequenceClassification(BertConfig(num_labels=i)) for i in (2, 3)]
    names = {"all": "of_total", "without_embeddings": "of_non_embedding", "prunable": "of_prunable"}
    assert sum(p.numel() for p in models[0].parameters()) == known["total"]
    for kind, tasks in known["sets"].items():
        for task, values in tasks.items():
            model = models[task == "MNLI"]
            tickets = [published(shared_data, kind[10:], task, seed) for seed in SEEDS]
            found = [ticket_size(keep, model, output_bias=False) for keep in tickets]
            for ours, theirs in names.items():
                shares, expected = [each[ours] for each in found], values[theirs]
                assert abs(np.mean(shares) - expected["mean"]) < 1e-9, (kind, task, ours)
                assert abs(np.std(shares, ddof=1) - expected["std_ddof1"]) < 1e-9


# The authors' files


def test_the_published_random_tickets_are_random_state_13(shared_data: Path) -> None:
    rng = np.random.RandomState(13)
    for task in ORDER:
        for seed in SEEDS:
            if task not in TASKS:
                rng.random(144 + 12)  # masks that are not here were drawn all the same
                continue
            good = published(shared_data, "", task, seed)
            drawn, theirs = bernoulli_like(good, rng), published(shared_data, "_random", task, seed)
            assert all(torch.equal(drawn[name], theirs[name]) for name in good), (task, seed)


def test_the_published_bad_and_super_tickets_are_of_our_kind(shared_data: Path) -> None:
    for task in TASKS:
        good = [published(shared_data, "", task, seed) for seed in SEEDS]
        kept = survivors(good)
        for seed, ticket in zip(SEEDS, good, strict=True):
            bad = published(shared_data, "_bad_1", task, seed)
            assert sizes(bad) == sizes(ticket)
            assert held(bad, ticket) == held(bad_like(ticket, drawing()), ticket)
            theirs = published(shared_data, "_super", task, seed)
            assert all(torch.equal(kept[name], theirs[name]) for name in kept)
            worst = published(shared_data, "_super_bizzaro", task, seed)
            middle = published(shared_data, "_super_midling", task, seed)
            assert sizes(worst) == sizes(middle) == sizes(kept)
            never = {n: ~torch.stack([t[n] for t in good]).any(0) for n in kept}
            assert held(worst, never)["value"] == min(*(sizes(m)["value"] for m in (never, kept)))
            assert held(worst, kept)["value"] == held(middle, kept)["value"] == 0
            assert held(worst, middle)["value"] == 0


def test_tickets_travel_through_the_authors_files(tmp_path: Path) -> None:
    keep = made_up(3)
    again = read_masks(write_masks(keep, tmp_path / "seed_3"))
    assert again.keys() == keep.keys() and all(torch.equal(again[n], keep[n]) for n in keep)
    tied = {f"{10 - i}/heads": torch.arange(6)[:, None] < i for i in range(11)}
    again = read_masks(write_masks(tied, tmp_path / "tied"))
    assert len(again) == 11
    assert all(torch.equal(again[f"{i}/value"], tied[f"{i}/heads"]) for i in range(11))


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither head_mask\.npy nor"):
        read_masks(tmp_path)
    file = tmp_path / "head_mask.npy"
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no whole \.npy file of numbers"):
        read_masks(tmp_path)
    write_masks(made_up(0), tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"no whole \.npy file of numbers"):
        read_masks(tmp_path)
    for wrong in (np.full((4, 6), 0.5), np.ones(4)):
        np.save(file, wrong)
        with pytest.raises(ValueError, match=r"expected zeros and ones, \[L, H\]"):
            read_masks(tmp_path)
    with pytest.raises(ValueError, match="no place for part 'ffn'"):
        write_masks({"0/ffn": torch.ones(9, 1, dtype=torch.bool)}, tmp_path)


# Magnitude


@pytest.fixture
def model() -> BertModel:
    """A tiny encoder in which no two weights are alike."""
    made = tiny_encoder().eval()
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=drawing(len(name))))
    return made


def survive(mask: WeightMask) -> int:
    return sum(int(kept.sum()) for kept in mask.values())


def test_bert_base_has_85_008_384_prunable_weights() -> None:
    with torch.device("meta"):
        weights = prunable(BertModel(BertConfig()))
    assert sum(each.numel() for each in weights.values()) == 85_008_384


def test_steps_are_those_of_torch(model: BertModel) -> None:
    theirs = tiny_encoder().eval()
    theirs.load_state_dict(model.state_dict())
    places = [name.rpartition(".") for name in prunable(theirs)]
    places = [(theirs.get_submodule(module), kind) for module, _, kind in places]
    tried = list(in_steps(model, lambda mask: 1.0, 0.5, amount=0.1, steps=3))
    for each in tried:
        prune.global_unstructured(places, prune.L1Unstructured, amount=0.1)
        ours = by_magnitude(model, each.kept)
        masks = [getattr(module, f"{kind}_mask") == 1 for module, kind in places]
        assert all(map(torch.equal, ours.values(), masks))


def test_masks_of_all_kinds_keep_exactly_as_many(model: BertModel) -> None:
    weights = prunable(model)
    total = sum(each.numel() for each in weights.values())
    masks = {
        kind: by_magnitude(model, 20_000, kind, drawing()) for kind in ("good", "random", "bad")
    }
    assert {survive(mask) for mask in masks.values()} == {20_000}
    assert not any((masks["good"][name] & masks["bad"][name]).any() for name in weights)
    least_kept = min(float(weights[n].abs()[m].min()) for n, m in masks["good"].items() if m.any())
    most_lost = max(float(weights[n].abs()[~m].max()) for n, m in masks["good"].items())
    assert least_kept >= most_lost
    flat = tiny_encoder()
    with torch.no_grad():
        [each.fill_(0.5) for each in flat.parameters()]
    assert survive(by_magnitude(flat, 12_345)) == survive(by_magnitude(flat, 12_345, "bad"))
    assert survive(by_magnitude(flat, 0)) == 0 and survive(by_magnitude(flat, total)) == total


def test_a_pruned_model_is_whole_again_afterwards(model: BertModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = by_magnitude(model, 20_000)
    with pytest.raises(KeyError), pruned(model, mask):
        assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == 20_000
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_removed_weights_stay_away_while_the_rest_learns(model: BertModel) -> None:
    mask = by_magnitude(model, 20_000)
    prune_(model, mask)
    ids = torch.arange(100, 112)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = prunable(model)["encoder.layer.0.output.dense.weight"].clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()
        assert all(not model.get_parameter(n).grad[~kept].any() for n, kept in mask.items())
        optimizer.step()
    after = prunable(model)
    assert all(not after[name][~kept].any() for name, kept in mask.items())
    assert not torch.equal(after["encoder.layer.0.output.dense.weight"], before)


def test_searches_end_at_the_target_and_go_on_from_a_journal(model: BertModel) -> None:
    total = sum(weights.numel() for weights in prunable(model).values())
    measured = []

    def quality(mask: WeightMask) -> float:
        measured.append(survive(mask))
        return survive(mask) / total

    for search, most in ((in_steps, 0.1 * 0.42 / 0.9), (by_bisection, 0.005)):
        measured.clear()
        tried = list(search(model, quality, 0.42))
        assert 0 <= least(tried, model) / total - 0.42 <= most
        assert measured == [each.kept for each in tried]
        again = list(search(model, quality, 0.42, known=tried[:3]))
        assert again == tried and len(measured) == 2 * len(tried) - 3
        assert not list(search(model, quality, 1.1))[-1].passed
        assert least(search(model, quality, 1.1), model) == total


def test_a_mask_is_a_bit_per_weight(model: BertModel, tmp_path: Path) -> None:
    mask = by_magnitude(model, 20_001)
    file = save_mask(mask, tmp_path / "mask.safetensors", seed=3)
    again = load_mask(file)
    assert again.keys() == mask.keys() and all(torch.equal(again[n], mask[n]) for n in mask)
    assert file.stat().st_size < sum(kept.numel() for kept in mask.values()) / 8 + 8000
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole file of a magnitude mask"):
        load_mask(file)


def test_shares_of_heads_and_mlps(model: BertModel) -> None:
    mask = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in prunable(model).items()}
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            mask[f"encoder.layer.1.attention.self.{part}.{kind}"][16:32] = False
    mask["encoder.layer.1.attention.output.dense.weight"][:, 16:32] = False
    mask["encoder.layer.1.attention.output.dense.bias"][16:32] = False
    mask["encoder.layer.0.intermediate.dense.weight"][:] = False
    heads, mlps = survival(mask, model)
    assert torch.equal(heads, torch.tensor([[1.0] * 4, [1.0, 0.0, 1.0, 1.0]]))
    assert torch.allclose(mlps, torch.tensor([(128 + 64 * 128) / (128 + 2 * 64 * 128), 1.0]))


def test_masks_of_other_models_and_other_kinds_are_refused(model: BertModel) -> None:
    name = "encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match=r"is \[2, 2\], the model has \[64, 128\]"):
        prune_(model, {name: torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the model has no such weights"):
        prune_(model, {"pooler.dense.weight": torch.ones(64, 64, dtype=torch.bool)})
    with pytest.raises(ValueError, match="expected 'good', 'random' or 'bad'"):
        by_magnitude(model, 5, "ugly")
    with pytest.raises(ValueError, match="-1 weights cannot survive of"):
        by_magnitude(model, -1)
