"""What is no converted checkpoint is called by what it is, with what is to be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2 import LLM

CONVERT = "python convert_checkpoints.py --original_ckpt_dir"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["params.json", "consolidated.00.pth"], f"holds Meta's files: convert it first: {CONVERT} "),
        (["consolidated.00.pth"], "holds Meta's files: convert it first"),
        (["config.json", "model.safetensors"], f"holds weights in Hugging Face's format: convert it first: {CONVERT} "),
        (["config.json"], "holds weights in Hugging Face's format: convert it first"),
        (
            ["params.json", "config.json", "pytorch_model.bin.index.json"],
            "holds weights in Hugging Face's format: convert it",
        ),
        (["notes.txt"], "is no converted checkpoint: it has no .metadata file"),
    ],
    ids=str,
)
def test_a_folder_of_another_kind(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError) as caught:
        LLM(tmp_path)
    assert str(caught.value).startswith(f"checkpoint_dir {str(tmp_path)!r} {message}")


def test_a_file_and_what_does_not_exist(tmp_path: Path) -> None:
    gguf, other = tmp_path / "model.gguf", tmp_path / "model.bin"
    for file, message in (
        (tmp_path / "model.safetensors", f"holds weights in Hugging Face's format: convert it first: {CONVERT}"),
        (gguf, f"is a GGUF file: convert it first: {CONVERT}"),
        (other, "is a file, and not a folder"),
    ):
        file.touch()
        with pytest.raises(ValueError, match=message):
            LLM(file)
    with pytest.raises(ValueError, match=r"'/no/where' does not exist$"):
        LLM("/no/where")
    with pytest.raises(ValueError, match=r"checkpoint_dir must be a folder, got 7"):
        LLM(7)  # type: ignore[arg-type]


def test_the_folder_of_the_examples_is_no_name_on_the_hub() -> None:
    with pytest.raises(ValueError, match=r"does not exist: convert_checkpoints.py writes .* make serve") as caught:
        LLM("build/converted_checkpoints")
    assert "hub" not in str(caught.value)


def test_a_name_on_the_hub_is_told_how_to_get_here() -> None:
    with pytest.raises(ValueError, match=r"does not exist; if it is a name on the hub") as caught:
        LLM("meta-llama/Llama-2-7b")
    assert "hf download meta-llama/Llama-2-7b --local-dir Llama-2-7b" in str(caught.value)
    assert f"{CONVERT} Llama-2-7b --save_checkpoint_dir" in str(caught.value)
