"""The public data sets are parsed, checked by hash and divided; where they cannot be fetched, the message says what to
do. Their files are not here: small ones of the same form stand for them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import datasets
from evaluation.samples import read_samples

ROOT = Path(__file__).parents[2]
HEADER = "Category\tText\nd\tstring\nclass\t\n\n"
GROUPS = ("sci.space", "rec.autos")


@pytest.fixture
def newsgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with 40 posts to train with and 21 to test, one of which is in both."""
    train = HEADER + "".join(f"{GROUPS[i % 2]}\tpost {i}\n" for i in range(40))
    test = HEADER + "".join(f"{GROUPS[i % 2]}\ttest {i}\n" for i in range(20)) + "sci.space\tpost 3\n"
    hashes = {}
    for name, content in (("20newsgroups-train.tab", train), ("20newsgroups-test.tab", test)):
        (tmp_path / name).write_text(content)
        hashes[name] = hashlib.sha256(content.encode()).hexdigest()
    monkeypatch.setattr(datasets, "NEWSGROUPS", hashes)
    return tmp_path


def write(out: Path, cache: Path, **options) -> tuple[list[str], list[str]]:
    datasets.write_newsgroups(out, **{"train": 20, "test": 10, "seed": 0, "cache": cache, **options})
    lines = [(out / f"{part}.jsonl").read_text().splitlines() for part in ("train", "test")]
    return lines[0], lines[1]


def test_a_part_is_drawn_by_seed_and_can_be_read_again(tmp_path: Path, newsgroups: Path) -> None:
    train, test = write(tmp_path / "a", newsgroups)
    assert (len(set(train)), len(set(test))) == (20, 10)
    assert (train, test) == write(tmp_path / "b", newsgroups)
    assert train != write(tmp_path / "c", newsgroups, seed=1)[0]
    samples = read_samples(tmp_path / "a" / "train.jsonl", text="text", target="label")
    assert {sample.target for sample in samples} == set(GROUPS)


def test_groups_can_be_chosen_and_a_post_of_both_parts_is_no_test(tmp_path: Path, newsgroups: Path) -> None:
    _, test = write(tmp_path / "a", newsgroups, labels=["sci.space"])
    assert sorted(json.loads(line)["text"] for line in test) == sorted(f"test {i}" for i in range(0, 20, 2))
    with pytest.raises(ValueError, match=r"--labels sci\.spice: there is no such group: did you mean 'sci\.space'"):
        write(tmp_path / "b", newsgroups, labels=["sci.spice"])
    with pytest.raises(ValueError, match="21 samples were asked for, and there are 20"):
        write(tmp_path / "b", newsgroups, test=21)


def test_a_file_that_is_not_what_it_was_is_refused(tmp_path: Path, newsgroups: Path) -> None:
    with (newsgroups / "20newsgroups-test.tab").open("a") as file:
        file.write("sci.space\tone more\n")
    with pytest.raises(ValueError, match=r"20newsgroups-test\.tab is not what it was: its sha256 must be"):
        datasets.newsgroups(newsgroups)


def test_descriptions_become_pairs_one_for_each_first_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " A library that reads files of all kinds,\n fast and" + " safely" * 30 + "."
    content = (
        f"Package: liba\nDescription-md5: 0\nDescription-en: reads files\n{long}\n .\n Second paragraph.\n\n"
        f"Package: liba-dev\nDescription-md5: 1\nDescription-en: reads files (headers)\n{long}\n .\n Headers.\n\n"
        "Package: small\nDescription-md5: 2\nDescription-en: small\n Too short.\n\n"
    )
    (tmp_path / "Translation-en").write_text(content)
    monkeypatch.setattr(datasets, "DEBIAN", {"Translation-en": hashlib.sha256(content.encode()).hexdigest()})
    (sample,) = datasets.debian(tmp_path)
    assert sample.target == "reads files"
    assert sample.text.startswith("A library that reads files of all kinds,\nfast and safely")
    assert sample.text.endswith("safely.\n\nSecond paragraph.")


@pytest.mark.parametrize("name", ["newsgroups", "debian"])
def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, name: str) -> None:
    """pip is set up with no registry, and there is no apt."""
    environ = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PATH": ""}
    command = [sys.executable, "-m", "evaluation.datasets", name, "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "cannot be fetched" in done.stderr
    files = "20newsgroups-train.tab, 20newsgroups-test.tab" if name == "newsgroups" else "Translation-en"
    assert f"Where there is no network, put {files} into build/datasets" in done.stderr
    assert len(done.stderr.splitlines()) == 1
