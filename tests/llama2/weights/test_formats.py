"""A format of weights is one file: its parts are cut, stored, loaded and multiplied as its values would be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import KVCache
from llama2.parallel.collectives import connect
from llama2.parallel.plan import allocate, build_mesh, local_size
from llama2.parallel.process_group import init_process_group
from llama2.weights.formats import Format, Weight
from llama2.weights.formats.plain import Plain
from llama2.weights.loader import build_model, load_model
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.spec import Spec
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, ragged_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.toy_format import Int8Groups
from tests.support.weights import random_weights, tiny_args

# Heads of 8 features are narrower than a group of 16; 16 groups of hidden features are 6, 6 and 4 on 3 ranks.
ARGS = tiny_args(dim=96, n_heads=12, n_kv_heads=6)
FORMATS: dict[str, Format] = dict.fromkeys(
    ("tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"), Int8Groups(16)
)

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


class GroupKernels(PlainKernels):
    """What a device adds for a format: a product with its parts."""

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if not isinstance(weight, Weight):
            return super().linear(x, weight)
        codes, scales = weight.parts["codes"].float(), weight.parts["scales"]
        by_group = (scales.shape[-1], -1)
        x, codes = x.unflatten(-1, by_group), codes.unflatten(-1, by_group)
        return torch.einsum("tgi,fgi,fg->tf", x, codes, scales).contiguous()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint in the toy format, and the plain one that it stands for."""
    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    spec, values = Spec(args=ARGS, dtype=torch.float32, formats=FORMATS), random_weights(ARGS)
    state = {}
    for name, (shape, dtype, *_) in spec.tensors().items():
        codes = dtype == torch.int8
        state[name] = torch.randint(-127, 128, shape, dtype=dtype) if codes else (1 + torch.rand(shape)) / 1500
    for name in list(values):
        weight = name.removesuffix(".weight")
        if name in state:
            state[name] = values[name]
        else:
            parts = {part: state[f"{weight}.{part}"] for part in ("codes", "scales")}
            values[name] = spec.format(weight).dequantize(parts)
    dcp.save(state, checkpoint_id=folder / "toy", no_dist=True)
    ARGS.save(folder / "toy")
    return {"toy": str(folder / "toy"), "plain": str(write_checkpoint(folder / "plain", ARGS, values))}


def run(folder: str, formats: dict[str, Format], kernels: PlainKernels | None = None) -> torch.Tensor | None:
    """Logits of all positions of three prompts; with the kernels that the device has, or those given."""
    init_process_group(CPU)
    checkpoint = DcpFolder(folder, formats=formats)
    mesh, collectives = build_mesh(checkpoint.spec, "cpu"), connect(CPU)
    options: dict[str, Any] = {"device": CPU, "max_seq_len": 64, "threads": 1}
    if kernels is None:
        model = load_model(checkpoint, mesh, collectives, dtype=torch.float32, **options)
    else:
        model = build_model(
            checkpoint.spec,
            mesh,
            collectives,
            fill=lambda at_rest: dcp.load(dict(at_rest), checkpoint_id=folder),
            kernels=kernels,
            **options,
        )
    heads = local_size("kv_heads", ARGS.n_kv_heads, mesh)
    cache = KVCache(ARGS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=heads, dtype=model.dtype, device=CPU)
    torch.manual_seed(0)
    batch = ragged_batch([(1, 1), (7, 7), (40, 40)], cache)
    return model(torch.randint(ARGS.vocab_size, (48,)), batch, torch.arange(48))


@pytest.mark.integration
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_format_of_two_parts_gives_the_logits_of_its_values_at_every_degree(
    folders: dict[str, str], degree: int
) -> None:
    whole = run(folders["plain"], {})
    assert whole is not None
    assert whole.std() > 0.1
    expected = run_ranks(degree, run, folders["plain"], {})[0]
    torch.testing.assert_close(expected, whole, atol=1e-5, rtol=0)
    # 3 ranks share plain features as 86, 86, 84 and groups as 6, 6, 4: their sums have other parts.
    tolerance = 1e-5 if degree == 3 else 0
    dequantized = run_ranks(degree, run, folders["toy"], FORMATS)[0]
    torch.testing.assert_close(dequantized, expected, atol=tolerance, rtol=0)
    own = run_ranks(degree, run, folders["toy"], FORMATS, GroupKernels())[0]
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@pytest.mark.integration
def test_weights_may_have_different_formats(folders: dict[str, str], tmp_path: Path) -> None:
    """As a head in 8 bits above layers in 4."""
    toy, plain = DcpFolder(folders["toy"], formats=FORMATS), DcpFolder(folders["plain"])
    mixed = {"output": FORMATS["output"], "w2": FORMATS["w2"]}
    spec = Spec(args=ARGS, dtype=torch.float32, formats=mixed)
    state = {}
    for name, part in spec.tensors().items():
        source = plain if name.endswith(".weight") else toy
        state[name] = source.read(name).reshape(part.shape)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    ARGS.save(tmp_path)
    assert torch.equal(run_ranks(2, run, str(tmp_path), mixed)[0], run_ranks(2, run, folders["plain"], {})[0])


def test_units_and_their_parts_at_rest() -> None:
    tensors = Spec(args=ARGS, dtype=torch.bfloat16, formats=FORMATS).tensors()
    assert {name: tensors[f"layers.0.{name}"].shape for name in SHAPES} == SHAPES
    # A format decides how its inputs are cut, and so how the outputs that they come from are.
    mixed = Spec(args=ARGS, dtype=torch.bfloat16, formats={"w2": Int8Groups(32)})
    assert mixed.units() == {"hidden": 32}
    assert mixed.tensors()["layers.0.feed_forward.w1.weight"].shape == (8, 32, 96)


SHAPES = {
    "attention.wq.codes": (6, 2, 8, 96),
    "attention.wq.scales": (6, 2, 8, 6),
    "attention.wo.codes": (96, 6, 2, 8),
    "attention.wo.scales": (96, 6, 2, 1),
    "feed_forward.w1.codes": (16, 16, 96),
    "feed_forward.w1.scales": (16, 16, 6),
    "feed_forward.w2.codes": (96, 16, 16),
    "feed_forward.w2.scales": (96, 16, 1),
    "attention_norm.weight": (96,),
}


def test_what_a_format_cannot_hold_is_refused(folders: dict[str, str]) -> None:
    odd = replace(ARGS, hidden_dim=250)
    with pytest.raises(ValueError, match="needs a multiple of 16 as hidden, got 250"):
        Spec(args=odd, dtype=torch.float32, formats=FORMATS).tensors()
    with pytest.raises(ValueError, match=r"lacks tensor layers\.0\.attention\.wk\.weight"):
        DcpFolder(folders["toy"], formats=FORMATS | {"wk": Plain(torch.float32)})
    odd_one_out = Spec(args=ARGS, dtype=torch.float32, formats={"wv": Int8Groups(16)})
    init_process_group(CPU)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wv must have the format of what .*wqkv has beside it"):
        allocate(odd_one_out, build_mesh(odd_one_out, "cpu"), device=CPU)
