"""Java, C, C++ and Go: imports by tree-sitter, files by the project's own build files and declarations.

Java by declared packages and types; C and C++ by the include folders that the project's build names; Go by `go.mod`.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tree_sitter_language_pack import get_parser

__all__ = ["c_edges", "go_edges", "java_edges"]

Edges = set[tuple[str, str]]

_JAVA_TYPES = {f"{kind}_declaration" for kind in ("class", "interface", "enum", "record", "annotation_type")}


def java_edges(files: Mapping[str, str], trees: Sequence[str] = ()) -> Edges:
    """Imports of types and of static members; of `a.b.*` those types that the file names.

    `trees` are folders with copies of the project for other platforms, which are built by themselves.
    """
    parser = get_parser("java")
    declared: dict[str, list[str]] = {}  # qualified type -> files
    roots: dict[str, str] = {}
    parsed = {}
    for path, text in files.items():
        root = parser.parse(text.encode()).root_node
        package = next(
            (_text(node.named_children[-1]) for node in root.children if node.type == "package_declaration"), ""
        )
        parsed[path] = (root, package)
        folder = posixpath.dirname(path)
        inner = package.replace(".", "/")
        tree = next((f"{tree}/" for tree in trees if path.startswith(f"{tree}/")), "main/")
        roots[path] = tree + (folder[: -len(inner)] if inner and folder.endswith(inner) else folder)
        for node in root.named_children:
            name = node.child_by_field_name("name")
            if name is not None and node.type in _JAVA_TYPES:
                declared.setdefault(f"{package}.{_text(name)}".lstrip("."), []).append(path)
    found: Edges = set()
    for path, (root, _) in parsed.items():
        for node in root.named_children:
            if node.type == "import_declaration":
                given = next(
                    child for child in node.named_children if child.type in ("scoped_identifier", "identifier")
                )
                everything = any(child.type == "asterisk" for child in node.children)
                for qualified in _java_types(_text(given), everything, root, declared):
                    found.add((path, _same_root(declared[qualified], path, roots)))
    return {(a, b) for a, b in found if a != b}


def _java_types(name: str, everything: bool, root: Any, declared: Mapping[str, list[str]]) -> list[str]:
    """The qualified types of the project that one import in the file under `root` means."""
    if everything and name not in declared:
        mentioned = {_text(node) for node in _walk(root) if node.type in ("type_identifier", "identifier")}
        inside = [qualified for qualified in declared if qualified.rpartition(".")[0] == name]
        return [qualified for qualified in inside if qualified.rpartition(".")[2] in mentioned]
    while name and name not in declared:
        name = name.rpartition(".")[0]
    return [name] if name else []


def c_edges(files: Mapping[str, str], include_folders: Sequence[str]) -> Edges:
    """Every `#include`, whatever the conditions around it; a quoted one is looked for beside the file first."""
    parsers = {True: get_parser("cpp"), False: get_parser("c")}
    found: Edges = set()
    for path, text in files.items():
        is_cpp = not path.endswith((".c", ".h"))
        for node in _walk(parsers[is_cpp].parse(text.encode()).root_node):
            if node.type != "preproc_include":
                continue
            given = node.child_by_field_name("path")
            if given is None or given.type not in ("string_literal", "system_lib_string"):
                continue
            name = _text(given)[1:-1]
            beside = [posixpath.dirname(path)] if given.type == "string_literal" else []
            for folder in (*beside, *include_folders):
                target = posixpath.normpath(posixpath.join(folder, name))
                if target in files:
                    found.add((path, target))
                    break
    return {(a, b) for a, b in found if a != b}


def go_edges(files: Mapping[str, str], modules: Mapping[str, str]) -> Edges:
    """Imports of packages, that is of all their files but tests; `modules` are the texts of go.mod, by path."""
    parser = get_parser("go")
    places = []  # (import path, folder), the longest path first
    for path, text in modules.items():
        if named := re.search(r"^module\s+\"?([^\s\"]+)", text, re.MULTILINE):
            places.append((named[1], posixpath.dirname(path)))
    places.sort(key=lambda place: -len(place[0]))
    folders: dict[str, list[str]] = {}
    for path in files:
        if not path.endswith("_test.go"):
            folders.setdefault(posixpath.dirname(path), []).append(path)
    found: Edges = set()
    for path, text in files.items():
        for node in _walk(parser.parse(text.encode()).root_node, {"function_declaration", "method_declaration"}):
            if node.type != "import_spec":
                continue
            given = node.child_by_field_name("path")
            name = _text(given)[1:-1] if given is not None else ""
            for module, folder in places:
                if name == module or name.startswith(f"{module}/"):
                    target = posixpath.join(folder, name[len(module) :].lstrip("/")).rstrip("/")
                    found |= {(path, other) for other in folders.get(target, ())}
                    break
    return {(a, b) for a, b in found if a != b}


def _same_root(candidates: Sequence[str], path: str, roots: Mapping[str, str]) -> str:
    """Of several files that declare a type, one in the importer's source tree, else in the tree that is nearest."""

    def distance(other: str) -> tuple[int, int, str]:
        shared = len(posixpath.commonprefix([roots[path].split("/"), roots[other].split("/")]))
        return -(roots[other] == roots[path]), -shared, other

    return min(candidates, key=distance)


def _walk(node: Any, skip: set[str] | None = None) -> Iterator[Any]:
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        if not skip or node.type not in skip:
            pending += node.children


def _text(node: Any) -> str:
    return "".join(node.text.decode("utf-8", "replace").split())
