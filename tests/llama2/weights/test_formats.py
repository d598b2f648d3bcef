"""A quantized weight is cut, stored, loaded and multiplied as its values would be, whatever its format."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llama2.kv_cache import KVCache
from llama2.parallel.collectives import connect
from llama2.parallel.plan import allocate, build_mesh, local_size
from llama2.parallel.process_group import init_process_group
from llama2.parallel.splits import mesh_shape
from llama2.weights.formats import Format
from llama2.weights.formats.catalog import load_formats, save_formats
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q4k import Q4K
from llama2.weights.formats.q8 import Q8
from llama2.weights.kinds import FORMATS_FILE
from llama2.weights.loader import load_model
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.spec import Spec
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, ragged_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.weights import meta_weights, random_weights, tiny_args

# Formats, and about how large their scales are for values of 0.1.
FORMATS: list[tuple[Format, dict[str, float]]] = [
    (Q8(group=16), {"scales": 1e-3}),
    (Q8(group=None, scales=torch.float32), {"scales": 1e-3}),
    (Q4(group=16), {"scales": 0.02}),
    (Q4(group=None, zero=8), {"scales": 0.02}),
    (Q4K(group=16), {"scales": 0.02, "mins": -0.15}),
    (Q4K(group=16, super_group=32), {"super_scales": 2e-4, "super_mins": -1e-3}),
    (Lut4(table="nf4", group=16), {"scales": 0.2}),
    (Lut4(table="nf4", group=16, scales=torch.uint8), {"output_scales": 2e-3}),
]
# A layer for each. Heads of 8 features are narrower than a group; 16 groups of hidden features are 6, 6 and 4 on 3
# ranks.
ARGS = tiny_args(dim=96, n_heads=12, n_kv_heads=6, n_layers=len(FORMATS))
WEIGHTS = [name for name, axes in ARGS.weight_axes().items() if axes.inputs]

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


def place(name: str) -> int:
    """Where in `FORMATS` the format of a weight is: as its layer; the last of wqkv has another than the first two."""
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    return (layer + name.endswith("wv")) % len(FORMATS)


SPEC = Spec(args=ARGS, dtype=torch.float32, formats={name: FORMATS[place(name)][0] for name in WEIGHTS})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint in all formats, with any codes, and the plain one that it stands for."""
    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    norms, state = random_weights(ARGS), {}
    for name, (shape, dtype, *_) in SPEC.tensors().items():
        weight, _, part = name.rpartition(".")
        sizes = FORMATS[place(weight)][1]
        if part == "weight":
            state[name] = norms[name]
        elif part in sizes:
            state[name] = (sizes[part] * (0.5 + torch.rand(shape))).to(dtype)
        else:
            low, high = (-127, 128) if dtype == torch.int8 else (0, 16 if part == "zeros" else 256)
            state[name] = torch.randint(low, high, shape, dtype=dtype)
    dcp.save(state, checkpoint_id=folder / "quantized", no_dist=True)
    SPEC.save(folder / "quantized")
    values = meta_weights(DcpFolder(folder / "quantized"))
    return {
        "quantized": str(folder / "quantized"),
        "plain": str(write_checkpoint(folder / "plain", ARGS, values)),
    }


def run(folder: str, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """Logits of all positions of three prompts."""
    init_process_group(CPU)
    checkpoint = DcpFolder(folder)
    mesh, collectives = build_mesh(checkpoint.spec, "cpu"), connect(CPU)
    model = load_model(checkpoint, mesh, collectives, dtype=dtype, device=CPU, max_seq_len=64, threads=1)
    heads = local_size("kv_heads", ARGS.n_kv_heads, mesh)
    cache = KVCache(ARGS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=heads, dtype=model.dtype, device=CPU)
    torch.manual_seed(0)
    batch = ragged_batch([(1, 1), (7, 7), (40, 40)], cache)
    return model(torch.randint(ARGS.vocab_size, (48,)), batch, torch.arange(48))


@pytest.mark.integration
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_any_formats_give_the_logits_of_their_values_at_every_degree(folders: dict[str, str], degree: int) -> None:
    whole = run(folders["plain"])
    assert whole is not None
    assert whole.std() > 0.1
    actual = run_ranks(degree, run, folders["quantized"])[0]
    torch.testing.assert_close(actual, whole, atol=1e-4, rtol=0)


@pytest.mark.integration
@pytest.mark.parametrize("degree", [1, 2])
def test_the_same_in_bf16(folders: dict[str, str], degree: int) -> None:
    """About as near to the exact logits as those of values that are rounded to bf16."""
    exact = run(folders["plain"])
    assert exact is not None
    rounded = run_ranks(degree, run, folders["plain"], torch.bfloat16)[0]
    actual = run_ranks(degree, run, folders["quantized"], torch.bfloat16)[0]
    assert (actual - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


def shares(folder: str) -> dict[str, torch.Tensor]:
    """The values of this rank's share of every weight that is cut along its inputs."""
    init_process_group(CPU)
    checkpoint = DcpFolder(folder)
    weights, at_rest = allocate(checkpoint.spec, build_mesh(checkpoint.spec, "cpu"), device=CPU)
    checkpoint.load(at_rest)
    return {name: weight[0].dequantize() for name, weight in weights.items() if name.endswith(("wo", "w2"))}


@pytest.mark.integration
@pytest.mark.parametrize("degree", [2, 3, 6])
def test_the_shares_of_all_ranks_are_the_whole_weight(folders: dict[str, str], degree: int) -> None:
    """To the bit, at degrees that divide neither heads nor groups."""
    (whole,), parts = run_ranks(1, shares, folders["quantized"]), run_ranks(degree, shares, folders["quantized"])
    assert len(whole) == 2 * ARGS.n_layers
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), values), name


def test_units_and_their_parts_at_rest() -> None:
    tensors = Spec(args=ARGS, dtype=torch.bfloat16, formats=dict.fromkeys(WEIGHTS, Q4(group=16))).tensors()
    assert {name: tensors[f"layers.0.{name}"].shape for name in SHAPES} == SHAPES
    # A format decides how its inputs are cut, and so how the outputs that they come from are.
    mixed = Spec(args=ARGS, dtype=torch.bfloat16, formats={"layers.3.feed_forward.w2": Q8(group=32)})
    assert mixed.units() == {"hidden": 32}
    assert mixed.tensors()["layers.0.feed_forward.w1.weight"].shape == (8, 32, 96)


SHAPES = {
    "attention.wq.codes": (6, 2, 8, 48),
    "attention.wq.scales": (6, 2, 8, 6),
    "attention.wo.codes": (96, 6, 2, 4),
    "attention.wo.scales": (96, 6, 2, 1),
    "feed_forward.w1.codes": (16, 16, 48),
    "feed_forward.w1.zeros": (16, 16, 6),
    "feed_forward.w2.codes": (96, 16, 8),
    "feed_forward.w2.scales": (96, 16, 1),
    "attention_norm.weight": (96,),
}


def test_what_a_format_cannot_hold_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    odd = replace(ARGS, hidden_dim=250)
    with pytest.raises(ValueError, match="needs a multiple of 16 as hidden, got 250"):
        replace(SPEC, args=odd).tensors()
    shutil.copytree(folders["quantized"], tmp_path / "other")
    save_formats(tmp_path / "other", {"output": Q8()})
    with pytest.raises(ValueError, match=r"lacks tensor layers\.0\.attention\.wk\.weight"):
        DcpFolder(tmp_path / "other")


def test_a_degree_that_groups_exclude_is_refused_with_both() -> None:
    args = tiny_args(n_heads=8, n_kv_heads=8, hidden_dim=256)
    spec = Spec(args=args, dtype=torch.bfloat16, formats={"layers.0.feed_forward.w2": Q4(group=128)})
    with pytest.raises(ValueError, match=r"its hidden in groups of 128, cannot run at .* degree 4; it can at 1, 2$"):
        mesh_shape(args, 4, spec.units())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", ""),
        ("3", "is damaged"),
        ('[{"format": "q5", "weights": []}]', "format must be one of q8, q4, q4k, lut4, got 'q5'"),
        ('[{"format": "q8", "group": 1000000000000, "weights": ["output"]}]', "group must be an even number"),
        ('[{"format": "q8", "group": true, "weights": ["output"]}]', "group must be an even number"),
        ('[{"format": "q4", "zero": -1, "weights": ["output"]}]', "zero must be 0 to 16"),
        ('[{"format": "lut4", "table": "x", "weights": ["output"]}]', "table must be one of nf4"),
        ('[{"format": "lut4", "table": [], "weights": ["output"]}]', "is damaged"),
        ('[{"format": "q8", "scales": "uint8", "weights": ["output"]}]', "scales must be bfloat16"),
        ('[{"format": "lut4", "table": "nf4", "scales": "int8", "weights": ["output"]}]', "scales must be bfloat16"),
        ('[{"format": "q8", "color": 1, "weights": ["output"]}]', "is damaged"),
        ('[{"format": "q8", "weights": ["norm.color"]}]', "'norm.color' is no weight"),
        ('[{"format": "q8", "weights": ["output", "output"]}]', "or in it twice"),
        ('[{"format": "q8"}]', "is damaged"),
    ],
)
def test_a_damaged_list_of_formats_is_refused_in_one_line(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / FORMATS_FILE).write_text(content)
    if not fault:
        assert load_formats(tmp_path, WEIGHTS) == {}
        return
    with pytest.raises(ValueError, match=f"{FORMATS_FILE}[^\n]*{fault}[^\n]*$"):
        load_formats(tmp_path, WEIGHTS)


def test_the_list_of_formats_comes_back(tmp_path: Path) -> None:
    SPEC.save(tmp_path)
    assert load_formats(tmp_path, WEIGHTS) == SPEC.formats
    (tmp_path / "plain").mkdir()
    replace(SPEC, formats={}).save(tmp_path / "plain")
    assert load_formats(tmp_path / "plain", WEIGHTS) == {}
