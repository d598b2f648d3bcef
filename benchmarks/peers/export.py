"""Owns our weights in the formats that peers read: a Hugging Face folder, and a GGUF file.

Knows no peer. Files are kept until the checkpoint changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama2.config import ModelArgs
from llama2.progress import progress
from llama2.weights.hf_writer import HuggingFaceWriter
from llama2.weights.precision import Converted, target
from llama2.weights.readers.dcp import METADATA_FILE, DcpFolder

# Longer than any measured prompt: peers refuse what their config does not allow.
MAX_POSITIONS = 32768
# gguf's names of the types of a weight, and of a file of them.
_GGUF_TYPES = {
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.float32: ("F32", "ALL_F32"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Weights to write. `key` identifies them, and changes when they do.

    `read` gives a parameter by Meta's name, its shape at rest (see `ModelArgs.parameter_shapes`). None where values do
    not matter: a Hugging Face folder then has only a config, and its reader makes random weights on its own device.
    `formats` names the formats of quantized weights. `read_bytes` is what a decoding step reads of the weights: all but
    the embedding table, where it looks up one row per token; None: each is as long as the engine's dtype.
    """

    key: str
    args: ModelArgs
    read: Callable[[str], torch.Tensor] | None
    formats: tuple[str, ...] = ()
    read_bytes: int | None = None

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Source:
        checkpoint = DcpFolder(folder)
        state = f"{folder.resolve()} {(folder / METADATA_FILE).stat().st_mtime_ns}"
        digest = hashlib.sha256(state.encode()).hexdigest()[:8]
        spec = checkpoint.spec
        values = Converted(checkpoint, target(spec, quantize="none"))
        read_bytes = sum(part.nbytes for name, part in spec.tensors().items() if not name.startswith("tok_embeddings"))
        return cls(
            key=f"{folder.resolve().name}-{digest}",
            args=values.spec.args,
            read=values.read,
            formats=tuple(sorted({str(format) for format in spec.formats.values()})),
            read_bytes=read_bytes if spec.formats else None,
        )

    @classmethod
    def of_shape(cls, name: str, args: ModelArgs) -> Source:
        return cls(key=name, args=args, read=None)


def write_hf(source: Source, cache: Path, dtype: torch.dtype) -> Path:
    """A folder that transformers and vLLM load: config.json and, where the weights matter, model.safetensors."""

    def write(folder: Path) -> None:
        folder.mkdir()
        args = replace(source.args, context_length=MAX_POSITIONS)
        writer = HuggingFaceWriter(folder, args, dtype=dtype, tied=False)
        if source.read is not None:
            writer.reserve()
            writer.fill(_progress(args.parameter_shapes()), source.read)
        writer.write_config()

    return _cached(cache / f"{source.key}-{_name(dtype)}-hf", write)


def write_gguf(source: Source, cache: Path, dtype: torch.dtype) -> Path:
    """A GGUF file without a vocabulary: its prompts come as token ids."""

    def write(path: Path) -> None:
        import gguf

        weight_name, file_name = _GGUF_TYPES[dtype]
        weight_type, file_type = gguf.GGMLQuantizationType[weight_name], gguf.LlamaFileType[file_name]
        args, writer = source.args, gguf.GGUFWriter(path, "llama")
        writer.add_file_type(file_type)
        writer.add_context_length(MAX_POSITIONS)
        writer.add_embedding_length(args.dim)
        writer.add_block_count(args.n_layers)
        writer.add_feed_forward_length(args.hidden_dim)
        writer.add_head_count(args.n_heads)
        writer.add_head_count_kv(args.n_kv_heads)
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
        writer.add_rope_dimension_count(args.head_dim)
        writer.add_rope_freq_base(args.rope_theta)
        writer.add_layer_norm_rms_eps(args.norm_eps)
        writer.add_vocab_size(args.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
        shapes = args.parameter_shapes()
        read = source.read or (lambda name: torch.randn(shapes[name]).mul_(0.02))
        for name in _progress(shapes):
            tensor = read(name)
            stored = names.get_name(name, try_suffixes=(".weight",))
            assert stored is not None
            if tensor.dim() == 1:
                writer.add_tensor(stored, tensor.float().numpy())  # llama.cpp wants norms in fp32
            else:
                values = _flat(name, tensor).to(dtype).contiguous()
                writer.add_tensor(stored, values.view(torch.uint8).numpy(), raw_dtype=weight_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _cached(cache / f"{source.key}-{_name(dtype)}.gguf", write)


def _progress(names: Iterable[str]) -> Iterable[str]:
    names = list(names)
    return progress(names, total=len(names), desc="weights for a peer", unit="tensor", leave=False, disable=None)


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Meta's two axes, from the stored ones."""
    return tensor.flatten(1) if name.endswith("wo.weight") else tensor.flatten(0, -2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cached(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, written now, atomically, unless it exists."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            write(partial)
            partial.rename(target)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
    return target
