"""Owns the order of the samples, and which of them are computed together: rows of packed samples, batches, steps.

Knows no torch and no ids. All follows from the seed and the epoch, so that a place in the data is two numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

# Of samples, by their places in the data: those of one batch, and the batches of one step.
Batch = list[int]
Step = list[Batch]


def epoch_rows(lengths: Sequence[int], epoch: int, *, seed: int, row_length: int | None) -> list[Batch]:
    """The rows of an epoch over samples of these lengths, each sample once. `row_length`: None packs nothing."""
    order = list(range(len(lengths)))
    random.Random(f"epoch {epoch} of {seed}").shuffle(order)
    return [[index] for index in order] if row_length is None else pack(lengths, order, row_length)


def steps_of(rows: Sequence[Batch], *, batch_size: int, gradient_accumulation: int) -> list[Step]:
    """Batches of `batch_size` rows, and steps of `gradient_accumulation` batches; the last ones may have fewer."""
    batches = [list(chain(*rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]
    return [batches[start : start + gradient_accumulation] for start in range(0, len(batches), gradient_accumulation)]


def batches_in_order(lengths: Sequence[int], *, row_length: int, batch_size: int) -> list[Batch]:
    """All samples in their order, in batches of at most `batch_size * row_length` tokens: for validation."""
    batches: list[Batch] = [[]]
    tokens = 0
    for index, length in enumerate(lengths):
        if batches[-1] and tokens + length > batch_size * row_length:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def pack(lengths: Sequence[int], order: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of samples that together have at most `row_length` tokens: each goes into the first row with room for it."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # the row, and the tokens that it has room for
    shortest = min(lengths, default=0)
    for index in order:
        for place, (row, room) in enumerate(open_rows):
            if lengths[index] <= room:
                rows[row].append(index)
                room -= lengths[index]
                if room < shortest:
                    del open_rows[place]
                else:
                    open_rows[place] = (row, room)
                break
        else:
            rows.append([index])
            if row_length - lengths[index] >= shortest:
                open_rows.append((len(rows) - 1, row_length - lengths[index]))
        # A long search finds little.
        del open_rows[:-64]
    return rows
