"""Owns what is trained: each adapted weight's two matrices in fp32, this rank's share of them, and their gradients.

Knows no optimizer and no file. Values are one flat tensor, and gradients another: an optimizer steps over all at once.
Each rank has A's inputs and B's outputs where the weight's own are. What several ranks have alike is a sum of their
gradients, and stays the same on all of them.

Shape suffixes: R adapter ranks, C inputs, F outputs, T rows, N values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama2.adapters.adapter import LoraPair
from llama2.adapters.format import Target
from llama2.adapters.products import PRODUCTS
from llama2.config import ModelArgs
from llama2.parallel.collectives import Collectives
from llama2.parallel.plan import local_portion
from llama2.parallel.splits import PLAN


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedProduct:
    """What is added to one product, for each of its parts that is trained: `scalings` times B times A.

    `a` has the parts' A's one after the other, (sum of `ranks`, C), and is None where no part is trained; `columns` are
    the parts' places in the product. Dropout leaves out a fraction of the inputs, of which this rank has `own_C`.
    """

    a: torch.Tensor | None
    b: tuple[torch.Tensor, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    columns: tuple[slice, ...]
    dropout: float
    name: str
    inputs: int
    own_C: torch.Tensor

    def kept(self, seed: int, x: torch.Tensor) -> torch.Tensor:
        """What x (T, C) is multiplied by: 0 for what is left out. It follows from `seed` alone, on any rank."""
        generator = torch.Generator(x.device).manual_seed(derived_seed(seed, self.name))
        kept = torch.rand(len(x), self.inputs, generator=generator, device=x.device) >= self.dropout
        return kept[:, self.own_C].to(x.dtype).div_(1 - self.dropout)


class TrainedAdapter:
    """An adapter as it is trained. `layers` has the products of every layer, by the names of PRODUCTS."""

    def __init__(
        self,
        args: ModelArgs,
        targets: Mapping[str, Target],
        mesh: DeviceMesh,
        units: Mapping[str, int],
        collectives: Collectives,
        *,
        dropout: float,
        seed: int,
        device: torch.device,
    ) -> None:
        """As PEFT begins: B is 0, and A uniform in ±1 / sqrt(C), the same for one seed at any number of ranks.

        `units` are those of the model's weights, between which their axes are cut (`Spec.units`).
        """
        self._targets = targets
        self._mesh = mesh
        self._collectives = collectives
        self._axes = args.weight_axes()
        sizes = args.axis_sizes
        portions = {axis: local_portion(axis, size, mesh, units.get(axis, 1)) for axis, size in sizes.items()}

        def own(axes: tuple[str, ...]) -> torch.Tensor:
            """Which of what has these axes, as one, is this rank's."""
            places = torch.arange(math.prod(sizes[axis] for axis in axes)).view([sizes[axis] for axis in axes])
            for dim, axis in enumerate(axes):
                places = places.narrow(dim, portions[axis].start, portions[axis].stop - portions[axis].start)
            return places.flatten()

        # By weight: which inputs and which outputs this rank has.
        self._own = {
            weight: (own(self._axes[weight].inputs), own(self._axes[weight].outputs))
            for layer in range(args.n_layers)
            for weights in PRODUCTS.values()
            for weight in (f"layers.{layer}.{one}" for one in weights)
        }
        self._allocate(args, device)
        self.layers = [
            {product: self._product(layer, product, args, dropout) for product in PRODUCTS}
            for layer in range(args.n_layers)
        ]
        for weight, target in targets.items():
            inputs = math.prod(sizes[axis] for axis in self._axes[weight].inputs)
            generator = torch.Generator().manual_seed(derived_seed(seed, weight))
            a_RC = (torch.rand(target.rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
            self._a[weight].copy_(a_RC[:, self._own[weight][0]])

    @property
    def parameters(self) -> torch.Tensor:
        """All values (N,), whose gradient is `gradients`."""
        self._values.grad = self.gradients
        return self._values

    def sum_gradients(self) -> None:
        """Over the ranks that have the same values. All ranks call it, after a backward pass."""
        everywhere, in_rep = self._groups
        if self._collectives.world_size > 1:
            part = self.gradients[:everywhere]
            part.copy_(self._collectives.all_reduce(part))
            if in_rep and self._mesh.shape[1] > 1:
                dist.all_reduce(self.gradients[everywhere : everywhere + in_rep], group=self._mesh.get_group("rep"))

    def gradient_norm(self) -> float:
        """Of the whole adapter's gradient, the same on every rank; once gradients are summed."""
        everywhere, in_rep = self._groups
        common, repeated, own = self.gradients.split([everywhere, in_rep, len(self.gradients) - everywhere - in_rep])
        squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in (common, repeated, own)]
        here = squares[1] / self._mesh.shape[1] + squares[2]
        return math.sqrt(squares[0] + self._collectives.all_reduce(here.view(1)))

    def put(self, pairs: Mapping[str, LoraPair]) -> None:
        """Take the values of whole matrices, one pair for each weight that is trained."""
        for weight, pair in pairs.items():
            own_C, own_F = self._own[weight]
            self._a[weight].copy_(pair.a_RC[:, own_C])
            self._b[weight].copy_(pair.b_FR[own_F])

    def pairs(self, *, gradients: bool = False) -> dict[str, LoraPair] | None:
        """The whole matrices, or their gradients, in fp32 on the host; on rank 0, else None. All ranks call it."""
        mine: dict[str, tuple[torch.Tensor, ...]] = {}
        for weight in self._targets:
            a, b = (self._of(one, gradients) for one in (self._a[weight], self._b[weight]))
            mine[weight] = (*self._own[weight], a, b)
        everyone: list[dict[str, tuple[torch.Tensor, ...]]] = [{}] * self._collectives.world_size
        if len(everyone) == 1:
            everyone = [mine]
        else:
            dist.gather_object(mine, everyone if self._collectives.rank == 0 else None)
        if self._collectives.rank != 0:
            return None
        whole = {}
        for weight, (rank, scaling) in self._targets.items():
            parts = [theirs[weight] for theirs in everyone]
            inputs, outputs = (1 + max(int(part[which].max()) for part in parts) for which in (0, 1))
            a_RC, b_FR = torch.empty(rank, inputs), torch.empty(outputs, rank)
            for own_C, own_F, a, b in parts:
                a_RC[:, own_C], b_FR[own_F] = a, b
            whole[weight] = LoraPair(a_RC=a_RC, b_FR=b_FR, scaling=scaling)
        return whole

    def _of(self, view: torch.Tensor, gradients: bool) -> torch.Tensor:
        """A matrix, or its gradient, on the host."""
        if gradients:
            view = self.gradients.as_strided(view.shape, view.stride(), view.storage_offset())
        return view.detach().to("cpu", copy=True)

    def _allocate(self, args: ModelArgs, device: torch.device) -> None:
        """Flat memory: what all ranks have first, then what those of one `rep` group have, then what is this rank's."""
        # By product or weight: the shape of its A's or its B, and over which axes of the mesh its gradient is summed.
        tensors: dict[tuple[str, str], tuple[tuple[int, int], frozenset[str]]] = {}
        for layer in range(args.n_layers):
            for product, weights in PRODUCTS.items():
                trained = [weight for one in weights if (weight := f"layers.{layer}.{one}") in self._targets]
                for weight in trained:
                    outputs = self._own[weight][1]
                    tensors[weight, "b"] = (
                        (len(outputs), self._targets[weight].rank),
                        _alike(self._axes[weight].outputs),
                    )
                if trained:
                    ranks = sum(self._targets[weight].rank for weight in trained)
                    inputs = self._own[trained[0]][0]
                    tensors[f"layers.{layer}.{product}", "a"] = (
                        (ranks, len(inputs)),
                        _alike(self._axes[trained[0]].inputs),
                    )
        order: tuple[frozenset[str], ...] = (frozenset({"kv", "rep"}), frozenset({"rep"}), frozenset())
        ordered = sorted(tensors.items(), key=lambda item: order.index(item[1][1]))
        sizes = [math.prod(shape) for _, (shape, _) in ordered]
        self._groups = [
            sum(size for size, (_, (_, alike)) in zip(sizes, ordered, strict=True) if alike == group)
            for group in order[:2]
        ]
        self._values, self.gradients = (torch.zeros(sum(sizes), device=device) for _ in range(2))
        self._leaves: dict[tuple[str, str], torch.Tensor] = {}
        pieces = zip(ordered, self._values.split(sizes), self.gradients.split(sizes), strict=True)
        for (key, (shape, _)), values, gradients in pieces:
            leaf = values.view(shape).detach().requires_grad_()
            # Backward passes add to what is there.
            leaf.grad = gradients.view(shape)
            self._leaves[key] = leaf
        self._a: dict[str, torch.Tensor] = {}
        self._b = {name: leaf.detach() for (name, kind), leaf in self._leaves.items() if kind == "b"}

    def _product(self, layer: int, product: str, args: ModelArgs, dropout: float) -> TrainedProduct:
        name = f"layers.{layer}.{product}"
        a = self._leaves.get((name, "a"))
        weights, columns, place = [], [], 0
        for one in PRODUCTS[product]:
            weight = f"layers.{layer}.{one}"
            outputs = len(self._own[weight][1])
            if weight in self._targets:
                weights.append(weight)
                columns.append(slice(place, place + outputs))
            place += outputs
        ranks = [self._targets[weight].rank for weight in weights]
        if a is not None:
            self._a |= dict(zip(weights, a.detach().split(ranks), strict=True))
        first = self._axes[f"layers.{layer}.{PRODUCTS[product][0]}"].inputs
        return TrainedProduct(
            a=a,
            b=tuple(self._leaves[weight, "b"] for weight in weights),
            ranks=tuple(ranks),
            scalings=tuple(self._targets[weight].scaling for weight in weights),
            columns=tuple(columns),
            dropout=dropout,
            name=name,
            inputs=math.prod(args.axis_sizes[axis] for axis in first),
            own_C=self._own[f"layers.{layer}.{PRODUCTS[product][0]}"][0],
        )


def derived_seed(*parts: object) -> int:
    """A seed for torch that depends on all of the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _alike(axes: tuple[str, ...]) -> frozenset[str]:
    """The axes of the mesh along which all ranks have the same of what has these logical axes."""
    return frozenset({"kv", "rep"}) - {cut for axis in axes for cut in PLAN.get(axis, ())}
