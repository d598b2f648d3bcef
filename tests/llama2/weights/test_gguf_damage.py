"""A GGUF file that is damaged, or made to do harm, is refused in one line, at once, and nothing is written."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama2.weights.convert import convert
from llama2.weights.readers.gguf.file import GgufFile
from scripts.serve import ROOT
from tests.support.gguf_files import sentencepiece_vocabulary, small_bpe, write_gguf
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

ARGS = tiny_args(n_layers=1)
SECOND, MEGABYTES = 1.0, 100 << 20
HUGE = struct.pack("<Q", 1 << 60)
UINT8, STRING, ARRAY = 0, 8, 9


def refused(path: Path, problem: str) -> None:
    """Converting it ends with one line that says so, in no time and memory, and with nothing at the target."""
    target = path.parent / "out"
    seconds: list[float] = []
    # A busy machine makes any one try slow.
    while len(seconds) < 3 and min(seconds, default=SECOND) >= SECOND:
        before, begun = resident_bytes("VmRSS"), time.process_time()
        # From here on the highest is counted anew.
        Path("/proc/self/clear_refs").write_text("5")
        with pytest.raises(ValueError) as caught:
            convert(path, target)
        seconds.append(time.process_time() - begun)
        assert resident_bytes("VmHWM") - before < MEGABYTES
    assert min(seconds) < SECOND
    assert re.search(problem, str(caught.value)), caught.value
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def resident_bytes(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def header(values: list[bytes], tensors: list[bytes], *, num_values: int | None = None) -> bytes:
    counts = struct.pack("<QQ", len(tensors), len(values) if num_values is None else num_values)
    return b"GGUF\3\0\0\0" + counts + b"".join(values) + b"".join(tensors)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], *, kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return string(name) + axes + struct.pack("<IQ", kind, offset)


HEADERS: dict[str, tuple[bytes, str]] = {
    "2^60 tensors": (b"GGUF\3\0\0\0" + HUGE + bytes(8), f"it says that it has {1 << 60} tensors"),
    "2^60 values": (b"GGUF\3\0\0\0" + bytes(8) + HUGE, f"it says that it has {1 << 60} values of metadata"),
    "more values than there are": (header([], [], num_values=9), "its header does not end|requires a buffer"),
    "a key of 2^60 bytes": (header([HUGE + b"key"], []), f"a string at byte 32 has {1 << 60} bytes"),
    "a string of 2^60 bytes": (header([entry(b"key", STRING, HUGE)], []), f"has {1 << 60} bytes"),
    "an array of 2^60": (header([entry(b"key", ARRAY, struct.pack("<I", UINT8) + HUGE)], []), "does not end within"),
    "2^60 strings": (header([entry(b"key", ARRAY, struct.pack("<I", STRING) + HUGE)], []), "more than 786432 strings"),
    "no text": (header([entry(b"\xff", UINT8, b"1")], []), "can't decode byte 0xff"),
    "a value of no type": (header([entry(b"key", 77, b"1")], []), "77 is not a valid GGUFValueType"),
    "a key twice": (header([entry(b"key", UINT8, b"1")] * 2, []), "its metadata has 'key' twice"),
    "a tensor twice": (header([], [tensor(b"t", (8,))] * 2) + bytes(99), "it has tensor 't' twice"),
    "deep arrays": (header([entry(b"key", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000)], []), "arrays in arrays"),
    "an early version": (b"GGUF\1\0\0\0" + bytes(40), "it is of version 1, and only 2, 3 are read"),
    "the other byte order": (b"GGUF\0\0\0\3" + bytes(40), "it is of version 50331648"),
    "an alignment of zero": (header([entry(b"general.alignment", 4, bytes(4))], []), "a power of two from 8 up, got 0"),
    "an alignment of three": (header([entry(b"general.alignment", 4, b"\3\0\0\0")], []), "a power of two from 8 up"),
    "an alignment in words": (header([entry(b"general.alignment", STRING, string(b"8"))], []), "a power of two"),
    "no axes": (header([], [tensor(b"t", ())]), "tensor 't' has 0 axes"),
    "2^31 axes": (header([], [string(b"t") + struct.pack("<I", 1 << 31)]), f"tensor 't' has {1 << 31} axes"),
    "an empty axis": (header([], [tensor(b"t", (8, 0))]), r"has the shape \(0, 8\)"),
    "2^120 elements": (header([], [tensor(b"t", (1 << 60, 1 << 60))]), "tensor 't' ends .* bytes after the file does"),
    "half a block": (header([], [tensor(b"t", (48,), kind=8)]), r"the shape \(48,\), which blocks of 32 do not fill"),
    "no type": (header([], [tensor(b"t", (8,), kind=4)]), "tensor 't' is of type 4, which the gguf package"),
    "out of the file": (header([], [tensor(b"t", (8,), offset=1 << 40)]), "tensor 't' ends .* bytes after the file"),
    "an odd offset": (
        header([], [tensor(b"t", (8,), offset=4)]) + bytes(99),
        "begins at 4, which is no multiple of 32",
    ),
    "overlapping": (
        header([], [tensor(b"a", (64,)), tensor(b"b", (8,), offset=32)]) + bytes(999),
        "the tensors 'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(tmp_path: Path, name: str) -> None:
    content, problem = HEADERS[name]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", f"is not a whole GGUF file: .*({problem})")


def test_a_large_file_of_next_to_nothing(tmp_path: Path) -> None:
    """As many strings, or as many tensors, as are let through take no longer; nor do zeros without end."""
    path = tmp_path / "model.gguf"
    many = b"".join(string(b"%06d" % number) for number in range((3 << 18) - 1))
    path.write_bytes(header([entry(b"key", ARRAY, struct.pack("<IQ", STRING, (3 << 18) - 1) + many)], []))
    refused(path, "the metadata has no general.architecture")
    path.write_bytes(header([], [tensor(b"%06d" % number, (8,), offset=32 * number) for number in range(1 << 16)]))
    refused(path, "ends .* bytes after the file does")
    path.write_bytes(header([], [], num_values=1 << 16))
    with path.open("r+b") as file:
        file.truncate(1 << 32)
    refused(path, "its metadata has '' twice")
    path.write_bytes(header([entry(b"key", ARRAY, struct.pack("<IQ", UINT8, 1 << 31))], []))
    with path.open("r+b") as file:
        file.truncate(1 << 32)
    refused(path, "its header does not end within 33554432 bytes")


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", ARGS, random_weights(ARGS)).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 23, *range(24, len(whole) - 1, 997), len(whole) - 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not a whole GGUF file: [^\n]*$"):
            GgufFile(path)


@pytest.mark.parametrize("content", [b"no GGUF at all" * 100, b"GGUF" + b"\xff" * 1000])
def test_junk(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.gguf").write_bytes(content)
    refused(tmp_path / "junk.gguf", "is not a whole GGUF file")
    with pytest.raises(ValueError, match=r"nothing\.gguf is not a whole GGUF file: .*No such file"):
        GgufFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("attention.head_count", "8", "llama.attention.head_count must be an integer, got '8'"),
        ("attention.head_count", [8, 8], "llama.attention.head_count must be an integer, got an array of 2"),
        ("attention.head_count", True, "must be an integer, got True"),
        ("attention.head_count", 8.0, "must be an integer, got 8.0"),
        ("attention.head_count", 0, "llama.attention.head_count must be positive, got 0"),
        ("attention.head_count", -8, "llama.attention.head_count must be positive, got -8"),
        ("attention.head_count", None, "the metadata has no llama.attention.head_count"),
        ("attention.head_count", 1 << 31, "must be positive, got 0"),
        ("attention.head_count_kv", 3, "n_kv_heads must divide n_heads=8, got 3"),
        ("attention.key_length", 7, "head_dim must be even"),
        ("attention.layer_norm_rms_epsilon", math.nan, "norm_eps must be a positive number, got nan"),
        ("attention.layer_norm_rms_epsilon", math.inf, "norm_eps must be a positive number, got inf"),
        ("attention.layer_norm_rms_epsilon", "x" * 1000, "must be a number, got 'xxx[^\n]{50,70} …$"),
        ("rope.freq_base", -1.0, "rope_theta must be a positive number, got -1.0"),
        ("block_count", (1 << 32) - 1, f"the metadata says n_layers={(1 << 32) - 1}, but .* tensors of 1 layers"),
        ("block_count", 2, "n_layers=2"),
        ("embedding_length", 1 << 31, "has the shape"),
        ("feed_forward_length", (1 << 32) - 1, "has the shape"),
        ("context_length", 0, "llama.context_length must be positive, got 0"),
        ("rope.scaling.type", 3, "rope.scaling.type must be a string, got 3"),
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens must be an array of strings, got an array of 2"),
        ("tokenizer.ggml.tokens", ["a"] * 97, "tokenizer.ggml.token_type has 96 of 97 pieces"),
        ("tokenizer.ggml.tokens", ["a"] * 96, "tokenizer.ggml.tokens has 'a' twice"),
        ("tokenizer.ggml.token_type", [1] * 95, "tokenizer.ggml.token_type has 95 of 96 pieces"),
        ("tokenizer.ggml.token_type", [77] * 96, "77 is not a valid TokenType"),
        ("tokenizer.ggml.token_type", ["1"] * 96, "must be an array of numbers, got an array of 96"),
        ("tokenizer.ggml.merges", ["a \1"], r"tokenizer.ggml.merges has 'a \\x01', and not all of it are pieces"),
        ("tokenizer.ggml.merges", ["ab"], "has 'ab', and not all of it are pieces"),
        ("tokenizer.ggml.merges", ["b a"], "has 'b a', and not all of it are pieces"),
        ("tokenizer.ggml.merges", None, "the metadata has no tokenizer.ggml.merges"),
        ("tokenizer.ggml.bos_token_id", 96, "tokenizer.ggml.bos_token_id must be less than 96, the pieces, got 96"),
        ("tokenizer.ggml.eos_token_id", (1 << 32) - 1, f"got {(1 << 32) - 1}"),
        ("tokenizer.ggml.eos_token_id", -1, "got -1"),
        ("tokenizer.ggml.add_bos_token", 1, "must be true or false, got 1"),
        ("tokenizer.ggml.pre", 7, "tokenizer.ggml.pre must be a string, got 7"),
        ("tokenizer.chat_template", 7, "tokenizer.chat_template must be a string, got 7"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", ARGS, random_weights(ARGS), metadata={key: value})
    refused(path, problem)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("scores", [1.0], "tokenizer.ggml.scores must have a number for each piece"),
        ("scores", [math.nan] * 512, "tokenizer.ggml.scores must have a number for each piece"),
        ("scores", ["1"] * 512, "must be an array of numbers"),
        ("token_type", [2] * 512, "the tokenizer in the metadata is damaged"),
        ("token_type", [1] * 512, None),
        ("tokens", [""] * 512, "the tokenizer in the metadata is damaged"),
        ("precompiled_charsmap", [1, 2, 3], "the tokenizer in the metadata is damaged"),
        ("add_space_prefix", "no", "must be true or false, got 'no'"),
    ],
)
def test_a_sentencepiece_vocabulary_that_cannot_be(tmp_path: Path, key: str, value: Any, problem: str | None) -> None:
    args = tiny_args(n_layers=1, vocab_size=512)
    vocabulary = partial(sentencepiece_vocabulary, model_file=tiny_sentencepiece(tmp_path))
    path = write_gguf(
        tmp_path / "model.gguf",
        args,
        random_weights(args),
        tokenizer=vocabulary,
        metadata={f"tokenizer.ggml.{key}": value},
    )
    if problem is None:
        convert(path, tmp_path / "out", verify=True)
    else:
        refused(path, problem)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_damage_is_found_or_does_no_harm(tmp_path: Path, kind: str) -> None:
    """Some bytes of the header are others: the file is refused in one line, or it is another model that can be read."""
    write: Callable[[gguf.GGUFWriter], None] = small_bpe
    args = ARGS
    if kind == "llama":
        args = tiny_args(n_layers=1, vocab_size=345)
        write = partial(sentencepiece_vocabulary, model_file=tiny_sentencepiece(tmp_path, 345))
    whole = write_gguf(tmp_path / "model.gguf", args, random_weights(args), tokenizer=write).read_bytes()
    end = whole.index(b"output.weight", whole.index(b"output_norm")) + 40
    path = tmp_path / "damaged.gguf"

    @settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.integers(0, end), st.integers(0, 255)), min_size=1, max_size=3))
    def damaged(changes: list[tuple[int, int]]) -> None:
        content = bytearray(whole)
        for place, byte in changes:
            content[place] = byte
        path.write_bytes(content)
        problem = ""
        try:
            GgufFile(path).check_tokenizer()
        except ValueError as error:
            problem = str(error)
        assert not problem or str(path) in problem
        assert "\n" not in problem

    damaged()


@pytest.mark.integration
def test_the_command_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HEADERS["2^60 tensors"][0])
    paths = ["--original_ckpt_dir", str(tmp_path / "model.gguf"), "--save_checkpoint_dir", str(tmp_path / "out")]
    command = [sys.executable, "convert_checkpoints.py", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*model\.gguf is not a whole GGUF file: .* {1 << 60} tensors\n", done.stderr)
    assert not (tmp_path / "out").exists()
