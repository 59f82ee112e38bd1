"""The import rule: which package may import which. Imports anywhere in a module count, lazy ones too."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "diffusion_orpo"
# Beside itself, `config` and `runtime`.
ALLOWED = {
    "runtime": set(),
    "config": {"runtime"},
    "scoring": set(),
    "models": set(),
    "training": {"scoring"},
    "pairs": set(),
    "store": {"pairs"},
    "labelling": {"pairs"},
    "generation": {"pairs", "models"},
    "reports": {"store", "pairs", "scoring", "generation"},
}
ANYBODY = {"config", "runtime"}
SCRIPTS = {path.stem for path in EXAMPLE.glob("*.py")}


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Dotted names of all that a module of a package, such as ("orpo", "pairs"), imports."""
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


def below_orpo(names: set[str]) -> set[str]:
    """The packages of `orpo`, and the modules beside them, among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("orpo.")}


def test_a_package_imports_only_what_it_may():
    violations = []
    for path in sorted((EXAMPLE / "orpo").rglob("*.py")):
        names, package = imports_of(path, EXAMPLE), path.relative_to(EXAMPLE / "orpo").parts[0]
        wrong = {name.split(".")[0] for name in names} & SCRIPTS
        if package in ALLOWED:
            runtime_alone = set() if package == "runtime" else ANYBODY
            wrong |= below_orpo(names) - ALLOWED[package] - runtime_alone - {package}
        violations += [f"{path.relative_to(EXAMPLE)} imports {name}" for name in sorted(wrong)]
    assert violations == []


def test_every_package_has_its_rule():
    folders = {path.parent.name for path in (EXAMPLE / "orpo").glob("*/__init__.py")}
    assert folders <= set(ALLOWED)
    assert [folder for folder in folders if (EXAMPLE / "orpo" / folder / "__init__.py").read_text()] == []


def test_imports_are_seen_wherever_they_stand():
    source = (
        "def f():\n    from ..training import loop\n    import orpo.models.sd\nfrom . import pair\nfrom ... import x\n"
    )
    assert below_orpo(imports(source, ("orpo", "pairs"))) == {"training", "models", "pairs"}
    assert below_orpo(imports("from ..cli import main", ("orpo", "pairs"))) == {"cli"}


def test_products_never_import_what_is_around_them():
    around = {"helpers", "conftest", "families", "faces", "sampling", "tiny_sdxl", "run_demo"}
    for folder, never in ("diffusion_orpo_loss", {"orpo", *around, *SCRIPTS}), ("examples/diffusion_orpo", around):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {name.split(".")[0] for name in imports_of(path, ROOT / folder)} & never, path


def test_helpers_are_not_imported_from_test_files():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports_of(path, ROOT / "tests") if name.split(".")[-1].startswith("test_")], path


def test_the_fast_tests_are_there():
    listed = re.findall(r"tests/\S+\.py", (ROOT / "Makefile").read_text())
    assert listed and [path for path in listed if not (ROOT / path).exists()] == []
