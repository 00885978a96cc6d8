"""Every term of the glossary stands there once, and what it names in the code exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import cow
import snaploader
from snaploader import workspace

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "glossary.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^- \*\*(.+?)\*\*: ", PAGE, re.MULTILINE)


def test_every_term_is_told_once() -> None:
    assert len(TERMS) > 40
    assert [term for term, count in Counter(TERMS).items() if count > 1] == []
    assert re.findall(r"\*\*(.+?)\*\*", PAGE) == TERMS


def test_every_term_is_used_on_another_page_or_in_the_code() -> None:
    files = [page for page in DOCS.rglob("*.md") if page.name != "glossary.md"]
    files += [path for name in ("cow", "snaploader") for path in (DOCS.parent / name).rglob("*.py")]
    text = "".join(re.sub(r"[\s_]", "", file.read_text(encoding="utf-8").lower()) for file in files)
    assert [term for term in TERMS if term.replace(" ", "") not in text] == []


def test_what_a_term_names_in_the_code_exists() -> None:
    names = re.findall(r"\(`([A-Z]\w+)`\)|a `([A-Z]\w+Tree)`", PAGE)
    known = {*dir(snaploader), *dir(cow), *dir(workspace)}
    assert {name for pair in names for name in pair if name} <= known
