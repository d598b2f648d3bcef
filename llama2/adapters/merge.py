"""Owns the choice of the values that an adapter is merged into, and whether it was trained on them.

Knows no file of weights and adds nothing itself: `precision.Converted` does, while it converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from llama2.adapters.adapter import HIDDEN, Adapter, LoraPair
from llama2.adapters.format import Base, check_fits, read_adapter, read_base
from llama2.adapters.reference import AdapterRef
from llama2.errors import InvalidValue
from llama2.weights.certificate import Identity
from llama2.weights.manifest import MANIFEST_FILE
from llama2.weights.origin import SORTED, Merged, Stored, is_quantized
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.source import Source

Onto = Literal["original", "quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """An adapter to be added to weights.

    Attributes:
        pairs: by the weights' names.
        quantize_first: add it to what the result's format makes of a weight, and not to the weight.
        note: a line for the user: what is merged into what.
        step: the same for `origin.json`.
    """

    pairs: Mapping[str, LoraPair]
    quantize_first: bool
    note: str
    step: Merged


def open_merge(folder: Path | str, source: Source, *, onto: str | None, quantize: str | None) -> Merge:
    """Open the adapter in `folder`, to be merged into `source`.

    Args:
        onto: "original": the values of a source that is not quantized. "quantized": those of one that is, dequantized;
            of one that is not, what `quantize` makes of them. None: the values as the source has them.
        quantize: the converter's, which says what becomes of the sums.

    Raises:
        ValueError: the adapter cannot be read, or was trained on something else, or the source has no such values.
    """
    if onto is not None and onto not in get_args(Onto):
        raise ValueError(f"--onto must be {' or '.join(get_args(Onto))}, got {onto!r}")
    try:
        AdapterRef.of(folder)
    except InvalidValue as error:
        raise ValueError(f"--adapter {error.problem}") from None
    reader, stored = source.reader, source.origin[-1]
    adapter, base = read_adapter(folder, reader.spec.args), read_base(folder)
    path, precisions, quantized = reader.path, _words(stored), is_quantized(stored)
    if onto == "original" and quantized:
        raise ValueError(
            f"--onto original needs values that are not quantized, and {path} is stored as {precisions}: convert from "
            "what it was quantized from"
        )
    if onto == "quantized" and not quantized and quantize in (None, "none", "gptq"):
        raise ValueError(
            f"--onto quantized needs quantized values, and {path} is stored as {precisions}: convert from the folder "
            "that the adapter was trained on, or set --quantize to int8, int4, nf4 or nf4_double"
        )
    if onto is None and base is not None and is_quantized(base.stored) != quantized:
        raise ValueError(
            f"{folder} was trained on weights stored as {_words(base.stored)}, and {path} is stored as {precisions}: "
            f"convert from these, or set --onto to {'quantized' if quantized else 'original'} to add it nevertheless"
        )
    onto = onto or ("quantized" if quantized else "original")
    what = f"the values of {path} as they are stored ({precisions})"
    if onto == "quantized":
        what = f"{what}, dequantized" if quantized else f"what {quantize} makes of the values of {path}"
    own = None
    if isinstance(reader, DcpFolder) and (path / MANIFEST_FILE).is_file():
        own = Base(weights=Identity.of(path).weights, stored=stored)
    known = _known(base, is_own=check_fits(folder, adapter, own, is_sorted=SORTED in source.origin))
    return Merge(
        pairs=_as_stored(folder, adapter, source, has_base=base is not None),
        quantize_first=onto == "quantized" and not quantized,
        note=f"merging {folder} ({len(adapter.pairs)} weights, rank {adapter.rank}) into {what}; {known}",
        step={"adapter": f"sha256:{adapter.identity.hex()}", "onto": onto},
    )


def _known(base: Base | None, *, is_own: bool) -> str:
    """What is known of the adapter's base, beside the values that it is merged into."""
    if base is None:
        return "it does not say what it was trained on"
    if is_own:
        return "it was trained on these"
    return f"it was trained on weights stored as {_words(base.stored)}, whose hash cannot be compared with these"


def _as_stored(folder: Path | str, adapter: Adapter, source: Source, *, has_base: bool) -> dict[str, LoraPair]:
    """The pairs, with hidden features in the order that the source's reader gives them.

    Raises:
        ValueError: it is not known in which order the adapter has them.
    """
    if adapter.changes_hidden and has_base and source.hidden_orders:
        raise ValueError(
            f"{folder} was trained on a converted folder, which has hidden features in another order than "
            f"{source.reader.path}: merge it into that folder"
        )
    pairs = dict(adapter.pairs)
    for name, pair in adapter.pairs.items():
        order = source.hidden_orders.get(name.split(".")[1])
        if order is not None and name.endswith(".w2"):
            pairs[name] = replace(pair, a_RC=pair.a_RC[:, order])
        elif order is not None and name.endswith(HIDDEN):
            pairs[name] = replace(pair, b_FR=pair.b_FR[order])
    return pairs


def _words(stored: Stored) -> str:
    return " and ".join(stored)
