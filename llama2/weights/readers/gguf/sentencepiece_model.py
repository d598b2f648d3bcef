"""Owns the way from a GGUF file's SentencePiece vocabulary back to a `tokenizer.model`. Knows no weights."""

from __future__ import annotations

import numpy as np
from gguf.constants import TokenType

from llama2.text.tokenizer_files import WORD_START
from llama2.weights.readers.gguf.metadata import Metadata
from llama2.weights.readers.gguf.vocabulary import Vocabulary


def build(metadata: Metadata, vocabulary: Vocabulary) -> bytes:
    """The content of a `tokenizer.model` with the same pieces, scores and types, whose numbers are SentencePiece's.

    Raises:
        ValueError: the vocabulary is damaged.
    """
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.pieces) or not np.isfinite(scores).all():
        raise ValueError(f"{metadata.path}: tokenizer.ggml.scores must have a number for each piece")
    model = ModelProto()
    types = list(vocabulary.types)
    if TokenType.UNKNOWN not in types:
        types[vocabulary.named.get("unk", 0)] = TokenType.UNKNOWN
    for piece, score, kind in zip(vocabulary.pieces, scores.tolist(), types, strict=True):
        # llama.cpp looks for these in the text itself, SentencePiece in what it has made of it.
        spelling = piece.replace(" ", WORD_START) if kind == TokenType.USER_DEFINED else piece
        model.pieces.add(piece=spelling, score=score, type=int(kind))
    trainer = model.trainer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(types)
    trainer.byte_fallback = TokenType.BYTE in types
    named = {**vocabulary.named, "unk": types.index(TokenType.UNKNOWN)}
    for name in ("unk", "bos", "eos", "pad"):
        index = named.get(name, -1)
        setattr(trainer, f"{name}_id", index)
        if index >= 0:
            setattr(trainer, f"{name}_piece", model.pieces[index].piece)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        normalizer.precompiled_charsmap = metadata.numbers("tokenizer.ggml.precompiled_charsmap").tobytes()
        normalizer.name = "user_defined"
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", bool, False)
    content: bytes = model.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"{metadata.path}: the tokenizer in the metadata is damaged: {fault}") from None
    return content
