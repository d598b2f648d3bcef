"""Owns what a model's weights are made of at rest: which tensors, by name, of which shapes and dtypes.

Knows no values, no file and no rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from llama2.config import ModelArgs
from llama2.parallel.splits import PLAN
from llama2.weights.formats import Format
from llama2.weights.formats.catalog import name_of, save_formats
from llama2.weights.formats.plain import Plain
from llama2.weights.origin import Stored, count_values

# Smaller ones need more bytes for scales than they save.
SMALLEST_GROUP = 16


class TensorSpec(NamedTuple):
    """A part of a weight at rest. Of its axes, by name, the first `num_outputs` are outputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str, ...]
    num_outputs: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The weights of a model.

    `formats` are by the weight's name, such as `layers.0.attention.wq`; a weight that has none there is plain, in
    `dtype`.
    """

    args: ModelArgs
    dtype: torch.dtype
    formats: Mapping[str, Format] = field(default_factory=dict)

    def format(self, name: str) -> Format:
        return self.formats.get(name, Plain(self.dtype))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def stored(self, precisions: Mapping[str, str] | None = None) -> Stored:
        """How many values there are in each precision. `precisions` are those of some weights by their files' own
        names for them; the others go by the names that formats have here.
        """
        plain = str(self.dtype).removeprefix("torch.")
        names = {weight: name_of(format) for weight, format in self.formats.items()} | dict(precisions or {})
        shapes = self.args.parameter_shapes()
        return count_values(
            (names.get(weight, plain), math.prod(shapes[f"{weight}.weight"])) for weight in self.args.weight_axes()
        )

    def save(self, folder: Path) -> None:
        """Write the files that describe the weights of a converted folder."""
        self.args.save(folder)
        save_formats(folder, self.formats)

    def units(self) -> dict[str, int]:
        """The axes that the plan cuts and some format does not let be cut anywhere, with what must stay together."""
        found: dict[str, int] = {}
        for name, axes in self.args.weight_axes().items():
            for axis in set(axes.inputs[-1:]) & PLAN.keys():
                found[axis] = math.lcm(self.format(name).unit, found.get(axis, 1))
        return {axis: unit for axis, unit in found.items() if unit > 1}

    def tensors(self) -> dict[str, TensorSpec]:
        """Every part by the name that it has in a converted folder, such as `layers.0.attention.wq.weight`.

        An axis that may only be cut between units is two: the units, and what is in one.

        Raises:
            ValueError: the format of a weight cannot hold it.
        """
        sizes, units = self.args.axis_sizes, self.units()
        for axis, unit in units.items():
            if sizes[axis] % unit:
                raise ValueError(f"the format of the weights needs a multiple of {unit} as {axis}, got {sizes[axis]}")

        def at_rest(axes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
            for axis in axes:
                unit = units.get(axis, 1)
                yield axis, sizes[axis] // unit
                if unit > 1:
                    yield f"{axis} of a unit", unit

        tensors = {}
        for name, axes in self.args.weight_axes().items():
            outputs, inputs = dict(at_rest(axes.outputs)), dict(at_rest(axes.inputs))
            parts = self.format(name).parts(tuple(outputs.values()), tuple(inputs.values()))
            for part, (shape, dtype) in parts.items():
                own_axes = (*outputs, *inputs)[: len(shape)]
                tensors[f"{name}.{part}"] = TensorSpec(shape, dtype, own_axes, len(outputs))
        return tensors


def fitting(format: Format, name: str, args: ModelArgs) -> Format:
    """`format` with the largest groups, no larger than its own, that fill the inputs of a weight and cut no head."""
    sizes = [args.axis_sizes[axis] for axis in args.weight_axes()[name].inputs]
    inputs, last = math.prod(sizes), sizes[-1]

    def largest(group: int) -> int:
        while inputs % group or (last % group and group % last):
            group //= 2
        return group

    own = {level: getattr(format, level, None) for level in ("group", "super_group")}
    groups = {level: largest(group) for level, group in own.items() if group}
    if groups.get("group", SMALLEST_GROUP) < SMALLEST_GROUP:
        raise ValueError(f"{name} cannot be quantized: no group of at least {SMALLEST_GROUP} fills its {last} inputs")
    return replace(format, **groups)  # type: ignore[type-var]
