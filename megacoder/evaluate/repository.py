"""Files of a repository as context for one of them: what it depends on, in the order of dependencies, as trained.

In a training sample, files come after their dependencies, each under a comment with its path (arXiv:2401.14196, 2.2); a
prompt that looks the same lets the model use what is in other files.
"""

from pathlib import Path

from megacoder.core.errors import DataError
from megacoder.corpus.dependencies import repository_dependencies
from megacoder.corpus.languages import language_of
from megacoder.corpus.order import dependency_order
from megacoder.corpus.samples import render

__all__ = ["dependency_context"]

_LARGEST = 1 << 20
"""Bytes beyond which a file is not used as context."""


def dependency_context(root: Path, file: Path) -> tuple[str, str]:
    """(text of all files under `root` that `file` depends on, directly or not; the path comment of `file`).

    Hidden folders and files that are not UTF-8 are skipped. Raises DataError where `file` is not under `root`.
    """
    try:
        target = str(file.resolve().relative_to(root.resolve()))
    except ValueError:
        raise DataError(f"{file} is not in {root}, the repository that is to be its context") from None
    texts = dict(_texts(root))
    texts.setdefault(target, file.read_text(encoding="utf-8"))
    paths = sorted(texts)
    languages = {path: language_of(path) or "" for path in paths}
    depends_on = repository_dependencies(languages, ((path, texts[path]) for path in paths))
    wanted, reached = [paths.index(target)], set()
    while wanted:
        node = wanted.pop()
        for dependency in depends_on[node]:
            if dependency not in reached:
                reached.add(dependency)
                wanted.append(dependency)
    reached.discard(paths.index(target))
    nodes = sorted(reached)
    order = dependency_order(nodes, [depends & reached for depends in depends_on])
    pieces = [render(paths[node], texts[paths[node]], languages[paths[node]], "hash") for node in order]
    return "".join(pieces), f"# {target}\n"


def _texts(root: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or language_of(str(inside)) is None or not path.is_file() or path.stat().st_size > _LARGEST:
            continue
        try:
            found.append((str(inside), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found
