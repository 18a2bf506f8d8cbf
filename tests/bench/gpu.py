"""On a GPU: sentences per second and the share of its bfloat16 matrix rate, BERT-base size."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch.optim import AdamW
from transformers import BertConfig, BertModel

from pruning_bias.debias import Teacher, debias_loss, hidden_states
from pruning_bias.encoding import Batch
from pruning_bias.gates import ThresholdGate
from pruning_bias.plans import head_plan
from pruning_bias.subnetworks import attach_

from .measuring import Figure, Part
from .rate import operations

SIZE, LENGTH, STEPS = 256, 32, 30


def timed(way: Callable[[], object], steps: int) -> float:  # seconds per call
    """Time many calls between two synchronisations; a few calls before them warm up."""
    for _ in range(5):
        way()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        way()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def drawn(first: int) -> Batch:
    """A batch of random word pieces on the GPU."""
    generator, shape = torch.Generator().manual_seed(first), (SIZE, LENGTH)
    ids = torch.randint(1000, 30000, shape, generator=generator)
    batch = Batch(ids, torch.ones_like(ids), torch.ones(shape), torch.arange(SIZE) + first)
    return batch.to("cuda")


def steady_step(compiled: bool) -> Callable[[], None]:
    """A frozen step on value heads whose sentences the teacher knows."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).cuda().eval().requires_grad_(False)
    subnetwork = attach_(model, head_plan(model), lambda _, shape: ThresholdGate(shape))
    optimizer = AdamW(subnetwork.parameters(), lr=0.01, weight_decay=0, fused=True)
    targets, attributes, a = drawn(0), drawn(SIZE), torch.randn(1, 2, 768, device="cuda")

    def teach(batch):
        with subnetwork.off():
            return hidden_states(model, batch)

    teacher = Teacher(teach)
    with torch.autocast("cuda", torch.bfloat16):
        teacher(attributes)
    if compiled:
        model.compile(dynamic=False)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = debias_loss(model, teacher, targets, attributes, a, layer="last", mode="token")
            loss = losses["loss"] + subnetwork.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure_gpu(part: Part) -> None:
    """With and without torch.compile."""
    if not torch.cuda.is_available():
        part.skipped = "torch sees no GPU"
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / timed(lambda: torch.mm(a, b), 20)
    asked = operations(np.full(2 * SIZE, LENGTH), 768, 3072, 12)
    part.numbers = {"gpu": torch.cuda.get_device_name(), "product_rate": rate}
    for name, compiled in (("as it is", False), ("with torch.compile", True)):
        seconds = timed(steady_step(compiled), STEPS)
        own = asked / seconds
        part.numbers[name] = {"seconds_per_step": seconds, "step_rate": own}
        part.figures.append(
            Figure(f"GPU, BERT-base, {LENGTH} pieces, value heads, {name}",
                   f"{own / rate:.2f} of the rate",
                   f"{own / 1e12:.0f} TFLOP/s, {2 * SIZE / seconds:.0f} sentences a second",
                   f"{rate / 1e12:.0f} TFLOP/s: torch.mm in bfloat16", f"{SIZE} + {SIZE}",
                   torch.get_num_threads(), ">= 0.4", own >= 0.4 * rate)
        )  # fmt: skip
