"""Owns this rank's shares of adapters in host memory, and how they get there: a thread reads files while steps run.

Knows no requests. All ranks load the same adapters in the same order, and keep one only if every rank could read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from llama2.adapters.format import Base, check_fits, read_adapter
from llama2.adapters.products import LoraProduct
from llama2.adapters.reference import AdapterRef
from llama2.adapters.slots import AdapterSlots, Share
from llama2.config import ModelArgs
from llama2.parallel.process_group import gather_objects


class AdapterStore:
    """Adapters that may be put into `slots`."""

    def __init__(self, args: ModelArgs, slots: AdapterSlots, base: Base | None, *, is_sorted: bool) -> None:
        """`base` and `is_sorted` are of what the model was loaded from: adapters that do not fit it are refused."""
        self._args = args
        self._base, self._is_sorted = base, is_sorted
        self._slots = slots
        self._shares: dict[AdapterRef, Share] = {}
        self._thread = ThreadPoolExecutor(1, "adapters", initializer=torch.set_num_threads, initargs=(1,))
        self._loading: tuple[AdapterRef, Future[tuple[bytes, Share]]] | None = None

    @property
    def layers(self) -> Sequence[Mapping[str, LoraProduct]]:
        """What the slots add to the products of each layer."""
        return self._slots.layers

    def load(self, ref: AdapterRef) -> None:
        """Begin to read an adapter. One at a time: `finish` comes before the next."""
        assert self._loading is None, f"{self._loading} is not finished"
        self._loading = ref, self._thread.submit(self._read, ref)

    @property
    def has_read(self) -> bool:
        """Would `finish` not wait?"""
        assert self._loading is not None
        return self._loading[1].done()

    def finish(self) -> tuple[bytes, str]:
        """Keep what was read, if every rank has read the same: its identity, and "". Else nothing is kept, and the
        second says why. All ranks call it.
        """
        assert self._loading is not None
        (ref, future), self._loading = self._loading, None
        identity, problem, share = b"", "", None
        try:
            identity, share = future.result()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            problem = str(error) or repr(error)
        answers = gather_objects((identity, problem))
        for rank, (theirs, trouble) in enumerate(answers):
            if trouble:
                return b"", f"rank {rank}: {trouble}" if len(answers) > 1 and trouble != problem else trouble
            if theirs != identity:
                return b"", f"{ref.path} is not the same on every rank"
        assert share is not None
        self._shares[ref] = share
        return identity, ""

    def drop(self, ref: AdapterRef) -> None:
        """Forget an adapter, if it is here."""
        self._shares.pop(ref, None)

    def put(self, slot: int, ref: AdapterRef) -> None:
        """Copy an adapter into a slot, for the passes from the next one on."""
        self._slots.put(slot, self._shares[ref])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, ref: AdapterRef) -> tuple[bytes, Share]:
        adapter = read_adapter(ref.path, self._args)
        check_fits(ref.path, adapter, self._base, is_sorted=self._is_sorted)
        if adapter.rank > self._slots.max_rank:
            raise ValueError(
                f"the adapter {ref.path} has rank {adapter.rank}, and max_lora_rank is {self._slots.max_rank}: "
                f"set max_lora_rank: {adapter.rank} in model-config.yaml, or LLM(…, max_lora_rank={adapter.rank})"
            )
        return adapter.identity, self._slots.take(adapter)
