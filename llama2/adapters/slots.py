"""Owns the device's memory for the adapters that steps compute with: S slots, each with room for this rank's share of
one adapter.

Knows no file, no name and no order: who is in which slot is decided elsewhere, alike on all ranks.

Of parallel ranks each adds to its own share of a product: B is cut along the weight's outputs, A along its inputs, so
that the sums over ranks that the model makes anyway complete what is added. Shape suffixes as in
llama2/adapters/products.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama2.adapters.adapter import Adapter, is_finite, layers_by_shape
from llama2.adapters.products import PRODUCTS, LoraProduct
from llama2.config import ModelArgs
from llama2.machine.memory import zeros
from llama2.parallel.plan import LINE_BYTES, local_portion


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's share of an adapter, on the host, laid out as a slot is: N values of each of L layers."""

    values_LN: torch.Tensor
    ranks_LP: torch.Tensor
    scales_LP: torch.Tensor


class AdapterSlots:
    """The slots of one rank. `layers` has the products of every layer, by its name."""

    def __init__(
        self,
        args: ModelArgs,
        mesh: DeviceMesh,
        units: Mapping[str, int],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`units` are those of the model's weights, between which their axes are cut (`Spec.units`)."""
        self.max_rank = max_rank
        self._sizes, self._axes = args.axis_sizes, args.weight_axes()
        self._portions = {
            axis: local_portion(axis, size, mesh, units.get(axis, 1)) for axis, size in self._sizes.items()
        }
        # By product: inputs, and outputs of each part. All layers are alike.
        self._shapes = {
            product: (
                self._local_size(self._axes[f"layers.0.{weights[0]}"].inputs),
                tuple(self._local_size(self._axes[f"layers.0.{weight}"].outputs) for weight in weights),
            )
            for product, weights in PRODUCTS.items()
        }
        # By weight: its product, which part of it, and which of its outputs.
        self._places = {
            weight: (product, part, slice(sum(outputs[:part]), sum(outputs[: part + 1])))
            for product, (_, outputs) in self._shapes.items()
            for part, weight in enumerate(PRODUCTS[product])
        }
        self._room = sum(
            len(outputs) * max_rank * inputs + max_rank * sum(outputs) for inputs, outputs in self._shapes.values()
        )
        self._room += -self._room % (LINE_BYTES // dtype.itemsize)
        num_parts = sum(map(len, PRODUCTS.values()))
        count = num_slots * args.n_layers * self._room
        self._values_SLN = zeros(count, dtype=dtype, device=device).view(num_slots, args.n_layers, self._room)
        self._ranks_SLP = torch.zeros(num_slots, args.n_layers, num_parts, dtype=torch.int32, device=device)
        self._scales_SLP = torch.zeros(num_slots, args.n_layers, num_parts, dtype=torch.float32, device=device)
        self.layers = [
            self._products(self._values_SLN[:, layer], self._ranks_SLP[:, layer], self._scales_SLP[:, layer])
            for layer in range(args.n_layers)
        ]

    def take(self, adapter: Adapter) -> Share:
        """This rank's share of an adapter, whose rank is no larger than `max_rank`. For any thread.

        Raises:
            ValueError: a value is too large for the model's dtype.
        """
        values_SLN, *others = self._values_SLN, self._ranks_SLP, self._scales_SLP
        pinned = values_SLN.device.type == "cuda"
        values_LN, ranks_LP, scales_LP = (
            torch.zeros(one.shape[1:], dtype=one.dtype, pin_memory=pinned) for one in (values_SLN, *others)
        )
        # Their first axis is the layer, not the slot.
        products = self._products(values_LN, ranks_LP, scales_LP)
        ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
        for (weight, rank), layers in layers_by_shape(ranks).items():
            product, part, outputs = self._places[weight]
            lora, axes = products[product], self._axes[f"layers.0.{weight}"]
            pairs = [adapter.pairs[f"layers.{layer}.{weight}"] for layer in layers]
            a_LRC = self._local(torch.stack([pair.a_RC for pair in pairs]), 2, axes.inputs)
            b_LFR = self._local(torch.stack([pair.b_FR for pair in pairs]), 1, axes.outputs)
            lora.a_SPRC[layers, part, :rank] = a_LRC.to(values_LN)
            lora.b_SRF[layers, :rank, outputs] = b_LFR.mT.to(values_LN)
            lora.ranks_SP[layers, part] = rank
            lora.scales_SP[layers, part] = torch.tensor([pair.scaling for pair in pairs])
        if not is_finite(values_LN):
            raise ValueError(f"the adapter has values that are too large for a model of {values_LN.dtype}")
        return Share(values_LN=values_LN, ranks_LP=ranks_LP, scales_LP=scales_LP)

    def put(self, slot: int, share: Share) -> None:
        """Copy a share into a slot, for all passes from the next one on."""
        self._values_SLN[slot].copy_(share.values_LN, non_blocking=True)
        self._ranks_SLP[slot].copy_(share.ranks_LP, non_blocking=True)
        self._scales_SLP[slot].copy_(share.scales_LP, non_blocking=True)

    def _products(
        self, values_SN: torch.Tensor, ranks_SP: torch.Tensor, scales_SP: torch.Tensor
    ) -> dict[str, LoraProduct]:
        """Views of the memory of one layer of all slots."""
        found, place, part = {}, 0, 0
        for product, (inputs, outputs) in self._shapes.items():
            count, last = len(outputs), part + len(outputs)
            a, b = count * self.max_rank * inputs, self.max_rank * sum(outputs)
            found[product] = LoraProduct(
                a_SPRC=values_SN[:, place : place + a].unflatten(1, (count, self.max_rank, inputs)),
                b_SRF=values_SN[:, place + a : place + a + b].unflatten(1, (self.max_rank, sum(outputs))),
                ranks_SP=ranks_SP[:, part:last],
                scales_SP=scales_SP[:, part:last],
                outputs=outputs,
            )
            place, part = place + a + b, last
        return found

    def _local_size(self, axes: tuple[str, ...]) -> int:
        return math.prod(portion.stop - portion.start for portion in map(self._portions.__getitem__, axes))

    def _local(self, values: torch.Tensor, dim: int, axes: tuple[str, ...]) -> torch.Tensor:
        """This rank's share of what has these axes at `dim`, as one."""
        values = values.unflatten(dim, [self._sizes[axis] for axis in axes])
        for at, axis in enumerate(axes, start=dim):
            portion = self._portions[axis]
            values = values.narrow(at, portion.start, portion.stop - portion.start)
        return values.flatten(dim, dim + len(axes) - 1)
