"""Measure all parts, or those named; write their figures and one table of all there are."""

import json
import os
import sys
from functools import partial

from tabulate import tabulate

from pruning_bias.environment import ALLOCATION
from pruning_bias.settings import write_atomic

from .differences import measure_differences
from .gpu import measure_gpu
from .growth import measure_growth, measure_scanning
from .lottery import measure_lottery
from .measuring import FOLDER, recorded
from .rate import measure_rate
from .seat import measure_seat
from .steps import measure_steps

PARTS = {
    "heads": partial(measure_steps, heads=True),
    "blocks": partial(measure_steps, heads=False),
    "rate": measure_rate,
    "scanning": measure_scanning,
    "growth": measure_growth,
    "seat": measure_seat,
    "lottery": measure_lottery,
    "differences": measure_differences,
    "gpu": measure_gpu,
}
HEADERS = ["figure", "mark", "", "measured", "ours", "against", "batch", "threads"]


def table() -> str:
    """Every part that was measured, in Markdown."""
    rows, machines, skipped = [], {}, []
    for name in PARTS:
        if not (file := FOLDER / f"{name}.json").is_file():
            continue
        found = json.loads(file.read_text())
        if found["skipped"]:
            skipped.append(f"* {name}: skipped, {found['skipped']}.")
        for f in found["figures"]:
            verdict = {True: "reached", False: "missed", None: ""}[f["reached"]]
            rows.append((f["what"], f["mark"], verdict, f["measured"], f["ours"], f["against"],
                         f["batch"], f["threads"]))  # fmt: skip
        machines.setdefault(_machine(found["machine"]), []).append(
            f"{name} ({found['machine']['cores_busy_elsewhere']:.2f})"
        )
    described = [f"* {', '.join(parts)}: {machine}." for machine, parts in machines.items()]
    return "\n".join([
        "# Speed\n",
        "Made by `make bench`; every figure is a ratio inside one run, on the same sentences "
        "with the packaged encoder, float32 where nothing else is said.\n",
        tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True),
        "\nWhere they come from; in brackets the cores that were busy with something else:\n",
        *described, *skipped, "",
    ])  # fmt: skip


def _machine(found: dict) -> str:
    native = "native" if found["native_bfloat16"] else "no native"
    versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if n != "papermill")
    return (
        f"{found['cpu']}, {found['cores']} cores, {native} bfloat16; Python {found['python']}, "
        f"{versions}; commit {found['commit']}"
    )


def main() -> None:
    """Measure, write, print."""
    wanted = sys.argv[1:] or list(PARTS)
    if wrong := [name for name in wanted if name not in PARTS]:
        sys.exit(f"no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    for name in wanted:
        print(f"measuring {name}", flush=True)
        with recorded(name) as part:
            PARTS[name](part)
    write_atomic(FOLDER / "README.md", table())
    print(f"\n{table()}\nfigures: {FOLDER}")


if __name__ == "__main__":
    if any(name not in os.environ for name in ALLOCATION):  # as every experiment runs
        given = [sys.executable, "-m", "bench", *sys.argv[1:]]
        os.execve(sys.executable, given, ALLOCATION | os.environ)
    main()
