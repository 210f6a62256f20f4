"""Python: `ast`, and modules found as the import system finds them in an installed package."""

import ast
from collections.abc import Mapping

__all__ = ["edges"]


def edges(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """(importer, imported) over `files`, {path: text} with the package's name as first folder."""
    found = set()
    for path, text in files.items():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        package = path.split("/")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [_module(alias.name.split("."), files) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = [*package[: len(package) + 1 - node.level]] if node.level else []
                if node.level > len(package):
                    continue
                base += (node.module or "").split(".") if node.module else []
                targets = [_module([*base, alias.name], files) or _module(base, files) for alias in node.names]
            else:
                continue
            found |= {(path, target) for target in targets if target and target != path}
    return found


def _module(parts: list[str], files: Mapping[str, str]) -> str | None:
    name = "/".join(parts)
    return next((path for path in (f"{name}/__init__.py", f"{name}.py") if path in files), None)
