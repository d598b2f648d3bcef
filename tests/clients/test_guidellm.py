"""guidellm, a benchmark, runs to its end against both streaming endpoints with no failed request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT, Service

pytestmark = pytest.mark.clients

REQUESTS = 12
STREAMS = 4
OUTPUT_TOKENS = 8


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_synthetic_prompts_run_to_the_end_without_a_failure(
    service: Service, model: str, tmp_path: Path, endpoint: str
) -> None:
    target = f"target={service.url},model={model},api_key={service.key}"
    options = {
        "backend": f"kind=openai_http,{target},request_format={endpoint}",
        "tokenizer": f"kind=huggingface_auto,model={service.checkpoint}",
        "data": f"kind=synthetic_text,prompt_tokens=48,output_tokens={OUTPUT_TOKENS}",
        "profile": f"kind=concurrent,streams={STREAMS}",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    environ = {**os.environ, "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0), done.stdout
    for request in benchmark["requests"]["successful"]:
        assert request["output_tokens"] == OUTPUT_TOKENS
        assert request["prompt_tokens"] >= 48
        assert request["time_to_first_token_ms"] < request["request_latency"] * 1000
