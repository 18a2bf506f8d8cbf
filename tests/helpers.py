"""What several test modules do: a run's notebook in this process, the density of gates."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from pruning_bias.execution import job_of
from pruning_bias.parameters import Run, digest, parameters
from pruning_bias.results import check_left
from pruning_bias.settings import file_sha256
from pruning_bias.subnetworks import Subnetwork

matplotlib.use("Agg")


def in_process(run: Run) -> dict[str, Any]:
    """The names a run's notebook ends with; its cells are run here, where torch is imported."""
    path = Path(job_of(run, None).notebook)
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, path.stem, "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(parameters(run))
    plt.close("all")
    return names


def finished_in_process(
    run: Run,
    root: Path,  # of the results
) -> Path:  # the folder of the finished run
    """As `execute` would leave it, but for the notebook, and without a kernel of its own."""
    name = f"{type(run).__name__}/{digest(run)}"
    folder = root / type(run).__name__ / f".{digest(run)}.host-1.tmp"
    folder.mkdir(parents=True)
    facts = {"experiment": type(run).__name__, **parameters(run)}
    (folder / "parameters.json").write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_BIAS_RUN_FOLDER", str(folder))
        in_process(run)
    check_left(folder, parameters(run))
    about = json.loads((folder / "environment.json").read_text()) | {"seconds": 1.0}
    (folder / "environment.json").write_text(json.dumps(about))
    done = {"metrics.json": file_sha256(folder / "metrics.json")}
    (folder / "done.json").write_text(json.dumps(done))
    return folder.rename(root / name)


def density(subnetwork: Subnetwork) -> float:
    """Open weights of the gated matrices over all their weights."""
    kept = total = 0
    for name, keep in subnetwork.keep().items():
        for site in subnetwork.plan[name]:
            size = site.grid.rows * site.grid.cols
            kept, total = kept + int(keep.sum()) * size, total + keep.numel() * size
    return kept / total


def small_encoder(
    family: str = "bert", layers: int = 2, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A random encoder in float64, 3 heads of 4, large weights, biases that are not zero."""
    shape = {"vocab_size": 50, "hidden_size": 12, "embedding_size": 12, "intermediate_size": 10}
    shape |= {"num_attention_heads": 3, "num_hidden_layers": layers, "max_position_embeddings": 40}
    config = AutoConfig.for_model(family, **shape | fields)
    if family == "distilbert":
        config.hidden_dim = 10
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.4 * torch.randn_like(parameter)
    return model.double().eval()
