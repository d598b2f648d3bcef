"""Owns the sampled ids that the host has not read yet: on the device, in places assigned to sequences.

Knows no plan and no sequence: places in, ids out.
"""

from __future__ import annotations

import torch

from llama2.engine.inputs import Inputs
from llama2.engine.transfer import upload
from llama2.parallel.collectives import Collectives


class TokenPool:
    """P places of one id each."""

    def __init__(self, num_places: int, collectives: Collectives, device: torch.device) -> None:
        self._collectives = collectives
        self._ids_P = torch.zeros(num_places, dtype=torch.int64, device=device)

    def put(self, places: list[int], ids_R: torch.Tensor) -> None:
        """Rank 0: write ids (R,), int64. Negative ids, from failed sampling, must not reach the embedding."""
        self._ids_P.index_copy_(0, upload(places, ids_R), ids_R.clamp(min=0))

    def share(self) -> None:
        """Send rank 0's ids to every rank; all call this. A sum in which the other ranks' terms are 0."""
        if self._collectives.rank != 0:
            self._ids_P.zero_()
        self._ids_P.copy_(self._collectives.all_reduce(self._ids_P))

    def gather(self, inputs: Inputs) -> torch.Tensor:
        """The ids (T,) of a step's tokens, read or not."""
        return torch.cat((inputs.ids_T, self._ids_P))[inputs.sources_T]
