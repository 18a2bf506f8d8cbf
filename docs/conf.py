"""Sphinx: pages of `prepare.py` -> a site that needs no network, neither to build nor to read."""

import ast
import dataclasses
import html
import inspect
import io
import re
import sys
import textwrap
import tokenize
from typing import get_origin
from xml.etree.ElementTree import tostring

from docutils import nodes
from docutils.utils import new_document
from latex2mathml.converter import convert_to_element
from myst_parser.mocking import MockRSTParser
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

project = "pruning_bias"
html_title = project
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_math_renderer = "mathml"
viewcode_follow_imported_members = False
html_show_copyright = html_copy_source = html_show_sourcelink = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses for local files
smartquotes_action = "D"
default_role = "py:obj"  # a name in backticks links to its API page, if it has one
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"
nb_number_source_lines = False
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
add_module_names = False
autodoc_default_options = {"no-value": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 60


def docments(obj: object) -> dict[str, str]:
    """What the comments beside the parameters, fields and the return of `obj` say."""
    source = textwrap.dedent(inspect.getsource(obj))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    function, found = ast.parse(source).body[0], {}
    if isinstance(function, ast.ClassDef):
        for node in function.body:
            if isinstance(node, ast.AnnAssign) and node.end_lineno in comments:
                found[node.target.id] = comments[node.end_lineno]
        if dataclasses.is_dataclass(obj):
            for base in obj.__mro__[1:-1]:
                found = docments(base) | found
            meanings = {f.name: f.metadata.get("meaning") for f in dataclasses.fields(obj)}
            return {k: v or found[k] for k, v in meanings.items() if v or k in found}
        function = {getattr(n, "name", ""): n for n in function.body}.get("__init__")
    if isinstance(function, ast.FunctionDef):
        end = function.returns.end_lineno if function.returns else 0
        for arg in ast.walk(function.args):
            if isinstance(arg, ast.arg) and arg.end_lineno in comments and arg.end_lineno != end:
                found[arg.arg] = comments[arg.end_lineno]
        if end in comments:
            found["return"] = comments[end]
    return found


def rst(text: str) -> str:
    """Plain text with names in backticks as reStructuredText."""
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = (re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2])
    parts[1::2] = (rf"\ `{part.strip('`')}`\ " for part in parts[1::2])
    return "".join(parts)


def add_fields(app, what, name, obj, options, lines):
    """Docments become field lists."""
    lines[:] = [rst(line) for line in lines]
    if what in ("function", "method", "class"):
        found = docments(obj)
        lines.append("")
        lines += [f":param {k}: {rst(v)}" for k, v in found.items() if k != "return"]
        lines += [f":returns: {rst(found['return'])}"] if "return" in found else []


def tidy(app, what, name, obj, options, signature, returns):
    """A signature with types by their short names: aliases as written, no limits of pydantic."""
    if getattr(obj, "_is_protocol", False):
        return "", returns
    names = vars(sys.modules.get(getattr(obj, "__module__", None), sys))
    aliases = {stringify_annotation(v, "smart"): k for k, v in names.items() if get_origin(v)}
    both = [signature or "", returns or ""]
    for i, text in enumerate(both):
        for alias in sorted(aliases, key=len, reverse=True):
            text = text.replace(alias, aliases[alias])
        both[i] = re.sub(r"Annotated\[(\w+), [^]]*\]", r"\1", text) or None
    return tuple(both)


def skip(app, what, name, obj, skip, options):
    """Fields of a class are told with its parameters, not once more each."""
    if what == "class" and not (inspect.isroutine(obj) or isinstance(obj, property)):
        return True
    return None


class Signature(SphinxDirective):
    """`{signature} class NAME` in a notebook: what autodoc says of it, without its members."""

    required_arguments = 2

    def run(self):
        kind, name = self.arguments
        document = new_document(self.env.docname, self.state.document.settings)
        MockRSTParser().parse(f".. auto{kind}:: {name}\n   :no-index:\n", document)
        return document.children


def mathml(tex, display):
    """TeX -> MathML, with lines where only a font of mathematics could stretch a brace."""
    root = convert_to_element(tex, display=display)
    for node in root.iter():
        node.text = html.unescape(node.text or "")
    for node in root.iter():
        if node.tag == "mo" and node.text == "‖":
            node.set("stretchy", "false")
        if node.tag in ("mover", "munder") and node[1].text in ("―", "⏟"):
            for child in node.iter():  # a sum above a brace is as large as elsewhere
                if child.tag == "msub" and child[0].text in ("∑", "∏"):
                    child.tag = "munder"
            node.set("class", {"―": "overline", "⏟": "underbrace"}[node[1].text])
            node.tag = "mrow"
            node.remove(node[1])
    return tostring(root, encoding="unicode")


def visit_math(self, node):
    """Formulae need no script."""
    if isinstance(node, nodes.math_block):
        self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    else:
        self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.add_directive("signature", Signature)
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("autodoc-process-signature", tidy)
    app.connect("autodoc-skip-member", skip)
