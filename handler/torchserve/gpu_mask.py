"""Owns which GPUs a worker may use where TorchServe must not know: the user's mask.

TorchServe counts a machine's GPUs from 0, whatever CUDA_VISIBLE_DEVICES says, and ends if there is a UUID in it. So it
is started without one, the mask travels in VARIABLE, and a worker puts it back before anything asks CUDA. Knows no
torch.
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
    """In a worker: let CUDA_VISIBLE_DEVICES be the user's mask, if there is one."""
    mask = environ.pop(VARIABLE, None)
    if mask is not None:
        environ[_CUDA] = ",".join(entries(mask))


def entries(mask: str) -> list[str]:
    """The GPUs of a mask, indices or UUIDs; as in CUDA, an empty one or -1 hides all that follow."""
    names = [name.strip() for name in mask.split(",")]
    hidden = [index for index, name in enumerate(names) if name in ("", "-1")]
    return names[: hidden[0]] if hidden else names
