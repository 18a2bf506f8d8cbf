"""The site: `python docs/build.py [FOLDER]`, by default _docs. Any warning is an error."""

import shutil
import sys
from pathlib import Path

import prepare
from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent


def up_to_date(site: Path) -> bool:
    """Whether the site is newer than all it is made of."""
    folders = (prepare.NBS, prepare.REFERENCE, DOCS, prepare.ROOT / "pruning_bias")
    files = [path for folder in folders for path in folder.rglob("*")]
    made_of = [path for path in files if path.suffix in (".ipynb", ".py", ".css", "")]
    newest = max(path.stat().st_mtime for path in made_of if path.name != "__pycache__")
    return (site / "index.html").exists() and (site / "index.html").stat().st_mtime > newest


def build(site: Path) -> int:
    """Make the site; a site that was there stays until the new one is complete."""
    if up_to_date(site):
        print(f"the site is up to date: {site / 'index.html'}")
        return 0
    work = site.parent / "_proc"
    prepare.main(work / "pages")
    shutil.rmtree(work / "html", ignore_errors=True)
    where = ["-c", DOCS, "-d", work / "trees", work / "pages", work / "html"]
    code = build_main(["-q", "-E", "-W", "--keep-going", *map(str, where)])
    if code == 0:
        shutil.rmtree(site, ignore_errors=True)
        (work / "html").rename(site)
        print(f"the site: {site / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else prepare.ROOT / "_docs").resolve()))
