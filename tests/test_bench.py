"""The benchmark counts what is computed, and its two sides compute the same."""

import numpy as np
import pytest
import torch
from bench import differences, growth, lottery, steps
from bench.measuring import product_rate, text
from bench.rate import operations
from torch.utils.flop_counter import FlopCounterMode

from pruning_bias.anatomy import Encoder, load_encoder, tiny_encoder
from pruning_bias.encoding import Batch
from pruning_bias.importance import all_open
from pruning_bias.plans import head_plan
from pruning_bias.qualities import mask_logits, without_each
from pruning_bias.regimes import TaskModel
from pruning_bias.tasks import Classifier, EncodedTask


def eager_encoder(name: str) -> Encoder:
    encoder = load_encoder(name)
    encoder.model.set_attn_implementation("eager")
    return encoder


def test_operations_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "load_encoder", eager_encoder)  # torch counts no fused attention
    monkeypatch.setattr(growth, "BATCH", 2)
    pair = growth.drawn(24)
    step = steps.our_step(torch.randn(1, 2, 384), head_plan)
    step(pair)  # the teacher's first time
    with FlopCounterMode(display=False) as counter:
        step(pair)
    count = operations(np.full(4, 24), 384, 1536, 6)
    assert count == pytest.approx(counter.get_total_flops(), rel=1e-3)  # BERT's pooler apart


@pytest.mark.parametrize("heads", [True, False])
def test_padded_steps_of_nn_pruning_start_from_the_same_loss(
    heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "BATCH", 2)
    pair, a = growth.drawn(12), torch.randn(1, 2, 384, generator=torch.Generator().manual_seed(0))
    ours = steps.our_step(a, steps.value_heads if heads else steps.blocks)
    longer = tuple(_pad(batch, 20) for batch in pair)
    theirs = steps.published_step(a, heads, dropout=False)
    diluted = 0.25 if heads else 0.0  # it counts FFN units that it does not gate as closed
    assert theirs(longer).item() + diluted == pytest.approx(ours(pair).item(), rel=1e-4)


def _pad(batch: Batch, length: int) -> Batch:
    more = (0, length - batch.ids.shape[1])
    return Batch(*(torch.nn.functional.pad(part, more) for part in batch[:3]), batch.index)


def test_masks_together_and_one_at_a_time_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lottery, "BATCH", 6)
    monkeypatch.setattr(lottery, "SENTENCES", 6)
    monkeypatch.setattr(lottery, "LENGTH", 10)
    classifier = Classifier(tiny_encoder(), 2).double().eval()
    for data in (lottery.full_length(text()), lottery.sentences(text())):
        assert len(data) == 6 and data.lengths.max() <= 10
        masks = lottery.masks_of_a_search(all_open(classifier.encoder))
        batch = data.batch(np.arange(6), pad_to=12)
        for some in masks:
            alone = lottery.one_at_a_time(classifier, some[:3], [batch])
            assert (mask_logits(classifier, some[:3], data) - alone).abs().max() < 1e-12
            usual = lottery.one_at_a_time(classifier, some[:3], [batch], Classifier.__call__)
            assert (usual - alone).abs().max() < 1e-12


def test_masks_of_the_benchmark_are_those_of_a_search_by_the_papers_steps() -> None:
    packaged = load_encoder("packaged").model
    counts = [len(masks) for masks in lottery.masks_of_a_search(all_open(packaged))]
    assert counts == [58 + 4, 46 + 4]  # of 72 heads and 6 MLPs


def test_masks_that_close_one_more_share_operations() -> None:
    classifier = Classifier(load_encoder("packaged").model, 2).eval()
    data = lottery.full_length(text())
    some = data.batch([0, 1])
    tiny = EncodedTask(
        data.task, data.ids[:128], data.types[:128], data.offsets[:3], data.labels[:2]
    )
    full = all_open(classifier.encoder)
    masks = [mask for *_, mask in without_each(full)]
    with FlopCounterMode(display=False) as each:  # neither side's fused attention is counted
        lottery.one_at_a_time(classifier, [full], [some])
    with FlopCounterMode(display=False) as together:
        mask_logits(classifier, masks, tiny)
    ratio = len(masks) * each.get_total_flops() / together.get_total_flops()
    assert 2.6 < ratio < 2.8


def test_a_rate_is_positive() -> None:
    assert product_rate(16, 16, 16, rounds=1) > 0


def test_a_differences_memory_is_what_torch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and what a step allocates; entries are counted with Adam's two moments."""
    monkeypatch.setattr(differences, "BATCH", 6)
    model = TaskModel(tiny_encoder(), 2)
    monkeypatch.setattr(lottery, "BATCH", 6)
    data = lottery.full_length(text())
    batch = data.batch(np.arange(6))
    step = differences.our_step(model, batch, None, fixed=True)
    weights = sum(4 * weight.numel() for weight in model.parameters()) / 2**20
    assert differences.memory(step, model) > weights
    encoder = sum(weight.numel() for weight in model.encoder.parameters())
    assert differences.lasting(model) == pytest.approx(0.01 * encoder * 24 / 2**20, rel=0.01)
    plain = TaskModel(tiny_encoder(), 2)
    assert differences.memory(differences.forward(plain, batch), plain) > weights
