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
from llama2.weights.formats.groups import repeated
from llama2.weights.readers import Chunk, check_layers, whole
from llama2.weights.readers.gguf_blocks import format_of, read_part
from llama2.weights.spec import Spec, fitting

_ARCHITECTURE = "llama"
# How text is cut into words before the merges, by `tokenizer.ggml.pre`. These are SmolLM2's own two steps.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
_NAMES_OF_WHOLE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_NAMES_OF_LAYER = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_PLAIN = {gguf.GGMLQuantizationType.F32: torch.float32, gguf.GGMLQuantizationType.F16: torch.float16}


class GgufFile:
    """A GGUF file, opened by mmap.

    Attributes:
        spec: all tensors. A type that no format holds exactly is dequantized to bf16.
    """

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
        args = self._read_args()
        self._check_tensors(args)
        self.spec = self._read_spec(args)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, at rest.

        GGUF holds wq and wk with the pairs of the rotary embedding side by side, as Meta's own files do.
        """
        weight, _, part = name.rpartition(".")
        stored, shape = self._stored(weight), self.spec.tensors()[name].shape
        if weight in self.spec.formats:
            return repeated(read_part(stored.data, stored.tensor_type, part), shape).view(shape)
        values = np.array(gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        return torch.from_numpy(values).view(shape)

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

    def _read_spec(self, args: ModelArgs) -> Spec:
        types = {name: self._stored(name).tensor_type for name, axes in args.weight_axes().items() if axes.inputs}
        formats = {name: format_of(type) for name, type in types.items()}
        dtypes = {_PLAIN.get(type, torch.bfloat16) for type in types.values()}
        return Spec(
            args=args,
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.bfloat16,
            formats={name: fitting(format, name, args) for name, format in formats.items() if format},
        )

    def _stored(self, weight: str) -> gguf.ReaderTensor:
        return self._tensors[self._stored_name(weight)]

    def _stored_name(self, weight: str) -> str:
        if weight.startswith("layers."):
            _, index, rest = weight.split(".", 2)
            return f"blk.{index}.{_NAMES_OF_LAYER[rest]}.weight"
        tied = weight == "output" and "output.weight" not in self._tensors
        return f"{_NAMES_OF_WHOLE['tok_embeddings' if tied else weight]}.weight"

    def _check_tensors(self, args: ModelArgs) -> None:
        check_layers(args, self._tensors, "the metadata", self.path)
        shapes = args.parameter_shapes()
        wanted = {self._stored_name(name.removesuffix(".weight")): shape for name, shape in shapes.items()}
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
