"""Owns where TorchServe's own programs are: beside the interpreter, or wherever PATH says."""

from __future__ import annotations

import os
import shutil
import sysconfig


def find_program(name: str) -> str:
    """The path of `name`, which is also the package that has it.

    Raises:
        ValueError: it is not installed.
    """
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ValueError(f"{name} is neither beside the interpreter nor on PATH: pip install {name}")
    return found
