"""The command `convert_checkpoints.py`: a complete folder, one line for each error, and nothing half done."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import convert_checkpoints
from llama2 import LLM
from llama2.config import ModelArgs
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import FairscaleFolder, same_bits
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ROOT = Path(__file__).parents[3]
ARGS = tiny_args(vocab_size=480, n_layers=1)
WEIGHTS = random_weights(ARGS, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = meta_folder(tmp_path_factory.mktemp("pristine"), ARGS, WEIGHTS, num_shards=4)
    tiny_sentencepiece(folder, vocab_size=480)
    return folder


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    """A copy of Meta's folder that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "source")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, lines on stderr that are no progress bar)."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags: object) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoints.py", *(str(flag) for flag in flags)])
        with pytest.raises(SystemExit) as exit:
            convert_checkpoints.main()
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return exit.value.code, [line for line in lines if line and "B/s]" not in line]

    return run


def flags(source: Path, target: Path) -> list[object]:
    return ["--original_ckpt_dir", source, "--save_checkpoint_dir", target]


def assert_holds(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """`folder` is a converted checkpoint of WEIGHTS, complete by itself."""
    assert ModelArgs.load(folder) == ARGS
    assert load_tokenizer(folder).vocab_size == 480
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in ARGS.parameter_shapes().items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    stored = DcpFolder(folder)
    assert stored.dtype == dtype
    for name, weight in WEIGHTS.items():
        assert same_bits(state[name].flatten(), weight.to(dtype).flatten()), name
        assert same_bits(stored.read(name), state[name]), name


def test_plain_python_writes_a_folder_that_is_complete_by_itself(source, tmp_path, command):
    target = tmp_path / "out"
    code, lines = command(*flags(source, target), "--verify")
    assert (code, [line for line in lines if "error" in line]) == (0, [])
    shutil.rmtree(source)
    assert_holds(target)
    assert sorted(path.name for path in target.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "manifest.json",
        "model_args.json",
        "tokenizer.model",
    ]


@pytest.mark.integration
def test_the_readmes_torchrun_command_works_as_typed(source, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    options = (
        f"--original_ckpt_dir {source} --tokenizer_path {source}/tokenizer.model --model_parallel_size 4 "
        f"--save_checkpoint_dir {tmp_path}/out --max_seq_len 512 --max_batch_size 2"
    )
    launch = [str(torchrun), "--nnodes", "1", "--nproc_per_node", "2", "--standalone", "convert_checkpoints.py"]
    done = subprocess.run([*launch, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "out")
    again = subprocess.run([*launch, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode != 0
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: save_checkpoint_dir {tmp_path}/out exists; --overwrite replaces it"]


def test_dtype_casts_and_verify_compares_with_the_cast_source(source, tmp_path, command):
    assert command(*flags(source, tmp_path / "out"), "--dtype", "fp32", "--verify")[0] == 0
    assert_holds(tmp_path / "out", torch.float32)


def test_back_to_metas_layout_through_the_command(source, tmp_path, command):
    assert command(*flags(source, tmp_path / "dcp"))[0] == 0
    back = ["--output_format", "fairscale", "--output_model_parallel_size", 2, "--verify"]
    assert command(*flags(tmp_path / "dcp", tmp_path / "from_dcp"), *back)[0] == 0
    assert command(*flags(source, tmp_path / "from_meta"), *back)[0] == 0
    for folder in (tmp_path / "from_dcp", tmp_path / "from_meta"):
        result = FairscaleFolder(folder, vocab_size=load_tokenizer(folder).vocab_size, num_shards=2)
        assert all(same_bits(result.read(name).flatten(), weight.flatten()) for name, weight in WEIGHTS.items())


def test_a_tokenizer_of_any_name_comes_along_under_the_expected_name(source, tmp_path, command):
    (source / "tokenizer.model").rename(tmp_path / "my.model")
    assert command(*flags(source, tmp_path / "out"), "--tokenizer_path", tmp_path / "my.model")[0] == 0
    assert_holds(tmp_path / "out")


def test_overwrite_replaces_a_checkpoint(source, tmp_path, command):
    for dtype in ("float16", "bfloat16"):
        assert command(*flags(source, tmp_path / "out"), "--overwrite", "--dtype", dtype)[0] == 0
    assert_holds(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_no_tensor_is_kept_after_it_is_written(source, tmp_path, monkeypatch):
    """DCP's own writer keeps all tensors of a file, which after a cast are a rank's whole share."""
    save = torch.save
    written: list[weakref.ref] = []

    def watch(tensor, stream):
        assert not [reference for reference in written if reference() is not None]
        save(tensor, stream)
        written.append(weakref.ref(tensor))

    monkeypatch.setattr(torch, "save", watch)
    convert(source, tmp_path / "out", dtype=torch.float32)
    assert len(written) > len(WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def set_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    shard = torch.load(folder / "consolidated.01.pth") | {name: value}
    torch.save({key: tensor for key, tensor in shard.items() if tensor is not None}, folder / "consolidated.01.pth")


def hostile(folder: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "code ran"),))

    torch.save({"norm.weight": Hostile()}, folder / "consolidated.01.pth")


FAULTS: dict[str, tuple[Callable[[Path], object] | None, list, str]] = {
    "a missing shard": (lambda d: (d / "consolidated.02.pth").unlink(), [], "consolidated.02.pth is missing"),
    "a wrong model_parallel_size": (None, ["--model_parallel_size", 8], "consolidated.04.pth is missing"),
    "a truncated shard": (truncate, [], "consolidated.01.pth is not a readable .pth file"),
    "a hostile shard": (hostile, [], "consolidated.01.pth is refused"),
    "another shape": (
        lambda d: set_tensor(d, "output.weight", torch.zeros(9, 9)),
        [],
        "output.weight has shape (9, 9)",
    ),
    "an unknown tensor": (lambda d: set_tensor(d, "lm_head", torch.zeros(9)), [], "unknown tensor 'lm_head'"),
    "a missing tensor": (lambda d: set_tensor(d, "output.weight", None), [], "tensor 'output.weight' is missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), [], "tokenizer"),
    "an invalid tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"junk"), [], "tokenizer.model"),
    "no folder": (shutil.rmtree, [], "/source does not exist"),
    "an unknown option": (None, ["--verfy"], "unknown option --verfy: did you mean --verify?"),
    "an argument without an option": (None, ["--verify=True", "here"], "unexpected argument 'here'"),
    "an unknown dtype": (
        None,
        ["--dtype", "int8"],
        "--dtype must be bfloat16 (bf16), float16 (fp16) or",
    ),
    "an unknown format": (None, ["--output_format", "gguf"], "output_format must be dcp or fairscale, got 'gguf'"),
    "no size for the way back": (None, ["--output_format", "fairscale"], "needs output_model_parallel_size"),
    "a size that is no number": (None, ["--model_parallel_size", "all"], "must be a positive integer, got 'all'"),
    "a switch with a value": (None, ["--overwrite", "3"], "--overwrite is a switch and takes no value, got 3"),
    "too many shards on the way back": (
        None,
        ["--output_format", "fairscale", "--output_model_parallel_size", 3],
        "this model does not split evenly into 3 shards",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_one_line_and_exit_code_1_and_leaves_nothing(source, tmp_path, command, fault):
    spoil, extra, message = FAULTS[fault]
    if spoil:
        spoil(source)
    before = sorted(tmp_path.rglob("*"))
    code, lines = command(*flags(source, tmp_path / "out"), *extra)
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["config.json", "model-00001-of-00002.safetensors"],
            "holds weights in Hugging Face's format, which are not read",
        ),
        (["config.json", "pytorch_model.bin", "tokenizer.model"], "holds weights in Hugging Face's format"),
        (["model.safetensors", "original/params.json"], "its subfolder .*/original is Meta's"),
        (["readme.md"], "holds no checkpoint: expected Meta's folder"),
        ([], "holds no checkpoint: expected Meta's folder"),
    ],
)
def test_a_folder_that_is_not_read_is_named_whatever_else_it_lacks(tmp_path, command, files, message):
    folder = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folder.mkdir(exist_ok=True)
    code, lines = command("--original_ckpt_dir", folder, "--save_checkpoint_dir", tmp_path / "out")
    assert code == 1
    assert re.match(f"error: {folder} .*{message}", lines[0]), lines
    with pytest.raises(ValueError, match=rf"{folder}' (is no converted checkpoint|holds weights in Hugging|does not)"):
        LLM(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "llama-2-7b.Q4_0.gguf"])
def test_a_file_that_is_not_read_is_named(tmp_path, command, name):
    (tmp_path / name).write_bytes(b"GGUF")
    code, lines = command("--original_ckpt_dir", tmp_path / name, "--save_checkpoint_dir", tmp_path / "out")
    assert code == 1
    assert re.match(
        f"error: {tmp_path / name} (holds weights in Hugging|is a file; expected|is not a whole GGUF)", lines[0]
    )


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 3])
def test_under_torchrun_an_error_is_one_line_of_one_rank(tmp_path, processes):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--original_ckpt_dir", "Llama-2-7b", "--save_checkpoint_dir", str(tmp_path / "out")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # else torchrun itself has something to say
    done = subprocess.run(
        [*launch, str(ROOT / "convert_checkpoints.py"), *options],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stderr == "error: Llama-2-7b does not exist\n"
    assert done.returncode not in (0, None)


@pytest.mark.parametrize(
    ("place", "extra", "message"),
    [
        ("checkpoint", [], "exists; --overwrite replaces it"),
        ("holiday photos", ["--overwrite"], "holds no checkpoint: choose another name"),
        ("holiday photos", [], "holds no checkpoint: choose another name"),
        ("file", ["--overwrite"], "is a file"),
        ("file/out", [], "/file'"),
        ("source", ["--overwrite"], "must not be or contain original_ckpt_dir"),
        (".", ["--overwrite"], "must not be or contain original_ckpt_dir"),
    ],
)
def test_a_target_that_must_not_be_replaced_is_left_alone(source, tmp_path, command, place, extra, message):
    for name in ("checkpoint/model_args.json", "holiday photos/1.jpg", "file"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    code, lines = command(*flags(source, tmp_path / place), *extra)
    assert (code, len(lines)) == (1, 1), lines
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("output", [[], ["--output_format", "fairscale", "--output_model_parallel_size", 2]])
def test_a_disk_that_fills_up_midway_leaves_the_old_checkpoint(source, tmp_path, command, monkeypatch, output):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert command(*flags(source, tmp_path / "out"))[0] == 0
    monkeypatch.setattr(os, "fsync", full)
    code, lines = command(*flags(source, tmp_path / "out"), "--overwrite", *output)
    assert code == 1
    assert "No space left on device" in lines[-1]
    monkeypatch.undo()
    assert_holds(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_error_while_the_file_grows_is_not_lost(source, tmp_path, monkeypatch):
    """The kernel reports it once, to whoever flushes first."""
    save, flushed = torch.save, threading.Event()

    def slow_save(*args: Any) -> None:
        flushed.wait(10)
        save(*args)

    def refuse(descriptor: int) -> None:
        flushed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(ValueError, match=r"Input/output error: .*__0_0.distcp"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.integration
def test_a_write_that_the_system_refuses_names_the_file(source, tmp_path):
    """torch.save replaces the system's error with its own."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "import convert_checkpoints; convert_checkpoints.main()"
    )
    options = [str(flag) for flag in flags(source, tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", limited, *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: [Errno 27] File too large: '{tmp_path}/.out.partial/__0_0.distcp'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verify_notices_a_changed_weight(source, tmp_path, command, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensor, stream: save(torch.nextafter(tensor, tensor + 1), stream))
    code, lines = command(*flags(source, tmp_path / "out"), "--verify")
    assert code == 1
    assert "verification failed: " in lines[-1]
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, signal, convert_checkpoints
from llama2.weights.readers.dcp import _SmallWrites
write, calls = _SmallWrites.write, []
def interrupt(*args):
    calls.append(args)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.{signal})
    return write(*args)
_SmallWrites.write = interrupt
convert_checkpoints.main()
"""


@pytest.mark.integration
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_an_interrupted_run_leaves_the_old_checkpoint_and_the_next_run_works(source, tmp_path, command, name):
    options = flags(source, tmp_path / "out")
    assert command(*options)[0] == 0
    code = INTERRUPTED.format(signal=name)
    arguments = [sys.executable, "-c", code, *(str(flag) for flag in options), "--overwrite", "--dtype", "float16"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (128 + signal.Signals[name], -signal.Signals[name]), done.stderr
    assert "Traceback" not in done.stderr
    assert_holds(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()} - {"out", "source"}
    assert left == ({".out.partial"} if name == "SIGKILL" else set())
    assert command(*options, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
