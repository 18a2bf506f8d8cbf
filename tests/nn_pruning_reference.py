"""nn_pruning 0.1.2, the engine of 2022, as tests and the benchmark call it; no test module.

It is loaded from its own source with one line of it mended, and put on a BERT the way the
published code did: blocks of query, key and value, the same blocks transposed in the attention's
output, one score per feed-forward unit, no least number of open groups, biases masked.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import BertModel

PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "ffn",
}


@cache
def masked_nn() -> ModuleType:
    """Its masks; Python 3.11 refuses the default of one dataclass field, so that is mended."""
    name = "nn_pruning.modules.masked_nn"
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text(encoding="utf-8")
    source = source.replace("import dataclass\n", "import dataclass, field\n", 1)
    source = source.replace("= InitDirective()", "= field(default_factory=InitDirective)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    return module


@cache
def patch_coordinator() -> ModuleType:
    """Its patching, schedule and penalty, once its masks can be imported."""
    masked_nn()
    return importlib.import_module("nn_pruning.patch_coordinator")


class Host(nn.Module):
    """What it expects around an encoder: its name patterns begin with `bert.`"""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert, self.config = bert, bert.config

    def forward(self, **inputs: Any) -> Any:
        """The encoder's output."""
        return self.bert(**inputs)


@dataclass(frozen=True)
class Patched:
    """A BERT whose linear maps are nn_pruning's."""

    host: Host
    coordinator: Any  # its ModelPatchingCoordinator

    def scores(self) -> dict[str, nn.Parameter]:
        """Mask scores under the names of our gates: 0/query, ..., 0/ffn."""
        found = {}
        for name, parameter in self.host.named_parameters():  # a shared one comes once
            if name.endswith("mask_scores"):
                layer, part = name.removeprefix("bert.encoder.layer.").split(".", 1)
                found[f"{layer}/{PARTS[part.split('.mask_module')[0]]}"] = parameter
        return found

    def schedule_(self, step: int, total: int, warmup_steps: int = -1) -> float:
        """Set the threshold of a training step; -1 is the warm-up that the published code left."""
        self.coordinator.schedule_threshold(step, total, warmup_steps, training=True)
        return self.threshold

    def finish_(self) -> float:
        """Set the final threshold, which evaluation used from the first step on."""
        self.coordinator.schedule_threshold(training=False)
        return self.threshold

    @property
    def threshold(self) -> float:
        """The threshold of the next forward."""
        return self.coordinator.patcher_context.get_context_data("threshold")

    def set_threshold_(self, threshold: float) -> None:
        """Set it by hand: for topK it is the share that stays open."""
        self.coordinator.patcher_context.set_context_data("threshold", threshold)

    def penalty(self) -> Tensor:
        """L1 or L0 of the scores, as the published code added it; needs a forward before."""
        return self.coordinator.regularization_loss(self.host)[0]


def patch_(
    model: BertModel,  # changed in place
    rows: int,  # of a block of query, key or value
    cols: int,
    method: str = "sigmoied_threshold",  # its own spelling; threshold, topK, l0 or magnitude
    ffn: bool = True,
    **settings: Any,  # any of its SparseTrainingArguments
) -> Patched:
    """Put nn_pruning on a BERT as the published code did, at the final threshold."""
    theirs = patch_coordinator()
    published = {
        "attention_pruning_method": method,
        "dense_pruning_method": f"{method}:1d_alt" if ffn else "disabled",
        "attention_output_with_dense": False,
        "attention_block_rows": rows,
        "attention_block_cols": cols,
        "initial_threshold": 0.0,
        "final_threshold": 0.1,
        "initial_warmup": 1,
        "final_warmup": 10,
        "regularization": "l1",
        "linear_min_parameters": 0,
    }
    arguments = theirs.SparseTrainingArguments(**(published | settings))
    coordinator = theirs.ModelPatchingCoordinator(arguments, "cpu", None, ["logits"], None)
    host = Host(model)
    coordinator.patch_model(host)
    patched = Patched(host.train(model.training), coordinator)
    patched.finish_()
    return patched
