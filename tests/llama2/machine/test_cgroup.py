"""What a group may still take is its limit without its usage, but for the file cache; groups above it count, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2.machine.cgroup import allowed_memory


def group(folder: Path, *, limit: str, usage: int = 500, version: int = 2) -> None:
    """A group whose file cache is 30 + 40 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    of_children = "total_" if version == 1 else ""
    own = "" if version == 2 else "inactive_file 1\nactive_file 2\n"
    stat = f"anon 400\nfile 90\n{own}{of_children}inactive_file 30\n{of_children}active_file 40\nunevictable 20\n"
    (folder / "memory.stat").write_text(stat)


def allowed(tmp_path: Path, own: str) -> list[int]:
    (tmp_path / "own").write_text(own)
    return allowed_memory(tmp_path / "own", tmp_path / "mount")


def test_a_container_has_its_limit_without_what_it_uses(tmp_path: Path) -> None:
    group(tmp_path / "mount", limit="1000")
    assert allowed(tmp_path, "0::/\n") == [570]
    group(tmp_path / "mount", limit="1000", usage=1040)
    assert allowed(tmp_path, "0::/\n") == [30]
    group(tmp_path / "mount", limit="1000", usage=2000)
    assert allowed(tmp_path, "0::/\n") == [0]


def test_groups_above_it_count_and_one_without_a_limit_does_not(tmp_path: Path) -> None:
    group(tmp_path / "mount" / "system.slice", limit="800")
    group(tmp_path / "mount" / "system.slice" / "llama.service", limit="max")
    group(tmp_path / "mount" / "system.slice" / "llama.service" / "job", limit="2000", usage=100)
    group(tmp_path / "mount" / "another.slice", limit="1")
    assert allowed(tmp_path, "0::/system.slice/llama.service/job\n") == [1970, 370]


def test_a_name_that_only_the_host_has_means_the_group_that_is_mounted(tmp_path: Path) -> None:
    group(tmp_path / "mount" / "memory", limit="1000", version=1)
    lines = "3:cpu,cpuacct:/docker/12ab\n2:memory:/docker/12ab\n1:name=systemd:/docker/12ab\n0::/docker/12ab\n"
    assert allowed(tmp_path, lines) == [570]
    group(tmp_path / "mount" / "memory" / "docker" / "12ab", limit="900", version=1)
    assert allowed(tmp_path, lines) == [470, 570]


@pytest.mark.parametrize("own", ["", "0::/\n", "0::/../above\n", "2:memory:/gone\n0::/\n"])
def test_without_groups_nothing_is_limited(tmp_path: Path, own: str) -> None:
    assert allowed(tmp_path, own) == []
    assert allowed_memory(tmp_path / "none", tmp_path) == []


def test_this_process_has_some_or_no_limit() -> None:
    assert all(left >= 0 for left in allowed_memory())
