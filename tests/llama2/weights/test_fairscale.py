"""Meta's layout: what is written is what plain torch.load reads, what is read is exact, and bad folders are refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from llama2.config import ModelArgs
from llama2.weights.readers.fairscale import FairscaleFolder, same_bits, write_fairscale
from tests.support.weights import meta_folder, meta_shards, random_weights, tiny_args

ARGS = tiny_args(dim=96, n_heads=24, n_kv_heads=12, vocab_size=48, n_layers=1, multiple_of=12)
WEIGHTS = random_weights(ARGS, dtype=torch.bfloat16)


def edit_shard(folder: Path, index: int, **changes: object) -> None:
    """Set (or, by None, delete) tensors of one shard; `__` in a keyword stands for a dot."""
    path = folder / f"consolidated.{index:02d}.pth"
    shard = torch.load(path)
    for name, value in changes.items():
        shard[name.replace("__", ".")] = value
    torch.save({name: value for name, value in shard.items() if value is not None}, path)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_chunks_tile_every_parameter_with_its_own_values(tmp_path, num_shards):
    folder = FairscaleFolder(meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=num_shards), vocab_size=None)
    assert (folder.spec.args, folder.spec.dtype, folder.num_shards) == (ARGS, torch.bfloat16, num_shards)
    for name, shape in ARGS.parameter_shapes().items():
        chunks = folder.chunks(name)
        whole = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        for chunk in chunks:
            part = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))
            whole[part] = chunk.read()
        assert sum(chunk.read().numel() for chunk in chunks) == whole.numel()
        assert same_bits(whole.flatten(), WEIGHTS[name].flatten()), name
        assert same_bits(folder.read(name), whole), name


def test_an_embedding_split_by_rows_as_in_llama_3_is_read_too(tmp_path):
    meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=2)
    for index, rows in enumerate(WEIGHTS["tok_embeddings.weight"].chunk(2)):
        edit_shard(tmp_path, index, tok_embeddings__weight=rows.clone())
    folder = FairscaleFolder(tmp_path, vocab_size=None)
    assert same_bits(folder.read("tok_embeddings.weight"), WEIGHTS["tok_embeddings.weight"])


def test_tensors_that_share_one_storage_are_handed_out_with_their_own_bytes_alone(tmp_path):
    """Meta's files keep a layer in one storage; torch.save of a view would write all of it."""
    flat = torch.cat([weight.flatten() for weight in WEIGHTS.values()])
    views, start = {}, 0
    for name, weight in WEIGHTS.items():
        views[name] = flat[start : start + weight.numel()].view(weight.shape)
        start += weight.numel()
    (tmp_path / "params.json").write_text(json.dumps(ARGS.to_params()))
    torch.save(views, tmp_path / "consolidated.00.pth")
    for name in WEIGHTS:
        (chunk,) = FairscaleFolder(tmp_path, vocab_size=None).chunks(name)
        view = chunk.read()
        assert view.untyped_storage().nbytes() == view.nbytes
        assert same_bits(view.flatten(), WEIGHTS[name].flatten())


def test_a_vocabulary_size_of_minus_one_is_the_tokenizers(tmp_path):
    meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=1)
    (tmp_path / "params.json").write_text(json.dumps({**ARGS.to_params(), "vocab_size": -1}))
    assert FairscaleFolder(tmp_path, vocab_size=48).spec.args == ARGS
    with pytest.raises(ValueError, match=r"tok_embeddings.weight has shape \(48, 96\), expected \(40, 96\)"):
        FairscaleFolder(tmp_path, vocab_size=40)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_written_shards_are_what_metas_code_expects(tmp_path, num_shards):
    write_fairscale(tmp_path, ARGS, WEIGHTS.__getitem__, num_shards=num_shards, dtype=torch.bfloat16)
    assert ModelArgs.from_params(json.loads((tmp_path / "params.json").read_text())) == ARGS
    for index, expected in enumerate(meta_shards(WEIGHTS, num_shards)):
        shard = torch.load(tmp_path / f"consolidated.{index:02d}.pth", weights_only=True)
        assert shard.keys() == expected.keys()
        for name, weight in shard.items():
            assert weight.is_contiguous()
            assert weight.untyped_storage().nbytes() == weight.nbytes
            assert weight.shape == expected[name].shape
            assert same_bits(weight, expected[name]), name


def test_writing_casts_to_the_dtype_asked_for(tmp_path):
    write_fairscale(tmp_path, ARGS, WEIGHTS.__getitem__, num_shards=2, dtype=torch.float32)
    folder = FairscaleFolder(tmp_path, vocab_size=None)
    assert folder.spec.dtype == torch.float32
    assert all(same_bits(folder.read(name).flatten(), weight.float().flatten()) for name, weight in WEIGHTS.items())


def test_a_shard_count_that_cuts_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not split evenly into 5 shards; it does into 1, 2, 3, 4, 6, 12$"):
        write_fairscale(tmp_path, ARGS, WEIGHTS.__getitem__, num_shards=5, dtype=torch.bfloat16)


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


class Hostile:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


FAULTS = {
    "missing shard": (lambda d: (d / "consolidated.02.pth").unlink(), "consolidated.02.pth is missing"),
    "no shards": (lambda d: [path.unlink() for path in d.glob("*.pth")], "holds no consolidated.00.pth"),
    "no params": (lambda d: (d / "params.json").unlink(), "params.json does not exist"),
    "params are no JSON": (lambda d: (d / "params.json").write_text("{"), "params.json cannot be read"),
    "params are a list": (lambda d: (d / "params.json").write_text("[]"), "params.json must hold a JSON object"),
    "truncated": (truncate, "consolidated.01.pth is not a readable .pth"),
    "junk": (lambda d: (d / "consolidated.01.pth").write_bytes(b"junk" * 99), "consolidated.01.pth is"),
    "empty": (lambda d: (d / "consolidated.01.pth").write_bytes(b""), "consolidated.01.pth is"),
    "hostile": (lambda d: torch.save({"a": Hostile()}, d / "consolidated.01.pth"), "consolidated.01.pth is refused"),
    "bare pickle": (
        lambda d: (d / "consolidated.01.pth").write_bytes(pickle.dumps(Hostile())),
        "consolidated.01.pth is",
    ),
    "a list": (lambda d: torch.save([1], d / "consolidated.01.pth"), "consolidated.01.pth must hold a dictionary"),
    "not a tensor": (lambda d: edit_shard(d, 1, norm__weight="x"), "consolidated.01.pth: 'norm.weight' is not a plain"),
    "sparse": (
        lambda d: edit_shard(d, 1, norm__weight=torch.eye(3).to_sparse()),
        "'norm.weight' is not a plain tensor",
    ),
    "unknown tensor": (lambda d: edit_shard(d, 2, extra=torch.zeros(1)), "consolidated.02.pth: unknown tensor 'extra'"),
    "missing tensor": (
        lambda d: edit_shard(d, 3, norm__weight=None),
        "consolidated.03.pth: tensor 'norm.weight' is mis",
    ),
    "wrong shape": (
        lambda d: edit_shard(d, 1, output__weight=torch.zeros(24, 96)),
        r"consolidated.01.pth: output.weight has shape \(24, 96\), expected \(12, 96\)",
    ),
    "another dtype": (
        lambda d: edit_shard(d, 1, norm__weight=WEIGHTS["norm.weight"].half()),
        r"consolidated.01.pth: norm.weight is torch.float16, but norm.weight of consolidated.00.pth is torch.bfloat16",
    ),
    "integers": (lambda d: edit_shard(d, 0, norm__weight=torch.zeros(96, dtype=torch.int8)), "is torch.int8, expected"),
    "of two models": (lambda d: edit_shard(d, 2, norm__weight=WEIGHTS["norm.weight"] * 2), "differ: two models?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_one_line_that_names_the_fault_and_no_code_runs(tmp_path, capfd, fault):
    spoil, message = FAULTS[fault]
    spoil(meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=4))
    with pytest.raises(ValueError, match=message) as caught:
        FairscaleFolder(tmp_path, vocab_size=None).read("norm.weight")
    assert "\n" not in str(caught.value)
    assert "code from a checkpoint ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (2, "--model_parallel_size is 2, but .* holds 3 shards"),
        (4, r"consolidated.03.pth is missing: the folder holds 3 shards \(--model_parallel_size is 4\)"),
    ],
)
def test_a_wrong_model_parallel_size_is_refused(tmp_path, claimed, message):
    meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=3)
    with pytest.raises(ValueError, match=message):
        FairscaleFolder(tmp_path, vocab_size=None, num_shards=claimed)


def test_copies_of_a_norm_that_drifted_apart_in_training_are_reported_and_the_first_is_taken(tmp_path, caplog):
    meta_folder(tmp_path, ARGS, WEIGHTS, num_shards=4)
    edit_shard(tmp_path, 2, norm__weight=WEIGHTS["norm.weight"] * 1.004)
    read = FairscaleFolder(tmp_path, vocab_size=None).read("norm.weight")
    assert torch.equal(read, WEIGHTS["norm.weight"])
    assert "norm.weight differs slightly between consolidated.00.pth and consolidated.02.pth" in caplog.text
