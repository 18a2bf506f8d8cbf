"""Notebooks -> pages for Sphinx.

Every notebook under nbs/ becomes a page; where results/reference has an executed copy, that one is
taken. Files are only read and written: no cell is run, nothing of the package is imported.
"""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, REFERENCE = ROOT / "nbs", ROOT / "results" / "reference"
SECTIONS = {  # caption -> its pages; the first that fits
    "Walk": r"00_walk|tutorials/.*",
    "Library": r"[^/]+",
    "Experiments": r"experiments/.*",
    "Reports": r"reports/.*",
    "API": r"api/.*",
}
SHOWN = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/svg+xml"}
METADATA = {"kernelspec": {"name": "python3", "display_name": "python3"}}
METADATA |= {"language_info": {"name": "python", "pygments_lexer": "python"}}


def sources() -> dict[str, Path]:
    """Page -> notebook; of the runs of an experiment on a corpus that of demo, or of least seed."""
    pages = {str(p.relative_to(NBS).with_suffix("")): p for p in sorted(NBS.rglob("*.ipynb"))}
    pages = {page: path for page, path in pages.items() if not re.search(r"(^|/)[._]", page)}
    runs: dict[str, tuple[bool, int, str, Path]] = {}
    for path in REFERENCE.rglob("notebook.ipynb"):
        run = json.loads(path.with_name("parameters.json").read_text())
        corpus = Path(run.get("corpus", "synthetic")).name.split(".")[0].replace("_", "-")
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", path.parts[-3]).lower()  # HeadMovement
        page = f"experiments/{name}" + f"_{corpus}" * (corpus != "synthetic")
        demo = path.relative_to(REFERENCE).parts[0].endswith("demo")
        candidate = (not demo, run.get("seed", 0), str(path), path)
        runs[page] = min(runs.get(page, candidate), candidate)
    pages |= {page: path for page, (*_, path) in runs.items()}
    for path in REFERENCE.rglob("reports/*.ipynb"):
        where = path.relative_to(REFERENCE).parts[0].removeprefix(f"{path.stem}_")
        pages[f"reports/{path.stem}" + f"_{where}" * (where not in ("reports", "demo"))] = path
    return pages


def exported() -> dict[str, list[str]]:
    """Module -> its `__all__`."""
    found = {}
    for path in sorted((ROOT / "pruning_bias").glob("[!_]*.py")):
        if match := re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.M | re.S):
            found[path.stem] = ast.literal_eval(match[1])
    return found


class Converter:
    """Cells of notebooks as Sphinx wants them."""

    def __init__(self, pages: dict[str, Path], modules: dict[str, list[str]], out: Path) -> None:
        self.modules, self.out = modules, out
        self.page_of = {NBS / f"{page}.ipynb": page for page in pages}
        self.page_of |= {path: page for page, path in pages.items()}

    def cells(self, page: str, path: Path) -> Iterator[dict]:
        """The cells of a page."""
        cells, module = json.loads(path.read_text())["cells"], None
        injected = any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
        for cell in cells:
            text = "".join(cell["source"])
            told = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", text, re.M))
            module = told.get("default_exp", module)
            if cell["cell_type"] == "markdown":
                yield markdown(self.prose(text, page))
            elif cell["cell_type"] == "code" and not told.keys() & {"default_exp", "hide"}:
                text = re.sub(r"^#\|.*\n?|^.*#\| *hide_line\n?", "", text, flags=re.M).strip()
                tags = cell["metadata"].get("tags", [])
                if {"parameters", "injected-parameters"} & set(tags):
                    yield parameters(text, folded=injected and "parameters" in tags)
                elif text:
                    exports = "export" in told and module
                    hidden = told.get("echo") == "false"
                    yield from self.code(cell, text, module if exports else None, hidden)

    def code(self, cell: dict, text: str, module: str | None, hidden: bool) -> Iterator[dict]:
        """A code cell; what it exports is told by its signatures, the source folded below."""
        nodes, folded = ast.parse(text).body if module else [], False
        for node in nodes:
            folded |= not isinstance(node, ast.Assign | ast.AnnAssign)
            kind = {"ClassDef": "class", "FunctionDef": "function"}.get(type(node).__name__)
            if kind and not node.name.startswith("_"):
                name = f"pruning_bias.{module}.{node.name}"
                yield markdown(f"```{{signature}} {kind} {name}\n```")
        outputs = [o for o in cell["outputs"] if "data" not in o or SHOWN & o["data"].keys()]
        outputs = [o for o in outputs if any(o.get("data", {}).get("text/markdown", "-"))]
        for output in outputs:
            if "data" in output:
                output["data"] = {k: v for k, v in output["data"].items() if k in SHOWN}
        tags = {"tags": ["remove-input"] if hidden else ["hide-input"] if folded else []}
        yield cell | {"source": text, "outputs": outputs, "metadata": tags}

    def prose(self, text: str, page: str) -> str:
        """Markdown with callouts, links and names that fit the site; code blocks stay."""
        parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.M | re.S)
        for i in range(0, len(parts), 2):
            part = re.sub(r"^(# .+)\n+> (.+)", r"\1\n\n{.subtitle}\n\2", parts[i])
            part = re.sub(r"^:::+ *\{\.callout-(\w+).*\}$", r":::{\1}", part, flags=re.M)
            part = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)", lambda m: self.link(m, page), part)
            name = r"\[[^]]*\]\(|(?<!`)`([A-Za-z][\w.]*)(\(\))?`(?!`)"  # or the label of a link
            parts[i] = re.sub(name, self.symbol, part)
        return "".join(parts)

    def link(self, match: re.Match, page: str) -> str:
        """A link to a notebook leads to its page; other files of the project are only named."""
        bang, label, target = match.groups()
        target, _, anchor = target.partition("#")
        if not target:
            return match[0]
        here = (NBS / page).parent
        for base in (here, ROOT):
            path = Path(os.path.normpath(base / target))
            if path in self.page_of:
                target = os.path.relpath(NBS / f"{self.page_of[path]}.ipynb", here)
                return f"[{label}]({target}{'#' * bool(anchor)}{anchor})"
            if bang and path.is_file():
                copy = self.out / "files" / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                return f"![{label}](/{copy.relative_to(self.out)})"
            if path.exists():
                return label
        return match[0]

    def symbol(self, match: re.Match) -> str:
        """A name that only an export can mean leads to its API page."""
        name, call = match[1] or "", match[2] or ""
        head, _, rest = name.partition(".")
        if head in self.modules and rest.split(".")[0] in self.modules[head]:
            return f"{{py:obj}}`{name}{call} <pruning_bias.{name}>`"
        homes = [m for m, names in self.modules.items() if head in names]
        if len(homes) != 1 or not (call or re.search("[A-Z_]", head)):
            return match[0]
        return f"{{py:obj}}`{name}{call} <pruning_bias.{homes[0]}.{name}>`"


def markdown(text: str) -> dict:
    """A cell of prose."""
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def parameters(text: str, folded: bool) -> dict:
    """A parameters cell as a box."""
    title = "Defaults of the parameters" if folded else "Parameters"
    box = f":::{{admonition}} {title}\n:class: note\n" + ":collapsible: closed\n" * folded
    return markdown(f"{box}```python\n{text}\n```\n:::")


def api(module: str, names: list[str], notebook: str | None) -> str:
    """The page of a module, in reStructuredText."""
    page = f"{module}\n{'=' * len(module)}\n\n"
    if notebook:
        page += f"Made from the notebook :doc:`/{notebook}`.\n\n"
    page += f".. automodule:: pruning_bias.{module}\n   :members:\n   :special-members: __call__\n"
    source = (ROOT / "pruning_bias" / f"{module}.py").read_text()
    for name in names:  # autodoc leaves out constants that have no docstring
        if match := re.search(rf"^{name}(?:: .+?)? = (.+?)(?:  # (.+))?$", source, re.M):
            value = match[1] + " ..." * match[1].endswith(("(", "[", "{", '"""'))
            page += f"\n.. py:data:: {name}\n   :module: pruning_bias.{module}\n"
            page += f"   :value: {value}\n\n   {match[2] or ''}\n"
    return page


def toctrees(names: list[str], options: str) -> str:
    """The tables of contents, one per section."""
    sections: dict[str, list[str]] = {caption: [] for caption in SECTIONS}
    for name in names:
        fits = (caption for caption, pattern in SECTIONS.items() if re.fullmatch(pattern, name))
        sections[next(fits)].append(name)
    return "\n\n".join(
        "\n".join([f"```{{toctree}}\n{options}:caption: {caption}", *names, "```"])
        for caption, names in sections.items()
        if names
    )


def main(out: Path) -> None:
    """Write all pages."""
    shutil.rmtree(out, ignore_errors=True)
    pages, modules = sources(), exported()
    converter = Converter(pages, modules, out)
    names = [*pages, *(f"api/{module}" for module in modules)]
    options = ":hidden:\n" if "index" in pages else ":maxdepth: 1\n"
    toctree = toctrees([name for name in names if name != "index"], options)
    homes = {}
    for page, path in pages.items():
        cells = list(converter.cells(page, path))
        if match := re.search(r"#\| default_exp (\w+)", path.read_text()):
            homes[match[1]] = page
        if page == "index":
            cells.append(markdown(toctree))
        if NBS not in path.parents:
            cells.insert(1, markdown(f"Executed; the file is `{path.relative_to(ROOT)}`."))
            if not (NBS / f"{page}.ipynb").exists():
                title = rf"\g<0> on {page.rpartition('_')[2]}"
                cells[0]["source"] = re.sub("^# .+", title, cells[0]["source"])
        cells = [cell | {"id": str(i)} for i, cell in enumerate(cells)]
        file = out / f"{page}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
        file.write_text(json.dumps(notebook))
    (out / "api").mkdir(exist_ok=True)
    for module, exports in modules.items():
        (out / "api" / f"{module}.rst").write_text(api(module, exports, homes.get(module)))
    if "index" not in pages:
        (out / "index.md").write_text(f"# pruning_bias\n\n{toctree}\n")
