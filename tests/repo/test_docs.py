"""Documents that can be checked: commands exist, links lead somewhere, decisions are numbered once and kept short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from source_tree import ROOT, text_files

DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))
DECISION_SECTIONS = ("## Context", "## Decision", "## Consequences", "## Measured")
DECISION_WORDS_MAX = 550  # one page
CONTRIBUTING_WORDS_MAX = 1100  # two pages

_CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def markdown() -> list[tuple[str, str]]:
    return [(path, text) for path, text in text_files() if path.endswith(".md")]


def anchors(text: str) -> set[str]:
    """Anchors of headings, by the rule of code forges: lower case, no punctuation, spaces as dashes."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken(path: str, text: str, link: str) -> bool:
    """Whether a link of a document leads nowhere; links to other hosts are not followed."""
    if re.match(r"[a-z]+:", link):
        return False
    target, _, anchor = link.partition("#")
    file = (ROOT / path).parent / target if target else ROOT / path
    if not file.exists() or not file.resolve().is_relative_to(ROOT):
        return True
    return (
        bool(anchor)
        and file.suffix == ".md"
        and anchor not in anchors(file.read_text(encoding="utf-8") if target else text)
    )


def test_links_resolve() -> None:
    findings = [
        f"{path}: {link}"
        for path, text in markdown()
        for link in _LINK.findall(_CODE.sub("", text))
        if broken(path, text, link)
    ]
    assert not findings, "\n".join(findings)


def test_every_make_command_in_a_document_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "check"} <= targets
    named = {
        (path, target)
        for path, text in markdown()
        for code in _CODE.findall(text)
        for target in re.findall(r"(?:^|[`;&|(]\s*|\n\s*(?:\$ )?)make(?: [A-Z_]+=\S+)* ([a-z-]+)", code)
    }
    assert not [(path, target) for path, target in named if target not in targets]


def test_decisions_are_numbered_without_gaps_or_doubles() -> None:
    numbers = [int(path.name[:4]) for path in DECISIONS]
    assert numbers == list(range(len(DECISIONS)))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_its_sections_on_one_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name)
    assert text.startswith(f"# {path.name[:4]} ")
    assert [section for section in DECISION_SECTIONS if f"\n{section}\n" not in text] == []
    assert len(text.split()) <= DECISION_WORDS_MAX


def test_contributing_fits_two_pages() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.split()) <= CONTRIBUTING_WORDS_MAX
    assert "make check" in text
