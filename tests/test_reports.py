"""Tables, verdicts and figures from results whose numbers are known."""

import csv
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from pruning_bias import reports
from pruning_bias.runs import (
    BlockMovement,
    DebiasOnly,
    HeadMovement,
    Movement,
    digest,
    load_histories,
    load_results,
    parameters,
)

Measured = dict[str, float]  # a test's name, bias or drift -> value
DENSE = {"builtin-6": 1.4, "builtin-7": 0.3, "bias": 20.0, "drift": 0.0}


def rows(state: str, measured: Measured, draw: int = 0, p: float = 0.01) -> list[dict[str, Any]]:
    """Rows of metrics.json."""
    return [
        {"state": state, "draw": draw}
        | (
            {"metric": name, "value": value}
            if name in ("bias", "drift", "closed", "groups", "density")
            else {"metric": "effect_size", "test": name, "value": value, "p_value": p}
        )
        for name, value in measured.items()
    ]


def leave_run(
    root: Path,
    run: Movement,
    after: Measured,
    random: Iterable[Measured] = (),
    keep: dict[str, np.ndarray] | None = None,
    p: float = 0.2,
    seconds: float = 10.0,
) -> Path:
    """A finished run's folder, as `execute` leaves it."""
    folder = root / type(run).__name__ / digest(run)
    folder.mkdir(parents=True)
    metrics = rows("before", DENSE) + rows("after", after, p=p)
    if keep:
        groups = sum(each.size for each in keep.values())
        closed = sum(int((~each).sum()) for each in keep.values())
        counts = {"closed": closed, "groups": groups, "density": 1 - closed / groups}
        metrics += rows("after", counts)
        save_file({f"{k}.keep": v for k, v in keep.items()}, folder / "masks.safetensors")
    for draw, measured in enumerate(random):
        metrics += rows("random", measured, draw)
    text = json.dumps(metrics)
    facts = {"experiment": type(run).__name__, **parameters(run)}
    files = {
        "metrics.json": text,
        "parameters.json": json.dumps(facts),
        "environment.json": json.dumps({"seconds": seconds}),
        "done.json": json.dumps({"metrics.json": hashlib.sha256(text.encode()).hexdigest()}),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "threshold", "loss", "bias", "drift", "open"])
        for step in range(5):
            share = step / 4
            bias = DENSE["bias"] + share * (after["bias"] - DENSE["bias"])
            writer.writerow([step, 0.1 * share, 4, bias, share * after["drift"], 1])
    return folder


def measured(six: float, seven: float, bias: float, drift: float) -> Measured:
    """What one state of one run measures."""
    return {"builtin-6": six, "builtin-7": seven, "bias": bias, "drift": drift}


def heads(*closed: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks of 2 layers with 4 value heads, all open but these (layer, head)."""
    keep = {f"{layer}/value": np.ones((4, 1), bool) for layer in range(2)}
    for layer, head in closed:
        keep[f"{layer}/value"][head] = False
    return keep


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of heads that help on test 6, of blocks that do not, of a model torn apart."""
    root = tmp_path / "results"
    control = [measured(1.4, 0.3, 19.0, 2.0), measured(1.3, 0.3, 19.0, 3.0)]
    for seed, six in enumerate((0.8, 0.9, 1.0)):
        leave_run(
            root,
            HeadMovement(seed=seed),
            measured(six, 0.9 + 0.01 * seed, 10.0, 1.0 + seed / 2),
            control,
            heads((0, 1), (1, seed)),
            p=(0.01, 0.02, 0.3)[seed],
            seconds=10 + seed,
        )
        blocks = {f"{i}/{part}": np.ones((2, 2), bool) for i in (0, 1) for part in ("query", "ffn")}
        blocks["1/query"][0, 0] = False
        same = measured(1.38, 0.31, 19.0, 20.0)
        leave_run(root, BlockMovement(seed=seed), same, control, blocks)
    leave_run(root, DebiasOnly(), measured(0.2, 0.31, 1.0, 500.0))
    return root
