"""Owns the reading of a Hugging Face folder: which weights of ours its tensors are.

Knows no file format, which is `tensor_files`' affair. Quantized weights of a kind get a reader of their own, in a file
beside this one, of the same config and the same files.
"""

from __future__ import annotations

import logging
from functools import reduce
from pathlib import Path

import torch

from llama2.weights.readers import Chunk, Reader, check_layers, whole
from llama2.weights.readers.hf_config import CONFIG_FILE, HuggingFaceConfig
from llama2.weights.readers.hf_layout import hf_name, hf_shapes, is_rotated, pairs_from_halves
from llama2.weights.readers.tensor_files import TensorFiles, own_storage
from llama2.weights.spec import Spec

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A buffer that older versions of transformers saved: it follows from the config.
_IGNORED = ".rotary_emb.inv_freq"


def open_hugging_face(path: Path) -> Reader:
    """A reader for a folder, or for one of its files alone.

    Raises:
        ValueError: a file is missing or damaged, or the model is of a kind that is not read.
    """
    config = HuggingFaceConfig.read((path.parent if path.is_file() else path) / CONFIG_FILE)
    if config.quantization is not None:
        method = config.quantization.get("quant_method", "an unknown method")
        raise ValueError(f"{path}: weights quantized by {method!r} are not read yet, only bf16, fp16 and fp32")
    return HuggingFaceFolder(path, config, TensorFiles(path))


class HuggingFaceFolder:
    """Plain weights, mapped and not read.

    Attributes:
        spec: all of its tensors. Where dtypes differ, it has one that holds them all exactly.

    Raises:
        ValueError: a tensor is missing, unknown, or not what the config says.
    """

    def __init__(self, path: Path, config: HuggingFaceConfig, files: TensorFiles) -> None:
        self.path = path
        self._files = files
        self._tied = config.tied
        args = config.args
        check_layers(args, (name.removeprefix("model.") for name in files), CONFIG_FILE, path)
        self._head_dim = args.head_dim
        self._check_tensors({self._stored_name(weight): shape for weight, shape in hf_shapes(args).items()})
        if config.tied:
            self._check_tied()
        dtypes = [tensor.dtype for name, tensor in files.items() if not name.endswith(_IGNORED)]
        self.spec = Spec(args=args, dtype=reduce(torch.promote_types, dtypes))
        if len(set(dtypes)) > 1:
            names = ", ".join(sorted(map(str, set(dtypes))))
            logger.info("%s has weights in %s: all become %s, if no other is asked for", path, names, self.spec.dtype)
        self._shapes = args.parameter_shapes()

    def read(self, name: str) -> torch.Tensor:
        """See `Reader`."""
        weight = name.removesuffix(".weight")
        values = own_storage(self._files[self._stored_name(weight)])
        if is_rotated(weight):
            values = pairs_from_halves(values, self._head_dim)
        return values.view(self._shapes[name])

    def chunks(self, name: str) -> list[Chunk]:
        """See `Reader`."""
        return whole(self, name, self._shapes[name])

    def _stored_name(self, weight: str) -> str:
        name = _stored(weight)
        return _stored("tok_embeddings") if weight == "output" and self._tied and name not in self._files else name

    def _check_tied(self) -> None:
        head, embedding = (self._files.get(_stored(weight)) for weight in ("output", "tok_embeddings"))
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError(
                f"{self.path}: {CONFIG_FILE} ties {_stored('output')} to the embedding, from which it differs"
            )

    def _check_tensors(self, wanted: dict[str, tuple[int, ...]]) -> None:
        for name in sorted(wanted.keys() - self._files.keys()):
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        for name, tensor in self._files.items():
            if name.endswith(_IGNORED):
                continue
            file, shape = self._files.file_of(name), tuple(tensor.shape)
            if name not in wanted:
                raise ValueError(f"{file}: tensor {name[:100]!r} is not part of a Llama model")
            if shape != wanted[name]:
                raise ValueError(f"{file}: {name} has shape {shape}, expected {wanted[name]} by {CONFIG_FILE}")
            if tensor.dtype not in _DTYPES:
                allowed = ", ".join(str(allowed) for allowed in _DTYPES)
                raise ValueError(f"{file}: {name} is {tensor.dtype}, expected one of {allowed}")


def _stored(weight: str) -> str:
    return f"{hf_name(weight)}.weight"
