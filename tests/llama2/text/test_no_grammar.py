"""What is no grammar is refused, and a model or an installation that cannot have one says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

import llama2.text.grammar
from llama2.text.grammar import MAX_CHOICES, GrammarCompiler
from llama2.text.tokenizer import Tokenizer


def test_what_cannot_be_written_is_refused(bpe: Tokenizer, sp: Tokenizer) -> None:
    """SmolLM2's vocabulary has no token for some control characters, so no reply can have them."""
    byte_level, words = (GrammarCompiler(tokenizer, tokenizer.vocab_size) for tokenizer in (bpe, sp))
    assert byte_level.choice(["a"])
    for refused in (
        lambda: byte_level.choice(["a\x04"]),
        lambda: byte_level.json_schema({"const": "\U00040000"}),
        lambda: byte_level.regex("\x04+"),
        lambda: byte_level.regex("a\x04"),
        lambda: words.choice(["\ud800"]),
    ):
        with pytest.raises(ValueError, match=r"cannot write|can write"):
            refused()


@pytest.mark.parametrize("texts", [[], ["a"] * (MAX_CHOICES + 1), ["a", 1], ["a" * 30_000]])
def test_choices_have_limits(sp: Tokenizer, texts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^it"):
        GrammarCompiler(sp, sp.vocab_size).choice(texts)


def test_a_model_that_never_ends_cannot_be_held_to_a_grammar(sp: Tokenizer) -> None:
    class Endless:
        def __getattr__(self, name: str) -> Any:
            return frozenset() if name == "eos_ids" else getattr(sp, name)

    with pytest.raises(ValueError, match="no end-of-text token"):
        GrammarCompiler(Endless(), 600).json_object()  # type: ignore[arg-type]


def test_without_llguidance_only_grammars_are_missing(sp: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module can still be imported, and asking for a grammar says what to install."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    spec = importlib.util.spec_from_file_location("fresh_grammar", llama2.text.grammar.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_grammar", fresh)
    spec.loader.exec_module(fresh)
    compiler = fresh.GrammarCompiler(sp, sp.vocab_size)
    with pytest.raises(ValueError, match=r"^constrained output needs llguidance, which is not installed"):
        compiler.json_object()


@pytest.mark.integration
def test_a_server_starts_without_llguidance() -> None:
    """It is imported when the first grammar is asked for."""
    code = "import sys, llama2.text.grammar, llama2.text.json_schema; assert 'llguidance' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
