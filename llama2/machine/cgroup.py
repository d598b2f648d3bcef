"""Owns how much memory the limits of a container, or of any other control group, still allow this process.

Knows Linux's files alone: https://docs.kernel.org/admin-guide/cgroup-v2.html and, for version 1,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """Where a version has its figures; those in memory.stat are pages of files, which the kernel drops when needed."""

    limit: str
    usage: str
    cache: tuple[str, str]


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def allowed_memory(own: Path = _OWN, mount: Path = _MOUNT) -> list[int]:
    """The bytes that each group of this process may still take; none for a group without a limit.

    `own` names the groups, and `mount` is where they are. In a container `own` may have the host's names: its group is
    the mount itself then.
    """
    allowed: list[int] = []
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (mount / "memory", _V1) if controllers else (mount, _V2)
        group = root / name.lstrip("/")
        # What a group above it allows is shared by all groups in that one.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                allowed += _left(folder, files)
    return allowed


def _left(folder: Path, files: _Files) -> list[int]:
    try:
        limit, usage, stat = ((folder / name).read_text() for name in (files.limit, files.usage, "memory.stat"))
    except OSError:  # the top group has no limit, and a sandbox not all files
        return []
    if limit.strip() == "max":
        return []
    figures = dict(line.split() for line in stat.splitlines())
    cache = sum(int(figures.get(name, 0)) for name in files.cache)
    return [max(0, int(limit) - int(usage) + cache)]
