"""The examples run as they stand, on the demo's model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def run(name: str, checkpoint: Path, *launcher: str, typed: str = "") -> str:
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), str(checkpoint)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=200, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in (ROOT / "examples").glob("*.py"))


def test_generate_prints_the_same_alone_and_on_two_ranks(smollm2_checkpoint: Path) -> None:
    alone = run("generate.py", smollm2_checkpoint)
    assert "The capital of France is' Paris." in alone
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    ranks = run("generate.py", smollm2_checkpoint, *launcher)
    assert ranks.splitlines()[:3] == alone.splitlines()[:3]


def test_a_chat_answers_each_line(smollm2_checkpoint: Path) -> None:
    printed = run("chat_stream.py", smollm2_checkpoint, typed="What is the capital of France?\nThank you!\n\n")
    assert len(printed.splitlines()) >= 2


def test_coroutines_are_answered(smollm2_checkpoint: Path) -> None:
    printed = run("async_batch.py", smollm2_checkpoint)
    assert all(f"{country}: " in printed for country in ("France", "Italy", "Spain", "Peru"))
    assert len(printed.splitlines()) >= 5


def test_structured_replies_have_their_form_and_a_true_sentence_is_likelier(smollm2_checkpoint: Path) -> None:
    described, chosen, true, false = run("structured.py", smollm2_checkpoint).splitlines()
    assert json.loads(described.replace("'", '"')).keys() == {"city", "million_people"}
    assert chosen in (" yes", " no")
    assert float(true.split()[-1]) > float(false.split()[-1])
