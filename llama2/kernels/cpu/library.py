"""Owns the way from the C++ files in cpu/ to operators in torch.ops.llama2_cpu: compiled once, then kept.

    python -m llama2.kernels.cpu.library

compiles them before the first start. Where that fails, plain PyTorch does the work, slower. For tests,
LLAMA_CPU_SANITIZE=address,undefined compiles another library with these sanitizers (`make test-sanitizers`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
NAME = "llama2_cpu"
_KEPT_DAYS = 60  # machines that share a home folder, and versions of the sources, have libraries of their own


@functools.cache
def load_library() -> bool:
    """Load the operators into this process, compiling them if needed. False, with a warning, if that fails."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        torch.ops.load_library(str(_compiled()))
    except (OSError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])
        logger.warning("the CPU kernels are not used, and decoding is slower: they do not compile here: %s", reason)
        return False
    return True


def _compiled() -> Path:
    """The library for this processor, this torch and these sources; ranks that start together wait for the first."""
    capability = torch.backends.cpu.get_cpu_capability()
    # Nobody reads floating-point exceptions, and keeping them would prevent vectorizing conditional sums.
    flags = ["-O3", "-march=native", "-fopenmp", "-fno-trapping-math"]
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    if sanitizers := os.environ.get("LLAMA_CPU_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"]
    files = sorted(file for file in SOURCES.iterdir() if file.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(repr((torch.__version__, flags, _processor())).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "torchserve-llama2")
    library = folder / f"{NAME}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        with suppress(OSError):  # a folder that only others may write into
            os.utime(library)  # for `_clean`
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _clean(folder)
            started = time.monotonic()
            # A warning, which is shown in a program that has not set up logging, too.
            logger.warning("compiling the CPU kernels, once for this machine: this takes half a minute to two minutes")
            with tempfile.TemporaryDirectory(dir=folder) as build:
                _compile([str(file) for file in files if file.suffix == ".cpp"], flags, build)
                os.replace(Path(build, f"{NAME}.so"), library)
            logger.warning("compiled the CPU kernels in %.0f s", time.monotonic() - started)
    return library


def _clean(folder: Path) -> None:
    """Remove what compilers that were killed left behind, and libraries that nothing has loaded for `_KEPT_DAYS`.

    Called under the folder's lock: nobody compiles in it. Whoever has loaded a library keeps it.
    """
    for left_over in folder.glob("tmp*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for library in folder.glob(f"{NAME}-*.so"):
        if time.time() - library.stat().st_mtime > _KEPT_DAYS * 86400:
            library.unlink(missing_ok=True)


def _compile(sources: list[str], flags: list[str], build: str) -> None:
    from torch.utils import cpp_extension

    # So that ninja is found beside the interpreter even if no virtual environment is activated.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    preloaded = os.environ.pop("LD_PRELOAD", None)  # a sanitizer's runtime, for this process, not the compiler
    try:
        with redirect_stdout(sys.stderr):
            cpp_extension.load(
                NAME,
                sources,
                extra_cflags=flags,
                extra_ldflags=[flag for flag in flags if flag.startswith("-fsanitize")],
                build_directory=build,
                is_python_module=False,
            )
    finally:
        if preloaded is not None:
            os.environ["LD_PRELOAD"] = preloaded


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines that differ."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(not load_library())
