"""Owns what fits where: the memory of a model's weights and KV cache at each precision and degree, and which to choose.

Knows the list of weights and no values: nothing large is read, and nothing is allocated.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from llama2.config import EngineConfig, ModelArgs
from llama2.kv_cache import bytes_per_block, cache_dtype, choose_batch_size, fitting_blocks
from llama2.machine.memory import free_host_memory
from llama2.machine.memory_plan import DEQUANTIZED_BYTES, reserve
from llama2.parallel.splits import degrees, mesh_shape, share
from llama2.weights.precision import target
from llama2.weights.spec import Spec, TensorSpec

AS_STORED = "as stored"
# What a conversion can make of any weights, from the most precise on: the errors of int8, nf4 and int4 are 0.5 %, 9.2 %
# and 10.1 % of values with a normal distribution, as root mean squares (tests/llama2/weights/test_capacity.py).
MADE = ("bf16", "int8", "nf4", "int4")
# Sequences of full length that a server is given room for where it can be.
ENOUGH_SEQUENCES = 8
# Counted up to this degree, and at the largest one that the devices allow.
_LARGEST_DEGREE = 8

_UNITS: Mapping[str, int] = {"gib": 1 << 30, "gb": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Where a model shall run: `count` GPUs of `nbytes` each; or None, and ranks on a CPU share `nbytes`."""

    count: int | None
    nbytes: int

    @classmethod
    def read(cls, text: str) -> Devices:
        """GPUs as in `2x24GiB`, `80GB` and `8x80GiB`.

        Raises:
            ValueError: `text` is nothing like that.
        """
        match = re.fullmatch(r"(?:(\d{1,4})x)?(\d{1,6}(?:\.\d{1,6})?)(gib|gb)", text.lower(), re.ASCII)
        count, nbytes = (int(match[1] or 1), int(float(match[2]) * _UNITS[match[3]])) if match else (0, 0)
        if not count or not nbytes:
            raise ValueError(f"--gpus must be such as 2x24GiB, 80GB or 8x80GiB, got {text!r}")
        return cls(count=count, nbytes=nbytes)

    @classmethod
    def of_this_machine(cls) -> Devices:
        """Its GPUs, as large as the smallest of them; without any, the memory that is free now."""
        if not torch.cuda.is_available():
            return cls(count=None, nbytes=free_host_memory())
        sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        return cls(count=len(sizes), nbytes=min(sizes))

    @property
    def most_ranks(self) -> int:
        return _LARGEST_DEGREE if self.count is None else self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a rank's KV cache has room for, and what the steps need beside it, in bytes by name (`reserve`)."""

    tokens: int
    sequences: int
    reserved: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the rank with the most of a model holds, in bytes. `room` None: there are not so many devices."""

    weights: int
    kv_per_token: int
    room: Room | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A model on devices, by precision: AS_STORED, then those of MADE that differ from it.

    `loads` are by degree, too, and `loads_int8` are these with a KV cache of 8 bits (`kv_cache_dtype`). `refused` says
    which precision the model cannot have, and why.
    """

    devices: Devices
    specs: Mapping[str, Spec]
    loads: Mapping[str, Mapping[int, Load]]
    loads_int8: Mapping[str, Mapping[int, Load]]
    refused: Mapping[str, str]

    @property
    def args(self) -> ModelArgs:
        return self.specs[AS_STORED].args

    def choose(self) -> tuple[str, int] | None:
        """The most precise weights that leave room for one sequence of full length, and a degree: the lowest with room
        for ENOUGH_SEQUENCES, else the one with the most room. None: nothing fits.

        What takes no fewer bytes than the weights as they are stored is no better than these.
        """
        stored = self.loads[AS_STORED][1].weights
        for name, loads in self.loads.items():
            if name != AS_STORED and loads[1].weights >= stored:
                continue
            rooms = {degree: load.room.sequences for degree, load in loads.items() if load.room}
            enough = [degree for degree, sequences in rooms.items() if sequences >= ENOUGH_SEQUENCES]
            if any(rooms.values()):
                return name, enough[0] if enough else max(rooms, key=lambda degree: rooms[degree])
        return None


def count_capacity(stored: Spec, devices: Devices) -> Capacity:
    """What fits of weights that are `stored`, in an engine with the default options, but for the KV cache's dtype."""
    if devices.count is not None:
        # As load_engine does with plain values on a GPU.
        stored = replace(stored, dtype=torch.bfloat16)
    specs, refused = {AS_STORED: stored}, {}
    for name in MADE:
        dtype, quantize = (torch.bfloat16, "none") if name == "bf16" else (None, name)
        try:
            made = target(stored, dtype=dtype, quantize=quantize, requantize=True)
        except ValueError as error:
            refused[name] = str(error)
        else:
            if made != stored:
                specs[name] = made
    loads, loads_int8 = (
        {name: _loads(spec, devices, EngineConfig(kv_cache_dtype=kept)) for name, spec in specs.items()}
        for kept in ("auto", "int8")
    )
    return Capacity(devices=devices, specs=specs, loads=loads, loads_int8=loads_int8, refused=refused)


def _loads(spec: Spec, devices: Devices, config: EngineConfig) -> dict[int, Load]:
    """By degree, ascending."""
    # Layers are alike.
    tensors, units = Counter(spec.tensors().values()), spec.units()
    possible = degrees(spec.args, units)
    largest = max(degree for degree in possible if degree <= devices.most_ranks)
    return {
        degree: _load(spec, tensors, mesh_shape(spec.args, degree, units), devices, config)
        for degree in possible
        if degree <= _LARGEST_DEGREE or degree == largest
    }


def _load(
    spec: Spec, tensors: Mapping[TensorSpec, int], mesh: tuple[int, int], devices: Devices, config: EngineConfig
) -> Load:
    args, degree, places = spec.args, math.prod(mesh), list(product(*map(range, mesh)))
    weights = max(
        sum(count * _local_bytes(tensor, mesh, place) for tensor, count in tensors.items()) for place in places
    )
    n_kv_heads = max(share("kv_heads", args.n_kv_heads, mesh, place) for place in places)
    kv_per_token = bytes_per_block(args, block_size=1, n_kv_heads=n_kv_heads, dtype=cache_dtype(config, spec.dtype))
    room = None
    if degree <= devices.most_ranks:
        own = devices.nbytes if devices.count else devices.nbytes // degree
        on_gpu = devices.count is not None
        room = _room(spec, own - weights, config, n_kv_heads=n_kv_heads, degree=degree, on_gpu=on_gpu)
    return Load(weights=weights, kv_per_token=kv_per_token, room=room)


def _local_bytes(tensor: TensorSpec, mesh: tuple[int, int], place: tuple[int, ...]) -> int:
    sizes = (share(axis, size, mesh, place) for axis, size in zip(tensor.axes, tensor.shape, strict=True))
    return math.prod(sizes) * tensor.dtype.itemsize


def _room(spec: Spec, left: int, config: EngineConfig, *, n_kv_heads: int, degree: int, on_gpu: bool) -> Room:
    """As `build_engine` shares out the memory that loading leaves."""
    args, config = spec.args, config.for_model(spec.args)
    rotary_table = 4 * config.max_seq_len * args.head_dim
    set_up = {"values of quantized weights": DEQUANTIZED_BYTES} if on_gpu and spec.formats else {}
    sizes: dict[str, Any] = {
        "free": max(0, left - rotary_table - sum(set_up.values())),
        "n_kv_heads": n_kv_heads,
        "dtype": spec.dtype,
        "device": torch.device("cuda" if on_gpu else "cpu"),
        "degree": degree,
    }
    config = replace(config, max_batch_size=choose_batch_size(args, config, **sizes))
    blocks = fitting_blocks(args, config, **sizes)
    return Room(
        tokens=blocks * config.block_size,
        sequences=blocks // config.blocks_per_sequence,
        reserved={**set_up, **reserve(args, config, dtype=spec.dtype, degree=degree)} if on_gpu else {},
    )
