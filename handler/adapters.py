"""Owns the adapters that a server offers, by name. Knows no engine, no body and no torch: what is in their weights is
found out when they are loaded.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.errors import RequestError
from llama2.adapters.config import CONFIG_FILE, AdapterConfig
from llama2.adapters.reference import AdapterRef
from llama2.config import LORA_RANK
from llama2.errors import InvalidValue, shown

logger = logging.getLogger(__name__)

HIGHEST_RANK = 64  # for which a server makes room unless it is told to
MAX_NAMES = 32  # that a message lists
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")


class Adapters:
    """The adapters below one folder. All methods are for any thread."""

    def __init__(self, folder: Path | None = None, *, can_change: bool = False, max_rank: int | None = None) -> None:
        """Each subfolder of `folder` that has a config is an adapter of that name, but for hidden ones, which may be
        half written; None: there are none.

        `can_change`: clients may load and unload. Adapters of a higher rank than `max_rank` are left out; by default
        that is the highest in the folder, up to `HIGHEST_RANK`, and at least `LORA_RANK` where clients may load others.

        Raises:
            InvalidValue: the folder is itself an adapter.
        """
        self._folder = None if folder is None else folder.resolve()
        self._can_change = can_change
        self.max_rank = max_rank or HIGHEST_RANK
        ranks = []
        self._lock = threading.Lock()
        self._refs: dict[str, AdapterRef] = {}
        self._loaded: set[str] = set()  # those of them that clients have loaded
        self._left_out: dict[str, str] = {}  # with the reasons
        if self._folder is not None and (self._folder / CONFIG_FILE).is_file():
            raise InvalidValue("adapters_dir", f"is itself an adapter: give the folder above {self._folder}")
        for config in sorted(self._folder.glob(f"[!.]*/{CONFIG_FILE}")) if self._folder else ():
            name = config.parent.name
            try:
                self._refs[name], rank = self._read(name, config.parent)
                ranks.append(rank)
            except ValueError as error:
                logger.warning("the adapter %s is left out: %s", name, error)
                self._left_out[name] = str(error)
        if max_rank is None:
            self.max_rank = max((*ranks, LORA_RANK) if can_change or not ranks else ranks)

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._refs)

    def find(self, name: str) -> AdapterRef | None:
        """The adapter of that name, as it was when it was loaded."""
        return self._refs.get(name)

    def named(self, name: Any) -> AdapterRef | None:
        """The adapter that a body of the native API names; None without a name.

        Raises:
            InvalidValue: it is no text.
            RequestError: there is none of that name (404).
        """
        if name is None:
            return None
        if not isinstance(name, str):
            raise InvalidValue("adapter", f"must be the name of an adapter, got {shown(name)}")
        ref = self.find(name)
        if ref is None:
            raise self.not_found("adapter", f"there is no adapter {shown(name)}", name, self.names)
        return ref

    def not_found(self, field: str, problem: str, name: str, names: Sequence[str]) -> RequestError:
        """A 404 with the names that there are, if they are not too many for a message, or why the adapter is none."""
        known = ", ".join(map(repr, names[:MAX_NAMES])) or "none"
        more = ", and others" if len(names) > MAX_NAMES else ""
        reason = self._left_out.get(name)
        why = f"this server has {known}{more}" if reason is None else f"it was left out at the start: {reason}"
        return RequestError(f"{problem}; {why}", param=field, status=404, code="model_not_found")

    def place(self, ref: AdapterRef) -> str:
        """Where an adapter is, below the folder."""
        assert self._folder is not None
        return str(Path(ref.path).relative_to(self._folder))

    def check(self, name: str, path: str, *, again: bool = False) -> AdapterRef:
        """The adapter at `path`, relative to the folder or absolute, which a client wants to have by `name`. It has it
        once it is added.

        Raises:
            InvalidValue: a value is wrong; or `again` is false, and the name is another adapter's, or loaded already.
            RequestError: clients may not do that (403).
        """
        self._check_can_change()
        assert self._folder is not None
        if not _NAME.fullmatch(name):
            raise InvalidValue("lora_name", f"must be letters, digits, '-', '_' and '.', got {shown(name)}")
        named, place = self.find(name), self._folder / path
        # The server's own choice, read now and not at the first request; it may be a link out of the folder.
        is_listed = named is not None and name not in self._loaded and place == Path(named.path)
        if named is not None and not again and not is_listed:
            raise InvalidValue("lora_name", f"{name} is there already: unload it first, or say load_inplace")
        try:
            place = place if is_listed else place.resolve()
        except (OSError, ValueError, RuntimeError):
            raise InvalidValue("lora_path", f"must be a path, got {shown(path)}") from None
        if place == self._folder or not place.is_relative_to(self._folder):
            raise InvalidValue("lora_path", f"must be below the server's adapters_dir, got {shown(path)}")
        try:
            return self._read(name, place)[0]
        except InvalidValue as error:
            raise InvalidValue("lora_path", error.problem) from None
        except ValueError as error:
            raise InvalidValue("lora_path", f"has no adapter that can be loaded: {error}") from None

    def add(self, name: str, ref: AdapterRef) -> None:
        """From now on requests may have it."""
        with self._lock:
            self._refs[name] = ref
            self._loaded.add(name)
            self._left_out.pop(name, None)

    def remove(self, name: str) -> AdapterRef:
        """No more requests may have it.

        Raises:
            RequestError: there is none of that name (404), or clients may not do that (403).
        """
        self._check_can_change()
        with self._lock:
            if name not in self._refs:
                raise RequestError(
                    f"there is no adapter {shown(name)}", param="lora_name", status=404, code="model_not_found"
                )
            self._loaded.discard(name)
            return self._refs.pop(name)

    def _check_can_change(self) -> None:
        if not self._can_change:
            raise RequestError(
                "clients of this server may not load and unload adapters: that is allow_runtime_lora_updating in "
                "model-config.yaml, beside adapters_dir",
                status=403,
                code="not_allowed",
            )

    def _read(self, name: str, folder: Path) -> tuple[AdapterRef, int]:
        """An adapter, and its rank."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"an adapter's name must be letters, digits, '-', '_' and '.', got {shown(name)}")
        ref = AdapterRef.of(folder)
        rank = AdapterConfig.load(folder).highest_rank
        if rank > self.max_rank:
            raise ValueError(
                f"its rank is {rank}, and there is room for {self.max_rank}: set max_lora_rank in model-config.yaml"
            )
        return ref, rank
