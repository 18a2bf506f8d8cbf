"""The settings file, the project's folders, downloads, and files that are whole or absent."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pruning_bias import settings
from pruning_bias.settings import (
    Settings,
    data_folder,
    fetch,
    file_sha256,
    find_data,
    load_settings,
    project_root,
    report_progress,
    write_atomic,
)


def ini(folder: Path, text: str) -> Path:
    path = folder / "settings.ini"
    path.write_text(text)
    return path


def test_the_committed_file_holds_the_defaults_and_explains_each_key():
    lines = (project_root() / "settings.ini").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+ =", line)]
    assert [lines[i].split(" =")[0] for i in keys] == list(Settings.model_fields)
    assert all(lines[i - 1].startswith("#") for i in keys)
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("executor = slurm", "executor is 'slurm'; expected: 'pool' or 'ray'"),
        ("threads = 0", "threads is '0'; expected: greater than or equal to 1"),
        ("threads = 1  # one", "threads is '1  # one'; expected: a valid integer"),
        ("gpus_per_run = 0", "gpus_per_run is '0'; expected: greater than 0"),
        ("gpus_per_run = inf", "gpus_per_run is 'inf'; expected: a finite number"),
        ("seeds = 1, 2", "seeds is '1, 2'; expected: whole numbers"),
        ("seeds =", "seeds is ''; expected: whole numbers"),
        ("device = gpu", "device is 'gpu'; expected: auto, cpu, cuda or cuda:N"),
        ("results =", "results is ''; expected: "),
        ("sedes = 1", "unknown key 'sedes'; the keys are results, data"),
        ("seeds", "cannot be read"),
        ("seeds = 1\nseeds = 2", "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_file_key_and_what_was_expected(tmp_path, line, says):
    path = ini(tmp_path, f"[pruning_bias]\n{line}\n")
    with pytest.raises(ValueError) as error:
        load_settings(path)
    assert str(error.value).startswith(f"{path}")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_the_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no section \[pruning_bias\]"):
        load_settings(ini(tmp_path, "[DEFAULT]\nlib_name = other\n"))


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().seeds = (1,)


def test_the_project_is_found_from_below_and_from_elsewhere(tmp_path, monkeypatch):
    here = project_root()
    monkeypatch.chdir(here / "nbs")
    assert project_root() == here
    (tmp_path / "nbs").mkdir()
    ini(tmp_path, "[DEFAULT]\n")  # an older nbdev project has this file too, and is not ours
    monkeypatch.chdir(tmp_path)
    assert project_root() == here


def test_without_a_project_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "settings.py"))
    with pytest.raises(FileNotFoundError, match="work inside a clone of the project"):
        project_root()


def test_the_environment_names_the_data_folder_before_the_file(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    ini(tmp_path, "[pruning_bias]\ndata = texts\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNING_BIAS_DATA", raising=False)
    assert data_folder() == tmp_path / "texts"
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path / "other"))
    assert data_folder() == tmp_path / "other"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine: its address, its folder and the requests it answered."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()
    (folder / "tiny.txt").write_text("she is an engineer\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("PRUNING_BIAS_DATA", str(tmp_path / "data"))
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    server.server_close()


def test_a_file_is_downloaded_once_and_its_hash_recorded(site):
    address, folder, asked = site
    assert find_data("texts/tiny.txt") is None
    path, again = (fetch("texts/tiny.txt", f"{address}/tiny.txt") for _ in range(2))
    assert path == again == data_folder() / "texts/tiny.txt"
    assert path.read_bytes() == (folder / "tiny.txt").read_bytes() and len(asked) == 1
    recorded = json.loads((data_folder() / "hashes.json").read_text())
    assert recorded == {"texts/tiny.txt": file_sha256(path)}


def test_a_file_that_changed_since_its_first_download_is_refused(site):
    address, folder, _ = site
    path = fetch("tiny.txt", f"{address}/tiny.txt")
    path.write_text("changed")
    with pytest.raises(ValueError, match=r"has sha256 .* expected .*: move it away"):
        find_data("tiny.txt")
    path.unlink()
    (folder / "tiny.txt").write_text("changed at its source")
    with pytest.raises(ValueError, match="cannot be had"):
        fetch("tiny.txt", f"{address}/tiny.txt")
    assert [each.name for each in data_folder().iterdir()] == ["hashes.json"]


def test_a_download_with_a_wrong_hash_leaves_nothing(site):
    address, _, _ = site
    with pytest.raises(ValueError, match=r"tiny\.txt cannot be had: .*hash"):
        fetch("tiny.txt", f"{address}/tiny.txt", sha256="0" * 64)
    assert list(data_folder().iterdir()) == []


def test_a_file_of_ones_own_is_used_without_the_network(site):
    address, folder, asked = site
    data_folder().mkdir()
    (data_folder() / "tiny.txt").write_bytes((folder / "tiny.txt").read_bytes())
    known = file_sha256(folder / "tiny.txt")
    assert fetch("tiny.txt", f"{address}/tiny.txt", known) == find_data("tiny.txt") and not asked


def test_what_cannot_be_downloaded_is_told_with_the_way_out(site):
    address, _, _ = site
    with pytest.raises(OSError, match=r"absent\.txt cannot be had: .*PRUNING_BIAS_DATA"):
        fetch("absent.txt", f"{address}/absent.txt")
    assert list(data_folder().iterdir()) == []


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = write_atomic(tmp_path / "note.txt", "old")
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["note.txt"] and path.read_text() == "old"


def test_progress_is_written_in_a_run_only_and_not_at_every_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNING_BIAS_RUN_FOLDER", raising=False)
    report_progress(1, 9)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PRUNING_BIAS_RUN_FOLDER", str(tmp_path))
    monkeypatch.setitem(settings._reported, "at", -1.0)
    clock = iter((10.0, 10.1, 11.0))
    monkeypatch.setattr(settings.time, "monotonic", lambda: next(clock))
    seen = []
    for step in (2, 3, 4):
        report_progress(step, 9)
        seen.append((tmp_path / "progress").read_text())
    assert seen == ["2 9", "2 9", "4 9"]


def test_settings_and_runs_load_without_the_heavy_libraries():
    code = "import sys, pruning_bias.runs; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "transformers", "papermill", "pandas", "ray"} & set(loaded)
