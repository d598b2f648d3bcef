"""The repository's own load benchmark runs to its end on a real server, and its figures are those of what it asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT, Service

pytestmark = pytest.mark.clients

REQUESTS = 6
OUTPUT_TOKENS = 4


def test_every_load_is_made_and_every_request_answered(service: Service, tmp_path: Path) -> None:
    options = {
        "url": service.url,
        "key": service.key,
        "checkpoint": service.checkpoint,
        "concurrency": 2,
        "requests": REQUESTS,
        "seconds": 10,
        "prompt_tokens": 16,
        "output_tokens": OUTPUT_TOKENS,
        "slo": "ttft=60000",
        "slo_rounds": 1,
        "dollars_per_hour": 3.6,
        "guidellm": Path(sys.executable).with_name("guidellm"),
        "out": tmp_path / "online.json",
    }
    command = [os.environ.get("SERVER_PYTHON", ".venv/bin/python"), "-m", "benchmarks.online"]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    written = json.loads((tmp_path / "online.json").read_text())
    assert service.key not in json.dumps(written)
    clients, rate = written["figures"]["loads"]
    assert (clients["clients"], clients["answered"], clients["failed"], clients["unfinished"]) == (2, REQUESTS, 0, 0)
    assert clients["tokens_per_s"] == pytest.approx(OUTPUT_TOKENS * clients["answered_per_s"])
    assert rate["offered_per_s"] == written["figures"]["slo"]["highest_rate_per_s"] > 0
    assert rate["failed"] == 0
    for load in (clients, rate):
        assert 0 < load["ttft_ms"]["p50"] < load["total_ms"]["p50"]
    assert (tmp_path / "online.png").read_bytes().startswith(b"\x89PNG")
