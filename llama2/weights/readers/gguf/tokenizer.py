"""Owns the way from the metadata of a GGUF file to a tokenizer's own files. Knows neither kind of vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama2.text.tokenizer_files import BPE_FILE, CONFIG_FILE, GENERATION_FILE, SENTENCEPIECE_FILE
from llama2.weights.readers.gguf import byte_level, sentencepiece_model
from llama2.weights.readers.gguf.metadata import Metadata
from llama2.weights.readers.gguf.vocabulary import ENDS, Vocabulary

_CONFIGURED = ("bos", "eos", "unk", "pad")


def read_tokenizer(metadata: Metadata, *, vocab_size: int) -> Mapping[str, bytes]:
    """The files of the tokenizer, by name: the vocabulary, `tokenizer_config.json` with the chat template, and
    `generation_config.json` where more ids than one end a reply.

    Raises:
        ValueError: it is damaged, of no kind known here, or has more pieces than `vocab_size`.
    """
    path, kind = metadata.path, metadata.get("tokenizer.ggml.model", str, "no_vocab")
    if kind not in ("llama", "gpt2"):
        raise ValueError(
            f"{path}: its tokenizer is {kind!r}, and only llama and gpt2 are known; "
            "--tokenizer_path takes one of its own"
        )
    vocabulary = Vocabulary.read(metadata)
    if len(vocabulary.pieces) > vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {len(vocabulary.pieces)} pieces, and its embedding has rows for {vocab_size}"
        )
    named = vocabulary.named
    config: dict[str, Any] = {
        **{f"{name}_token": vocabulary.pieces[named[name]] for name in _CONFIGURED if name in named},
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.get("tokenizer.chat_template", str)
    if kind == "llama":
        files = {SENTENCEPIECE_FILE: sentencepiece_model.build(metadata, vocabulary)}
        config |= {"add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", bool, True)}
        config |= {"tokenizer_class": "LlamaTokenizer"}
    else:
        cut = byte_level.words(metadata)
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, cut.adds_bos) and "bos" in named
        files = {BPE_FILE: byte_level.build(metadata, vocabulary, cut, adds_bos=adds_bos)}
        config |= {"add_bos_token": adds_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
    ends = sorted({named[name] for name in ENDS if name in named})
    if len(ends) > 1:
        files |= {GENERATION_FILE: _json({"eos_token_id": ends})}
    return files | {CONFIG_FILE: _json(config)}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
