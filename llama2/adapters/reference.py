"""Owns how a request names an adapter. Knows nothing of what is in its files, and no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llama2.adapters.config import CONFIG_FILE
from llama2.errors import InvalidValue, shown

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """A folder in PEFT's format, as it was when it was asked for: with other files it is another adapter."""

    path: str
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path | str) -> AdapterRef:
        """The adapter that is in `folder` now.

        Raises:
            InvalidValue: there is none.
        """
        path = Path(folder).absolute()
        try:
            files = [(path / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except (OSError, ValueError):
            hint = ""
            if os.path.isfile(path / _PICKLE_FILE):
                hint = f": {_PICKLE_FILE} is a pickle, which is not read"
            elif os.path.isfile(path / "adapter" / CONFIG_FILE):
                hint = f": there is one in {Path(folder) / 'adapter'}"
            elif not os.path.exists(path):
                hint = ", which does not exist"
            raise InvalidValue(
                "adapter",
                f"must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT writes it, "
                f"got {shown(str(folder))}{hint}",
            ) from None
        return cls(path=str(path), stamp=tuple(number for one in files for number in (one.st_mtime_ns, one.st_size)))
