"""Every tensor-parallel degree has one rank's losses, gradients and adapters, and its ranks have the same values."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llama2.adapters.adapter import LoraPair
from llama2.adapters.format import read_adapter
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample
from llama2.training.run import finetune
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.training import one_step, options, random_samples, write_samples
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.integration

Step = tuple[torch.Tensor, dict[str, LoraPair] | None, float]


def step(folder: str, config: TrainingConfig, samples: list[Sample]) -> Step:
    """What each rank does; a dropout that drops the same inputs on all of them."""
    return one_step(folder, config, samples, dropout_seed=5)


def compare(ours: Step, theirs: Step) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
    assert ours[1] is not None
    assert theirs[1] is not None
    for name, pair in theirs[1].items():
        for mine, other in ((ours[1][name].a_RC, pair.a_RC), (ours[1][name].b_FR, pair.b_FR)):
            assert (mine - other).norm() < 1e-5 * other.norm(), name


@pytest.mark.parametrize(
    ("changes", "degrees"),
    [
        ({"n_kv_heads": 4}, [2]),
        ({"dim": 72, "n_heads": 9, "n_kv_heads": 3}, [2, 3, 6]),  # 6 and 3 heads; then two ranks share a KV head
        ({"n_heads": 8, "n_kv_heads": 2}, [8]),  # each KV head on 4 ranks
    ],
)
def test_every_degree_has_the_gradients_of_one_rank(
    tmp_path: Path, changes: dict[str, object], degrees: list[int]
) -> None:
    args = tiny_args(vocab_size=509, **changes)  # a prime: no degree divides it
    folder = str(write_checkpoint(tmp_path / "checkpoint", args, random_weights(args)))
    samples = random_samples([5, 2, 33, 18], args.vocab_size)
    for config in (options(dropout=0.2), options(target_modules=["k_proj", "o_proj", "down_proj"], rank=4)):
        alone = step(folder, config, samples)
        for degree in degrees:
            results = run_ranks(degree, step, folder, config, samples)
            compare(results[0], alone)
            for losses, _, norm in results:
                assert torch.equal(losses, results[0][0])
                assert norm == results[0][2]


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_a_quantized_base_is_cut_between_its_groups(tmp_path: Path, quantize: str) -> None:
    args = tiny_args(vocab_size=512)
    source = meta_folder(tmp_path / "meta", args, random_weights(args), num_shards=1)
    tiny_sentencepiece(source)
    convert(source, tmp_path / "quantized", quantize=quantize)
    samples = random_samples([20, 9], args.vocab_size)
    alone = step(str(tmp_path / "quantized"), options(), samples)
    compare(run_ranks(2, step, str(tmp_path / "quantized"), options(), samples)[0], alone)


def train(config: TrainingConfig, resume: bool = False) -> tuple[int, float | None]:
    result = finetune(config, resume=resume)
    return result.steps, result.validation_loss


def test_a_run_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """And can be resumed: the same bits as without the interruption."""
    args = tiny_args(vocab_size=509)
    tokenizer_file = tiny_sentencepiece(tmp_path, vocab_size=509)
    folder = write_checkpoint(tmp_path / "checkpoint", args, random_weights(args), tokenizer_file)
    common = {
        "checkpoint_dir": str(folder),
        "data": str(write_samples(tmp_path / "samples.jsonl")),
        "epochs": 2,
        "save_steps": 2,
        "validation_fraction": 0.1,
    }

    def config(name: str) -> TrainingConfig:
        return options(**common, output_dir=str(tmp_path / name))

    alone = train(config("one"))
    results = run_ranks(2, train, config("two"))
    assert results[0] == results[1]
    assert results[0][0] == alone[0]
    assert results[0][1] == pytest.approx(alone[1], rel=1e-4)
    architecture = DcpFolder(folder).spec.args
    one, two = (read_adapter(tmp_path / name / "adapter", architecture) for name in ("one", "two"))
    for name, pair in one.pairs.items():
        torch.testing.assert_close(two.pairs[name].a_RC, pair.a_RC, rtol=0, atol=1e-3)
        torch.testing.assert_close(two.pairs[name].b_FR, pair.b_FR, rtol=0, atol=1e-3)
    # As if it had been killed after step 2: what is newer is gone.
    newest = sorted((tmp_path / "two").glob("checkpoint-*"))[-1]
    identity = read_adapter(newest / "adapter", architecture).identity
    shutil.rmtree(newest)
    assert run_ranks(2, train, config("two"), True) == results
    assert read_adapter(newest / "adapter", architecture).identity == identity
    with pytest.raises(RuntimeError, match="another run: its ranks is 2, and here it is 1"):
        run_ranks(1, train, config("two"), True)
