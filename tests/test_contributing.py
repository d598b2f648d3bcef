"""CONTRIBUTING.md names the folders that there are."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePath

ROOT = Path(__file__).parents[1]


def named_folders() -> set[PurePath]:
    """Those of the tree under "Rooms", in which each level is indented by two more spaces."""
    rooms = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Rooms")[2].partition("\n## ")[0]
    folders: set[PurePath] = set()
    path: list[str] = []
    for line in rooms.splitlines():
        if line.startswith("    "):
            name = line.split()[0]
            depth = (len(line) - len(line.lstrip()) - 4) // 2
            path = [*path[:depth], name.rstrip("/")]
            folders.add(PurePath(*path))
    return folders


def real_folders() -> set[PurePath]:
    """The repository's; of the tests' folders, only those that mirror no other."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {folder for file in files if (ROOT / file).exists() for folder in PurePath(file).parents}
    visible = {folder for folder in folders if folder.parts and not folder.parts[0].startswith(".")}
    mirrors = {PurePath("tests", folder) for folder in visible}
    return {folder for folder in visible if folder not in mirrors and PurePath("tests/clients") not in folder.parents}


def test_the_tree_names_every_folder_and_no_other() -> None:
    assert named_folders() == real_folders()
