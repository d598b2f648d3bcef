"""The floors of the house: a file imports only from lower ones, and what needs no torch imports none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module's floor is that of the longest prefix of its name. A module may be imported by another
# one of its floor and room, as long as that makes no cycle.
FLOORS = {
    ("" if floor == "4" else "llama2.") + name: int(floor)
    for floor, row in re.findall(
        r"^\| (\d) \|(.*)\|$", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    for name in re.findall(r"`([\w.]+)`", row)
}

TORCH_FREE = (
    *(
        "llama2",
        "llama2.config",
        "llama2.text.tokenizer",
        "llama2.text.text_stream",
        "llama2.text.chat",
        "llama2.engine.sequence",
        "llama2.adapters.config",
    ),
    *("llama2.text.dialog", "llama2.text.tools", "llama2.text.tool_prompt", "llama2.text.json_schema"),
    *("llama2.engine.scheduler", "llama2.engine.block_manager", "build_archive", "handler.torchserve.server.command"),
    *(
        "handler.body",
        "handler.errors",
        "handler.call",
        "handler.config",
        "handler.native",
        "handler.torchserve.transport",
        "handler.torchserve.llama_handler",
    ),
    *("handler.prompt", "handler.openai.api", "handler.torchserve.gpu_mask"),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for folder in ("llama2", "handler", "apps", "scripts", "benchmarks", "evaluation")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name == "kernels"
} | {path.stem: path for path in ROOT.glob("*.py")}


def floor(module: str) -> int:
    known = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert known, f"{module} has no floor: give it one in docs/architecture.md"
    return FLOORS[max(known, key=len)]


def imported(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, anywhere in it, except for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names = [f"{module}.{a.name}" if f"{module}.{a.name}" in SOURCES else module for a in node.names]
        yield from (name for name in names if name in SOURCES)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_imports_from_no_higher_floor(module: str) -> None:
    too_high = [name for name in imported(SOURCES[module]) if floor(name) > floor(module)]
    assert not too_high, f"{module} (floor {floor(module)}) imports {too_high}"


def test_every_row_of_the_table_is_of_modules_that_are_there() -> None:
    assert FLOORS
    assert not [
        name for name in FLOORS if not any(module == name or module.startswith(name + ".") for module in SOURCES)
    ]


def test_the_model_knows_nothing_of_the_server() -> None:
    for module, path in SOURCES.items():
        if module.startswith("llama2."):
            assert not [name for name in imported(path) if not name.startswith("llama2.")], module


def test_the_chat_page_knows_nothing_but_the_openai_api() -> None:
    for module, path in SOURCES.items():
        if module.startswith("apps."):
            assert not [name for name in imported(path) if not name.startswith("apps.")], module


def test_no_cycle_of_imports() -> None:
    graph = {module: set(imported(path)) for module, path in SOURCES.items()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"these import each other in a cycle: {sorted(graph)}"


def test_what_knows_no_torch_does_not_bring_it_along() -> None:
    """Nor by way of another module: asked of a fresh interpreter."""
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchserve_finds_exactly_one_class_in_the_handler() -> None:
    tree = ast.parse(SOURCES["handler.torchserve.llama_handler"].read_text())
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == ["LlamaHandler"]
