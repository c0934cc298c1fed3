"""Imports go down only, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "dsft"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# From the bottom up: a unit may import units of lower layers, and itself. The third field names peers of the same layer
# that it may import too.
LAYERS: list[dict[str, set[str]]] = [
    {"constants": set(), "errors": {"constants"}, "__init__": set()},
    {"config": set()},
    {"fsio": set(), "remote": set(), "world": set(), "address": {"world"}, "dist": {"fsio", "world", "address"}},
    {"ops": set()},
    {"store": set(), "model": set(), "checkpoint": set(), "metrics": set(), "launch": set()},
    {"corpus": set(), "sampling": set()},
    {"batch": set()},
    {"train": {"evaluate", "export"}, "evaluate": set(), "export": set()},
    {"advise": set(), "report": set()},
    {"cli": {"demo"}, "demo": {"cli"}, "__main__": {"cli"}},
]
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}
PEERS = {unit: peers for units in LAYERS for unit, peers in units.items()}


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def unit_of(module: str) -> str:
    """The part of dsft that a module belongs to: a sub-package, or a module at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(file: Path, *, at_import_time_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every module of dsft that a file imports, inside functions too unless told otherwise."""
    for node, in_function, for_types in _nodes(ast.parse(file.read_text()), False, False):
        if at_import_time_only and (in_function or for_types):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "dsft")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            if (node.module or "").split(".")[0] == "dsft":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield node.lineno, submodule if submodule in MODULES else str(node.module)


def _nodes(tree: ast.AST, in_function: bool, for_types: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(tree):
        yield child, in_function, for_types
        inner = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        yield from _nodes(child, inner, types)


def test_every_part_has_a_layer() -> None:
    assert {unit_of(module) for module in MODULES} - LAYER_OF.keys() == set()


def test_imports_go_down_only() -> None:
    upward = []
    for file in FILES:
        unit = unit_of(module_name(file))
        for line, imported in imports_of(file):
            target = unit_of(imported)
            allowed = target in {unit, "__init__"} | PEERS[unit] or LAYER_OF[target] < LAYER_OF[unit]
            if not allowed:
                upward.append(f"{file.relative_to(REPOSITORY)}:{line} ({unit}) imports {imported} ({target})")
    assert not upward, "\n".join(upward)


def test_no_import_cycles() -> None:
    graph = {
        module_name(file): {target for _, target in imports_of(file, at_import_time_only=True)} & MODULES
        for file in FILES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module] - {module}):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", ["dsft.cli.main", "dsft.config", "dsft.config.load", "dsft.config.deepspeed"])
def test_the_command_line_and_the_configuration_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("unit", ["cli", "config"])
def test_no_file_of_the_command_line_or_configuration_imports_torch_at_the_top(unit: str) -> None:
    for file in sorted((PACKAGE / unit).glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            heavy = {"torch", "deepspeed", "transformers", "datasets", "pyarrow", "numpy"}
            assert not heavy & {name.split(".")[0] for name in names}, f"{file}:{node.lineno}"


def test_files_are_short_and_say_what_they_are_for() -> None:
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= MAX_LINES, f"{file} is longer than {MAX_LINES} lines"
        assert ast.get_docstring(ast.parse(text)), f"{file} has no module docstring"


def test_types_are_published() -> None:
    assert (PACKAGE / "py.typed").exists()


def _users_of(dotted: str) -> set[str]:
    """Files that import a module from outside dsft, or use it by its dotted name."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names = {ast.unparse(node)}
            else:
                continue
            if any(name == dotted or name.startswith(f"{dotted}.") for name in names):
                found.add(str(file.relative_to(PACKAGE)))
    return found


def test_only_dist_uses_torch_distributed() -> None:
    # bandwidth is a program of its own, which dsft doctor starts; no run imports it
    assert _users_of("torch.distributed") | _users_of("deepspeed.comm") <= {"dist.py", "launch/bandwidth.py"}


def test_only_fsio_replaces_files() -> None:
    assert _users_of("os.replace") | _users_of("os.rename") | _users_of("shutil.move") <= {"fsio.py"}


def test_nothing_unfinished_is_left() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    for file in FILES:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            assert not any(word in line for word in words), f"{file}:{number}: {line.strip()}"
