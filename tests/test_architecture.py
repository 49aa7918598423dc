"""The import graph: packages point one way, and nothing imports JAX before the environment is set."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orcd_jax"

# What each part of the package may import of the others, besides itself and the leaves.
LEAVES = {"config", "config_files", "errors", "telemetry", "tokenizer", ""}
MAY_IMPORT: dict[str, set[str]] = {
    "main": {"command_line", "config_files", "device", "environment", "serving", "wiring", "worker"},
    "wiring": {"checkpoint", "device", "residency", "server", "serving", "worker"},
    "serving": {"worker"},
    "environment": {"device", "residency"},
    "command_line": {"config_sources"},
    "config_sources": {"config_files"},
    "config_files": set(),
    "config_rules": set(),
    "cli": {"api", "checkpoint", "residency"},
    "server": {"worker", "engine", "api", "checkpoint"},
    "worker": {"engine", "residency", "checkpoint", "device", "models"},
    "engine": {"models", "device", "kernels"},
    "residency": {"checkpoint", "models", "kernels", "device"},
    "checkpoint": {"models"},
    "models": {"kernels"},
    "kernels": set(),
    "device": set(),
    "api": set(),
    "config": {"config_rules"},
    "errors": set(),
    "telemetry": set(),
    "tokenizer": set(),
}
# What a person's command or a message passes through; the rest is the device plane.
JAX_FREE = {
    "",
    "main",
    "wiring",
    "serving",
    "environment",
    "command_line",
    "config",
    "config_sources",
    "config_files",
    "config_rules",
    "errors",
    "telemetry",
    "tokenizer",
    "cli",
    "server",
    "api",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(dotted: str) -> str:
    """``orcd_jax.engine.engine`` is of the part ``engine``; ``orcd_jax`` itself of the part ``""``."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def name_of(path: Path) -> str:
    pieces = ("orcd_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that a module imports; ``at_import_time`` leaves out those inside functions and type checking."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or name_of(path).startswith("orcd_jax.api"), f"{path}: relative import"
            if node.level == 0 and node.module is not None:
                base = node.module
                # `from orcd_jax import errors` names a part; `from orcd_jax import __version__` does not.
                found.update(
                    f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names
                )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def is_module(dotted: str) -> bool:
    at = PACKAGE.joinpath(*dotted.split(".")[1:])
    return dotted.startswith("orcd_jax.") and (at.is_dir() or at.with_suffix(".py").is_file())


@pytest.mark.requirement("WORKER-4010")
@pytest.mark.parametrize("path", modules(), ids=lambda path: name_of(path))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(name_of(path))
    if not part:
        return
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[part] | LEAVES | {part}
    parts = {part_of(name) for name in imports(path) if name.split(".")[0] == "orcd_jax"}
    assert parts <= allowed, f"{name_of(path)} imports {sorted(parts - allowed)}"


@pytest.mark.requirement("WORKER-4011")
@pytest.mark.parametrize("path", modules(), ids=lambda path: name_of(path))
def test_only_the_device_plane_imports_jax(path: Path) -> None:
    if part_of(name_of(path)) in JAX_FREE:
        assert not {"jax", "jaxlib", "flax", "orbax"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("module", ["main", "config", "cli", "telemetry.log", "telemetry.narration", "errors"])
def test_what_runs_before_the_environment_is_set_does_not_import_jax(module: str) -> None:
    script = f"import sys, orcd_jax.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, check=False).returncode == 0


@pytest.mark.requirement("WORKER-4010")
def test_the_table_is_acyclic() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, of in MAY_IMPORT.items() if part not in done and of <= done}
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_every_module_has_a_docstring_and_stays_under_its_size() -> None:
    for path in modules():
        if "api" in path.relative_to(PACKAGE).parts or not (text := path.read_text(encoding="utf-8")):
            continue
        assert ast.get_docstring(ast.parse(text)), path
        assert text.count("\n") <= 500, f"{path} has {text.count(chr(10))} lines: one noun a file"


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["otel"], *extras["signing"]]
    declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines}
    # Where the name to import is not the name to install.
    modules_of = {
        "absl-py": "absl",
        "opentelemetry-sdk": "opentelemetry",
        "orbax-checkpoint": "orbax",
        "protobuf": "google",
    }
    known = (
        {modules_of.get(name, name.replace("-", "_")) for name in declared}
        | set(sys.stdlib_module_names)
        | {"orcd_jax"}
    )
    used = {name.split(".")[0] for path in modules() for name in imports(path)}
    assert used <= known, f"not in pyproject.toml: {sorted(used - known)}"


@pytest.mark.requirement("WORKER-4403")
def test_only_the_boundary_asks_a_device_about_itself() -> None:
    questions = re.compile(r"\.memory_stats\(|local_devices\(|unsafe_buffer_pointer|cuPointer|nvmlDevice")
    asking = {path for path in modules() if questions.search(path.read_text(encoding="utf-8"))}
    assert {part_of(name_of(path)) for path in asking} == {"device"}
