"""What several test modules do: a run's notebook in this process, the density of gates."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat

from pruning_bias.execution import job_of
from pruning_bias.parameters import Run, parameters
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


def density(subnetwork: Subnetwork) -> float:
    """Open weights of the gated matrices over all their weights."""
    kept = total = 0
    for name, keep in subnetwork.keep().items():
        for site in subnetwork.plan[name]:
            size = site.grid.rows * site.grid.cols
            kept, total = kept + int(keep.sum()) * size, total + keep.numel() * size
    return kept / total
