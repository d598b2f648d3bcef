"""Every type of GGUF comes as the values that the gguf package gives: to the bit, or as bf16, and then it is said."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from llama2.config import ModelArgs
from llama2.kv_cache import KVCache
from llama2.parallel.collectives import connect
from llama2.parallel.plan import build_mesh, local_size
from llama2.parallel.process_group import init_process_group
from llama2.weights.convert import convert
from llama2.weights.loader import load_model
from llama2.weights.precision import Converted, target
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.gguf.file import GgufFile
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, ragged_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_files import gguf_name, random_blocks, write_gguf
from tests.support.ranks import run_ranks
from tests.support.weights import meta_shape, meta_weights, random_weights, tiny_args

EXACT = (
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q6_K, Type.IQ4_NL),
    *(Type.IQ4_XS, Type.MXFP4),
)
ROUNDED = (
    *(Type.Q5_1, Type.Q5_K, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S),
    *(Type.TQ1_0, Type.TQ2_0),
)
# Heads of 32 features are narrower than a super-group, those of 8 than a group, and 96 divides no 256.
SHAPES = {
    "narrow heads": tiny_args(dim=256, n_heads=8, n_layers=1, multiple_of=256),
    "narrower heads": tiny_args(dim=256, n_heads=32, n_kv_heads=8, n_layers=1, multiple_of=256),
    "odd heads": tiny_args(dim=768, n_heads=8, n_layers=1, hidden_dim=512),
    "wide heads": tiny_args(dim=512, n_heads=2, n_kv_heads=1, n_layers=1, hidden_dim=256),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


def matrices(args: ModelArgs) -> list[str]:
    return [name for name, axes in args.weight_axes().items() if axes.inputs]


def stored_values(path: Path, args: ModelArgs) -> dict[str, torch.Tensor]:
    """What the gguf package makes of each matrix."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = {name: stored[gguf_name(f"{name}.weight")] for name in matrices(args)}
    return {
        f"{name}.weight": torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
def test_a_type_that_has_a_format_is_exact(tmp_path: Path, kind: Type, shape: str) -> None:
    args = SHAPES[shape]
    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), types=dict.fromkeys(matrices(args), kind))
    model = GgufFile(path)
    assert model.notes == []
    assert model.spec.formats.keys() == set(matrices(args))
    ours = meta_weights(model)
    for name, values in stored_values(path, args).items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name].view(torch.int32), values.view(torch.int32)), name


@pytest.mark.parametrize("kind", [*EXACT, *ROUNDED], ids=lambda kind: kind.name)
def test_any_bytes_are_the_values_that_gguf_gives(kind: Type) -> None:
    """Blocks are of any bytes, and their values of a weight's size: else the test would test little."""
    values = gguf.dequantize(random_blocks(kind, 64, 512), kind)
    assert np.isfinite(values).all()
    assert 0.5 < values.std() * 512**0.5 < 2


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_another_type_becomes_bf16(tmp_path: Path, kind: Type) -> None:
    args = SHAPES["narrow heads"]
    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), types=dict.fromkeys(matrices(args), kind))
    model = GgufFile(path)
    assert (model.spec.dtype, model.spec.formats) == (torch.bfloat16, {})
    elements = sum(np.prod(meta_shape(f"{name}.weight", args)) for name in matrices(args))
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    assert model.notes == [
        f"9 weights in {kind.name} become bfloat16, {elements * 2 / 1e6:.1f} MB instead of "
        f"{elements / values * nbytes / 1e6:.1f} MB"
    ]
    for name, expected in stored_values(path, args).items():
        assert torch.equal(model.read(name).view(expected.shape), expected.bfloat16()), name


def test_plain_types(tmp_path: Path) -> None:
    """A file of one plain type keeps it; beside others, fp16 and fp32 become bf16, and that is said."""
    args = SHAPES["narrow heads"]
    weights = random_weights(args)
    for kind, dtype in ((Type.F16, torch.float16), (Type.BF16, torch.bfloat16)):
        types = dict.fromkeys(matrices(args), kind)
        model = GgufFile(write_gguf(tmp_path / "model.gguf", args, weights, types=types))
        assert (model.spec.dtype, model.notes) == (dtype, [])
        assert torch.equal(meta_weights(model)["output.weight"], weights["output.weight"].to(dtype))
    types = dict.fromkeys(matrices(args), Type.Q8_0) | {"output": Type.F16, "tok_embeddings": Type.BF16}
    model = GgufFile(write_gguf(tmp_path / "model.gguf", args, weights, types=types))
    assert model.spec.dtype == torch.bfloat16
    assert model.notes == ["output in F16 becomes bfloat16, 0.0 MB instead of 0.0 MB"]


def test_groups_that_fill_no_head_become_bf16(tmp_path: Path) -> None:
    """Heads of 100 features, in groups of 32: the other matrices stay quantized."""
    args = tiny_args(dim=800, n_heads=8, n_layers=1, hidden_dim=64)
    types = dict.fromkeys(matrices(args), Type.Q4_0)
    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), types=types)
    model = GgufFile(path)
    assert set(matrices(args)) - model.spec.formats.keys() == {"layers.0.attention.wo"}
    assert model.notes == ["layers.0.attention.wo in Q4_0 becomes bfloat16, 1.3 MB instead of 0.4 MB"]
    wo = "layers.0.attention.wo.weight"
    assert torch.equal(model.read(wo).view(800, 800), stored_values(path, args)[wo].bfloat16())


@pytest.mark.parametrize("kind", [Type.Q8_1, Type.Q8_K, Type.I32, Type.F64], ids=lambda kind: kind.name)
def test_a_type_that_gguf_cannot_dequantize_is_named(tmp_path: Path, kind: Type) -> None:
    args = SHAPES["narrow heads"]
    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), types={"output": Type.Q8_0})
    content = bytearray(path.read_bytes())
    name = struct.pack("<Q", 13) + b"output.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and their sizes
    assert content[place] == Type.Q8_0
    content[place] = kind
    # It is the last one: larger elements would end behind the file.
    path.write_bytes(content + bytes(args.dim * args.vocab_size * 8))
    with pytest.raises(ValueError, match=rf"'output\.weight' is of type {kind.name}, which the .* cannot dequantize"):
        GgufFile(path)


# As a file in Q4_K_M: the more sensitive half of the layers has wv and w2 in Q6_K.
MIXED = tiny_args(dim=256, n_heads=8, n_layers=2, hidden_dim=1024)
TYPES = dict.fromkeys(matrices(MIXED), Type.Q4_K) | {
    "output": Type.Q6_K,
    "layers.1.attention.wv": Type.Q6_K,
    "layers.1.feed_forward.w2": Type.Q6_K,
    "layers.0.attention.wq": Type.Q3_K,
    "layers.0.attention.wk": Type.IQ4_XS,
    "layers.1.feed_forward.w1": Type.MXFP4,
    "layers.1.feed_forward.w3": Type.Q5_K,
}


def logits(folder: str) -> torch.Tensor | None:
    """Logits in fp32 of all positions of three prompts."""
    init_process_group(CPU)
    checkpoint = DcpFolder(folder)
    mesh, collectives = build_mesh(checkpoint.spec, "cpu"), connect(CPU)
    model = load_model(checkpoint, mesh, collectives, dtype=torch.float32, device=CPU, max_seq_len=64, threads=1)
    heads = local_size("kv_heads", MIXED.n_kv_heads, mesh)
    cache = KVCache(
        MIXED, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=heads, dtype=model.dtype, device=CPU
    )
    torch.manual_seed(0)
    batch = ragged_batch([(1, 1), (7, 7), (40, 40)], cache)
    return model(torch.randint(MIXED.vocab_size, (48,)), batch, torch.arange(48))


def convert_here(source: str, folder: str) -> None:
    init_process_group(CPU)
    convert(source, folder, verify=True)


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixed_file_has_the_logits_of_its_values(
    tmp_path: Path, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "model.gguf", MIXED, random_weights(MIXED), types=TYPES)
    with caplog.at_level(logging.INFO):
        if processes == 1:
            convert(path, tmp_path / "quantized", verify=True)
            assert "layers.1.feed_forward.w3 in Q5_K becomes bfloat16, 0.5 MB instead of 0.2 MB" in caplog.messages
        else:
            run_ranks(processes, convert_here, str(path), str(tmp_path / "quantized"))
    values = meta_weights(Converted(GgufFile(path), target(GgufFile(path).spec, dtype=torch.float32, quantize="none")))
    rounded = "layers.1.feed_forward.w3.weight"
    for name, expected in stored_values(path, MIXED).items():
        assert torch.equal(values[name], expected.bfloat16().float() if name == rounded else expected), name
    norms = {name: value.bfloat16().float() for name, value in values.items() if value.dim() == 1}
    plain = write_checkpoint(tmp_path / "plain", MIXED, values | norms)
    exact = logits(str(plain))
    assert exact is not None
    assert exact.std() > 0.1
    for degree in (1, 2):
        actual = run_ranks(degree, logits, str(tmp_path / "quantized"))[0]
        torch.testing.assert_close(actual, exact, atol=1e-4, rtol=0)
