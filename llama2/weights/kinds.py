"""Owns what the names of its files say about a path that should hold a model. Reads none of them, and knows no torch.

So a wrong path is answered before anything that it lacks, and in words that name what it is.
"""

from __future__ import annotations

from pathlib import Path

from llama2.errors import InvalidValue

METADATA_FILE = ".metadata"
_HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json", "config.json")
_NOT_YET = (
    "weights in Hugging Face's format, which are not read yet; Meta's own are (params.json, consolidated.00.pth …)"
)
_CONVERT = "python convert_checkpoints.py --original_ckpt_dir {} --save_checkpoint_dir converted_checkpoints"


def check_source(path: Path) -> None:
    """Refuse what does not look like something that the converter reads.

    Raises:
        InvalidValue: it says what `path` is instead.
    """
    if _is_meta(path) or (path / METADATA_FILE).exists() or (path.suffix == ".gguf" and path.exists()):
        return
    if not path.exists():
        fault = "does not exist"
    elif _is_hugging_face(path):
        inside = path / "original"
        fault = f"holds {_NOT_YET}" + (f"; its subfolder {inside} is Meta's" if _is_meta(inside) else "")
    elif path.is_file():
        fault = "is a file; expected Meta's folder, a converted one, or a .gguf file"
    else:
        fault = "holds no checkpoint: expected Meta's folder, with params.json and consolidated.00.pth"
    raise InvalidValue("--original_ckpt_dir", f"{str(path)!r} {fault}")


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
        if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            fault += (
                "; if it is a name on the hub, nothing is fetched from there: download Meta's files (hf download "
                f"{path} --local-dir {folder.name}) and convert them: {_CONVERT.format(folder.name)}"
            )
    elif folder.suffix == ".gguf":
        fault = f"is a GGUF file: {convert}"
    elif _is_meta(folder):
        fault = f"holds Meta's files: {convert}"
    elif _is_hugging_face(folder):
        fault = f"holds {_NOT_YET}, to be converted"
    elif folder.is_file():
        fault = "is a file, and not a folder"
    else:
        fault = f"is no converted checkpoint: it has no {METADATA_FILE} file, which convert_checkpoints.py writes"
    raise InvalidValue(field, f"{str(path)!r} {fault}")


def _is_meta(path: Path) -> bool:
    return (path / "params.json").is_file() or next(path.glob("consolidated.*.pth"), None) is not None


def _is_hugging_face(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return any(next(path.glob(name), None) for name in _HUGGING_FACE)
