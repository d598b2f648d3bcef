"""The output folder appears whole or not at all, and what stood there survives every failure."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from llama2.weights.staging import StagedFolder


def staged_file(target: Path, text: str) -> StagedFolder:
    staged = StagedFolder(target)
    staged.open(size=0)
    (staged.partial / "weights").write_text(text)
    return staged


def test_the_target_appears_at_commit_and_nothing_else_stays(tmp_path):
    staged = staged_file(tmp_path / "deep" / "out", "new")
    assert not (tmp_path / "deep" / "out").exists()
    staged.commit()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "weights").read_text() == "new"


def test_commit_replaces_and_discard_keeps_what_stood_there(tmp_path):
    staged_file(tmp_path / "out", "old").commit()
    staged_file(tmp_path / "out", "discarded").discard()
    assert (tmp_path / "out" / "weights").read_text() == "old"
    staged_file(tmp_path / "out", "new").commit()
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    staged_file(tmp_path / "out", "old").commit()
    staged = staged_file(tmp_path / "out", "new")
    shutil.rmtree(staged.partial)  # the second rename cannot work now
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    monkeypatch.setattr("llama2.weights.staging._sync", lambda path: None)
    with pytest.raises(FileNotFoundError):
        staged.commit()
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_a_run_killed_between_the_two_renames_is_recovered(tmp_path):
    staged_file(tmp_path / "out", "old").commit()
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    StagedFolder(tmp_path / "out").recover()
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_a_run_killed_after_the_swap_leaves_the_new_folder(tmp_path):
    staged_file(tmp_path / ".out.replaced", "old").commit()
    staged_file(tmp_path / "out", "new").commit()
    StagedFolder(tmp_path / "out").recover()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "new"


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.partial" / "stale").write_text("stale")
    staged_file(tmp_path / "out", "new").commit()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]


def test_two_runs_do_not_write_one_target(tmp_path):
    first = staged_file(tmp_path / "out", "first")
    with pytest.raises(ValueError, match="another process is writing"):
        StagedFolder(tmp_path / "out").open(size=0)
    first.commit()
    assert (tmp_path / "out" / "weights").read_text() == "first"
    staged_file(tmp_path / "out", "second").commit()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=5_000_000_000))
    with pytest.raises(ValueError, match=r"not enough disk space for .*out: 7.0 GB needed, 5.0 GB free"):
        StagedFolder(tmp_path / "out").open(size=7_000_000_000)
    assert not any(tmp_path.iterdir())


def test_a_link_is_followed_so_that_the_folder_it_names_is_replaced_on_its_own_disk(tmp_path):
    staged_file(tmp_path / "disk" / "real", "old").commit()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    staged_file(tmp_path / "out", "new").commit()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "weights").read_text() == "new"
