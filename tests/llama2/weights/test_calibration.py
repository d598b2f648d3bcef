"""`--quantize gptq` refuses what it cannot use before any work is done, and leaves nothing when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2.weights.calibration import ENVIRONMENT, Gptq
from llama2.weights.convert import convert
from tests.support.conversion import ROOT, flags
from tests.support.tokenizers import SENTENCES

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

TEXT = "\n".join(SENTENCES * 4)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of the library's interpreter. It has a version, and then fails as a test writes it."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ENVIRONMENT / "bin" / "python"
    python.parent.mkdir(parents=True)
    return answering(python, "exit 9")


def answering(python: Path, run: str) -> Path:
    python.write_text(f'#!/bin/sh\nif test "$2" = -c; then echo 7.6.0; exit; fi\n{run}\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", None, "cannot be read: No such file or directory"),
        ("text.txt", b"", "is empty"),
        ("text.txt", b" \n\n", "is empty"),
        ("text.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("text.txt", b"Too short.", "tokens: at least 1024 are needed"),
        ("text.txt", bytes(17 << 20), "has more than 16 MiB: 262144 tokens are used at most"),
        ("texts.jsonl", b"", "is empty"),
        ("texts.jsonl", b'{"text": "a"}\n\nnonsense\n', 'line 3 must be like {"text": "..."}'),
        ("texts.jsonl", b'{"content": "a"}\n', 'line 1 must be like {"text": "..."}'),
        ("texts.jsonl", b'{"text": 7}\n', 'line 1 must be like {"text": "..."}'),
    ],
)
def test_a_file_that_is_no_text_is_refused(source, library, tmp_path, command, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    code, lines = command(*flags(source, tmp_path / "out"), "--quantize", "gptq", "--calibration", tmp_path / name)
    lines = [line for line in lines if "calibrating:" not in line]
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith(f"error: --calibration {tmp_path / name}")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_library_is_one_line_that_says_how_to_install_it(source, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    before = sorted(tmp_path.rglob("*"))
    options = (*flags(source, tmp_path / "out"), "--quantize", "gptq", "--calibration", "text.txt")
    expected = [
        "error: --quantize gptq needs gptqmodel in an environment of its own, "
        f"{tmp_path}/{ENVIRONMENT}: make gptq sets it up"
    ]
    assert command(*options) == (1, expected)
    # An environment without the library, as this one is.
    (tmp_path / ENVIRONMENT / "bin").mkdir(parents=True)
    (tmp_path / ENVIRONMENT / "bin" / "python").symlink_to(sys.executable)
    assert command(*options) == (1, expected)
    assert sorted(path for path in tmp_path.rglob("*") if ENVIRONMENT.name not in path.parts) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--quantize", "gptq"], "--quantize gptq and --calibration, the file of a text, go together"),
        (["--calibration", "text.txt"], "--quantize gptq and --calibration, the file of a text, go together"),
        (
            ["--quantize", "int4", "--calibration", "text.txt"],
            "--quantize gptq and --calibration, the file of a text, go",
        ),
        (
            ["--quantize", "gptq", "--calibration", "text.txt", "--output_format", "hf"],
            "--output_format hf holds plain values: --quantize must be none, got 'gptq'",
        ),
        (["--quantize", "gptq", "--calibration"], "--calibration needs a file"),
    ],
)
def test_flags_that_do_not_go_together(source, library, tmp_path, command, extra, message):
    (tmp_path / "text.txt").write_text(TEXT)
    code, lines = command(*flags(source, tmp_path / "out"), *extra)
    assert (code, len(lines)) == (1, 1), lines
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_needs_requantize(source, library, tmp_path, command):
    (tmp_path / "text.txt").write_text(TEXT)
    convert(source, tmp_path / "int4", quantize="int4")
    options = [*flags(tmp_path / "int4", tmp_path / "out"), "--quantize", "gptq", "--calibration", "text.txt"]
    code, lines = command(*options)
    assert (code, len(lines)) == (1, 1), lines
    assert (
        "quantized already: without --quantize they keep their precision; --requantize allows to make gptq" in lines[0]
    )
    # Allowed, it gets as far as the library.
    assert "gptqmodel 7.6.0 ended with exit code 9" in command(*options, "--requantize")[1][-1]


def test_the_librarys_own_error_is_the_message_and_the_old_checkpoint_stays(source, library, tmp_path, command):
    (tmp_path / "text.txt").write_text(TEXT)
    convert(source, tmp_path / "out")
    answering(library, 'echo "ValueError: no such group" >&2; echo "| a table |" >&2; exit 1')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = [*flags(source, tmp_path / "out"), "--quantize", "gptq", "--calibration", "text.txt", "--overwrite"]
    code, lines = command(*options)
    assert code == 1
    assert lines[-1] == "error: gptqmodel 7.6.0 ended with exit code 1: ValueError: no such group"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.integration
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_calibration_ends_the_library_and_leaves_nothing(source, library, tmp_path, name):
    (tmp_path / "text.txt").write_text(TEXT)
    # What it starts must end, too. A line says that a layer is done.
    pids = tmp_path / "pids"
    answering(library, f"sleep 100 & echo $! $$ > {pids}; sleep 1; echo 1; wait")
    before = sorted(tmp_path.rglob("*"))
    options = [*flags(source, tmp_path / "out"), "--quantize", "gptq", "--calibration", "text.txt"]
    running = subprocess.Popen(
        [sys.executable, ROOT / "convert_checkpoints.py", *map(str, options)], cwd=tmp_path, stderr=subprocess.PIPE
    )
    with running:
        assert running.stderr is not None
        shown = b""
        while b" 1/1 " not in shown:
            part = os.read(running.stderr.fileno(), 1000)
            assert part
            shown += part
        running.send_signal(signal.Signals[name])
        assert b"Traceback" not in running.communicate(timeout=30)[1]
    assert running.returncode == 128 + signal.Signals[name]
    for pid in pids.read_text().split():
        assert ended(int(pid))
    pids.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # nobody waits for it
            return True
        time.sleep(0.05)
    return False


def test_what_is_taken_of_a_file(library, tmp_path):
    """Sequences of the context at most, each as a prompt begins; of a long file a part from all of it."""
    from llama2.text.tokenizer import load_tokenizer
    from tests.support.tokenizers import tiny_sentencepiece

    tokenizer = load_tokenizer(tiny_sentencepiece(tmp_path))
    (tmp_path / "text.txt").write_text(TEXT)
    ids = tokenizer.encode(TEXT)
    sequences = Gptq.open("text.txt").sequences(tokenizer, 64)
    assert [token for each in sequences for token in each[1:]] == ids
    assert {each[0] for each in sequences} == {tokenizer.bos_id}
    assert {len(each) for each in sequences[:-1]} == {64}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES * 20))
    sequences = Gptq.open("texts.jsonl").sequences(tokenizer, 2048)
    assert sequences == [tokenizer.encode_prompt(text) for text in SENTENCES * 20]
    (tmp_path / "long.txt").write_text(TEXT * 300)
    sequences = Gptq.open("long.txt").sequences(tokenizer, 64)
    assert 128 * 1024 < sum(map(len, sequences)) <= 128 * 2048
