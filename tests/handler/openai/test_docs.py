"""docs/openai.md says something of every field, and every test that it names is there."""

from __future__ import annotations

import re

import pytest

from handler.openai.chat import ChatBody
from handler.openai.completions import CompletionBody
from handler.openai.fields import Body
from handler.openai.responses import ResponseBody
from tests.handler.support import ROOT

DOCS = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, ResponseBody])
def test_every_field_has_a_row(body: type[Body]) -> None:
    rows = [line.split("|")[1] for line in DOCS.splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(body.model_fields) <= described


def test_every_test_that_is_named_is_there() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", DOCS))
    assert len(named) > 20
    assert not [name for name in named if f"def {name}(" not in tests]
