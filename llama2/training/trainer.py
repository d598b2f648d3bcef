"""Owns a run: steps over the data, validations, checkpoints, and when it ends.

Knows no file format. All ranks do the same: what depends on a time or on a sum is rank 0's to say.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama2.adapters.adapter import LoraPair
from llama2.parallel.collectives import Collectives
from llama2.progress import log_above_bars, progress
from llama2.training.batches import Step, batches_in_order, epoch_rows, steps_of
from llama2.training.checkpoints import ADAPTER_FOLDER, Progress, RunFolder, together
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample
from llama2.training.logs import Log, Row
from llama2.training.lora import TrainedAdapter, derived_seed
from llama2.training.optimizer import learning_rate, make_optimizer
from llama2.training.passes import Passes

# Writes whole matrices, by the weights' names, to a folder.
WriteAdapter = Callable[[Path, Mapping[str, LoraPair]], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of a run: the folder of its adapter, the steps made, and the losses, in nats per token, as far as measured."""

    adapter: Path
    steps: int
    loss: float | None
    validation_loss: float | None
    tokens: int
    seconds: float


class Trainer:
    """Of one rank. `training` and `validation` are the samples, the same on all ranks."""

    def __init__(
        self,
        config: TrainingConfig,
        passes: Passes,
        adapter: TrainedAdapter,
        collectives: Collectives,
        folder: RunFolder,
        training: Sequence[Sample],
        validation: Sequence[Sample],
    ) -> None:
        self._config, self._passes, self._adapter = config, passes, adapter
        self._collectives, self._folder = collectives, folder
        self._training, self._validation = training, validation
        self._optimizer = make_optimizer(config, adapter.parameters)
        self._progress = Progress()
        self._log: Log | None = None  # rank 0's
        lengths, row_length = [len(sample) for sample in training], config.max_length if config.packing else None
        rows = [epoch_rows(lengths, epoch, seed=config.seed, row_length=row_length) for epoch in range(config.epochs)]
        sizes = {"batch_size": config.batch_size, "gradient_accumulation": config.gradient_accumulation}
        self._epochs = [steps_of(one, **sizes) for one in rows]
        num_steps = sum(map(len, self._epochs))
        self._num_steps = min(num_steps, config.max_steps or num_steps)
        self._log_first(
            "%s in %s of at most %d tokens; a step takes up to %s: %s in %s",
            _counted(len(training), "sample"), _counted(len(rows[0]), "row"), config.max_length,
            _counted(config.batch_size * config.gradient_accumulation, "row"),
            _counted(self._num_steps, "step"), _counted(config.epochs, "epoch"),
        )  # fmt: skip

    def resume(self, progress: Progress, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with this rank's state."""
        self._progress = progress
        self._adapter.parameters.copy_(state["values"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._log_first("resuming after step %d of %d", self._progress.step, self._num_steps)

    def run(self, write_adapter: WriteAdapter) -> Result:
        """Train to the end. `write_adapter(folder, pairs)` is called on rank 0.

        Raises:
            ValueError: a checkpoint cannot be written, or the loss is no number.
        """
        config, first = self._config, self._collectives.rank == 0
        if first:
            self._log = Log(self._folder.folder, last_step=self._progress.step, tensorboard=config.tensorboard)
        steps = list(self._remaining())
        total = sum(self._count(step) for _, _, step, _ in steps)
        started, tokens, since = time.monotonic(), 0, Window()
        loss: float | None = None
        bar = progress(total=total, desc="training", unit="tok", unit_scale=True, disable=not first)
        with log_above_bars(), bar:
            for number, epoch, step, ends_epoch in steps:
                losses, norm = self.step(number, step)
                self._progress = replace(self._progress, step=number)
                since.add(losses, self._count(step))
                tokens += self._count(step)
                bar.update(self._count(step))
                if number % config.log_steps == 0 or number == self._num_steps:
                    loss, rate = since.mean(), learning_rate(config, number, self._num_steps)
                    bar.set_postfix_str(f"loss {loss:.4f}")
                    self._add(since.row(step=number, epoch=epoch, learning_rate=rate, gradient_norm=norm))
                    since = Window()
                self._after(number, epoch, ends_epoch, write_adapter)
                if self._stopped:
                    self._log_first("no lower loss in %d validations: the run ends", self._progress.since_best)
                    break
        if self._log is not None:
            self._log.close()
        return Result(
            adapter=self._folder.folder / ADAPTER_FOLDER,
            steps=self._progress.step,
            loss=loss,
            validation_loss=self._progress.best_loss,
            tokens=tokens,
            seconds=time.monotonic() - started,
        )

    @property
    def _stopped(self) -> bool:
        """Has validation found nothing better for too long?"""
        patience = self._config.early_stopping
        return patience is not None and self._progress.since_best >= patience

    def _after(self, number: int, epoch: float, ends_epoch: bool, write_adapter: WriteAdapter) -> None:
        """Validate and save, where that is due after a step."""
        config, is_last = self._config, number == self._num_steps
        is_best = not self._validation
        if self._validation and (is_last or self._is_due(config.evaluate_steps, number, ends_epoch)):
            is_best = self._validate(number, epoch)
        saves = is_last or self._stopped or self._is_due(config.save_steps, number, ends_epoch)
        if saves or (self._validation and is_best):
            self._save(write_adapter, whole=saves, is_best=is_best)

    def _remaining(self) -> Iterator[tuple[int, float, Step, bool]]:
        """The steps that are not done: the number, the epochs seen after it, its batches, whether it ends an epoch."""
        if self._stopped:
            return
        number = 0
        for epoch, steps in enumerate(self._epochs):
            for place, step in enumerate(steps, start=1):
                number += 1
                if self._progress.step < number <= self._num_steps:
                    yield number, epoch + place / len(steps), step, place == len(steps)

    def _count(self, step: Step) -> int:
        return sum(len(self._training[index]) for batch in step for index in batch)

    def step(self, number: int, step: Step) -> tuple[list[float], float]:
        """One step; returns the losses of its tokens, summed, and their number; and the gradient's norm."""
        config, adapter = self._config, self._adapter
        batches = [[self._training[index] for index in batch] for batch in step]
        targets = sum(sample.num_targets for batch in batches for sample in batch)
        adapter.gradients.zero_()
        total = torch.zeros((), dtype=torch.float64)
        for place, batch in enumerate(batches):
            losses_R = self._passes.losses(batch, dropout_seed=derived_seed(config.seed, number, place))
            summed = losses_R.sum()
            (summed / targets).backward()
            total += summed.detach().double().cpu()
        adapter.sum_gradients()
        norm = adapter.gradient_norm()
        if not math.isfinite(norm) or not math.isfinite(total):
            raise ValueError(
                f"the loss or its gradient is no number in step {number}: a smaller learning_rate or a longer warmup "
                "may help; the newest checkpoint stays"
            )
        if norm > config.max_gradient_norm:
            adapter.gradients.mul_(config.max_gradient_norm / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config, number, self._num_steps)
        self._optimizer.step()
        return [float(total), targets], norm

    @torch.no_grad()
    def _validate(self, number: int, epoch: float) -> bool:
        """Measure the loss on the validation samples; returns whether it is the lowest so far."""
        config, total, targets = self._config, 0.0, 0
        lengths = [len(sample) for sample in self._validation]
        for batch in batches_in_order(lengths, row_length=config.max_length, batch_size=config.batch_size):
            losses_R = self._passes.losses([self._validation[index] for index in batch])
            total, targets = total + float(losses_R.sum(dtype=torch.float64)), targets + len(losses_R)
        loss = self._collectives.broadcast_object(total / targets)
        best = self._progress.best_loss
        is_best = best is None or loss < best
        self._progress = replace(
            self._progress,
            best_loss=loss if is_best else best,
            since_best=0 if is_best else self._progress.since_best + 1,
        )
        self._add(Row(step=number, epoch=round(epoch, 4), validation_loss=loss))
        self._log_first("step %d: validation loss %.4f", number, loss)
        return is_best

    def _save(self, write_adapter: WriteAdapter, *, whole: bool, is_best: bool) -> None:
        pairs = self._adapter.pairs()

        def write(folder: Path) -> None:
            assert pairs is not None
            write_adapter(folder, pairs)

        if whole:
            state: Mapping[str, Any] = {
                "values": self._adapter.parameters.detach(),
                "optimizer": self._optimizer.state_dict(),
            }
            self._folder.save(self._progress, state, write, keep=self._config.keep_checkpoints)
        if is_best:
            together(lambda: write(self._folder.folder / ADAPTER_FOLDER) if pairs is not None else None)

    @staticmethod
    def _is_due(every: int | None, number: int, ends_epoch: bool) -> bool:
        return ends_epoch if every is None else number % every == 0

    def _add(self, row: Row) -> None:
        if self._log is not None:
            self._log.add(row)

    def _log_first(self, message: str, *values: object) -> None:
        if self._collectives.rank == 0:
            logger.info(message, *values)


class Window:
    """What has been computed since the last row of the log."""

    def __init__(self) -> None:
        self.tokens = 0
        self._loss = self._targets = 0.0
        self._started = time.monotonic()

    def add(self, losses: Sequence[float], tokens: int) -> None:
        """`losses`: their sum and their number."""
        self._loss += losses[0]
        self._targets += losses[1]
        self.tokens += tokens

    def mean(self) -> float:
        return self._loss / self._targets

    def row(self, *, step: int, epoch: float, learning_rate: float, gradient_norm: float) -> Row:
        return Row(
            step=step,
            epoch=round(epoch, 4),
            loss=self.mean(),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens=self.tokens,
            seconds=time.monotonic() - self._started,
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
