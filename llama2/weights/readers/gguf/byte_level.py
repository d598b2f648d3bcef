"""Owns the way from a GGUF file's byte-level vocabulary to a `tokenizer.json`. Knows no weights.

`tokenizer.ggml.pre` names how text is cut into words before the merges. The expressions are those of the models' own
tokenizers; llama.cpp's `llama-vocab.cpp` lists which name stands for which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from llama2.weights.readers.gguf.metadata import Metadata
from llama2.weights.readers.gguf.vocabulary import Vocabulary


class Words(NamedTuple):
    """How words are cut: by one expression after the other, each match and each gap by itself.

    `whole`: a word that is a piece is one token, whatever the merges. `adds_bos`: where the file does not say.
    """

    cuts: tuple[str, ...]
    whole: bool = False
    adds_bos: bool = False


_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_SEED_CODER = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"(?:[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*)"
_TEKKEN = rf"{_CASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT_4O = rf"{_CASES}{_ENGLISH}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
# DeepSeek spells out the letters that have case, of a Unicode of its time.
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KINDS: tuple[tuple[str, Words], ...] = (
    ("default", Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 mpt olmo gigachat mellum trillion", Words((_GPT_2,))),
    ("smollm starcoder refact command-r codeshell minerva-7b", Words((r"\p{N}", _GPT_2))),
    ("llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 lfm2", Words((_LLAMA_3,), whole=True, adds_bos=True)),
    ("smaug-bpe", Words((_LLAMA_3,))),
    ("tekken", Words((_TEKKEN,), whole=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2", Words((_GPT_4O,))),
    ("qwen2 stablelm2 megrez deepseek-r1-qwen", Words((_QWEN_2,))),
    ("seed-coder", Words((_SEED_CODER,))),
    (
        "deepseek-llm",
        Words((r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?{_DEEPSEEK_MARKS}", r"\s+$", _DEEPSEEK_ASIAN, r"\p{N}")),
    ),
    ("deepseek-coder", Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, r"\p{N}"))),
    ("viking", Words((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"))),
)
WORDS: Mapping[str, Words] = MappingProxyType({name: words for names, words in _KINDS for name in names.split()})


def words(metadata: Metadata) -> Words:
    """How the file's words are cut.

    Raises:
        ValueError: it does not say, or in a way that is not known here.
    """
    key = "tokenizer.ggml.pre"
    name = metadata.get(key, str, "")
    if name not in WORDS:
        said = f"says that words are cut as {name!r} ({key})" if name else f"does not say how words are cut ({key})"
        raise ValueError(
            f"{metadata.path} {said}; known are {', '.join(WORDS)}; --tokenizer_path takes the model's own tokenizer"
        )
    return WORDS[name]


def build(metadata: Metadata, vocabulary: Vocabulary, cut: Words, *, adds_bos: bool) -> bytes:
    """The content of a `tokenizer.json`.

    Raises:
        ValueError: a piece is there twice, or a merge names what is none.
    """
    pieces = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    if len(pieces) != len(vocabulary.pieces):
        twice = next(piece for index, piece in enumerate(vocabulary.pieces) if pieces[piece] != index)
        raise ValueError(f"{metadata.path}: tokenizer.ggml.tokens has {twice!r} twice")
    merges = []
    for merge in metadata.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in pieces or right not in pieces or left + right not in pieces:
            raise ValueError(f"{metadata.path}: tokenizer.ggml.merges has {merge!r}, and not all of it are pieces")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(pieces, merges, ignore_merges=cut.whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in cut.cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_added(vocabulary, TokenType.CONTROL)))
    tokenizer.add_tokens(list(_added(vocabulary, TokenType.USER_DEFINED)))
    if adds_bos:
        index = vocabulary.named["bos"]
        bos = vocabulary.pieces[index]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, index)]
        )
    return tokenizer.to_str(pretty=True).encode()


def _added(vocabulary: Vocabulary, wanted: TokenType) -> Iterator[AddedToken]:
    for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True):
        if kind == wanted:
            yield AddedToken(piece, special=wanted == TokenType.CONTROL, normalized=False)
