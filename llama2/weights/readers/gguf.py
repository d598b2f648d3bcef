"""Owns the reading of a GGUF file of the Llama architecture: its sizes, its weights, its byte-level tokenizer.

Knows no other checkpoint format. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama2.config import ModelArgs
from llama2.text.tokenizer_files import BPE_FILE, CONFIG_FILE
from llama2.weights.readers import Chunk, check_layers, whole

_ARCHITECTURE = "llama"
# How text is cut into words before the merges, by `tokenizer.ggml.pre`. These are SmolLM2's own two steps.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
_NAMES_OF_WHOLE = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
_NAMES_OF_LAYER = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}


class GgufFile:
    """A GGUF file, opened by mmap.

    Attributes:
        args: the architecture.
        dtype: fp32, to which every weight is dequantized.
    """

    dtype = torch.float32

    def __init__(self, path: Path | str) -> None:
        """Read the metadata and compare the list of tensors with it.

        Raises:
            ValueError: the file is no whole GGUF file, or no model that this project can run.
        """
        self.path = Path(path)
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (OSError, ValueError, LookupError, OverflowError, MemoryError, struct.error) as error:
            raise ValueError(f"{self.path} is not a whole GGUF file: {error}") from None
        architecture = self._field("general.architecture")
        if architecture != _ARCHITECTURE:
            raise ValueError(f"{self.path}: architecture must be {_ARCHITECTURE!r}, got {architecture!r}")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.args = self._read_args()
        self._check_tensors()

    def read(self, name: str) -> torch.Tensor:
        """Parameter `name`, at rest.

        GGUF holds wq and wk with the pairs of the rotary embedding side by side, as Meta's own files do.
        """
        stored = self._tensors[self._stored_name(name)]
        values = np.array(gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        return torch.from_numpy(values).view(self.args.parameter_shapes()[name])

    def chunks(self, name: str) -> list[Chunk]:
        return whole(self, name)

    def write_tokenizer(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as the tokenizers library and transformers read them.

        Raises:
            ValueError: as `check_tokenizer`, or the tokenizer is damaged.
        """
        self.check_tokenizer()
        try:
            tokenizer, config = self._build_tokenizer(), self._tokenizer_config()
        except Exception as error:  # the tokenizers library raises no class of its own
            raise ValueError(f"{self.path}: the tokenizer in the metadata is damaged: {error}") from None
        tokenizer.save(str(Path(folder) / BPE_FILE))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")

    def check_tokenizer(self) -> None:
        """Raises ValueError if the vocabulary is not byte-level, or words are cut for it in a way not known here."""
        kind, cut = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != "gpt2" or cut not in _PRE_TOKENIZERS:
            allowed = ", ".join(_PRE_TOKENIZERS)
            raise ValueError(
                f"{self.path} is a GGUF file of a kind that is not read yet: its tokenizer is {kind!r} with words cut "
                f"as {cut!r}, and only gpt2 with {allowed} is known; Meta's own folder is read"
            )

    def _build_tokenizer(self) -> Tokenizer:
        pieces, types = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[self._field("tokenizer.ggml.pre")]()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(_added(pieces, types, gguf.TokenType.CONTROL)))
        tokenizer.add_tokens(list(_added(pieces, types, gguf.TokenType.USER_DEFINED)))
        return tokenizer

    def _tokenizer_config(self) -> dict[str, Any]:
        pieces = self._field("tokenizer.ggml.tokens")
        config = {
            "add_bos_token": self._field("tokenizer.ggml.add_bos_token", False),
            "chat_template": self._field("tokenizer.chat_template", None),
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
            index = self._field(f"tokenizer.ggml.{key}_token_id", None)
            config[f"{name}_token"] = None if index is None else pieces[index]
        return {key: value for key, value in config.items() if value is not None}

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path}: the metadata has no {key!r}")

    def _read_args(self) -> ModelArgs:
        def of(key: str, *default: Any) -> Any:
            return self._field(f"{_ARCHITECTURE}.{key}", *default)

        experts, scaling = of("expert_count", 0), of("rope.scaling.type", "none")
        if experts:
            raise ValueError(f"{self.path}: a mixture of {experts} experts is not supported, only dense models")
        if scaling != "none":
            raise ValueError(f"{self.path}: rotary scaling {scaling!r} is not supported")
        dim, n_heads = of("embedding_length"), of("attention.head_count")
        # The file holds fp32: the shortest decimal of that number is what was meant (1e-05, not 9.99999974e-06).
        norm_eps, rope_theta = (
            float(str(np.float32(value)))
            for value in (of("attention.layer_norm_rms_epsilon"), of("rope.freq_base", 10000.0))
        )
        return ModelArgs(
            dim=dim,
            n_layers=of("block_count"),
            n_heads=n_heads,
            n_kv_heads=of("attention.head_count_kv", n_heads),
            head_dim=of("attention.key_length", dim // n_heads),
            hidden_dim=of("feed_forward_length"),
            vocab_size=len(self._field("tokenizer.ggml.tokens")),
            norm_eps=norm_eps,
            rope_theta=rope_theta,
            context_length=of("context_length", None),
        )

    def _stored_name(self, name: str) -> str:
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            return f"blk.{index}.{_NAMES_OF_LAYER[rest]}"
        stored = _NAMES_OF_WHOLE[name]
        tied = name == "output.weight" and stored not in self._tensors
        return _NAMES_OF_WHOLE["tok_embeddings.weight"] if tied else stored

    def _check_tensors(self) -> None:
        check_layers(self.args, self._tensors, "the metadata", self.path)
        wanted = {self._stored_name(name): shape for name, shape in self.args.parameter_shapes().items()}
        for name in sorted(wanted.keys() ^ self._tensors.keys()):
            what = "is missing" if name in wanted else "is not part of a Llama model"
            raise ValueError(f"{self.path}: tensor {name!r} {what}")
        for name, shape in wanted.items():
            stored = self._tensors[name]
            if stored.n_elements != np.prod(shape):
                raise ValueError(
                    f"{self.path}: tensor {name!r} has {stored.n_elements} elements, the metadata says {np.prod(shape)}"
                )


def _added(pieces: list[str], types: list[int], wanted: gguf.TokenType) -> Iterator[AddedToken]:
    for piece, kind in zip(pieces, types, strict=True):
        if kind == wanted:
            yield AddedToken(piece, special=wanted == gguf.TokenType.CONTROL, normalized=False)
