"""Sphinx: Markdown by MyST, docstrings by autodoc. Nothing is loaded from elsewhere when a page is read.

Formulas are code, as in the files: they are short, read the same on a terminal, and need no script and no font.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import Config, GoogleDocstring

import locallip_cuda

project = "locallip-cuda"
author = "The locallip-cuda authors"
version = release = str(locallip_cuda.build_info()["version"])

extensions = ["sphinx.ext.autodoc", "myst_nb"]
exclude_patterns = ["build"]
default_role = "code"
nitpicky = True
# Of other projects, whose pages are not at hand.
nitpick_ignore_regex = [("py:.*", r"(?!locallip_cuda).*")]
# In signatures, of what is no part of the API.
nitpick_ignore = [
    ("py:class", f"locallip_cuda.propagation.{name}")
    for name in ("graph.Graph", "functional.Functional", "rules.AnyRule")
]

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
nb_execution_mode = "off"  # the tests run the notebooks

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
smartquotes_action = "D"  # quotes stay those of code
html_static_path = ["static"]
html_css_files = ["wide.css"]


def _outside(app: Any, name: str, source: list[str]) -> None:
    """Links to files outside docs, which are right where the file is read by itself, to their copies."""
    source[0] = source[0].replace("](../bench/results/", "](generated/results/")
    source[0] = source[0].replace("](../examples/plug_in/README.md)", "](generated/examples/plug_in.md)")
    source[0] = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](generated/examples/\1.md)", source[0])


_CODE = re.compile(r"(``.+?``|:[a-z:]+:`.+?`|`.+?`)")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns):$")
_GOOGLE = Config(napoleon_use_ivar=True, napoleon_attr_annotations=False)
_ITEM = re.compile(r"(\w+(?:, \w+)*): ")


def _plain(app: Any, kind: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as they are written here: stars and bars are themselves, outside of code and literal blocks, and lines
    `argument: what it is`, or several in a line with three spaces between them, are a list also without a heading."""
    own = {*getattr(of, "__annotations__", {})}
    with contextlib.suppress(TypeError, ValueError):
        own |= {*inspect.signature(of).parameters}
    found: list[str] = []
    literal = section = False
    item = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            literal = section = False
        if literal:
            found.append(line)
            continue
        parts = _CODE.split(line)
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        text = "".join(parts)
        section = section or bool(_SECTION.match(text))
        literal = text.endswith("::")
        for piece in re.split(r"   (?=\w+(?:, \w+)*: )", text.strip()):
            names = _ITEM.match(piece)
            if section or not piece:
                item = False
                if names:  # as one name, which is what a field of docutils has
                    piece = names[1].replace(", ", ",") + piece[names.end(1) :]
                found.append(" " * indent + piece)
            elif names and set(names[1].split(", ")) <= own:
                found += [""] * (not item) + [f"- `{names[1]}`: {piece[names.end() :]}"]
                item = True
            elif item and not indent and re.match(r"[A-Z]", piece):
                item = False
                found += ["", piece]
            else:
                found.append("  " + piece if item else piece)
    # a property's first line is no type, whatever colon is in it
    docstring = GoogleDocstring(found, _GOOGLE, app, "method" if kind == "property" else kind, name, of, options)
    lines[:] = docstring.lines()


_LOADED = re.compile(r"""<(?:script|img|link)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^"']+""")


def _offline(app: Any, error: Exception | None) -> None:
    """What a page loads lies beside it."""
    if error is None:
        pages = {path: _LOADED.findall(path.read_text()) for path in Path(app.outdir).rglob("*.html")}
        foreign = {str(path): found for path, found in pages.items() if found}
        if foreign:
            raise ExtensionError(f"pages load from elsewhere: {foreign}")


def setup(app: Any) -> None:
    app.connect("build-finished", _offline)
    app.connect("source-read", _outside)
    app.connect("autodoc-process-docstring", _plain)
