"""Make README.md from nbs/index.ipynb as it was last executed: no Quarto, and nothing is run."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def output(out: nbformat.NotebookNode) -> str:
    """One output of a cell as Markdown."""
    data = out.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"]
    text = out.get("text") or data.get("text/plain", "")
    return f"```\n{text.rstrip()}\n```" if text else ""


def cell_text(cell: nbformat.NotebookNode) -> list[str]:
    """A cell as Markdown; `#| echo: false` hides the code and shows what it gave."""
    if cell.cell_type == "markdown":
        return [cell.source]
    code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    shown = [] if "#| echo: false" in cell.source else [f"```python\n{code}\n```"]
    return shown + [text for out in cell.outputs if (text := output(out))]


def main() -> None:
    """Write README.md; links that are right in nbs/ become right at the top."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    text = "\n\n".join(part for cell in notebook.cells for part in cell_text(cell)) + "\n"
    text = re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", text)
    text = text.replace("](../", "](")
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
