"""The house keeps its shape: imports point down, files and functions stay small, nothing is swallowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lorica"
LAYERS = [
    {"errors", "files", "account"},
    {"doors", "patterns"},
    {"tensorfiles"},
    {"weights", "core"},
    {"targets", "rows", "kernels"},
    {"dora", "geometry", "spectral"},
    {"lowrank"},
    {"state"},
    {"merging"},
    {"patch", "fast", "resized"},
    {"methods"},
    {"formats"},
    {"beside"},
    {"algebra"},
    {"adapter"},
    {"models", "data"},
    {"insertion"},
    {"evaluate", "inspect", "passes"},
    {"plan"},
    {"tasks"},
    {"train", "analysis", "serve", "counts", "export", "expression"},
    {"quickstart", "hub"},
    {"cli"},
    {"__main__"},
]
FILES = sorted(SOURCE.rglob("*.py"))
BUDGET = {"file": 400, "function": 60, "parameters": 10}


def layer(part: str) -> int:
    return next(place for place, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level parts of lorica that a module imports, also inside functions; not those for type checkers alone."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "lorica":
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorica."):
            yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[1], node.lineno) for alias in node.names if "lorica." in alias.name)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != SOURCE or path.stem != "__init__"], ids=str)
def test_imports_point_down(path):
    here = part_of(path)
    known = {part for parts in LAYERS for part in parts}
    for part, line in imported(ast.parse(path.read_text())):
        if part in known and part != here:
            assert layer(part) < layer(here), f"{path.name}:{line}: {here} may not import {part}"


def test_every_module_has_its_layer():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts <= {part for layer in LAYERS for part in layer}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_keep_their_size(path):
    text = path.read_text()
    assert text.count("\n") <= BUDGET["file"]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= BUDGET["function"], f"{node.name}:{node.lineno}"
            names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            assert len([name for name in names if name not in ("self", "cls")]) <= BUDGET["parameters"], node.name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_says_what_it_is_and_swallows_nothing(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(inner, ast.Pass) for inner in node.body), f"line {node.lineno}"
    assert path.stem not in {"utils", "common", "helpers", "misc"}


def test_no_file_names_a_folder_of_some_machine():
    wanted = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt)/")
    for path in [*FILES, *ROOT.glob("*.md"), *ROOT.glob("*.t*"), *ROOT.glob("docs/*"), *ROOT.glob("tests/**/*.py")]:
        if path.suffix in {".py", ".md", ".toml", ".txt"} and path != Path(__file__):
            assert not wanted.search(path.read_text()), path


def test_every_pinned_version_is_exact():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
