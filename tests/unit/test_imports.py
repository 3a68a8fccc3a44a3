"""No import of windlass is circular: those inside functions count, those for type checkers alone do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in (ROOT / "windlass").rglob("*.py")}


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            yield module if module in MODULES else node.module
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


@pytest.mark.slow
def test_no_import_is_circular() -> None:
    graph = {
        name: {other for other in imported(ast.parse(path.read_text())) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 1000
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
