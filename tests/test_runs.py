"""Runs under real faults: killed workers, kernels and drivers, failures, full disks, bad input.

Started as a program this file is the driver that one of the tests kills.
"""

import ast
import asyncio
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import nbformat
import psutil
import pytest

from pruning_bias import execution, executors
from pruning_bias.environment import ALLOCATION
from pruning_bias.execution import RunFailed, execute
from pruning_bias.executors import execute_all
from pruning_bias.kernels import NURSERY, nursery
from pruning_bias.notebooks import check_notebook
from pruning_bias.parameters import Run, digest, parameter, parameters, parameters_cell
from pruning_bias.results import load_histories, load_results
from pruning_bias.runs import EXPERIMENTS, BlockMovement, DebiasOnly, HeadMovement, from_parameters
from pruning_bias.settings import project_root

NOTEBOOKS = Path(__file__).parent / "notebooks"


@dataclass(frozen=True, kw_only=True)
class Fault(Run):
    """A run that fails as asked."""

    notebook: ClassVar[str] = str(NOTEBOOKS / "fault.ipynb")

    fault: str = parameter("", "what goes wrong; empty for nothing")
    scratch: str = parameter("", "folder of the log of executions and of the markers")


@dataclass(frozen=True, kw_only=True)
class Untagged(Fault):
    """The same without the tag on its cell."""

    notebook: ClassVar[str] = str(NOTEBOOKS / "untagged.ipynb")


def fault(place: Path, what: str = "", **others: int) -> Fault:
    return Fault(fault=what, scratch=str(place), **others)


def executions(place: Path) -> Counter:
    """How often each run's notebook was begun: (fault, seed) -> times."""
    log = place / "executions.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter((line.split("|")[0], int(line.split("|")[1])) for line in lines)


def names(root: Path) -> list[str]:
    return sorted(each.name for each in root.glob("*/*"))


def until(true, seconds: float = 60) -> None:
    """Wait for something to become true; fail if it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- the dataclasses


@pytest.mark.parametrize("wrong", [
    {"layer": "middle"}, {"mode": "word"}, {"seed": "7"}, {"seed": -1}, {"seed": True},
    {"steps": 0}, {"steps": 2.0}, {"alpha": float("nan")}, {"alpha": "0.2"}, {"device": "gpu"},
    {"mlp": 1}, {"encoder": None}, {"threads": 0}, {"batch_size": 0}, {"sentences": -1},
])  # fmt: skip
def test_a_wrong_value_is_refused_in_a_sentence(wrong):
    with pytest.raises(ValueError) as error:
        HeadMovement(**wrong)
    (name, value), message = next(iter(wrong.items())), str(error.value)
    assert message.startswith(f"HeadMovement: {name} is {value!r}; expected: ")
    assert "\n" not in message


def test_the_choices_are_listed():
    with pytest.raises(ValueError, match="expected: first, last, all, intermediate"):
        DebiasOnly(layer="middle")
    with pytest.raises(ValueError, match="there are DebiasOnly, HeadMovement, BlockMovement"):
        from_parameters("Head", {})
    with pytest.raises(ValueError, match="BlockMovement has no heads; it has encoder, seed, "):
        from_parameters("BlockMovement", {"heads": "tied"})


@pytest.mark.parametrize("experiment", EXPERIMENTS.values())
def test_parameters_make_the_same_run_again(experiment):
    own = {"layer": "all", "alpha": 1}
    run = experiment(seed=5, **{k: v for k, v in own.items() if k in parameters(experiment())})
    assert from_parameters(experiment.__name__, parameters(run)) == run
    assert json.loads(json.dumps(parameters(run))) == parameters(run)


def test_the_digest_names_the_run_and_nothing_else():
    run = HeadMovement(seed=1, alpha=1)
    shuffled = dict(reversed(parameters(run).items()))
    assert digest(run) == digest(from_parameters("HeadMovement", shuffled))
    assert digest(run) == digest(HeadMovement(alpha=1.0, seed=1))
    every = [HeadMovement(), BlockMovement(), DebiasOnly(), HeadMovement(mlp=True), run]
    assert len({digest(each) for each in every}) == len(every)
    assert digest(HeadMovement()) == "990eaa719ddc", "a changed digest orphans everybody's results"


# ---- the notebooks


@pytest.mark.parametrize("experiment", [*EXPERIMENTS.values(), Fault])
def test_papermill_reads_every_parameter_of_the_cell(experiment, tmp_path):
    cell = nbformat.v4.new_code_cell(parameters_cell(experiment), metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    check_notebook(tmp_path / "notebook.ipynb", parameters(experiment()))


def test_parameters_cells_match_the_dataclasses():
    classes = {execution._snake(name): each for name, each in EXPERIMENTS.items()}
    paths = sorted((project_root() / "nbs/experiments").glob("*.ipynb"))
    for path, run_class in [(NOTEBOOKS / "fault.ipynb", Fault)] + [
        (path, classes[path.stem]) for path in paths
    ]:
        cells = nbformat.read(path, as_version=4).cells
        tagged = [each.source for each in cells if "parameters" in each.metadata.get("tags", [])]
        assert tagged == [parameters_cell(run_class)], path.name


@pytest.mark.parametrize(("changed", "says"), [
    ({"sead": 1}, "has no parameter sead; it has encoder, seed"),
    ({"seed": None}, "was not given seed"),
    ({"seed": "1"}, "seed is '1'; expected: int"),
    ({"seed": True}, "seed is True; expected: int"),
    ({"fault": 1}, "fault is 1; expected: str"),
])  # fmt: skip
def test_a_notebook_is_run_with_exactly_its_parameters(changed, says):
    given = {k: v for k, v in (parameters(Fault()) | changed).items() if v is not None}
    with pytest.raises(ValueError, match=says):
        check_notebook(NOTEBOOKS / "fault.ipynb", given)


def test_a_refused_run_writes_nothing_and_is_not_tried_again(tmp_path):
    run = Untagged(scratch=str(tmp_path))
    says = "has 0 cells tagged `parameters`, expected one"
    with pytest.raises(ValueError, match=says):
        execute(run, tmp_path / "results")
    report = execute_all([run], tmp_path / "results", "pool", slots=1, progress=False)
    assert says in report.failed[digest(run)] and not (tmp_path / "results").exists()


def test_a_notebook_that_is_none_is_named(tmp_path):
    for content in (None, "no json", "[]"):
        path = tmp_path / "notebook.ipynb"
        if content:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"notebook\.ipynb cannot be read as a notebook"):
            check_notebook(path, {})


# ---- one run


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, Path]:
    """A results folder with one finished run, and the run's folder."""
    place = tmp_path_factory.mktemp("done")
    return place / "results", execute(fault(place, seed=3, threads=2), place / "results")


def test_a_finished_run_leaves_its_folder_and_is_not_repeated(done):
    root, folder = done
    place = root.parent
    assert names(root) == [folder.name] == [digest(fault(place, seed=3, threads=2))]
    assert sorted(each.name for each in folder.iterdir()) == [
        "done.json", "environment.json", "history.csv", "metrics.json", "notebook.ipynb",
        "parameters.json",
    ]  # fmt: skip
    assert execute(fault(place, seed=3, threads=2), root) == folder
    assert executions(place) == {("", 3): 1}


def test_the_folder_says_what_the_run_was_and_where_it_was_done(done):
    _, folder = done
    facts = json.loads((folder / "parameters.json").read_text())
    assert facts.pop("experiment") == "Fault" and Fault(**facts).seed == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seconds"] > 0 and environment["peak_memory_mib"] > 1
    assert environment["versions"]["papermill"] and environment["cores"] >= 1
    last = nbformat.read(folder / "notebook.ipynb", as_version=4).cells[-1].outputs[0]
    allocation = os.environ.get("GLIBC_TUNABLES", ALLOCATION["GLIBC_TUNABLES"])
    assert ast.literal_eval(last.data["text/plain"]) == ["2", "0", allocation]


def test_results_are_one_row_per_metric_with_the_parameters_beside(done):
    table = load_results(done[0])
    assert list(table.state) == ["before", "after"] and list(table.value) == [3, 3]
    assert set(table.digest) == {done[1].name} and set(table.experiment) == {"Fault"}
    assert set(table.threads) == {2} and (table.seconds > 0).all()
    history = load_histories(done[0])
    assert list(history.loss) == [0.5, 0.25] and set(history.seed) == {3}
    assert load_results(done[0] / "absent").empty and load_histories(done[0] / "absent").empty


@pytest.mark.parametrize("name", ["metrics.json", "parameters.json", "done.json"])
def test_a_broken_folder_is_named(done, tmp_path, name):
    folder = tmp_path / "Fault" / done[1].name
    folder.mkdir(parents=True)
    for file in done[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(load_results(tmp_path)) == 2
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{folder} is broken: {name}"):
        load_results(tmp_path)
    (folder / name).write_bytes((done[1] / name).read_bytes())
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=f"{folder}: metrics.json was changed"):
        load_results(tmp_path)


@pytest.mark.parametrize(("what", "says"), [
    ("raise", "In [4] raised RuntimeError: asked to fail"),
    ("exit", "ended without metrics.json"),
    ("kill kernel", "the kernel died"),
    ("garbage", "JSONDecodeError"),
    ("clash", "has device, names of parameters"),
])  # fmt: skip
def test_a_failed_run_keeps_its_notebook_and_never_counts(tmp_path, what, says):
    root, run = tmp_path / "results", fault(tmp_path, what)
    with pytest.raises(RunFailed, match=re.escape(says)) as error:
        execute(run, root)
    assert "\n" not in str(error.value)
    assert names(root) == [f"{digest(run)}.failed"] and load_results(root).empty
    failed = root / "Fault" / names(root)[0]
    kept = sorted(each.name for each in failed.iterdir())
    assert kept == ["error.txt", "notebook.ipynb", "parameters.json"]
    assert says in (failed / "error.txt").read_text()
    first = nbformat.read(failed / "notebook.ipynb", as_version=4).cells[0].source
    assert "An Exception was encountered" in first or says in first


def test_a_success_removes_the_failure_before_it(tmp_path):
    run = fault(tmp_path, "raise once")
    with pytest.raises(RunFailed):
        execute(run, tmp_path / "results")
    execute(run, tmp_path / "results")
    assert names(tmp_path / "results") == [digest(run)]


def test_of_two_that_finish_the_same_run_the_second_gives_way(tmp_path):
    job = execution.job_of(fault(tmp_path, "wait"), tmp_path / "results")
    both = [start(job, stdout=subprocess.PIPE) for _ in range(2)]
    until(lambda: executions(tmp_path)["wait", 0] == 2)
    (tmp_path / "go").touch()
    assert [each.communicate()[0].strip() for each in both] == [str(job.folder)] * 2
    assert [each.returncode for each in both] == [0, 0]
    assert names(tmp_path / "results") == [job.digest]


def test_what_dead_processes_left_goes_away_and_nothing_else(tmp_path):
    run, host = fault(tmp_path), execution.platform.node()
    child = subprocess.Popen(["true"])
    child.wait()
    kept = [f".{digest(run)}.{host}-{os.getppid()}.tmp", f".{digest(run)}.{host}-2-{child.pid}.tmp"]
    for name in (*kept, f".{digest(run)}.{host}-{child.pid}.tmp"):
        (tmp_path / "results" / "Fault" / name).mkdir(parents=True)
    sockets = tmp_path / "pb-1234"
    sockets.mkdir()
    (tmp_path / "results" / "Fault" / name / "sockets").write_text(str(sockets))
    execute(run, tmp_path / "results")
    assert not sockets.exists()
    assert names(tmp_path / "results") == sorted([*kept, digest(run)])


def test_a_folder_without_done_is_left_alone(tmp_path):
    run = fault(tmp_path)
    mine = tmp_path / "results" / "Fault" / digest(run)
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"):
        execute(run, tmp_path / "results")
    assert (mine / "notes.txt").read_text() == "mine" and not executions(tmp_path)


def test_results_that_cannot_be_written_are_told_at_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    root = tmp_path / "file" / "results"
    with pytest.raises(OSError, match=f"the results folder {root} cannot be written"):
        execute(fault(tmp_path), root)
    assert not executions(tmp_path)


# ---- full disks


def test_a_file_that_cannot_grow_is_a_failure(tmp_path):
    job = execution.job_of(fault(tmp_path, "write too much"), tmp_path / "results")
    worker = start(job, stderr=subprocess.PIPE, preexec_fn=lambda: limit_files(2**20))
    assert "File too large" in worker.communicate()[1] and worker.returncode == 1
    assert names(tmp_path / "results") == [f"{job.digest}.failed"]


def start(job: execution.Job, **options) -> subprocess.Popen:
    """Start one worker."""
    command = [sys.executable, "-m", "pruning_bias.worker", json.dumps(job._asdict())]
    return subprocess.Popen(command, text=True, **options)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["write too much", "fill the disk"])
def test_a_full_disk_leaves_nothing_that_counts(tmp_path, small_disk, what):
    run = fault(tmp_path, what)
    with pytest.raises(RunFailed, match="No space left on device"):
        execute(run, small_disk / "results")
    assert set(names(small_disk / "results")) <= {f"{digest(run)}.failed"}
    assert load_results(small_disk / "results").empty
    again = execute(fault(tmp_path), small_disk / "results")  # there is room again
    assert (again / "done.json").exists()


# ---- many runs: the same faults for both executors

missing = importlib.util.find_spec("ray") is None
no_ray = pytest.mark.skipif(missing, reason="the extra `ray` is not installed")


ONCE = ("raise once", "kill worker once", "kill kernel once")


class Sweep(NamedTuple):
    """What is left of a sweep in which everything went wrong."""

    place: Path
    digests: dict[tuple[str, int], str]  # (fault, seed) -> digest
    report: executors.Report  # of the second driver
    family: int  # processes below the first driver when it was killed
    orphans: list[psutil.Process]  # those of them that did not end
    early: list[str]  # what lay in the results between the two drivers


@pytest.fixture(scope="module", params=["pool", pytest.param("ray", marks=no_ray)])
def sweep(request, tmp_path_factory) -> Sweep:
    """A driver is killed in the middle; the next one meets killed workers and failing runs."""
    place = tmp_path_factory.mktemp(request.param)
    quick, slow = fault(place), fault(place, "wait")
    driver = drive(place, request.param, quick, slow)
    done = place / "results" / "Fault" / digest(quick) / "done.json"
    until(lambda: done.exists() and executions(place)["wait", 0] == 1)
    family = workers(driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    orphans = remaining(family)
    early = [name for name in names(place / "results") if not name.startswith(".")]
    (place / "go").touch()
    faults = ["raise", *ONCE, *(["kill ray worker once"] if request.param == "ray" else [])]
    listed = [quick, slow, *(fault(place, what) for what in faults), slow, fault(place, seed=1)]
    report = execute_all(listed, place / "results", request.param, 3, 1, progress=False)
    digests = {(run.fault, run.seed): digest(run) for run in listed}
    return Sweep(place, digests, report, len(family), orphans, early)


def workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """All processes below a driver, but two of Ray's own that take a minute to notice its end."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in family if not re.search("ray::.*Agent", " ".join(each.cmdline()))]


def remaining(family: list[psutil.Process], seconds: float = 30) -> list[psutil.Process]:
    """Those of the processes that have not ended by themselves after a while."""
    end = time.monotonic() + seconds
    while (left := [each for each in family if lives(each)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_driver_takes_its_workers_and_kernels_along(sweep):
    assert sweep.family >= 2 and not sweep.orphans


def test_a_killed_driver_leaves_what_was_finished_and_the_next_one_carries_on(sweep):
    assert sweep.early == [sweep.digests["", 0]]
    assert [path.name for path in sweep.report.skipped] == sweep.early
    assert executions(sweep.place)["", 0] == 1 and executions(sweep.place)["wait", 0] == 2


def test_a_run_that_fails_or_is_killed_once_is_tried_again(sweep):
    again = [each for each in sweep.digests if each[0].endswith("once")]
    assert len(again) >= len(ONCE)
    assert all(executions(sweep.place)[each] == 2 for each in again)
    assert {path.name for path in sweep.report.finished} == {
        sweep.digests[each] for each in [("wait", 0), ("", 1), *again]
    }
    assert all((path / "done.json").exists() for path in sweep.report.finished)


def test_a_run_that_always_fails_is_reported_and_the_others_finish(sweep):
    failed = sweep.digests["raise", 0]
    assert set(sweep.report.failed) == {failed} and executions(sweep.place)["raise", 0] == 2
    assert "In [4] raised RuntimeError: asked to fail; see " in sweep.report.failed[failed]
    assert (sweep.place / f"results/Fault/{failed}.failed/notebook.ipynb").exists()


def test_only_finished_and_failed_runs_remain(sweep):
    failed = sweep.digests["raise", 0]
    rest = set(sweep.digests.values()) - {failed}
    assert set(names(sweep.place / "results")) == rest | {f"{failed}.failed"}
    assert set(load_results(sweep.place / "results").digest) == rest


def test_an_interrupted_driver_ends_its_workers_and_they_tidy_up(tmp_path):
    driver = drive(tmp_path, "pool", fault(tmp_path, "wait"))
    until(lambda: executions(tmp_path)["wait", 0] == 1)
    family = workers(driver)
    driver.send_signal(signal.SIGINT)
    driver.wait(30)
    assert len(family) >= 2 and not remaining(family) and not names(tmp_path / "results")


def test_a_running_run_says_how_far_it_is(tmp_path):
    job = execution.job_of(HeadMovement(), tmp_path)
    running = job.folder.with_name(f".{job.digest}.host-1.tmp")
    running.mkdir(parents=True)
    (running / "progress").write_text("120 200")
    now = time.time()
    assert executors._notes([job], now - 60) == f"HeadMovement {job.digest[:4]} 120/200"
    assert executors._notes([job], now + 60) == ""  # left by a driver that was killed


def test_a_run_waits_for_those_it_names_and_for_no_other(tmp_path):
    first, second = (execution.job_of(HeadMovement(seed=i), tmp_path) for i in (0, 1))
    name = f"run:HeadMovement/{first.digest}"
    after = execution.job_of(HeadMovement(encoder=name), tmp_path)
    turns = executors._Turns([after, second, first])
    assert turns.ready() == [second, first]
    assert turns.ready(second) == []
    assert turns.ready(first) == [after] and turns.ready(after) == []


# ---- forked kernels


@pytest.fixture(scope="module")
def ready() -> Iterator[tuple[psutil.Process, str]]:
    """A nursery that is ready, and its place."""
    with nursery(execution.kernel_environment(1)) as near:
        until(Path(near[NURSERY]).exists)
        (found,) = (p for p in psutil.Process().children() if "--nursery" in p.cmdline())
        yield found, near[NURSERY]
    assert not remaining([found], 5) and not Path(near[NURSERY]).parent.exists()


@pytest.fixture
def nurse(ready, monkeypatch) -> psutil.Process:
    """What this process starts asks a nursery for kernels."""
    monkeypatch.setenv(NURSERY, ready[1])
    return ready[0]


def parents(place: Path) -> list[int]:
    """The processes that the kernels came from."""
    return [int(line.split("|")[3]) for line in (place / "executions.log").read_text().splitlines()]


def test_a_forked_kernel_finds_what_one_of_its_own_finds(nurse, tmp_path, monkeypatch):
    run = DebiasOnly(seed=3, steps=2)
    forked = execute(run, tmp_path / "forked")
    monkeypatch.delenv(NURSERY)
    own = execute(run, tmp_path / "own")
    for name in ("metrics.json", "history.csv"):
        assert (forked / name).read_bytes() == (own / name).read_bytes()
    facts = [json.loads((each / "environment.json").read_text()) for each in (forked, own)]
    assert 0.5 < facts[0].pop("peak_memory_mib") / facts[1].pop("peak_memory_mib") < 2
    assert all(isinstance(each.pop("seconds"), float) for each in facts) and facts[0] == facts[1]
    pictures = [(each / "notebook.ipynb").read_text().count("image/png") for each in (forked, own)]
    assert pictures[0] == pictures[1] > 0


def test_every_forked_kernel_has_the_environment_that_its_worker_gives_it(nurse, tmp_path):
    folders = [execute(fault(tmp_path, seed=seed), tmp_path / "results") for seed in (0, 1)]
    assert all((folder / "done.json").exists() for folder in folders)
    assert parents(tmp_path) == [nurse.pid] * 2
    drawn = [line.split("|")[4] for line in (tmp_path / "executions.log").read_text().splitlines()]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("what", ["kill kernel", "raise"])
def test_a_forked_kernel_that_dies_or_raises_is_a_run_that_failed(what, nurse, tmp_path):
    message = {"kill kernel": "the kernel died", "raise": "RuntimeError: asked to fail"}[what]
    with pytest.raises(RunFailed, match=message):
        execute(fault(tmp_path, what), tmp_path / "results")
    assert parents(tmp_path) == [nurse.pid]


def test_a_killed_worker_takes_its_forked_kernel_along(nurse, tmp_path):
    driver = drive(tmp_path, "pool", fault(tmp_path, "wait"))
    until(lambda: executions(tmp_path)["wait", 0] == 1)
    (kernel,) = nurse.children()
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert parents(tmp_path) == [nurse.pid] and not remaining([kernel])


def test_an_interrupt_reaches_a_forked_kernel(nurse, tmp_path):
    async def ask() -> str:
        manager = execution._kernel(str(tmp_path), tmp_path, 1)()
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready()
        (kernel,) = nurse.children()
        client.execute("import time; print('begun', flush=True); time.sleep(600)")
        while (await client.get_iopub_msg(timeout=30))["msg_type"] != "stream":
            pass
        await manager.interrupt_kernel()
        reply = await client.get_shell_msg(timeout=30)
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
        assert not remaining([kernel])
        return reply["content"]["ename"]

    assert asyncio.run(ask()) == "KeyboardInterrupt"


def test_without_a_nursery_that_answers_a_kernel_starts_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv(NURSERY, str(tmp_path / "nobody"))
    assert (execute(fault(tmp_path), tmp_path / "results") / "done.json").exists()
    assert parents(tmp_path) == [os.getpid()]


def test_a_nursery_ends_with_the_process_that_opened_it(tmp_path):
    code = (
        "import time\nfrom pruning_bias.kernels import nursery\n"
        "with nursery({}) as near:\n    print(*near.values(), flush=True)\n    time.sleep(600)"
    )
    opener = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    place = Path(opener.stdout.readline().strip())
    family = psutil.Process(opener.pid).children()
    opener.kill()
    opener.wait()
    assert len(family) == 1 and not remaining(family) and not place.parent.exists()


def test_kernels_are_forked_where_that_is_safe_and_pays(tmp_path):
    cpu, other, gpu, wide = (
        execution.job_of(fault(tmp_path, **own), None)
        for own in ({}, {"seed": 1}, {"device": "cuda:0"}, {"threads": 2})
    )
    asked = {
        "more runs than slots": ([cpu, other], [{}]),
        "all at once": ([cpu, other], [{}, {}]),
        "a GPU": ([cpu, gpu], [{}]),
        "GPUs": ([cpu, other], [{"CUDA_VISIBLE_DEVICES": "0"}]),
        "threads differ": ([cpu, wide], [{}]),
        "Ray": ([cpu, other], []),
    }
    forked = []
    for name, case in asked.items():
        with executors._nursery(*case) as near:
            forked += [name] * bool(near)
    assert forked == ["more runs than slots"]


# ---- where runs go


def test_a_gpu_is_a_slot_and_a_share_of_one_is_a_slot(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    gpu, cpu = (
        execution.job_of(fault(tmp_path, device=device), None) for device in ("cuda", "cpu")
    )
    seen = [slot["CUDA_VISIBLE_DEVICES"] for slot in executors._slots([gpu, cpu], 0, 0.5)]
    assert seen == ["4", "7", "4", "7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in executors._slots([gpu], 0, 1.0)] == ["4", "7"]
    assert len(executors._slots([gpu], 3, 1.0)) == 3 and executors._slots([cpu], 2, 1.0) == [{}, {}]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory) -> Path:
    """Two runs on two GPUs (that are none), done by a driver of their own."""
    place = tmp_path_factory.mktemp("pinned")
    both = [fault(place, seed=seed, device="cuda") for seed in (0, 1)]
    driver = drive(place, "pool", *both, env=os.environ | {"CUDA_VISIBLE_DEVICES": "4,7"})
    assert driver.wait(60) == 0
    return place


def test_runs_on_gpus_see_one_each(pinned):
    lines = (pinned / "executions.log").read_text().splitlines()
    assert sorted(line.split("|")[2] for line in lines) == ["4", "7"]


def test_each_run_is_told_as_it_ends(pinned):
    told = (pinned / "report.txt").read_text()
    assert "2/2" in told
    for seed in (0, 1):
        run = fault(pinned, seed=seed, device="cuda")
        assert re.search(rf"^Fault {digest(run)} seed={seed} [\d.]+ s$", told, re.M)


def test_ray_is_asked_for_a_share_of_a_gpu(tmp_path):
    has = {"CPU": 8.0, "GPU": 1.0}
    devices = ("cuda", "auto", "cpu", "cuda:1")
    jobs = {each: execution.job_of(fault(tmp_path, device=each), None) for each in devices}
    assert executors._needs(jobs["cuda"], has, 0.5) == {"num_cpus": 1, "num_gpus": 0.5}
    assert executors._needs(jobs["auto"], {"CPU": 8.0}, 0.5)["num_gpus"] == 0
    assert executors._needs(jobs["cpu"], has, 0.5)["num_gpus"] == 0
    with pytest.raises(ValueError, match="Ray chooses the GPU; expected cuda"):
        executors._needs(jobs["cuda:1"], has, 1.0)
    with pytest.raises(ValueError, match="all of Ray has"):
        executors._needs(jobs["cuda"], {"CPU": 8.0}, 1.0)


def test_a_missing_ray_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray\]'"):
        execute_all([fault(tmp_path)], tmp_path / "results", "ray", progress=False)
    with pytest.raises(ValueError, match="executor is 'slurm'; expected: pool or ray"):
        execute_all([fault(tmp_path)], tmp_path / "results", "slurm")


# ---- the driver


def drive(place: Path, executor: str, *listed: Fault, **options) -> subprocess.Popen:
    """Start the runs from a process of their own."""
    (place / "list.json").write_text(json.dumps([parameters(run) for run in listed]))
    command = [sys.executable, __file__, executor, str(place)]
    with open(place / "report.txt", "w") as report:
        return subprocess.Popen(command, stdout=report, stderr=report, **options)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    where = Path(sys.argv[2])
    these = [Fault(**each) for each in json.loads((where / "list.json").read_text())]
    outcome = execute_all(these, where / "results", sys.argv[1], slots=2, retries=0)
    print(*outcome.failed.values(), sep="\n")
    sys.exit(1 if outcome.failed else 0)
