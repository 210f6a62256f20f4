"""Layering: packages import only from rows below their own, and siblings never import each other."""

import ast
from pathlib import Path

import pytest

import megacoder

ROOT = Path(megacoder.__file__).parent
ROWS = [
    ["version", "core"],
    ["ops"],
    ["parallel"],
    ["data", "checkpoint"],
    ["model", "corpus"],
    ["train", "evaluate"],
    ["cli"],
]
RANK = {name: row for row, names in enumerate(ROWS) for name in names}


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write megacoder.… in full"
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "megacoder" else [node.module]
            )
    return [name for name in names if name.startswith("megacoder.")]


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        for name in imported_modules(path):
            target = name.split(".")[1]
            if target != package and target != "version" and not RANK.get(target, 99) < RANK[package]:
                found.append(f"{path.relative_to(root)}: {package} -> {target}")
    return found


def test_packages_import_only_downward():
    assert violations(ROOT) == []


def test_every_package_has_a_row():
    packages = {child.name for child in ROOT.iterdir() if (child / "__init__.py").exists()}
    assert packages <= RANK.keys()


@pytest.mark.parametrize(
    ("package", "line"), [("ops", "import megacoder.data"), ("data", "from megacoder import checkpoint")]
)
def test_an_upward_or_sideways_import_is_seen(tmp_path, package, line):
    (tmp_path / package).mkdir()
    (tmp_path / package / "offender.py").write_text(line + "\n")
    assert len(violations(tmp_path)) == 1
