"""Owns the settings of an evaluation: what its yaml may hold, and what each key means.

Knows no model and opens no data file. A mistake is an `InvalidValue` with the path to its key, such as `runs[1].shots`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llama2.engine.sampling_params import integer
from llama2.errors import InvalidValue, shown
from llama2.names import first_names

T = TypeVar("T")

TASKS = ("classification", "summarization")
FORMATS = ("chat", "completion")
MATCHES = ("text", "grammar")
VARIED = ("rank", "epochs", "dropout", "sample_fraction")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Two files, JSONL or CSV, and the names of their columns. `train` is where examples are drawn from, `limit` how
    many samples of `test` count, the first ones; none: all."""

    test: Path
    train: Path | None = None
    text: str = "text"
    target: str
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("text", "target"):
            _text(name, getattr(self, name))
        if self.limit is not None:
            integer("limit", self.limit, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How a sample becomes a prompt. `instruction` comes once, before the examples; `template` is each sample.

    In both {labels} is the list of labels, and in the template {text} the document, cut to `max_text_tokens`.
    `format` is chat, in the model's own chat format, or completion.
    """

    template: str = "{text}"
    instruction: str = ""
    format: str = "chat"
    max_text_tokens: int = 512

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        integer("max_text_tokens", self.max_text_tokens, low=1)
        for name, known in (("template", {"text", "labels"}), ("instruction", {"labels"})):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidValue(name, f"must be a text, got {shown(value)}")
            for placeholder in set(_PLACEHOLDER.findall(value)) - known:
                allowed = " and ".join(f"{{{one}}}" for one in sorted(known))
                raise InvalidValue(name, f"may have {allowed}, got {{{placeholder}}}")
        if "{text}" not in self.template:
            raise InvalidValue("template", f"must have {{text}} in it, got {shown(self.template)}")

    def filled(self, text: str, labels: Sequence[str]) -> str:
        return self._fill(self.template, {"text": text, "labels": ", ".join(labels)})

    def filled_instruction(self, labels: Sequence[str]) -> str:
        return self._fill(self.instruction, {"labels": ", ".join(labels)})

    @staticmethod
    def _fill(template: str, values: Mapping[str, str]) -> str:
        """All at once: what a document says is no placeholder."""
        return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to ask: with `shots` examples, with the adapter in a folder, or another checkpoint."""

    name: str
    shots: int = 0
    adapter: Path | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        _text("name", self.name)
        if not re.fullmatch(r"[\w.,=+-]+", self.name):
            raise InvalidValue(
                "name", f"must be of letters, digits and _.,=+-, since files have it, got {shown(self.name)}"
            )
        integer("shots", self.shots, low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """`finetune` is the yaml of finetune.py in which each point of the `grids` changes some values.

    A grid maps `rank`, `epochs`, `dropout` and `sample_fraction` to lists; its points are all combinations.
    """

    finetune: Path
    grids: tuple[Mapping[str, tuple[float, ...]], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.grids, Sequence) or isinstance(self.grids, str) or not self.grids:
            raise InvalidValue("grids", f"must be a list of grids, got {shown(self.grids)}")
        object.__setattr__(self, "grids", tuple(_grid(f"grids[{i}]", grid) for i, grid in enumerate(self.grids)))

    def points(self) -> list[dict[str, float]]:
        """What each adapter is tuned with; a point of two grids once."""
        points: list[dict[str, float]] = []
        for grid in self.grids:
            for values in itertools.product(*grid.values()):
                point = dict(zip(grid, values, strict=True))
                points += [point] if point not in points else []
        return points


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of an evaluation. See docs/evaluation.md for the keys in words.

    `engine` holds keywords of `LLM`, `price_per_hour` is what this machine costs, in dollars.
    """

    checkpoint: Path
    output_dir: Path
    task: str
    data: Data
    runs: tuple[Run, ...]
    prompt: Prompt = field(default_factory=Prompt)
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    match: str = "text"
    max_new_tokens: int | None = None
    seed: int = 0
    resamples: int = 1000
    confidence: float = 0.95
    price_per_hour: float | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    ablation: Ablation | None = None

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("match", self.match, MATCHES)
        integer("seed", self.seed, low=0)
        integer("resamples", self.resamples, low=1)
        if self.max_new_tokens is not None:
            integer("max_new_tokens", self.max_new_tokens, low=1)
        if not _is_number(self.confidence) or not 0 < self.confidence < 1:
            raise InvalidValue("confidence", f"must be a number in (0, 1), got {shown(self.confidence)}")
        if self.price_per_hour is not None and (not _is_number(self.price_per_hour) or self.price_per_hour < 0):
            raise InvalidValue("price_per_hour", f"must be a number of at least 0, got {shown(self.price_per_hour)}")
        if not isinstance(self.engine, Mapping):
            raise InvalidValue("engine", f"must map options of LLM to values, got {shown(self.engine)}")
        self._check_task()
        self._check_runs()

    @property
    def label_names(self) -> Mapping[str, str] | None:
        """What the model is to write for each label of the data; None where the data says which labels there are."""
        if self.labels is None or isinstance(self.labels, Mapping):
            return self.labels
        return {label: label for label in self.labels}

    def _check_task(self) -> None:
        if self.task == "classification":
            if self.labels is None and self.data.train is None:
                raise InvalidValue("labels", "must be given where there is no data.train to take them from")
            if self.labels is not None and not _are_labels(self.labels):
                raise InvalidValue(
                    "labels",
                    "must be a list of two or more texts, or map each label of the data to what the model is to write, "
                    f"got {shown(self.labels)}",
                )
            return
        for name, is_there in (("labels", self.labels is not None), ("match", self.match != "text")):
            if is_there:
                raise InvalidValue(name, "is for classification: a summary has no label")

    def _check_runs(self) -> None:
        names = [run.name for run in self.runs]
        for index, run in enumerate(self.runs):
            if run.name in names[:index]:
                raise InvalidValue(f"runs[{index}].name", f"must be another than runs before have, got {run.name!r}")
            if run.shots and self.data.train is None:
                raise InvalidValue(f"runs[{index}].shots", "needs data.train, from which examples are drawn")
        if self.ablation and self.data.train is None:
            raise InvalidValue("ablation", "needs data.train, with which adapters are tuned")


def read_settings(path: Path) -> Settings:
    """The settings in a yaml file.

    Raises:
        ValueError: the file cannot be read, or a key is missing, unknown or wrong; the message begins with the file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        return _settings(values)
    except InvalidValue as error:
        raise ValueError(f"{path}: {error}") from None


def _settings(values: Any) -> Settings:
    if not isinstance(values, Mapping):
        raise InvalidValue("it", f"must map keys to values, got {shown(values)}")
    runs = values.get("runs")
    if not isinstance(runs, list) or not runs:
        raise InvalidValue("runs", f"must be a list of one or more runs, got {shown(runs)}")
    sections = {name: (Data, Prompt, Ablation)[i] for i, name in enumerate(("data", "prompt", "ablation"))}
    read = {name: _section(name, kind, values[name]) for name, kind in sections.items() if values.get(name) is not None}
    read["runs"] = tuple(_section(f"runs[{index}]", Run, run) for index, run in enumerate(runs))
    if isinstance(values.get("labels"), list):
        read["labels"] = tuple(values["labels"])
    return _section("", Settings, {**values, **read})


def _section(place: str, kind: type[T], values: Any) -> T:
    """`values` as a `kind`; what is wrong is said of a key below `place`."""
    inside = f"{place}." if place else ""
    if not isinstance(values, Mapping):
        raise InvalidValue(place, f"must map keys to values, got {shown(values)}")
    try:
        known = first_names({str(key): value for key, value in values.items()}, kind)
        for one in dataclasses.fields(kind):  # type: ignore[arg-type]
            if one.default is MISSING and one.default_factory is MISSING and known.get(one.name) is None:
                raise InvalidValue(one.name, "is missing")
            if "Path" in str(one.type) and known.get(one.name) is not None:
                _text(one.name, known[one.name])
                known[one.name] = Path(known[one.name])
        return kind(**known)
    except InvalidValue as error:
        raise InvalidValue(inside + error.field, error.problem) from None


def _grid(place: str, grid: Any) -> dict[str, tuple[float, ...]]:
    if not isinstance(grid, Mapping) or not grid:
        raise InvalidValue(place, f"must map some of {', '.join(VARIED)} to lists, got {shown(grid)}")
    for name, values in grid.items():
        if name not in VARIED:
            raise InvalidValue(f"{place}.{name}", f"is none of {', '.join(VARIED)}")
        if not isinstance(values, list) or not values or not all(map(_is_number, values)):
            raise InvalidValue(f"{place}.{name}", f"must be a list of numbers, got {shown(values)}")
        if name == "sample_fraction" and not all(0 < value <= 1 for value in values):
            raise InvalidValue(f"{place}.{name}", f"must be of numbers in (0, 1], got {shown(values)}")
    return {name: tuple(values) for name, values in grid.items()}


def _are_labels(labels: Any) -> bool:
    texts = [*labels, *labels.values()] if isinstance(labels, Mapping) else labels
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
        return False
    written = list(labels.values() if isinstance(labels, Mapping) else labels)
    return len(written) > 1 and len(set(written)) == len(written)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidValue(name, f"must be a text, got {shown(value)}")


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidValue(name, f"must be {' or '.join(allowed)}, got {shown(value)}")
