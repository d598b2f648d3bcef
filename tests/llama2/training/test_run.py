"""A run learns, can be resumed to the same bits, and keeps its last adapter whatever happens to the next one."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.adapters.adapter import Adapter
from llama2.adapters.format import read_adapter, read_base
from llama2.training import checkpoints, run
from llama2.training.config import TrainingConfig
from llama2.training.run import finetune
from llama2.training.trainer import Trainer
from llama2.weights.certificate import Identity
from llama2.weights.convert import convert
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.training import options, write_samples
from tests.support.weights import meta_folder, random_weights, tiny_args

ARGS = tiny_args(vocab_size=512)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Of tensors so small, several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("base")
    source = meta_folder(scratch / "meta", ARGS, random_weights(ARGS), num_shards=1)
    tiny_sentencepiece(source)
    convert(source, scratch / "checkpoint")
    write_samples(scratch / "samples.jsonl")
    return scratch


def config(folder: Path, output: Path, **changes: Any) -> TrainingConfig:
    common = {
        "checkpoint_dir": str(folder / "checkpoint"),
        "data": str(folder / "samples.jsonl"),
        "output_dir": str(output),
        "learning_rate": 0.01,
        "validation_fraction": 0.1,
    }
    return options(**{**common, **changes})


def adapter(path: Path) -> Adapter:
    return read_adapter(path, ARGS)


def log(path: Path, column: str) -> list[float]:
    with (path / "log.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_it_learns(folder: Path, tmp_path: Path) -> None:
    result = finetune(config(folder, tmp_path, epochs=12, max_gradient_norm=100.0))
    losses, measured = log(tmp_path, "loss"), log(tmp_path, "validation_loss")
    assert losses[0] > 5
    assert losses[-1] < 1
    assert len(measured) == 12
    assert min(measured) == result.validation_loss
    assert result.validation_loss < 2
    assert log(tmp_path, "step")[-1] == result.steps
    assert (tmp_path / "loss.png").stat().st_size > 5000
    base = read_base(tmp_path / "adapter")
    assert base is not None
    assert base.weights == Identity.of(folder / "checkpoint").weights
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


class Killed(BaseException):
    pass


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch, after steps that no checkpoint has."""
    changes = {"epochs": 2, "dropout": 0.1, "save_steps": 3, "evaluate_steps": 2, "batch_size": 2}
    whole = finetune(config(folder, tmp_path / "whole", **changes))
    take_step = Trainer.step

    def step(self: Trainer, number: int, batches: Any) -> Any:
        if number == 6:
            raise Killed
        return take_step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Killed):
        finetune(config(folder, tmp_path / "parts", **changes))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-000003"]
    parts = finetune(config(folder, tmp_path / "parts", **changes), resume=True)
    assert (parts.steps, parts.loss, parts.validation_loss) == (whole.steps, whole.loss, whole.validation_loss)
    for column in ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "epoch"):
        assert log(tmp_path / "parts", column) == log(tmp_path / "whole", column)
    last = f"checkpoint-{whole.steps:06d}"
    for name in ("adapter", f"{last}/adapter"):
        assert adapter(tmp_path / "parts" / name).identity == adapter(tmp_path / "whole" / name).identity
    states = [torch.load(tmp_path / name / last / "rank-0.pt", weights_only=True) for name in ("parts", "whole")]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        ours, theirs = (state["optimizer"]["state"][0][name] for state in states)
        assert torch.equal(ours, theirs)


def test_another_run_is_not_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no weight is read to find that out."""
    changes = {"max_steps": 1, "epochs": 1}
    finetune(config(folder, tmp_path / "run", **changes))
    monkeypatch.delattr(run, "load_model")
    with pytest.raises(ValueError, match="has checkpoints: go on with --resume, or choose another output_dir"):
        finetune(config(folder, tmp_path / "run", **changes))
    with pytest.raises(ValueError, match=r"is of another run: its rank is 8, and here it is 4"):
        finetune(config(folder, tmp_path / "run", **changes, rank=4), resume=True)
    write_samples(tmp_path / "other.jsonl", count=50)
    with pytest.raises(ValueError, match="is of another run: its data is"):
        finetune(config(folder, tmp_path / "run", **changes, data=str(tmp_path / "other.jsonl")), resume=True)
    # Weights of the same shapes are another base.
    source = meta_folder(tmp_path / "meta", ARGS, random_weights(ARGS, seed=1), num_shards=1)
    tiny_sentencepiece(source)
    convert(source, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="is of another run: its base is"):
        finetune(config(folder, tmp_path / "run", **changes, checkpoint_dir=str(tmp_path / "checkpoint")), resume=True)
    (state,) = (tmp_path / "run").glob("checkpoint-*/rank-0.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"rank-0\.pt cannot be read"):
        finetune(config(folder, tmp_path / "run", **changes), resume=True)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [(checkpoints.torch, "save", 2), (run, "write_adapter", 3), (run, "write_adapter", 4)],
    ids=["a state", "a checkpoint's adapter", "the adapter"],
)
def test_a_full_disk_leaves_the_last_adapter(
    module: Any, name: str, call: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder, tmp_path / "run", epochs=2, validation_fraction=0)
    real, last, calls = getattr(module, name), [], itertools.count(1)

    def write(*arguments: Any, **options: Any) -> None:
        if next(calls) == call:
            last.append(adapter(tmp_path / "run" / "adapter").identity)
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(module, name, write)
    with pytest.raises(ValueError, match="No space left on device"):
        finetune(settings)
    monkeypatch.undo()
    assert [adapter(tmp_path / "run" / "adapter").identity] == last
    for left in (tmp_path / "run").glob("checkpoint-*"):
        adapter(left / "adapter")
    assert not list((tmp_path / "run").glob(".*"))
    # With room again the run goes on, and ends where it would have.
    finetune(settings, resume=True)
    finetune(config(folder, tmp_path / "whole", epochs=2, validation_fraction=0))
    ends = [adapter(sorted((tmp_path / name).glob("checkpoint-*"))[-1] / "adapter") for name in ("run", "whole")]
    assert ends[0].identity == ends[1].identity


def test_early_stopping_keeps_the_best_adapter(folder: Path, tmp_path: Path) -> None:
    stopping = config(folder, tmp_path, epochs=40, early_stopping=2, learning_rate=0.3, schedule="constant")
    result = finetune(stopping)
    measured = log(tmp_path, "validation_loss")
    assert len(measured) < 40
    best = min(range(len(measured)), key=measured.__getitem__)
    assert best == len(measured) - 3
    assert result.validation_loss == measured[best]
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert adapter(newest / "adapter").identity != adapter(tmp_path / "adapter").identity
    assert finetune(stopping, resume=True).steps == result.steps


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no number in step \d+: a smaller learning_rate"):
        finetune(config(folder, tmp_path, epochs=9, learning_rate=1e20, warmup=0, optimizer="adamw"))


def test_what_cannot_run_here_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(run, "load_model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for changes, message in (
        ({"optimizer": "paged_adamw_8bit"}, "optimizer paged_adamw_8bit is for GPUs"),
        ({"tensorboard": True}, "tensorboard needs a package: pip install tensorboard"),
        ({"target_modules": ["w9"]}, "target_modules must be of q_proj"),
        ({"target_modules": ["lm_head"]}, "target_modules must be of q_proj"),
        ({"batch_size": 1 << 30}, r"this run needs \d+ MiB, and \d+ MiB are free: .* try a smaller batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(config(folder, tmp_path / "run", **changes))


def test_tensorboard_has_what_the_log_has_and_of_a_resumed_run_each_step_once(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"epochs": 2, "save_steps": 3, "evaluate_steps": 2, "batch_size": 2, "tensorboard": True}
    finetune(config(folder, tmp_path, **changes))
    shutil.rmtree(sorted(tmp_path.glob("checkpoint-*"))[-1])
    finetune(config(folder, tmp_path, **changes), resume=True)
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    for column in ("loss", "validation_loss", "learning_rate", "gradient_norm", "tokens", "seconds"):
        events = written.Scalars(column)
        assert [event.value for event in events] == pytest.approx(log(tmp_path, column), rel=1e-5)
    assert [event.step for event in written.Scalars("loss")] == list(range(1, len(log(tmp_path, "loss")) + 1))
