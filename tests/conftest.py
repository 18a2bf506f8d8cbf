"""What several test modules share: the packaged encoder, the data folder, the golden figures."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pruning_bias.anatomy import Encoder, load_encoder


@pytest.fixture(scope="session")
def packaged() -> Encoder:
    """The packaged encoder in float32; whoever puts gates on it takes them off again."""
    return load_encoder("packaged")


@pytest.fixture(scope="session")
def packaged64() -> Encoder:
    """The packaged encoder in float64, under the same condition."""
    encoder = load_encoder("packaged")
    encoder.model.double()
    return encoder


@pytest.fixture
def shared_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the published word lists and SEAT files; skips where there is none."""
    named = os.environ.get("PRUNING_BIAS_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "words" / "male.txt").is_file():
        pytest.skip(f"no published word lists in {folder}; PRUNING_BIAS_DATA may name their folder")
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Reads figures that the papers' own code gave, by the name of their file."""

    def read(name: str) -> dict[str, Any]:
        with gzip.open(Path(__file__).parent / "golden" / f"{name}.json.gz", "rt") as file:
            return json.load(file)

    return read
