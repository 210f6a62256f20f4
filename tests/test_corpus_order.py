"""Dependencies and order: edges against `ast` with package resolution, Algorithm 1 against its plain transcription."""

import ast
import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megacoder.corpus.dependencies import RESOLVERS, repository_dependencies
from megacoder.corpus.imports.c import CIncludes
from megacoder.corpus.imports.python import PythonImports, python_imports
from megacoder.corpus.order import connected_subgraphs, dependency_order
from megacoder.corpus.samples import SampleConfig, plan_samples, render, rendered_bytes


def algorithm_1(depends_on):
    """Algorithm 1 of arXiv 2401.14196, line by line; the lowest index wins a tie."""
    n = len(depends_on)
    graph = {f: [] for f in range(n)}
    in_degree = dict.fromkeys(range(n), 0)
    for a in range(n):
        for b in range(n):
            if a != b and b in depends_on[a]:
                graph[b].append(a)
                in_degree[a] += 1
    reach = [{f, *graph[f], *(b for b in depends_on[f])} for f in range(n)]
    for _ in range(n):
        reach = [set().union(*(reach[g] for g in group)) for group in reach]
    orders = []
    for subgraph in sorted({frozenset(group) for group in reach}, key=min):
        result = []
        while len(result) < len(subgraph):
            f = min((f for f in subgraph if f not in result), key=lambda f: (in_degree[f], f))
            for dependant in graph[f]:
                in_degree[dependant] -= 1
            result.append(f)
        orders.append(result)
    return orders


graphs = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.sets(st.integers(0, n - 1), max_size=3), min_size=n, max_size=n)
)


@settings(max_examples=300, deadline=None)
@given(graphs)
def test_the_heap_orders_as_algorithm_1_does(depends_on):
    mine = [dependency_order(group, depends_on) for group in connected_subgraphs(depends_on)]
    assert mine == algorithm_1(depends_on)


def test_without_cycles_dependencies_come_first():
    depends_on = [{3}, {0, 3}, set(), {4}, set()]
    assert connected_subgraphs(depends_on) == [[0, 1, 3, 4], [2]]
    assert dependency_order([0, 1, 3, 4], depends_on) == [4, 3, 0, 1]


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("import a", [("a", None)]),
        ("import a.b as c, d\n", [("a.b", None), ("d", None)]),
        ("from a import b as c, d\n", [("a", "b"), ("a", "d")]),
        ("from . import a\nfrom .b import c\nfrom ...d.e import f\n", [(".", "a"), (".b", "c"), ("...d.e", "f")]),
        ("from a import (  # why\n    b,  # first (of two)\n    c as d,\n)\n", [("a", "b"), ("a", "c")]),
        ("from a import b, \\\n    c\n", [("a", "b"), ("a", "c")]),
        ("from a import \\\n  (b, c)\n", [("a", "b"), ("a", "c")]),
        ("from a import *\n", [("a", "*")]),
        ("try: import a\nexcept ImportError: from b import c\n", [("a", None), ("b", "c")]),
        ("x = 1; import a; y = 2\n", [("a", None)]),
        ("def f():\n\tfrom a import b\n", [("a", "b")]),
        ('"""\nimport a\n"""\nimport b\n', [("b", None)]),
        ("x = 'it\\'s'\n# don't\nimport b  # import c\n", [("b", None)]),
        ("r'''\\\nimport a\n'''\n", []),
        ("print 'python 2'\nimport a\n", [("a", None)]),
        ("important = 1\nfromage = 2\nyield_from = 3\n", []),
        ("'''never closed\nimport a\n", []),
        ("from a import (b, c\n", [("a", "b"), ("a", "c")]),
    ],
)
def test_imports_in_text(text, imports):
    assert list(python_imports(text)) == imports


@pytest.mark.parametrize("hostile", ['\\"""', '"', "from a import (\n", "from ", "\n\t" * 2, "'\\\n"])
def test_text_that_invites_backtracking_is_lexed_in_linear_time(hostile):
    list(python_imports(hostile * (4_000_000 // len(hostile))))  # quadratic time would outlast the timeout


def dependencies(paths, path, text, resolver=PythonImports):
    found = resolver(paths)
    found.collect(path, text)
    return found.dependencies(path)


@pytest.mark.parametrize(
    ("path", "text", "targets"),
    [
        ("pkg/sub/a.py", "from . import b", {"pkg/sub/b.py"}),
        ("pkg/sub/a.py", "from .b import name", {"pkg/sub/b.py"}),
        ("pkg/sub/a.py", "from .. import core", {"pkg/core.py"}),
        ("pkg/sub/a.py", "from . import name", {"pkg/sub/__init__.py"}),
        ("pkg/sub/a.py", "from ..... import core", set()),
        ("pkg/sub/__init__.py", "from . import name", set()),  # itself
        ("pkg/sub/a.py", "import pkg.core", {"pkg/core.py"}),
        ("pkg/sub/a.py", "from pkg import core, sub, name", {"pkg/core.py", "pkg/sub/__init__.py", "pkg/__init__.py"}),
        ("pkg/sub/a.py", "import core", set()),  # absolute, and not on the path
        ("pkg/sub/a.py", "import typing, pkg.typing", {"pkg/typing.py"}),
        ("pkg/core.py", "import typing", set()),
        ("tests/test_core.py", "from pkg.core import name", {"pkg/core.py"}),
        ("tests/test_core.py", "import helpers", {"tests/helpers.py"}),
        ("tests/test_core.py", "import lone", {"src/lone.py"}),
        ("docs/conf.py", "import deep.x", {"vendor/deep/x.py"}),
        ("pkg/core.py", "import numpy", set()),
        ("docs/conf.py", "import bound", {"python/bound.py"}),
        ("docs/conf.py", "import json", set()),  # the standard library's
    ],
)
def test_imports_resolve_as_python_would(path, text, targets):
    paths = [
        "pkg/__init__.py", "pkg/core.py", "pkg/typing.py", "pkg/sub/__init__.py", "pkg/sub/a.py", "pkg/sub/b.py",
        "tests/test_core.py", "tests/helpers.py", "src/lone.py", "src/json.py", "python/bound.py",
        "docs/conf.py", "vendor/deep/__init__.py", "vendor/deep/x.py", "vendor/deep/x.pyi",
    ]  # fmt: skip
    assert dependencies(paths, path, text) == targets


def test_the_nearest_package_of_a_name_is_meant():
    paths = ["a/extra/deep/__init__.py", "b/extra/deep/__init__.py"]
    for folder in "ab":
        found = dependencies([*paths, f"{folder}/app/m.py"], f"{folder}/app/m.py", "import deep")
        assert found == {f"{folder}/extra/deep/__init__.py"}


def test_the_standard_library_resolves_within_itself():
    names = "abc ast base64 bisect calendar cmd code codecs copy csv dis enum glob gzip heapq hmac io json os re typing"
    paths = [f"Lib/{name}.py" for name in names.split()]
    assert dependencies(paths, "Lib/typing.py", "import abc, re") == {"Lib/abc.py", "Lib/re.py"}


def ast_edges(files):
    """Edges by `ast` and the package's own layout; an independent reading of Python's rules."""

    def module(dotted):
        path = dotted.replace(".", "/")
        return next((found for found in (f"{path}/__init__.py", f"{path}.py") if found in files), None)

    edges = set()
    for path, text in files.items():
        package = path.split("/")[:-1]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                targets = [module(alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                targets = [module(f"{base}.{alias.name}") or module(base) for alias in node.names]
            else:
                continue
            edges |= {(path, target) for target in targets if target and target != path}
    return edges


@pytest.mark.parametrize("package", ["networkx", "rich"])
def test_edges_of_real_packages(package):
    root = Path(find_spec(package).origin).parent
    files = {f"{package}/{path.relative_to(root).as_posix()}": path.read_text() for path in sorted(root.rglob("*.py"))}
    paths = sorted(files)
    found = repository_dependencies(dict.fromkeys(paths, "Python"), [(path, files[path]) for path in paths])
    mine = {(paths[index], paths[target]) for index, targets in enumerate(found) for target in targets}
    truth = ast_edges(files)
    assert len(truth) > 100
    assert len(mine & truth) >= 0.99 * len(truth)
    assert len(mine & truth) >= 0.99 * len(mine)


def test_includes():
    paths = ["src/a.c", "src/a.h", "src/util/a.h", "include/lib/b.h", "other/include/lib/b.h", "other/string.h"]
    text = (
        '#include "a.h"\n  #  include <lib/b.h>\n#include <string.h>\n#include "../src/util/a.h"\n// #include "x.h"\n'
    )
    assert dependencies(paths, "src/a.c", text, CIncludes) == {"src/a.h", "include/lib/b.h", "src/util/a.h"}
    assert dependencies(paths, "other/x.c", "#include <lib/b.h>", CIncludes) == {"other/include/lib/b.h"}


def test_headers_that_several_folders_have_are_those_of_the_include_directory_in_use():
    paths = ["a/x.h", "b/x.h", "b/y.h", "b/sub/z.h", "a/string.h", "b/poll.h"]
    text = "#include <x.h>\n#include <y.h>\n#include <sub/z.h>\n"
    assert dependencies(paths, "a/src/m.c", text, CIncludes) == {"b/x.h", "b/y.h", "b/sub/z.h"}
    assert dependencies(paths, "a/src/m.c", "#include <x.h>\n", CIncludes) == {"a/x.h"}, "else the nearest"
    assert dependencies(paths, "a/src/m.c", '#include "string.h"\n#include <poll.h>\n', CIncludes) == set()
    assert dependencies(paths, "a/src/m.c", '#include "poll.h"\n', CIncludes) == {"b/poll.h"}
    assert dependencies(paths, "a/m.c", "#include <string.h>\n", CIncludes) == set()
    assert dependencies(paths, "a/m.c", '#include "string.h"\n', CIncludes) == {"a/string.h"}
    assert dependencies(paths, "a/m.c", "#include <ub/z.h>\n", CIncludes) == set(), "a folder's whole name"


def test_a_dropped_file_is_not_replaced_by_another():
    languages = {"pkg/__init__.py": "Python", "pkg/a.py": "Python", "pkg/b.py": "Python", "b.py": "Python"}
    files = [("b.py", ""), ("pkg/a.py", "from pkg import b")]  # pkg/b.py was filtered out
    assert repository_dependencies(languages, files) == [set(), set()]


def test_languages_do_not_depend_on_one_another():
    languages = {"a.py": "Python", "b.c": "C", "c.h": "C", "d.rb": "Ruby"}
    files = [("a.py", "import c"), ("b.c", '#include "c.h"'), ("c.h", ""), ("d.rb", "require 'a'")]
    assert repository_dependencies(languages, files) == [set(), {2}, set(), set()]
    parsed = [language for resolver in RESOLVERS for language in resolver.languages]
    assert len(parsed) == len(set(parsed))
    assert {
        "Python", "Java", "C", "C++", "CUDA", "C#", "JavaScript", "TypeScript", "JSON", "Go", "Rust", "Ruby", "PHP",
        "Kotlin", "Scala",
    } == set(parsed)  # fmt: skip


PATHS = ["a.py", "b.py", "c.py", "d.py"]
EDGES = [{1}, {2}, set(), set()]  # a -> b -> c; d alone


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, [[2, 1, 0], [3]]),
        ({"order": "path"}, [[0, 1, 2], [3]]),
        ({"max_bytes": 30}, [[2, 1, 0], [3]]),
        ({"max_bytes": 29}, [[0], [1], [2], [3]]),
        ({"max_bytes": 29, "oversize": "cut"}, [[0], [2, 1], [3]]),
        ({"max_bytes": 9, "oversize": "cut"}, [[0], [1], [2], [3]]),
    ],
)
def test_samples(options, samples):
    assert plan_samples(PATHS, [10] * 4, EDGES, SampleConfig(**options), key="0") == samples


def test_the_random_order_is_a_function_of_its_key():
    paths, edges = [f"{index}.py" for index in range(8)], [{(index + 1) % 8} for index in range(8)]
    config = SampleConfig(order="random")
    (first,), (again,) = (plan_samples(paths, [1] * 8, edges, config, key="0") for _ in range(2))
    (other,) = plan_samples(paths, [1] * 8, edges, config, key="1")
    assert first == again
    assert sorted(first) == list(range(8))
    assert first != other


@settings(max_examples=100, deadline=None)
@given(graphs, st.integers(1, 40), st.sampled_from(["files", "cut"]), st.sampled_from(["topo", "random", "path"]))
def test_every_file_is_in_exactly_one_sample(depends_on, max_bytes, oversize, order):
    n = len(depends_on)
    sizes = [5 + index for index in range(n)]
    config = SampleConfig(max_bytes=max_bytes, oversize=oversize, order=order)
    samples = plan_samples([str(index) for index in range(n)], sizes, depends_on, config, key="0")
    assert sorted(node for sample in samples for node in sample) == list(range(n))
    assert all(len(sample) == 1 or sum(sizes[node] for node in sample) <= max_bytes for sample in samples)


def test_rendering():
    assert render("a/b.c", "x", "C", "hash") == "# a/b.c\nx\n"
    assert render("a/b.c", "x\n", "C", "language") == "// a/b.c\nx\n"
    for path, text, style in itertools.product(("a.ml", "é.ml"), ("", "x", "中", "x\n"), ("hash", "language")):
        assert rendered_bytes(path, text, "OCaml", style) == len(render(path, text, "OCaml", style).encode())


_LINES = (
    "import a", "from a import b", "from a import (b,", "c)  # import", "# import (", "'''", "x = 'import'", "f(x)",
    "x = 1; import d", "import e, \\", "e, f", "y = '\\", "import g'", "imported = 2", "", "# ) import",
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(_LINES), max_size=12).map("\n".join))
@example("'''\nimport a\nf(x)\ny = '\\")  # never closed, and its last character escapes nothing
def test_reading_up_to_the_last_import_finds_all_imports(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacoder.corpus.imports.python._end_of_imports", len)
        everything = list(python_imports(text))
    assert list(python_imports(text)) == everything
