"""The offline benchmark on a tiny shape: every row is there, or says why it cannot be measured."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks import ceilings, offline
from benchmarks.engines import Cell
from benchmarks.peers import registry
from benchmarks.peers.registry import find_peers
from llama2 import flags
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _measure_ceilings_quickly(patch)
        yield


def _measure_ceilings_quickly(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ceilings, "SECONDS", 0.01)
    patch.setattr(ceilings, "BUFFER_BYTES", 1 << 20)
    patch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (256,)})


def run(out: Path, **changes: Any) -> str:
    """Run it, and return what it printed."""
    settings = {"shape": "tiny", "device": "cpu", "new_tokens": 4, "rounds": 2, "out": str(out)}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        offline.benchmark(**{**settings, **changes})
    return printed.getvalue()


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def result(quick: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one run printed, and the JSON file that it wrote."""
    path = tmp_path_factory.mktemp("offline") / "deep" / "tiny.json"
    printed = run(
        path,
        batches=(1, 3),
        contexts=(8, 40),
        max_seq_len=30,
        peer=("transformers", "gpt_fast"),
        gpt_fast=str(path.parent / "no-clone"),
    )
    return printed, path


def test_every_batch_and_context_has_a_row_with_all_its_rounds(result: tuple[str, Path]) -> None:
    rows = read(result[1])["figures"]["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 8), (3, 8), (1, 40), (3, 40)]
    for row in rows[:2]:
        assert len(row["rounds"]) == 2
        assert row["prefill_tokens_per_second"] == pytest.approx(row["batch"] * row["context"] / row["ttft_seconds"])
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] * 1e3 / row["milliseconds_per_step"])
        for what in ("prefill", "decode"):
            limit, reached = row[f"{what}_limit_tokens_per_second"], row[f"{what}_tokens_per_second"]
            assert row[f"{what}_percent_of_limit"] == pytest.approx(100 * reached / limit)


def test_one_process_is_compared_with_memory_in_each_round(result: tuple[str, Path]) -> None:
    for row in read(result[1])["figures"]["rows"][:2]:
        rates = [one["bytes_per_second"] for one in row["rounds"]]
        assert min(rates) > 0
        assert len(set(rates)) == len(rates)


def test_work_that_does_not_fit_is_named_with_the_reason(result: tuple[str, Path]) -> None:
    """At context 40 a sequence needs more than 30 positions."""
    printed, path = result
    for row in read(path)["figures"]["rows"][2:]:
        assert "max_seq_len is 30" in row["skipped"]
    assert "batch 3 at context 40 was skipped: its longest sequence takes 46 positions" in printed


def test_a_peer_takes_turns_with_ours_and_gets_a_ratio(result: tuple[str, Path]) -> None:
    peer = read(result[1])["figures"]["peers"]["transformers"]
    assert peer["version"] == transformers.__version__
    rows = peer["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 8), (3, 8)]
    for row in rows:
        ratios = [one["theirs"]["decode_seconds"] / one["ours"]["decode_seconds"] for one in row["rounds"]]
        assert row["decode_ratio"]["min"] == pytest.approx(min(ratios))
        assert row["decode_ratio"]["max"] == pytest.approx(max(ratios))
        assert row["decode_ratio"]["min"] <= row["decode_ratio"]["median"] <= row["decode_ratio"]["max"]


def test_a_peer_that_is_not_there_is_named_with_its_command_and_the_run_goes_on(result: tuple[str, Path]) -> None:
    printed, path = result
    command = "git clone https://github.com/meta-pytorch/gpt-fast .venv-peers/gpt-fast"
    assert read(path)["figures"]["peers"]["gpt_fast"] == {"install": command, "not_run": f"not installed: {command}"}
    assert f"gpt_fast: not installed: {command}" in printed


def test_a_peer_that_is_not_there_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Our own measurement takes minutes, in which it could be installed."""

    class Measured(Exception):
        pass

    def measure(*_: object) -> None:
        raise Measured

    monkeypatch.setattr(offline, "measure_ceilings", measure)
    with pytest.raises(Measured):
        run(tmp_path / "tiny.json", peer=("transformers", "gpt_fast"), gpt_fast=str(tmp_path))
    assert capsys.readouterr().err.splitlines() == [
        "== gpt_fast is left out: not installed: "
        "git clone https://github.com/meta-pytorch/gpt-fast .venv-peers/gpt-fast"
    ]


def test_the_file_says_what_ran_where_and_a_plot_lies_beside_it(result: tuple[str, Path]) -> None:
    content = read(result[1])
    assert content["kind"] == "offline"
    assert content["machine"]["cores"] >= 1
    assert {"python", "torch", "numpy"} <= content["versions"].keys()
    assert content["settings"]["engine"]["prefix_cache"] is False
    assert all(rate > 0 for rate in content["figures"]["ceilings"].values())
    assert result[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_it_runs_on_two_ranks_and_one_of_them_writes(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    printed = run_ranks(2, _run_on_a_rank, path)
    assert "on cpu, 2 rank(s)" in printed[0]
    assert printed[1] == ""
    assert read(path)["settings"]["ranks"] == 2
    assert len(read(path)["figures"]["rows"][0]["rounds"]) == 2


def _run_on_a_rank(path: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        _measure_ceilings_quickly(patch)
        return run(path, batches=2, contexts=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "8b"), "shape must be one of 7b, 13b"),
        ((), "give either --checkpoint DIR or --shape NAME"),
        (("--shape", "tiny", "--peer", "ollama"), "peer must be one of transformers,"),
        (("--shape", "tiny", "--batches", "1,x"), "--batches must be a whole number of 1 or more, got 'x'"),
        (("--shape", "tiny", "--batches", "8", "--max_step_tokens", "8"), "more than the largest batch, 8, got 8"),
        (("--shape", "tiny", "--context", "8"), "unknown option --context: did you mean --contexts?"),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(offline, "measure_ceilings", None)
    monkeypatch.setattr(sys, "argv", ["offline", *arguments])
    with pytest.raises(SystemExit, match=message.replace("?", r"\?")):
        flags.run(offline.benchmark)


def test_every_peer_that_is_not_installed_has_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty machine has only our own interpreter's peers."""
    monkeypatch.setattr(registry, "VENVS", tmp_path)
    names = ["transformers", "transformers_static", "transformers_batching", "llama_cpp", "vllm", "gpt_fast"]
    for device_type in ("cpu", "cuda"):
        kinds = find_peers(names, device_type=device_type)
        missing = {name: kind.install for name, kind in kinds.items() if not kind.is_installed(tmp_path)}
        assert missing.keys() == {"llama_cpp", "vllm", "gpt_fast"}
        assert all("pip install " in missing[name] for name in ("llama_cpp", "vllm"))


def test_the_first_reply_has_room_for_what_it_gains_while_the_last_prompt_is_computed() -> None:
    """Of 20 tokens a step, 4 may go to replies: 4 prompts of 16 are computed within 4 steps."""
    assert Cell(batch=4, context=16).length(new_tokens=8, max_step_tokens=20) == 16 + 4 + 8 + 1
