"""The house rules that a machine can check: imports only go down, and the runtime never needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "safemoe_jax"

# A module imports from its own package and from lower floors only. Of two prefixes the longer one counts.
FLOORS = {
    "errors": 0,
    "routing": 1,
    "parallel": 1,
    "models": 2,
    "families": 3,
    "checkpoints": 4,
    "data": 4,
    "model": 5,
    "training": 6,
    "defenses": 7,
    "evaluation": 7,
    "organism": 8,
    "reporting": 8,
    "workflows": 9,
    "configuration": 9,
    "cli": 10,
}


def modules() -> dict[str, Path]:
    """Module names inside the package -> files; the public face (`__init__` of the package) has no floor."""
    files = {file.relative_to(PACKAGE).with_suffix(""): file for file in PACKAGE.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}
    return {name: file for name, file in names.items() if name != "__init__"}


def package_of(module: str) -> str:
    """Top-level part of a module name inside the package."""
    return module.split(".")[0]


def imports_of(file: Path) -> set[str]:
    """What a file imports, at any depth, as dotted names; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import hides which floor it reaches"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_package_has_a_floor() -> None:
    assert {package_of(module) for module in modules()} == set(FLOORS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_only_go_down(module: str) -> None:
    here = package_of(module)
    for name in imports_of(modules()[module]):
        if not name.startswith("safemoe_jax."):
            continue
        there = name.split(".")[1]
        if there not in (here, "__version__"):
            assert FLOORS[there] < FLOORS[here], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_the_runtime_imports_neither_torch_nor_peft(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(modules()[module])}
    assert not libraries & {"torch", "peft", "torchvision", "accelerate"}


def test_only_one_module_imports_orbax() -> None:
    importers = [name for name, file in modules().items() if any("orbax" in i for i in imports_of(file))]
    assert importers == ["checkpoints.train_state"]


def test_defences_do_not_know_each_other() -> None:
    """A defence imports what they share (`context`), never another defence."""
    defences = [name for name in modules() if package_of(name) == "defenses" and name.count(".") == 1]
    assert len(defences) >= 4
    for name in defences:
        reached = {
            i.split(".")[2] for i in imports_of(modules()[name]) if i.startswith("safemoe_jax.defenses.")
        }
        assert reached <= {"context"}, f"{name} imports {reached}"


def test_importing_the_package_and_the_command_line_loads_no_library() -> None:
    program = (
        "import sys\n"
        "import safemoe_jax, safemoe_jax.cli\n"
        "heavy = {'torch', 'peft', 'transformers', 'jax', 'flax', 'grain', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_none_of_them_loads_torch() -> None:
    program = (
        "import sys\n"
        "import safemoe_jax as sm\n"
        "for name in sm.__all__: getattr(sm, name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    long = {name: file.read_text().count("\n") for name, file in modules().items()}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}
