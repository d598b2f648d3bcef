"""Owns how a person reads what fits where: three tables and a piece of advice, in lines of up to 100 characters.

Counts nothing itself.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llama2.machine.memory_plan import describe
from llama2.weights.capacity import AS_STORED, ENOUGH_SEQUENCES, Capacity, Devices, Load
from llama2.weights.spec import Spec

_WIDTH = 100
_LABEL = 4


def report(capacity: Capacity, path: Path | str, notes: Sequence[str] = ()) -> str:
    """All that there is to say of the model at `path`, whose reader has `notes`."""
    args, loads, devices = capacity.args, capacity.loads, capacity.devices
    parameters = sum(math.prod(shape) for shape in args.parameter_shapes().values())
    # Keys and values have the dtype of plain values: a column for each that there is, and one for codes of 8 bits.
    kv: dict[str, Mapping[int, Load]] = {}
    for name, spec in capacity.specs.items():
        kv.setdefault(f"KV {_dtype(spec)}", loads[name])
    kv["KV int8"] = capacity.loads_int8[AS_STORED]
    degrees = sorted({degree for each in loads.values() for degree in each})
    used = [degree for degree in degrees if degree <= devices.most_ranks]
    weights = _table(degrees, loads, 10, lambda load: _decimals(load.weights / 1e9))
    cached = _table(degrees, kv, 15, lambda load: f"{load.kv_per_token / 1024:,.1f} KiB")
    lines = [
        str(path),
        f"{parameters / 1e9:.3f} billion parameters, stored as {_stored(capacity.specs[AS_STORED])}; "
        f"a context of {args.context_length} tokens",
        *notes,
        "",
        "Weights per rank in GB (10^9 bytes), and KV cache per rank and token, by tensor parallel degree:",
        "",
        *(left + right[_LABEL:] for left, right in zip(weights, cached, strict=True)),
        "",
        f"Tokens of KV cache beside them (and sequences of {args.context_length}), on {_named(devices)}:",
        "",
        *_table(used, loads, 18, _room),
        "",
        "The same with kv_cache_dtype int8 or fp8:",
        "",
        *_table(used, capacity.loads_int8, 18, _room),
        "",
        *(f"Not possible: {name}, since {reason}" for name, reason in capacity.refused.items()),
        *_advice(capacity),
    ]
    return "\n".join(lines)


def _table(
    degrees: Sequence[int], columns: Mapping[str, Mapping[int, Load]], width: int, cell: Callable[[Load], str]
) -> list[str]:
    """A head, and a line for each degree; "-" where a column has it not."""
    lines = ["TP".rjust(_LABEL) + "".join(name.rjust(width) for name in columns)]
    for degree in degrees:
        cells = (cell(loads[degree]) if degree in loads else "-" for loads in columns.values())
        lines.append(f"{degree:{_LABEL}}" + "".join(text.rjust(width) for text in cells))
    return lines


def _room(load: Load) -> str:
    assert load.room is not None
    return f"{load.room.tokens:,} ({load.room.sequences})"


def _decimals(number: float) -> str:
    return f"{number:,.2f}" if number >= 10 else f"{number:.3f}"


def _dtype(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _stored(spec: Spec) -> str:
    kinds = dict.fromkeys(type(spec.format(name)).__name__ for name in spec.args.weight_axes())
    return ", ".join(_dtype(spec) if kind == "Plain" else kind for kind in kinds)


def _named(devices: Devices) -> str:
    size = f"{devices.nbytes / 2**30:.1f} GiB"
    if devices.count is None:
        return f"a CPU with {size} free"
    return f"{devices.count} GPUs of {size}" if devices.count > 1 else f"one GPU of {size}"


def _advice(capacity: Capacity) -> list[str]:
    chosen, sequence = capacity.choose(), f"a sequence of {capacity.args.context_length} tokens"
    if chosen is None:
        most = max(load.room.tokens for loads in capacity.loads.values() for load in loads.values() if load.room)
        return _wrapped(f"Nothing leaves room for {sequence}: {most:,} tokens at most, for a lower max_seq_len.")
    name, degree = chosen
    room = capacity.loads[name][degree].room
    assert room is not None
    flags = {AS_STORED: "no --quantize", "bf16": "--dtype bf16"}.get(name, f"--quantize {name}")
    if name != AS_STORED and capacity.specs[AS_STORED].formats:
        flags += " --requantize"
    enough = room.sequences >= ENOUGH_SEQUENCES
    why = f"lowest degree with room for {ENOUGH_SEQUENCES} of them" if enough else "degree with room for the most"
    reserved = f"For its steps each GPU keeps {sum(room.reserved.values()) / 2**30:.2f} GiB: {describe(room.reserved)}."
    return [
        *_wrapped(
            f"Recommended: {name} ({flags}) at tensor_parallel_size {degree}, the most precise weights that leave room "
            f"for {sequence}, at the {why}."
        ),
        *(_wrapped(reserved) if room.reserved else []),
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)
