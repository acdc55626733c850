"""The repository as the tests of tests/repo see it: its files, their text, their syntax trees."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = "kvstore/v1/"
LIBRARY = ("kvstore/", "client/")

_OUTPUT_FOLDERS = {"__pycache__", "build", "dist", "node_modules"}
_HIDDEN_OF_OURS = {".ci", ".github", ".gitignore"}
_TEXT_SUFFIXES = {
    ".py",
    ".pyi",
    ".md",
    ".toml",
    ".txt",
    ".sh",
    ".proto",
    ".yaml",
    ".yml",
    ".json",
    ".cfg",
    ".service",
    "",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file. `path` is relative to the root, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def in_library(self) -> bool:
        """Whether it is hand-written code that is installed."""
        return self.path.startswith(LIBRARY)

    def line(self, number: int) -> str:
        """A line of the text, by its number as in the syntax tree."""
        return self.text.splitlines()[number - 1]

    def functions(self) -> Iterator[Function]:
        """Every function, nested ones and methods included."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


def _is_ours(name: str) -> bool:
    if name.startswith("."):
        return name in _HIDDEN_OF_OURS
    return name not in _OUTPUT_FOLDERS and not name.endswith(".egg-info")


@functools.cache
def text_files() -> tuple[tuple[str, str], ...]:
    """(relative path, text) of every text file of the project below 1 MiB, found without git: an archive will do."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(filter(_is_ours, folders))
        for name in sorted(filter(_is_ours, names)):
            path = Path(folder) / name
            if path.suffix in _TEXT_SUFFIXES and path.is_file() and path.stat().st_size < 1 << 20:
                text = path.read_bytes().decode("utf-8", errors="replace")
                found.append((path.relative_to(ROOT).as_posix(), text))
    return tuple(found)


@functools.cache
def python_files() -> tuple[Source, ...]:
    """Every Python file that a person wrote."""
    return tuple(
        Source(path, text, ast.parse(text, path))
        for path, text in text_files()
        if path.endswith(".py") and not path.startswith(GENERATED)
    )


def library_files() -> tuple[Source, ...]:
    """The Python files of the installed packages that a person wrote."""
    return tuple(source for source in python_files() if source.in_library)
