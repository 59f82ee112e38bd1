"""The rule of the house: which room may import which. Imports anywhere in a module count, lazy ones too."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "diffusion_orpo"
ALLOWED = {
    "runtime": set(),
    "scoring": set(),
    "data": {"runtime"},
    "models": {"runtime"},
    "training": {"runtime", "scoring"},
    "store": {"data", "models", "runtime"},
    "drawing": {"data", "runtime"},
    "evaluation": {"drawing", "scoring", "data", "runtime"},
    "checking": {"store", "data", "runtime"},
    "labelling": {"data", "runtime"},
    "making": {"drawing", "models", "scoring", "data", "runtime"},
}
SCRIPTS = {path.stem for path in EXAMPLE.glob("*.py")}
MODULES = sorted((EXAMPLE / "orpo").rglob("*.py"))


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names of all that a module imports.

    Args:
        source: the module's.
        package: that it is in, such as ("orpo", "data").
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def imports_of(path: Path, root: Path) -> set[str]:
    return imports(path.read_text(), path.relative_to(root).parent.parts)


def rooms(names: set[str]) -> set[str]:
    """The rooms among dotted names; "top" where it is `orpo` itself or a module beside the rooms."""
    found = [name.split(".") for name in names if name == "orpo" or name.startswith("orpo.")]
    return {parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "top" for parts in found if len(parts) != 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(EXAMPLE / "orpo")))
def test_a_room_imports_only_what_it_may(path):
    names = imports_of(path, EXAMPLE)
    assert not {name.split(".")[0] for name in names} & SCRIPTS, "nothing imports a script"
    room = path.relative_to(EXAMPLE / "orpo").parts[0]
    if room in ALLOWED:
        assert rooms(names) - {room} <= ALLOWED[room]


def test_every_room_has_its_rule():
    folders = {path.name for path in (EXAMPLE / "orpo").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ALLOWED)
    assert all((EXAMPLE / "orpo" / room / "__init__.py").read_text() == "" for room in ALLOWED)


def test_imports_are_seen_wherever_they_stand():
    source = (
        "def f():\n    from ..training import loop\n    import orpo.models.sd\nfrom . import pair\nfrom ... import x\n"
    )
    assert rooms(imports(source, ("orpo", "data"))) == {"training", "models", "data"}
    assert rooms({"orpo.data_source"}) == {"top"}


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("diffusion_orpo_loss", {"orpo", "tests", "helpers", *SCRIPTS}),
        ("examples/diffusion_orpo", {"helpers", "conftest", "families", "faces", "sampling", "tiny_sdxl", "run_demo"}),
    ],
)
def test_products_never_import_what_is_around_them(folder, never):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path, ROOT / folder)} & never, path


def test_helpers_are_not_imported_from_test_files():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports_of(path, ROOT / "tests") if name.split(".")[-1].startswith("test_")], path


def test_the_fast_tests_are_there():
    listed = re.findall(r"tests/\S+\.py", (ROOT / "Makefile").read_text())
    assert listed and [path for path in listed if not (ROOT / path).exists()] == []
