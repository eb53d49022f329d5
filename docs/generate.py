"""Writes docs/generated: the pages that are derived from the code, and copies of files that lie outside docs."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallip_cuda.nn
from locallip_cuda.experiments import cli
from locallip_cuda.propagation import rules
from locallip_cuda.propagation.graph import lowered, traced

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"

# Where a function of the table is called from, and how its name is written there.
_OWNERS = (
    ("torch.nn.functional", F),
    ("torch", torch),
    ("torch.Tensor", Tensor),
    ("locallip_cuda.nn", locallip_cuda.nn),
)


def write() -> None:
    shutil.rmtree(GENERATED, ignore_errors=True)
    pages = {
        "supported.md": supported(),
        "sources.md": sources(),
        "command_line.md": command_line(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for path in sorted((ROOT / "bench" / "results").glob("*.md")):
        pages[f"results/{path.name}"] = path.read_text()
    for path in sorted((ROOT / "examples").glob("*.py")):
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n{_fenced(path.read_text(), 'python')}"
    pages["examples/plug_in.md"] = (ROOT / "examples" / "plug_in" / "README.md").read_text()
    for name, text in pages.items():
        (GENERATED / name).parent.mkdir(parents=True, exist_ok=True)
        (GENERATED / name).write_text(text)


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


# ---- what has bounds ----


def names(function: Any) -> list[str]:
    """Under which a function of the table can be called, in full."""
    found = [
        f"{owner}.{name}"
        for owner, space in _OWNERS
        for name, value in vars(space).items()
        if value is function and not name.startswith("_")
    ]
    inherited = getattr(function, "__name__", "")
    if not found and getattr(torch.Tensor, inherited, None) is function:
        found = [f"torch.Tensor.{inherited}"]
    return found or [f"torch.Tensor.{getattr(getattr(function, '__self__', None), '__name__', inherited)}"]


def refusals(rule: Callable[..., Any]) -> list[str]:
    """The messages of the rule's errors, with … for what they got."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in _parts(node.exc.args[0]))
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    ]
    return list(dict.fromkeys(texts))


def _parts(message: ast.expr) -> list[ast.expr]:
    return message.values if isinstance(message, ast.JoinedStr) else [message]


def sections() -> Iterator[tuple[str, list[tuple[Callable[..., Any], list[Any]]]]]:
    """The table by the headings that it has in its file: (title, [(rule, its functions), ...])."""
    source, _ = inspect.findsource(rules)
    headings = {line: found[1] for line, text in enumerate(source, 1) if (found := re.match(r"# ---- (.*) ----", text))}
    for line, title in headings.items():
        last = min((other for other in headings if other > line), default=len(source) + 1)
        own: dict[CodeType, tuple[Callable[..., Any], list[Any]]] = {}
        for function, rule in rules.RULES.items():
            if line < rule.__code__.co_firstlineno < last:
                own.setdefault(rule.__code__, (rule, []))[1].append(function)
        if own:
            yield title, list(own.values())


# What the classes of torch.nn are made with to see whether they have bounds, by the names of what they want.
_TRIAL = {
    **dict.fromkeys(("in_channels", "out_channels", "num_features", "in_features", "out_features"), 8),
    **dict.fromkeys(("num_channels", "normalized_shape", "embed_dim", "d_model", "input_size", "hidden_size"), 8),
    **dict.fromkeys(("kernel_size", "groups", "num_groups", "nhead", "num_heads", "upscale_factor", "norm_type"), 2),
    **dict.fromkeys(("downscale_factor", "output_size", "size", "scale_factor", "padding", "unflattened_size"), 2),
    **{"min_val": -1.0, "max_val": 1.0, "threshold": 0.0, "value": 0.0, "dim": 1},
}
_TRIAL_SIZES = ((8,), (8, 4), (8, 4, 4), (8, 4, 4, 4))


@cache
def modules() -> list[str]:
    """Classes of torch.nn that have bounds in eval mode, found by trying."""
    found = []
    for name, kind in sorted(vars(nn).items()):
        if isinstance(kind, type) and issubclass(kind, nn.Module) and not name.startswith("Lazy"):
            given = [
                p.name
                for p in inspect.signature(kind).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name in ("size", "scale_factor"))
            ]
            given = [each for each in given if not (each == "size" and "scale_factor" in given)]
            if set(given) <= set(_TRIAL) and any(_has_bounds(kind, given, sizes) for sizes in _TRIAL_SIZES):
                found.append(name)
    return found


def _has_bounds(kind: type[nn.Module], given: list[str], sizes: tuple[int, ...]) -> bool:
    x = torch.zeros(1, *sizes)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = kind(**{name: _TRIAL[name] for name in given}).eval()
            return bool(lowered(traced(module, x), x.dtype).head) and module(x).dim() > 1
    except Exception:  # of many kinds: arguments and sizes that do not fit, and no rule
        return False


SUPPORTED = """# Functions and modules with rules

Made from the table of rules, `locallip_cuda/propagation/rules.py`, when this page was built. What a rule refuses is in
the second column, in the words of its errors, … for what it got. Names of functions stand for what they are called by:
`F` is `torch.nn.functional`, `ll` is `locallip_cuda`. Updates in place, such as `relu_`, count as what they compute.
[Which networks have bounds](../networks.md) says what joins values and what becomes of all.
"""

MODULES = """## Modules of torch.nn

Those that have bounds by themselves, in eval mode, found by trying each once with small arguments. Containers, hooks
and parametrisations count as what they run.
"""


def supported() -> str:
    lines = [SUPPORTED]
    for title, own in sections():
        lines += [f"## {title.capitalize()}", "", "| functions | refused |", "| --- | --- |"]
        for rule, functions in own:
            short = dict.fromkeys(_short(name) for function in functions for name in names(function))
            refused = "; ".join(refusals(rule)).replace("|", "\\|")
            lines.append(f"| {', '.join(f'`{name}`' for name in short)} | {refused} |")
        lines.append("")
    return "\n".join([*lines, MODULES, ", ".join(f"`{name}`" for name in modules()), ""])


def _short(name: str) -> str:
    name = name.replace("torch.nn.functional.", "F.").replace("locallip_cuda.", "ll.")
    return name.replace("torch.Tensor.", "Tensor.")


# ---- the sources of the kernels ----


def sources() -> str:
    lines = ["# Files of csrc", "", "By the first sentence of each.", "", "| file | |", "| --- | --- |"]
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    for path in sorted(paths, key=lambda path: (path.stem, str(path))):
        lines.append(f"| `{path.relative_to(ROOT / 'csrc')}` | {_first_sentence(path.read_text())} |")
    return "\n".join([*lines, ""])


def _first_sentence(source: str) -> str:
    paragraph = re.match(r"(// .+\n)+", source)
    assert paragraph, "a source without a comment at its head"
    text = " ".join(line.removeprefix("//").strip() for line in paragraph[0].splitlines())
    return re.split(r"(?<=\.)\s", text)[0].rstrip(".:").replace("|", "\\|")


# ---- the command line ----


def command_line() -> str:
    parser = cli.parser()
    lines = ["# Command line", "", f"{parser.description}", ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                about = command.description or _sentence(summaries[name] or "")
                lines += [f"## locallip {name}", "", _options_as_code(about), "", *_options(command)]
    return "\n".join(lines)


def _options(command: argparse.ArgumentParser) -> Iterator[str]:
    formatter = command._get_formatter()
    for group in command._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        yield from (f"### {_sentence(group.title or '').rstrip('.')}", "", group.description or "", "")
        for action in actions:
            value = "" if action.nargs == 0 else formatter._format_args(action, (action.dest or "").upper())
            names = ", ".join(f"`{name} {value}`".replace(" `", "`") for name in action.option_strings) or f"`{value}`"
            yield from (names, f": {_options_as_code(formatter._expand_help(action))}", "")


def _options_as_code(text: str) -> str:
    return re.sub(r"(--[\w-]+)", r"`\1`", text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


if __name__ == "__main__":
    write()
