"""Every benchmark is a command that refuses a value that makes no sense before it does anything."""

from __future__ import annotations

import importlib
import sys

import pytest

from llama2 import flags


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convert", "--gigabytes -1"),
        ("convert", "--rounds 0"),
        ("convert", "--processes two"),
        ("finetune", "--rounds 0"),
        ("finetune", "--tokens few"),
        ("loading", "--gigabytes 0"),
        ("loading", "--rounds many"),
        ("offline", "--rounds 0"),
        ("offline", "--threads 0"),
        ("offline", "--max_step_tokens 0"),
        ("online", "--concurrency 1,0"),
        ("online", "--rates 1,fast"),
        ("online", "--seconds 0"),
        ("online", "--dollars_per_hour -2"),
        ("prefix", "--rounds 0"),
        ("prefix", "--suffix_tokens few"),
        ("scheduler", "--steps 0"),
        ("scheduler", "--running 0"),
        ("scheduler", "--waiting=-1"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = words.split()
    if name == "offline":
        arguments += ["--shape", "tiny"]
    if name == "finetune":
        arguments += ["--checkpoint", "none"]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    flag = words.replace("=", " ").split()[0]
    with pytest.raises(SystemExit, match=f"^error: {flag} must be a (whole )?number "):
        flags.run(importlib.import_module(f"benchmarks.{name}").benchmark)
