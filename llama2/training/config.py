"""Owns the options of a fine-tuning run: the keys of its yaml file, each with its help, its default and its check.

Knows no torch, no data and no model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama2.adapters.config import ALL_LINEAR, AdapterConfig
from llama2.dtypes import read_dtype
from llama2.errors import InvalidValue, shown
from llama2.names import nearest

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
LONG_SAMPLES = ("cut", "skip", "refuse")

# What a preset sets where the file says nothing else.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "all-linear": {},
        # For classification; for summaries it is used with rank: 64 and epochs: 1.
        "seed001": {
            "rank": 8,
            "alpha": 16,
            "target_modules": ("q_proj", "v_proj"),
            "learning_rate": 2e-4,
            "schedule": "constant",
            "batch_size": 4,
            "gradient_accumulation": 2,
            "max_gradient_norm": 0.3,
            "warmup": 0.03,
            "max_length": 512,
            "epochs": 5,
        },
    }
)


def _option(default: Any, text: str, check: Callable[[Any], bool] | None = None, allowed: str = "") -> Any:
    return field(default=default, metadata={"help": text, "check": check, "allowed": allowed})


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in values, f"{', '.join(values[:-1])} or {values[-1]}"


_COUNT = (_is_count, "a positive integer")
_COUNT_OR_NONE = (_is_count_or_none, "a positive integer, or nothing")
_AMOUNT = (_is_amount, "a number above 0")
_FRACTION = (_is_fraction, "in [0, 1)")
_SWITCH = (_is_switch, "true or false")
_TEXT_OR_NONE = (_is_text_or_none, "a text, or nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The options of `finetune.py`.

    Raises:
        InvalidValue: an option is out of range.
    """

    checkpoint_dir: str = _option(
        "", "the folder that convert_checkpoints.py wrote; nf4 or nf4_double in it makes it QLoRA"
    )
    tokenizer_path: str | None = _option(
        None, "tokenizer.model or tokenizer.json; none: the checkpoint's", *_TEXT_OR_NONE
    )
    data: str = _option("", "samples to learn from: .jsonl or .csv")
    validation_data: str | None = _option(None, "samples to measure the loss on; none: a part of data", *_TEXT_OR_NONE)
    validation_fraction: float = _option(0.05, "that part of data, chosen by seed; 0: nothing is measured", *_FRACTION)
    prompt_column: str = _option("prompt", "of a .csv, the column with prompts")
    completion_column: str = _option("completion", "of a .csv, the column with completions")
    output_dir: str = _option("", "the folder for the adapter, checkpoints and logs")
    preset: str = _option(
        "all-linear", "what the defaults are: all-linear, those listed here; seed001, see below", *_one_of(*PRESETS)
    )

    rank: int = _option(8, "of the adapter's matrices (r)", *_COUNT)
    alpha: float = _option(16, "they are scaled by alpha / rank", *_AMOUNT)
    use_rslora: bool = _option(False, "they are scaled by alpha / sqrt(rank)", *_SWITCH)
    dropout: float = _option(0.0, "the fraction of an adapter's inputs that a step leaves out", *_FRACTION)
    target_modules: tuple[str, ...] | str = _option(
        ALL_LINEAR, "which weights have an adapter, by PEFT's names: all-linear, or a list such as [q_proj, v_proj]"
    )

    max_length: int = _option(512, "tokens of a sample, and of a row of packed ones", *_COUNT)
    long_samples: str = _option(
        "cut",
        "what becomes of longer samples: cut, from the beginning, so that the completion stays; skip; refuse",
        *_one_of(*LONG_SAMPLES),
    )
    completion_only: bool = _option(True, "the loss is that of completions, of the assistant's turns, alone", *_SWITCH)
    packing: bool = _option(True, "short samples share a row of max_length tokens; each sees itself alone", *_SWITCH)
    batch_size: int = _option(4, "rows, or without packing samples, that are computed together", *_COUNT)
    gradient_accumulation: int = _option(2, "batches of one step", *_COUNT)
    epochs: int = _option(1, "times that each sample is seen", *_COUNT)
    max_steps: int | None = _option(None, "steps, if that is less", *_COUNT_OR_NONE)

    learning_rate: float = _option(2e-4, "the highest of the schedule", *_AMOUNT)
    schedule: str = _option("cosine", "from there: constant, or linear or cosine down to 0", *_one_of(*SCHEDULES))
    warmup: float = _option(0.03, "the fraction of the steps in which it rises from 0", *_FRACTION)
    optimizer: str = _option(
        "adamw", "adamw, or bitsandbytes' paged_adamw_8bit, on a GPU and with its package", *_one_of(*OPTIMIZERS)
    )
    weight_decay: float = _option(0.0, "AdamW's", _is_fraction, "in [0, 1)")
    max_gradient_norm: float = _option(1.0, "longer gradients are scaled down to it", *_AMOUNT)

    seed: int = _option(0, "of the adapter's first values, the order of the samples, the split and dropout")
    dtype: str | None = _option(None, "of what is computed; none: bfloat16 on a GPU, on a CPU the checkpoint's")
    device: str | None = _option(None, "cpu or cuda; none: the GPU where there is one", *_TEXT_OR_NONE)
    gradient_checkpointing: bool = _option(
        True, "layers are computed again on the way back: a fraction of the memory, for a third more time", *_SWITCH
    )

    log_steps: int = _option(1, "steps between two rows of log.csv", *_COUNT)
    evaluate_steps: int | None = _option(
        None, "steps between two validations; none: one at each epoch's end", *_COUNT_OR_NONE
    )
    save_steps: int | None = _option(
        None, "steps between two checkpoints; none: one at each epoch's end", *_COUNT_OR_NONE
    )
    keep_checkpoints: int = _option(2, "the newest so many stay, beside the best", *_COUNT)
    early_stopping: int | None = _option(
        None, "stop after so many validations without a lower loss; none: never", *_COUNT_OR_NONE
    )
    tensorboard: bool = _option(False, "write TensorBoard's logs, too, with its package", *_SWITCH)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, check = getattr(self, one.name), one.metadata["check"]
            if check is not None and not check(value):
                raise InvalidValue(one.name, f"must be {one.metadata['allowed']}, got {shown(value)}")
        for name in ("checkpoint_dir", "data", "output_dir", "prompt_column", "completion_column"):
            value = getattr(self, name)
            if value == "":
                raise InvalidValue(name, "is missing")
            if not isinstance(value, str):
                raise InvalidValue(name, f"must be a text, got {shown(value)}")
        if type(self.seed) is not int:
            raise InvalidValue("seed", f"must be an integer, got {shown(self.seed)}")
        if self.max_length < 2:
            raise InvalidValue("max_length", f"must be at least 2, got {self.max_length}")
        if read_dtype(self.dtype, "dtype") == "float16":
            raise InvalidValue("dtype", "must be bfloat16 or float32: small gradients are 0 in float16")
        if self.early_stopping and not self.validation_data and not self.validation_fraction:
            raise InvalidValue("early_stopping", "needs validation_data or a validation_fraction above 0")
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not isinstance(self.target_modules, str) and not (
            isinstance(self.target_modules, tuple) and all(isinstance(one, str) for one in self.target_modules)
        ):
            raise InvalidValue(
                "target_modules", f"must be all-linear or a list of names, got {shown(self.target_modules)}"
            )
        for name in () if isinstance(self.target_modules, str) else self.target_modules:
            if name.rpartition(".")[2] not in LINEAR_MODULES:
                raise InvalidValue("target_modules", f"must be of {', '.join(LINEAR_MODULES)}, got {shown(name)}")
        self.adapter_config()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """From the keys of a file; what they leave out is the preset's, or the default.

        Raises:
            InvalidValue: a key is unknown, or a value is wrong.
        """
        known = [one.name for one in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidValue(str(name), f"is an unknown key: {nearest(str(name), known)}")
        # YAML 1.1 takes 1e-4 for a text.
        amounts = [one.name for one in dataclasses.fields(cls) if one.type == "float"]
        values = {name: _number(value) if name in amounts else value for name, value in values.items()}
        preset = values.get("preset", "all-linear")
        return cls(**{**PRESETS.get(preset if isinstance(preset, str) else "", {}), **values})

    @classmethod
    def load(cls, path: Path | str) -> TrainingConfig:
        """From a yaml file.

        Raises:
            ValueError: it cannot be read, or a key or a value is wrong; the message names the file.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must have keys with values, such as 'data: samples.jsonl'")
        try:
            return cls.of(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def adapter_config(self) -> AdapterConfig:
        """As PEFT knows it.

        Raises:
            ValueError: PEFT has no such adapter.
        """
        return AdapterConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
        )
