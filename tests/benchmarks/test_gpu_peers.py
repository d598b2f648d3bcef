"""The peers' part of `benchmarks/gpu.sh`, where no peer and no flag parser is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.bare_python import run_bare

pytestmark = pytest.mark.integration

CODE = """
from benchmarks import ceilings
ceilings.SECONDS, ceilings.BUFFER_BYTES, ceilings.PRODUCT_SIZES = 0.01, 1 << 20, {"cpu": (256,)}
import benchmarks.gpu_peers
benchmarks.gpu_peers.main(sys.argv[1:])
"""


def test_a_peer_that_is_not_there_is_named_beside_what_was_measured_before(tmp_path: Path) -> None:
    arguments = ("--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--context", "8", "--rounds", "1")
    done = run_bare(CODE, *arguments, "--peers", "gpt_fast", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no plot is drawn: No module named 'matplotlib'" in done.stdout
    peers = json.loads((tmp_path / "gpu.json").read_text())["figures"]["peers"]
    assert peers["gpt_fast"]["not_run"].startswith("not installed: git clone ")
    assert "gpt_fast: not installed: git clone " in (tmp_path / "gpu.txt").read_text()
    assert json.loads((tmp_path / "peers.json").read_text())["figures"]["rows"][0]["context"] == 8
