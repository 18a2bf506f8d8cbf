"""No step of the training loop asks the device for a number: a GPU would wait for it."""

import pytest
import torch
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_bias.anatomy import load_encoder
from pruning_bias.benchmarks import builtin_tests
from pruning_bias.debias import Teacher, hidden_states, orthogonality
from pruning_bias.fidelity import Fidelity
from pruning_bias.gates import ThresholdGate
from pruning_bias.movement import Debiasing
from pruning_bias.plans import Plan, block_plan, ffn_plan, head_output_plan, head_plan
from pruning_bias.subnetworks import attach_
from pruning_bias.texts import read_classes
from pruning_bias.training import cubic

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Asks(TorchDispatchMode):
    """Notes every operation whose answer the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS or (
            name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_probe_sees_a_wait() -> None:
    with Asks() as asks:
        torch.ones(2).sum().item()
    assert asks.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("fidelity", ["equations", "published_code"])
@pytest.mark.parametrize("mode", ["token", "sentence"])
@pytest.mark.parametrize("what", ["heads", "blocks"])
@pytest.mark.parametrize("room", [0, 2**30])
def test_no_step_waits(what: str, mode: str, fidelity: str, room: int) -> None:
    encoder = load_encoder("tiny")
    model, switches = encoder.model, Fidelity.parse(fidelity)
    plans: dict[str, Plan] = {
        "heads": head_plan(model, ("query", "key", "value")) | head_output_plan(model),
        "blocks": block_plan(model, 16) | ffn_plan(model),
    }
    subnetwork = attach_(model, plans[what], lambda name, shape: ThresholdGate(shape))

    def teach(batch):
        with subnetwork.off():
            return hidden_states(model, batch)

    text = read_classes(encoder.tokenizer, "synthetic", "builtin", limit=40, seed=0)
    debiasing = Debiasing(
        model, encoder.tokenizer, Teacher(teach, room=room), text, builtin_tests()[:1],
        layer="all", mode=mode, alpha=0.2, beta=0.8, fidelity=switches,
    )  # fmt: skip
    pairs = debiasing.pairs(8, torch.Generator().manual_seed(0))
    optimizer = SGD(subnetwork.parameters(), lr=1.0)
    for step in range(3):
        pair = next(pairs)  # made on the host, of host arrays
        assert pair[1].to("meta").index.device.type == "cpu"  # the teacher reads it
        with Asks() as asks:
            subnetwork.set_threshold_(cubic(step, 3, 0.0, 0.1))
            losses = debiasing.losses(pair, debiasing.fixed)
            loss = losses["loss"] + subnetwork.penalty()
            subnetwork.openness()
            loss.backward()
            optimizer.step()
        assert asks.found == []
        optimizer.zero_grad()


def test_losses_are_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    states, a = (torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    weights = torch.ones(8)
    exact = orthogonality(states, a[:, :2], weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality(states, a[:, :2], weights), exact)
