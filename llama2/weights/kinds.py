"""Owns what the names of its files say about a path that should hold a model. Reads none of them, and knows no torch.

So a wrong path is answered before anything that it lacks, and in words that name what it is.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from llama2.errors import InvalidValue

METADATA_FILE = ".metadata"
FORMATS_FILE = "formats.json"
CALIBRATION_FILE = "calibration.json"  # what the weights were calibrated with
_USUAL_NAME = "converted_checkpoints"  # of README and its examples
_CONVERT = f"python convert_checkpoints.py --original_ckpt_dir {{}} --save_checkpoint_dir {_USUAL_NAME}"


class Kind(Enum):
    """A kind of model files. The value says what a path of that kind is."""

    CONVERTED = "holds a converted checkpoint"
    META = "holds Meta's files"
    HUGGING_FACE = "holds weights in Hugging Face's format"
    GGUF = "is a GGUF file"


def check_source(path: Path, field: str = "--original_ckpt_dir") -> Kind:
    """What the converter shall read; `field` is where the user gave it.

    Raises:
        InvalidValue: `path` does not look like something that it reads, or like several such things.
    """
    kinds = _kinds(path)
    if len(kinds) == 1:
        return kinds[0]
    if not path.exists():
        fault = "does not exist"
    elif kinds:
        fault = f"{' and '.join(kind.value for kind in kinds)}: only one of them can be the model"
    elif path.is_file():
        fault = "is a file; expected Meta's folder, Hugging Face's, a converted one, a .gguf or a .safetensors file"
    else:
        fault = (
            "holds no checkpoint: expected Meta's folder, with params.json and consolidated.00.pth, or Hugging Face's, "
            "with config.json and model.safetensors"
        )
    raise InvalidValue(field, f"{str(path)!r} {fault}")


def check_converted(path: Path | str, field: str = "checkpoint_dir") -> None:
    """Refuse what is no folder that the converter wrote; `field` is where the user gave it.

    Raises:
        InvalidValue: it says what `path` is, and what is to be done with it.
    """
    try:
        folder = Path(path)
    except TypeError:
        raise InvalidValue(field, f"must be a folder, got {path!r}") from None
    if (folder / METADATA_FILE).is_file():
        return
    convert = f"convert it first: {_CONVERT.format(folder)}"
    if not folder.exists():
        fault = "does not exist"
        if folder.name == _USUAL_NAME:
            fault += f": convert_checkpoints.py writes such folders, and make serve writes one as build/{_USUAL_NAME}"
        elif isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            fault += (
                "; if it is a name on the hub, nothing is fetched from there: download its files (hf download "
                f"{path} --local-dir {folder.name}) and convert them: {_CONVERT.format(folder.name)}"
            )
    elif kinds := _kinds(folder):
        fault = f"{kinds[0].value}: {convert}"
    elif folder.is_file():
        fault = "is a file, and not a folder"
    else:
        fault = f"is no converted checkpoint: it has no {METADATA_FILE} file, which convert_checkpoints.py writes"
    raise InvalidValue(field, f"{str(path)!r} {fault}")


def _kinds(path: Path) -> list[Kind]:
    if path.is_file():
        return [
            kind
            for kind, suffix in ((Kind.GGUF, ".gguf"), (Kind.HUGGING_FACE, ".safetensors"))
            if path.suffix == suffix
        ]

    def has(*names: str) -> bool:
        return any(next(path.glob(name), None) for name in names)

    tensors = has("model*.safetensors", "pytorch_model*.bin", "*.index.json")
    # Some folders on the hub describe one model twice: only its tensors say whose files they are.
    found = {
        Kind.CONVERTED: has(METADATA_FILE),
        Kind.META: has("consolidated.*.pth") or (has("params.json") and not tensors),
        Kind.HUGGING_FACE: tensors,
    }
    kinds = [kind for kind, is_one in found.items() if is_one]
    return kinds or [Kind.HUGGING_FACE] * has("config.json")
