"""One command: it prints, it does nothing twice, and what is committed says what it claims."""

from pathlib import Path

import pytest

from pruning_bias import reproduce as command
from pruning_bias.averages import main_runs, movement_runs
from pruning_bias.conclusions import verdicts
from pruning_bias.results import load_results
from pruning_bias.runs import DebiasOnly, HeadMovement
from pruning_bias.settings import Settings, load_settings, project_root


def test_the_command_prints_a_table_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = Settings(**{**load_settings().model_dump(), "results": str(tmp_path)})
    runs = [HeadMovement(mask_learning_rate=1.0, steps=8), DebiasOnly()]
    monkeypatch.setitem(command.PROFILES, ("movement", "tiny"), lambda settings: runs)
    assert command.reproduce("movement", "tiny", settings) == 0
    first = capsys.readouterr().out
    for name in ("tables/movement.md", "figures/training.png", "reports/movement.ipynb"):
        assert (tmp_path / "tiny" / name).is_file()
    assert "heads (value), last/token" in first and str(tmp_path / "tiny" / "tables") in first
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    report = (tmp_path / "tiny" / "reports" / "movement.ipynb").stat().st_mtime_ns
    assert command.reproduce("movement", "tiny", settings) == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")} == stamps
    assert (tmp_path / "tiny" / "reports" / "movement.ipynb").stat().st_mtime_ns == report


def test_a_missing_corpus_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**{**load_settings().model_dump(), "results": str(tmp_path / "results")})
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path / "nothing"))
    runs = [HeadMovement(corpus="corpora/mine.txt.gz")]
    monkeypatch.setitem(command.PROFILES, ("movement", "mine"), lambda settings: runs)
    with pytest.raises(
        ValueError, match=r"no corpus at 'corpora/mine.txt.gz', nor in the data folder"
    ):
        command.reproduce("movement", "mine", settings)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("profile", "test"), [("demo", "builtin-6"), ("small", "SEAT-6")])
def test_bias_moves_in_what_is_committed(profile: str, test: str) -> None:
    """A third of test 6 or more, beyond chance, over three seeds, drift below the controls'."""
    kept = load_results(project_root() / "results" / "reference" / profile)
    frame = main_runs(movement_runs(kept))
    found = verdicts(frame)
    six = found[(found.test == test) & (found.draws > 0) & (found.n >= 3)]
    helped = six[(six.fall >= six.before.abs() / 3) & (six.gain > 0)]
    assert len(helped) >= 1
    drift = frame[(frame.metric == "drift") & (frame.experiment == "HeadMovement")]
    states = drift.groupby("state")["value"].mean()
    assert states["after"] < states["random"]
