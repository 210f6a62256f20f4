"""Imports of every parsed language but Python and C: how they parse, and to which file they resolve."""

import pytest

from megacoder.corpus.ambiguous import settled_language
from megacoder.corpus.dependencies import RESOLVERS, repository_dependencies
from megacoder.corpus.imports.go import go_imports
from megacoder.corpus.imports.javascript import javascript_imports
from megacoder.corpus.imports.lookup import nearest_path
from megacoder.corpus.imports.rust import rust_uses
from megacoder.corpus.languages import language_of


def edges(files):
    """{path: {paths it depends on}} of a repository {path: text}."""
    paths = sorted(files)
    found = repository_dependencies(
        {path: language_of(path) for path in paths}, [(path, files[path]) for path in paths]
    )
    return {paths[index]: {paths[target] for target in targets} for index, targets in enumerate(found) if targets}


REPOSITORIES = {
    # languages: {path: text}, {path: paths that it depends on}
    "java": ({
        "src/com/x/A.java": (
            "/* import com.x.No; */\n// import com.x.No;\npackage com.x;\n\nimport java.util.List;\n"
            "import com.x.sub.B;import com.x.sub.C.Inner;\nimport static com.x.sub.D.value;\nimport com.x.wild.*;\n"
            '@Deprecated\nclass A { String s = "import com.x.No;"; Used u; }\n'
        ),
        "src/com/x/No.java": "package com.x;\nclass No {}\n",
        "src/com/x/sub/B.java": "package com.x.sub;\nimport com.x.Gone;\nclass B {}\n",
        "src/com/x/sub/C.java": "package com.x.sub;\nclass C { class Inner {} }\n",
        "src/com/x/sub/D.java": "package com.x.sub;\nclass D { static int value; }\n",
        "src/com/x/wild/Used.java": "package com.x.wild;\nclass Used {}\n",
        "src/com/x/wild/Unused.java": "package com.x.wild;\nclass Unused {}\n",
        "other/com/x/sub/B.java": "package com.x.sub;\nclass B {}\n",
    }, {
        "src/com/x/A.java": {f"src/com/x/{name}.java" for name in ("sub/B", "sub/C", "sub/D", "wild/Used")}
    }),
    "kotlin, scala and java": ({
        "a/Main.kt": '@file:JvmName("M")\npackage a\n\nimport b.helper\nimport b.Thing as T\nimport c.J\nfun f() = 1\n',
        "b/Util.kt": "package b\n\nfun <T> List<T>.helper(): Int = 1\n\ninternal data class Thing(val x: Int)\n",
        "c/J.java": "package c;\nimport d.S;\nclass J {}\n",
        "d/S.scala": "package d\n\nimport b.{Thing => T, helper}, c._\n\nobject S extends J {\n  import e.Deep\n}\n",
        "e/all.scala": "package e\ncase class Deep(x: Int)\ntrait Other\n",
        "f/R.scala": "package f\nimport b.{Thing => T}\nimport _root_.e.Deep\nobject R\n",
        "run.main.kts": "import b.Thing as T\n",
    }, {
        "a/Main.kt": {"b/Util.kt", "c/J.java"}, "c/J.java": {"d/S.scala"},
        "d/S.scala": {"b/Util.kt", "c/J.java", "e/all.scala"}, "f/R.scala": {"b/Util.kt", "e/all.scala"},
        "run.main.kts": {"b/Util.kt"},
    }),
    "c#": ({
        "A.cs": "using X.Models;\nusing static X.Tools.Helper;\nnamespace X.App { class A { Model m; } }",
        "Models/Model.cs": "namespace X.Models;\n\npublic sealed class Model {}\n",
        "Models/Unused.cs": "namespace X.Models { public record Unused(int X); }\n",
        "Tools/Helper.cs": "namespace X.Tools\n{\n    // using X.Models;\n    public static class Helper {}\n}\n",
        "Old/Models/Model.cs": "namespace X.Models;\n\npublic sealed class Model {}\n",
        "B.cs": "namespace X;\n\nusing Models;\n\nclass B { Model m; }\n",
        "C.cs": "using M = X.Models.Model;\n\nclass C { M m; }\n",
    }, {
        "A.cs": {"Models/Model.cs", "Tools/Helper.cs"}, "B.cs": {"Models/Model.cs"}, "C.cs": {"Models/Model.cs"},
    }),
    "go": ({
        "main.go": 'package tool\nimport (\n"errors"\n"github.com/me/tool/pkg/a"\n"github.com/other/errors"\n)\n',
        "pkg/a/a.go": 'package a\nimport "github.com/me/tool/pkg/b"\n',
        "pkg/a/more.go": "package a\n",
        "pkg/a/a_test.go": 'package a\nimport "github.com/me/tool"\n',
        "pkg/b/b.go": 'package b\nimport "gopkg.in/lib.v1"\n',
        "errors/errors.go": "package errors\n",
        "vendor/gopkg.in/lib.v1/lib.go": "package lib\n",
    }, {
        "main.go": {"pkg/a/a.go", "pkg/a/more.go"}, "pkg/a/a.go": {"pkg/b/b.go"}, "pkg/a/a_test.go": {"main.go"},
        "pkg/b/b.go": {"vendor/gopkg.in/lib.v1/lib.go"},
    }),
    "go, second version": ({
        "tool.go": 'package tool\nimport "github.com/me/tool/v2/a"\n',
        "tool_test.go": "package tool_test\n",
        "a/a.go": 'package a\nimport "./inner"\n',
        "a/inner/i.go": "package inner\n",
    }, {
        "tool.go": {"a/a.go"}, "a/a.go": {"a/inner/i.go"},
    }),
    "go, its library": ({
        "src/fmt/print.go": 'package fmt\nimport "os"\n',
        "src/os/file.go": "package os\n",
    }, {
        "src/fmt/print.go": {"src/os/file.go"},
    }),
    "javascript, a site": ({
        "web/pages/p.ts": "import '~/lib/c';\nimport './view.jsx';\nimport './two';\nimport '/q.js';\n",
        "web/pages/view.tsx": "import 'own/thing';\n",
        **dict.fromkeys(("web/lib/c.ts", "web/pages/two.ts", "web/pages/two.js", "web/pages/q.js"), ""),
        "own/package.json": '{"name": "own"}',
        "own/src/thing.ts": "",
    }, {
        "web/pages/p.ts": {"web/lib/c.ts", "web/pages/view.tsx", "web/pages/two.ts", "web/pages/q.js"},
        "web/pages/view.tsx": {"own/src/thing.ts"},
    }),
    "javascript and typescript": ({
        "packages/app/package.json": '{"name": "app", "main": "./lib/index.js"}',
        "packages/app/src/index.ts": "import { u } from '@me/lib';\nimport './util.js';\nimport x from './dir';\n",
        "packages/app/src/util.ts": "import s from '@/shared/s';\nimport '@me/lib/deep';\nimport './data.json';\n",
        "packages/app/src/data.json": "{}",
        "packages/app/src/dir/index.tsx": "import fs from 'fs';\nimport '..';\n",
        "packages/app/src/shared/s.ts": "export default require('../../../..')\n",
        "packages/lib/package.json": '{"name": "@me/lib", "source": "main.js"}',
        "packages/lib/main.js": "const a = require('./missing')\n",
        "packages/lib/deep.d.ts": "import 'app';\n",
        "broken/package.json": "{",
    }, {
        "packages/app/src/index.ts": {
            "packages/lib/main.js", "packages/app/src/util.ts", "packages/app/src/dir/index.tsx",
        },
        "packages/app/src/util.ts": {
            "packages/app/src/shared/s.ts", "packages/lib/deep.d.ts", "packages/app/src/data.json",
        },
        "packages/app/src/dir/index.tsx": {"packages/app/src/index.ts"},
        "packages/lib/deep.d.ts": {"packages/app/src/index.ts"},
    }),
    "javascript, installed packages": ({
        "app/src/a.ts": "import 'dep';\nimport 'dep/sub?raw';\nimport 'own';\nlet x = 1; // import './b';\n",
        "app/src/b.js": "",
        "app/node_modules/dep/package.json": '{"name": "dep", "main": "lib/m.js"}',
        "app/node_modules/dep/lib/m.js": "",
        "app/node_modules/dep/sub.js": "",
        "node_modules/dep/index.js": "",
        "own/package.json": '{"name": "own"}',
        "own/index.js": "",
    }, {
        "app/src/a.ts": {"app/node_modules/dep/lib/m.js", "app/node_modules/dep/sub.js", "own/index.js"},
    }),
    "rust": ({
        "Cargo/src/lib.rs": 'pub mod a;\nmod tests { use super::*; }\n#[path = "odd/file.rs"]\nmod odd;\n// mod no;\n',
        "Cargo/src/no.rs": "",
        "Cargo/src/odd/file.rs": "",
        "Cargo/src/a/mod.rs": "mod b;\nuse crate::c::Thing;\nuse self::b::{x, y};\n",
        "Cargo/src/a/b.rs": "use super::super::c;\nuse super::Item;\nfn f() { crate::a::g() }\n",
        "Cargo/src/c.rs": "use std::fmt;\n",
        "my-crate/src/lib.rs": "pub mod deep;\n",
        "my-crate/src/deep.rs": "",
        "my-crate/src/main.rs": "use my_crate::deep::Thing;\nuse deep::Thing;\n",
    }, {
        "Cargo/src/lib.rs": {"Cargo/src/a/mod.rs", "Cargo/src/odd/file.rs"},
        "Cargo/src/a/mod.rs": {"Cargo/src/a/b.rs", "Cargo/src/c.rs"},
        "Cargo/src/a/b.rs": {"Cargo/src/c.rs", "Cargo/src/a/mod.rs"},
        "my-crate/src/lib.rs": {"my-crate/src/deep.rs"},
        "my-crate/src/main.rs": {"my-crate/src/deep.rs"},
    }),
    "rust, several crates": ({
        "app/src/main.rs": "use lib_core::store::Item;\n",
        "lib-core/src/lib.rs": "pub mod store;\n",
        "lib-core/src/store.rs": "use crate::Error;\n",
        "lib.rs": "mod b;\n",
        "b.rs": "",
        "sub/src/lib.rs": "mod a;\nmod b;\n",
        "sub/src/a.rs": "use crate::b::Thing;\n",
        "sub/src/b.rs": "",
    }, {
        "app/src/main.rs": {"lib-core/src/store.rs"},
        "lib-core/src/lib.rs": {"lib-core/src/store.rs"}, "lib-core/src/store.rs": {"lib-core/src/lib.rs"},
        "lib.rs": {"b.rs"}, "sub/src/lib.rs": {"sub/src/a.rs", "sub/src/b.rs"}, "sub/src/a.rs": {"sub/src/b.rs"},
    }),
    "ruby, several gems": ({
        "one/lib/one.rb": "require 'two'\nrequire 'only/here'\nrequire 'both/here'\n",
        "one/lib/shared.rb": "",
        "two/lib/two.rb": "require 'shared'\n",
        "two/lib/shared.rb": "",
        "two/test/two.rb": "",
        "two/more/only/here.rb": "",
        **dict.fromkeys(("one/more/both/here.rb", "two/more/both/here.rb"), ""),
    }, {
        "one/lib/one.rb": {"two/lib/two.rb", "two/more/only/here.rb"}, "two/lib/two.rb": {"two/lib/shared.rb"},
    }),
    "ruby": ({
        "lib/gem.rb": "require 'json'\nrequire 'gem/version'\nautoload :Core, 'gem/core'\n# require 'gem/no'\n",
        "lib/gem/version.rb": "=begin\nrequire 'gem/core'\n=end\n",
        "lib/gem/core.rb": "require_relative 'version'\nrequire_relative '../gem'\nload './x.rb'\n",
        "lib/gem/no.rb": "",
        "test/t_test.rb": "require File.expand_path('../helper', __dir__)\nrequire 'gem'\n",
        "spec/json.rb": "",
    }, {
        "lib/gem.rb": {"lib/gem/version.rb", "lib/gem/core.rb"},
        "lib/gem/core.rb": {"lib/gem/version.rb", "lib/gem.rb"},
        "test/t_test.rb": {"lib/gem.rb"},
    }),
    "php": ({
        "src/App.php": (
            "<?php\nnamespace Me;\n\nuse Me\\Model\\{User, Group as G};\nuse Me\\Tool;\nuse Other\\T;\nclass App {}\n"
        ),
        "src/Model/User.php": "<?php\nnamespace Me\\Model;\nfinal class User {}\n",
        "src/Model/All.php": "<?php namespace Me\\Model;\ninterface Group {}\n",
        "src/Tool.php": "<?php\nnamespace Me;\n// use Me\\Model\\User;\ntrait Tool {}\n",
        "index.php": (
            "<?php\nrequire_once __DIR__ . '/src/App.php';\ninclude('lib/x.php');\nrequire 'inc/deep.php';\n"
            "require $file;\n# require 'lib/y.php';\n"
        ),
        "src/inc/deep.php": "<?php\n",
        "y.php": "<?php\n",
        "lib/x.php": "<?php\nrequire 'y.php';\n",
        "lib/y.php": "<?php\n",
    }, {
        "src/App.php": {"src/Model/User.php", "src/Model/All.php", "src/Tool.php"},
        "index.php": {"src/App.php", "lib/x.php", "src/inc/deep.php"},
        "lib/x.php": {"lib/y.php"},
    }),
    "c, includes in comments": ({
        "a.c": '/*\n#include "old.h"\n*/\n#if 1\n# include "new.h"\n/* an old one:\n#include "old.h" */\n#endif\n',
        "old.h": '/**/\n#include "new.h"\n/*/\n#include "a.c"\n*/\n',
        "new.h": "\n",
    }, {"a.c": {"new.h"}, "old.h": {"new.h"}}),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), REPOSITORIES.values(), ids=REPOSITORIES)
def test_imports_resolve_to_files(files, expected):
    assert edges(files) == expected


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ('package a\n\nimport "fmt"\n', ["fmt"]),
        ('// import "no"\npackage a\nimport (\n\t"b" // why\n\tx "a.b/c"\n\t. "d"\n\n\t_ `e`\n)\nimport "f"\n',
         ["b", "a.b/c", "d", "e", "f"]),
        ('package a\nimport ("fmt"; "os")\nvar s = `import "no"`\n', ["fmt", "os"]),
        ('package a\nimport (\n"fmt"\n', ["fmt"]),
        ('package a\nimport ()\nimport "b"\n', ["b"]),
        ("package a\n", []),
        ("", []),
    ],
)  # fmt: skip
def test_go_import_paths(text, paths):
    assert list(go_imports(text)) == paths


GO_TREE = {
    "cmd/tool/main.go": 'package main\nimport (\n"fmt"\n"github.com/me/proj/%s"\n)\n',
    "store/store.go": "package store\n",
    "internal/store/store.go": "package store\n",
    "api/api.go": 'package api\nimport "github.com/me/proj/store"\n',
}


def test_a_small_go_module_is_known_by_its_internal_package():
    files = {path: GO_TREE[path] for path in ("cmd/tool/main.go", "internal/store/store.go")}
    files["cmd/tool/main.go"] %= "internal/store"
    assert edges(files) == {"cmd/tool/main.go": {"internal/store/store.go"}}


def test_a_go_module_is_known_where_three_imports_lead_into_it():
    files = {f"{name}/{name}.go": f"package {name}\n" for name in ("one", "two", "three")}
    names = [f'"github.com/me/proj/{name}"\n' for name in ("one", "two", "gone")]
    assert edges(files | {"main.go": f"package main\nimport (\n{''.join(names)})\n"}) == {}
    names.append('"github.com/me/proj/three"\n')
    assert edges(files | {"main.go": f"package main\nimport (\n{''.join(names)})\n"}) == {"main.go": set(files)}


def test_a_small_go_module_is_known_where_all_imports_from_it_are_here():
    files = {path: GO_TREE[path] for path in ("cmd/tool/main.go", "store/store.go", "api/api.go")}
    files["cmd/tool/main.go"] %= "api"
    assert edges(files) == {"cmd/tool/main.go": {"api/api.go"}, "api/api.go": {"store/store.go"}}
    files["more.go"] = (
        'package x\nimport (\n"github.com/me/proj/a"\n"github.com/me/proj/b"\n"github.com/me/proj/c"\n)\n'
    )
    assert edges(files) == {}, "two of five: another module with folders of the same names"
    files = {
        "a.go": 'package a\nimport (\n"h.org/o/r/envoy/v2"\n"h.org/o/r/envoy/v3"\n)\n',
        "x/v2/a.go": "package v2\n",
    }
    assert edges(files | {"x/v3/a.go": "package v3\n"}) == {}, "not the path of a repository"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import a from './a';\nimport {\n  b,\n  c\n} from \"./b\"\n", {"./a", "./b"}),
        ("import './a'\nexport * from './b'\nexport { c } from './c'\n", {"./a", "./b", "./c"}),
        ("const a = require('./a'), b = require( \"b\" )\nawait import('./c')\n", {"./a", "b", "./c"}),
        ("// import './a'\n/**\n * import './b'\n */\n", set()),
        ("import type { T } from './t'\ntype U = import('./u').U\n", {"./t", "./u"}),
        ('/// <reference path="globals.d.ts" />\n', {"./globals.d.ts"}),
        ("import(`./${name}`); require(name); x.from(y)\n", set()),
        ("import(`./a`); const b = 'b' + require(`./b`)\n", {"./a", "./b"}),
        ("const s = \"see from './b'\", t = 'it\\'s'; import c from './c'\n", {"./c"}),
        ("throw `import './a' first`\n", set()),
    ],
)
def test_javascript_names(text, names):
    assert javascript_imports(text) == names


def test_rust_uses_are_spread_out():
    spread = [["a", "b"], ["a", "c", "d"], ["a", "c", "*"], ["e"]]
    assert list(rust_uses("a::{b as x, c::{d, *}}, e")) == spread


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_will_do(end):
    files = {
        "a.py": "import os\nfrom .b import \\\n    x, y\nimport c, \\\n  d\n",
        "b.py": "\x0cfrom c import (\n  x, # y\n  z)\n", "c.py": "\n", "d.py": "\n",
        "a.c": '#include "a.h"\n#include "b.h"\n', "a.h": "\n", "b.h": "\n",
    }  # fmt: skip
    found = edges({path: text.replace("\n", end) for path, text in files.items()})
    assert found == {"a.py": {"b.py", "c.py", "d.py"}, "b.py": {"c.py"}, "a.c": {"a.h", "b.h"}}
    header = "#pragma once\nnamespace foo {\nint f(int a);\n}\n".replace("\n", end)
    assert settled_language("a.h", "C", header) == "C++"


def test_the_nearest_of_several_is_meant():
    assert nearest_path(["a/x/f", "b/x/f", "b/f"], "b/x/y") == "b/x/f"
    assert nearest_path(["b/f", "a/f"], "c") == "a/f"
    assert nearest_path([], "c") is None


HOSTILE = [
    "import ", "import a.", "import {", "use a::{", "using a", "package a", "/*", "//\n", "@a(", '"', "`", "require('",
    "\n ", "mod a", "pub ", "from '", "namespace a", "a, ", "class ", "import (\n", "@a\n", "public ", "((", "use A\\{",
]  # fmt: skip


@pytest.mark.parametrize("extension", ["java", "kt", "scala", "cs", "go", "js", "ts", "rs", "rb", "php", "py", "c"])
def test_no_text_takes_more_than_linear_time(extension):
    """At 2,000,000 characters, quadratic time would outlast the timeout; linear time is 0.1 seconds a text."""
    for hostile in HOSTILE:
        path = f"a.{extension}"
        repository_dependencies({path: language_of(path)}, [(path, hostile * (2_000_000 // len(hostile)))])


def test_every_resolver_names_its_languages():
    assert all(resolver.languages for resolver in RESOLVERS)
