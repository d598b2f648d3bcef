"""A result file says where and with what it was measured, and nothing that names the machine."""

from __future__ import annotations

import json
import platform
import socket
from pathlib import Path

import pytest

from benchmarks.results import commit, machine, save, versions


def test_a_file_has_the_machine_the_versions_the_commit_and_the_figures(tmp_path: Path) -> None:
    path = save(tmp_path / "deep" / "one.json", "offline", {"batch": 1}, [{"seconds": 0.5}])
    content = json.loads(path.read_text())
    assert content["kind"] == "offline"
    assert content["settings"] == {"batch": 1}
    assert content["figures"] == [{"seconds": 0.5}]
    assert content["machine"] == machine()
    assert content["versions"] == versions()
    assert content["versions"]["python"] == platform.python_version()
    assert content["commit"] == commit()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells a processor's family and model")
def test_a_processor_is_named_by_its_vendor_family_and_model() -> None:
    """As lscpu names them: "AMD EPYC" alone may be any of five generations."""
    names = ("cpu", "cpu_vendor") + (("cpu_family", "cpu_model") if platform.machine() == "x86_64" else ())
    assert all(machine()[name] for name in names)
    assert all(machine()[name].isdigit() for name in names[2:])


def test_no_host_name_is_written(tmp_path: Path) -> None:
    path = save(tmp_path / "one.json", "offline", {}, [])
    assert socket.gethostname() not in path.read_text()


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "one.json", "offline", {}, [float("nan")])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that writes after each figure may be killed then."""
    path = save(tmp_path / "one.json", "offline", {}, [1])
    write = Path.write_text

    def be_killed(self: Path, text: str, **settings: str) -> int:
        write(self, text[:10], **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", be_killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, "offline", {}, [1, 2])
    assert json.loads(path.read_text())["figures"] == [1]
