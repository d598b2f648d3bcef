"""Owns which GPUs a worker may use where TorchServe must not know: the user's mask, and how TorchServe counts in it.

TorchServe counts a machine's GPUs from 0, whatever CUDA_VISIBLE_DEVICES says, and sets that variable to its own count
in its workers; started under a mask with a UUID in it, it ends. So it is started without one, the mask travels in
VARIABLE, and each rank puts the two together before anything asks CUDA. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

VARIABLE = "LLAMA_VISIBLE_DEVICES"
_CUDA = "CUDA_VISIBLE_DEVICES"


def requested(environ: Mapping[str, str]) -> str | None:
    """The mask under which the user starts a server, spelled as CUDA wants it; None: all GPUs."""
    return environ.get(_CUDA, environ.get(VARIABLE))


def set_aside(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to start TorchServe in."""
    aside = {name: value for name, value in environ.items() if name != _CUDA}
    mask = requested(environ)
    return aside if mask is None else {**aside, VARIABLE: mask}


def restore(environ: MutableMapping[str, str]) -> None:
    """In a worker: let CUDA_VISIBLE_DEVICES say which of the user's GPUs are its own.

    Raises:
        ValueError: as `select`.
    """
    mask = environ.pop(VARIABLE, None)
    if mask is not None:
        environ[_CUDA] = select(mask, environ.get(_CUDA))


def entries(mask: str) -> list[str]:
    """The GPUs of a mask, indices or UUIDs; as in CUDA, an empty one or -1 hides all that follow."""
    names = [name.strip() for name in mask.split(",")]
    hidden = [index for index, name in enumerate(names) if name in ("", "-1")]
    return names[: hidden[0]] if hidden else names


def select(mask: str, own: str | None) -> str:
    """The entries of the user's mask that TorchServe's `own` one, such as "0,1", counts; all of them without one.

    Raises:
        ValueError: it counts further than the mask goes.
    """
    names = entries(mask)
    if own is None or not names:
        return ",".join(names)
    wanted = entries(own)
    beyond = [index for index in wanted if not index.isdecimal() or int(index) >= len(names)]
    if beyond:
        raise ValueError(
            f"{VARIABLE}={mask} names {len(names)} GPUs, but TorchServe gave this worker those of index {own}: name as "
            "many as torchrun: nproc-per-node asks for, or lower that"
        )
    return ",".join(names[int(index)] for index in wanted)
