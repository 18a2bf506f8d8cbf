"""Our results become the reference that is committed: `python docs/keep.py PROFILE`.

Of a run all stays but weights, masks and differences of single weights, and, after the first seed,
its notebook.
"""

import json
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def finished(root: Path) -> list[Path]:
    """The finished runs of a profile, by seed; refused if one was made from uncommitted code."""
    runs = sorted(path.parent for path in root.glob("*/*/done.json"))
    if not runs:
        sys.exit(f"no finished runs in {root}: make reproduce PROFILE={root.name} first")
    for run in runs:
        if '-dirty"' in (run / "environment.json").read_text():
            sys.exit(f"{run} was made from uncommitted code: take it away and run it again first")
    return sorted(runs, key=lambda run: parameters(run)["seed"])


def parameters(run: Path) -> dict:
    """What decides the result of a run."""
    return json.loads((run / "parameters.json").read_text())


def keep(profile: str) -> None:
    """Copy what is to be kept; what was kept before goes."""
    ours, theirs = RESULTS / "local" / profile, RESULTS / "reference" / profile
    runs, seen = finished(ours), set()
    shutil.rmtree(theirs, ignore_errors=True)
    for run in runs:
        kind = json.dumps(parameters(run) | {"seed": None})
        leave = ["model", "weight_masks", *(each.name for each in run.glob("subnetwork*"))]
        leave += ["notebook.ipynb"] * (kind in seen)
        seen.add(kind)
        shutil.copytree(run, theirs / run.relative_to(ours), ignore=lambda *_, n=leave: n)
    for made in ("tables", "figures", "reports"):
        shutil.copytree(ours / made, theirs / made, ignore=shutil.ignore_patterns(".*"))
    size = sum(path.stat().st_size for path in theirs.rglob("*") if path.is_file())
    print(f"{len(runs)} runs, {size / 1e6:.1f} MB in {theirs}")


if __name__ == "__main__":
    keep(sys.argv[1] if len(sys.argv) > 1 else "demo")
