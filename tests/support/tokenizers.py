"""A small SentencePiece model, trained in a moment from the sentences written here."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the recipe of mayonnaise? Take an egg yolk, some mustard, a little vinegar and a lot of oil.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "In 1969 there were 2 men on the moon; in 1972 there were 12 who had been there.",
    "def main(argv):    for name in argv:        print(name)",
    "Once upon a time there was a king who had three daughters, and the youngest was the wisest.",
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.",
    "Grüße aus München, schöne Straße, viele Bücher und ein kühles Getränk.",
    "今日は天気がいいですね。明日も天気がいいといいです。",
    "[INST] <<SYS>> You are a helpful assistant. <</SYS>> Hello! [/INST] Hello, how can I help?",
    "[INST] Who are you? [/INST] I am a helpful assistant. [INST] Thank you. [/INST] You are welcome.",
)


def tiny_sentencepiece(folder: Path, vocab_size: int = 512, *, remove_extra_whitespaces: bool = False) -> Path:
    """Train `folder/tokenizer.model` with Llama 2's settings.

    BPE, byte pieces, identity normalization, ids 0 1 2 for <unk> <s> </s>, no padding. These sentences carry a
    `vocab_size` from 345 to 700.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(folder) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
