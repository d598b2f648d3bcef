"""Owns the reading of a Hugging Face folder: which weights of ours its tensors are.

Knows no file format, which is `tensor_files`' affair, and no method of quantization, which are those in `quantized/`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llama2.weights.formats import Format
from llama2.weights.readers import Chunk, check_layers, note_of_plain, whole
from llama2.weights.readers.hf_config import CONFIG_FILE, HuggingFaceConfig
from llama2.weights.readers.hf_layout import hf_name, hf_shapes, is_rotated, pairs_from_halves
from llama2.weights.readers.quantized import Method, StoredWeight, dequantized
from llama2.weights.readers.quantized.awq import Awq
from llama2.weights.readers.quantized.bitsandbytes import BitsAndBytes
from llama2.weights.readers.quantized.gptq import Gptq
from llama2.weights.readers.quantized.integers import IntegerWeight
from llama2.weights.readers.tensor_files import TensorFiles, own_storage
from llama2.weights.spec import Spec, fitting

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A buffer that older versions of transformers saved: it follows from the config.
_IGNORED = ".rotary_emb.inv_freq"
_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Method]] = MappingProxyType(
    {"gptq": Gptq.read, "awq": Awq.read, "bitsandbytes": BitsAndBytes.read}
)


def open_hugging_face(path: Path) -> HuggingFaceFolder:
    """A reader for a folder, or for one of its files alone.

    Raises:
        ValueError: a file is missing or damaged, or the model is of a kind that is not read.
    """
    config_file = (path.parent if path.is_file() else path) / CONFIG_FILE
    config = HuggingFaceConfig.read(config_file)
    method: Method | None = None
    if config.quantization is not None:
        name = config.quantization.get("quant_method")
        if not isinstance(name, str) or name not in _METHODS:
            raise ValueError(
                f"{config_file}: weights quantized by {name!r} are not read, only by {', '.join(_METHODS)}"
            )
        try:
            method = _METHODS[name](config.quantization)
        except ValueError as error:
            raise ValueError(f"{config_file}: quantization_config: {error}") from None
    return HuggingFaceFolder(path, config, TensorFiles(path), method)


class HuggingFaceFolder:
    """Weights of a folder, mapped and not read.

    Attributes:
        spec: all of its tensors. Where dtypes of plain ones differ, it has one that holds them all exactly.
        notes: a line for each kind of weights that are quantized in the files and plain here.
        hidden_orders: by the number of a layer whose hidden features are in another order here, each one's place in the
            files.

    Raises:
        ValueError: a tensor is missing, unknown, or not what the config says.
    """

    def __init__(self, path: Path, config: HuggingFaceConfig, files: TensorFiles, method: Method | None) -> None:
        self.path = path
        self._files = files
        self._tied = config.tied
        args = config.args
        check_layers(args, (name.removeprefix("model.") for name in files), CONFIG_FILE, path)
        self._head_dim = args.head_dim
        self._stored_shapes = hf_shapes(args)
        self._quantized: dict[str, StoredWeight] = {}
        if method is not None:
            self._open_quantized(method)
        dtypes = self._check_plain()
        if config.tied:
            self._check_tied()
        self.hidden_orders: dict[str, torch.Tensor] = {}
        self._sort_hidden()
        formats: dict[str, Format] = {}
        for weight, stored in self._quantized.items():
            try:
                fitted = fitting(stored.format, weight, args)
            except ValueError:
                continue
            if stored.holds(getattr(fitted, "group", None)):
                formats[weight] = fitted
        self.spec = Spec(args=args, dtype=reduce(torch.promote_types, dtypes), formats=formats)
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            logger.info("%s has weights in %s: all become %s, if no other is asked for", path, names, self.spec.dtype)
        self._shapes = {name: tensor.shape for name, tensor in self.spec.tensors().items()}

    @property
    def precisions(self) -> dict[str, str]:
        """How the weights that are quantized in the files are stored there, by their names."""
        return {weight: stored.kind for weight, stored in self._quantized.items()}

    @property
    def notes(self) -> list[str]:
        plain: dict[str, list[str]] = {}
        for weight, stored in self._quantized.items():
            if weight not in self.spec.formats:
                plain.setdefault(stored.kind, []).append(weight)
        tensors = self.spec.tensors()
        return [
            note_of_plain(
                weights,
                kind,
                self.spec.dtype,
                nbytes=sum(tensors[f"{weight}.weight"].nbytes for weight in weights),
                stored=sum(self._quantized[weight].nbytes for weight in weights),
            )
            for kind, weights in plain.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        """See `Reader`."""
        weight, _, part = name.rpartition(".")
        shape, stored = self._shapes[name], self._quantized.get(weight)
        if stored is None:
            values = own_storage(self._files[self._stored_name(weight)])
        elif weight in self.spec.formats:
            outputs, inputs = self._stored_shapes[weight]
            values = stored.read(part, inputs * outputs // math.prod(shape))
        else:
            values = dequantized(stored, self.spec.dtype)
        if is_rotated(weight):
            values = pairs_from_halves(values, self._head_dim)
        if weight.endswith((".w1", ".w3")) and (order := self.hidden_orders.get(_layer(weight))) is not None:
            values = values[order]
        return values.view(shape)

    def chunks(self, name: str) -> list[Chunk]:
        """See `Reader`."""
        return whole(self, name, self._shapes[name])

    def _stored_name(self, weight: str) -> str:
        tied = weight == "output" and self._tied and _stored(weight) not in self._files
        return _stored("tok_embeddings" if tied else weight)

    def _open_quantized(self, method: Method) -> None:
        for weight, shape in self._stored_shapes.items():
            # A norm is a vector, and the embedding is not multiplied by.
            if len(shape) == 2 and weight != "tok_embeddings":
                stored = method.open(self._files, hf_name(weight), (shape[0], shape[1]))
                if stored is not None:
                    self._quantized[weight] = stored
        if not self._quantized:
            raise ValueError(f"{self.path}: {CONFIG_FILE} has a quantization_config, but no weight is quantized so")

    def _check_plain(self) -> set[torch.dtype]:
        """The dtypes of the tensors that are not quantized, once all are what the config says."""
        plain = self._stored_shapes.keys() - self._quantized.keys()
        wanted = {self._stored_name(weight): self._stored_shapes[weight] for weight in plain}
        quantized = {name for stored in self._quantized.values() for name in stored.names}
        for name in sorted(self._files.keys() - wanted.keys() - quantized):
            if not name.endswith(_IGNORED):
                file = self._files.file_of(name)
                raise ValueError(f"{file}: tensor {name[:100]!r} is not part of a Llama model")
        return {self._files.take(name, shape, _DTYPES, by=CONFIG_FILE).dtype for name, shape in sorted(wanted.items())}

    def _check_tied(self) -> None:
        head, embedding = (self._files.get(_stored(weight)) for weight in ("output", "tok_embeddings"))
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError(
                f"{self.path}: {CONFIG_FILE} ties {_stored('output')} to the embedding, from which it differs"
            )

    def _sort_hidden(self) -> None:
        """Bring the inputs of w2 into the order of its groups: they are the outputs of w1 and w3."""
        for weight, stored in self._quantized.items():
            if weight.endswith(".w2") and isinstance(stored, IntegerWeight) and stored.order_C is not None:
                self.hidden_orders[_layer(weight)] = stored.order_C
                self._quantized[weight] = stored.ordered(stored.order_C)


def _stored(weight: str) -> str:
    return f"{hf_name(weight)}.weight"


def _layer(weight: str) -> str:
    return weight.split(".")[1]
