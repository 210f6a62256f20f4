"""Screening: broken files of every screened language are distinguished from good ones; heuristics at their limits."""

import random
import re

import pytest

from megacoder.corpus.compilers import accepts
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.heuristics import HeuristicLimits, modularity, readability
from megacoder.corpus.languages import LANGUAGES
from megacoder.corpus.screening import Screening, ScreeningConfig
from megacoder.corpus.syntax import SCREENED, parse

GOOD = {
    "Ada": "procedure Main is\nbegin\n   null;\nend Main;\n",
    "Agda": "module A where\n\ndata Nat : Set where\n  zero : Nat\n",
    "Assembly": "main:\n    mov eax, 1\n    ret\n",
    "C": "int main(void) {\n    return 0;\n}\n",
    "C#": "class A {\n    int F() { return 1; }\n}\n",
    "Clojure": "(defn f [x] (+ x 1))\n",
    "CMake": "project(a)\nadd_executable(a a.c)\n",
    "Common Lisp": "(defun f (x) (+ x 1))\n",
    "C++": "template <class T> T f(T x) { return x; }\n",
    "CSS": "a { color: red; }\n",
    "CUDA": "__global__ void f(float *x) { x[0] = 1; }\n",
    "Dart": "int f(int x) { return x + 1; }\n",
    "Dockerfile": "FROM debian\nRUN ls\n",
    "Elixir": "defmodule A do\n  def f(x), do: x + 1\nend\n",
    "Elm": "module A exposing (..)\n\nf x = x + 1\n",
    "Emacs Lisp": "(defun f (x) (+ x 1))\n",
    "Erlang": "-module(a).\nf(X) -> X + 1.\n",
    "F#": "module A\n\nlet f x = x + 1\n",
    "Fortran": "program a\n  print *, 1\nend program a\n",
    "GLSL": "void main() { gl_FragColor = vec4(1.0); }\n",
    "Go": "package a\n\nfunc F(x int) int { return x + 1 }\n",
    "Groovy": "def f(x) { return x + 1 }\n",
    "Haskell": "module A where\n\nf :: Int -> Int\nf x = x + 1\n",
    "HTML": "<!doctype html><html><body><p>text</p></body></html>\n",
    "Java": "class A {\n    int f(int x) { return x + 1; }\n}\n",
    "Java Server Pages": "<html><% int x = 1; %><b><%= x %></b></html>\n",
    "JavaScript": "export function f(x) { return x + 1; }\n",
    "JSON": '{"a": [1, 2, null]}\n',
    "Julia": "function f(x)\n    x + 1\nend\n",
    "Jupyter Notebook": '{"cells": [], "metadata": {}}\n',
    "Kotlin": "fun f(x: Int): Int = x + 1\n",
    "Literate Agda": "Prose.\n\\begin{code}\nmodule A where\n\\end{code}\nMore.\n",
    "Literate Haskell": "Prose, with (an odd bracket.\n\n> module A where\n> f x = x + 1\n\nMore.\n",
    "Lua": "function f(x) return x + 1 end\n",
    "Makefile": "all: a.o\n\tcc -o a a.o\n",
    "MATLAB": "function y = f(x)\n  y = x + 1;\nend\n",
    "OCaml": "let f x = x + 1\n",
    "Pascal": "program a;\nbegin\n  writeln(1);\nend.\n",
    "Perl": "sub f { my ($x) = @_; return $x + 1; }\n",
    "PHP": "<?php\nfunction f($x) { return $x + 1; }\n",
    "PowerShell": "function F($x) { return $x + 1 }\n",
    "Protocol Buffer": 'syntax = "proto3";\nmessage A { int32 x = 1; }\n',
    "Python": "def f(x):\n    return x + 1\n",
    "R": "f <- function(x) x + 1\n",
    "Racket": "#lang racket\n(define (f x) (+ x 1))\n",
    "RMarkdown": "# Title (\n\n```{r}\nf <- function(x) x + 1\n```\n",
    "Ruby": "def f(x)\n  x + 1\nend\n",
    "Rust": "fn f(x: i32) -> i32 { x + 1 }\n",
    "Scala": "object A { def f(x: Int): Int = x + 1 }\n",
    "Scheme": "(define (f x) (+ x 1))\n",
    "Shell": 'if [ -n "$1" ]; then echo "$1"; fi\n',
    "Solidity": "pragma solidity ^0.8.0;\ncontract A { uint x; }\n",
    "Sparql": "SELECT ?a WHERE { ?a ?b ?c . }\n",
    "SQL": "SELECT a FROM b WHERE c = 1;\n",
    "SystemVerilog": "module a(input logic b);\nendmodule\n",
    "TCL": "proc f {x} { expr {$x + 1} }\n",
    "TeX": "\\documentclass{article}\n\\begin{document}\nText.\n\\end{document}\n",
    "Thrift": "struct A { 1: i32 x }\n",
    "TypeScript": "export function f(x: number): number { return x + 1; }\n",
    "Verilog": "module a(input b);\nendmodule\n",
    "VHDL": "entity a is\nend entity a;\n",
    "XSLT": '<?xml version="1.0"?>\n<a><b/></a>\n',
    "YAML": "a:\n  - 1\n  - b: 2\n",
    "Zig": "fn f(x: i32) i32 { return x + 1; }\n",
}
_BRACKETS = ") ) ) ) )\n" * 4
BROKEN = {
    **dict.fromkeys(
        ("Agda", "CMake", "Emacs Lisp", "F#", "Fortran", "MATLAB", "Racket", "Shell", "SQL", "TCL"), _BRACKETS
    ),
    "Assembly": "= = ( ( ) [ } { ;\n",
    "Common Lisp": "(defun f (x (+ x 1)\n",
    "Dockerfile": "{{{ }}}\n(((\n",
    "HTML": "</a></b></c><d <e <f\n",
    "Java Server Pages": "<html><% int x = 1; <b><%= x </b></html>\n",
    "Jupyter Notebook": '{"cells": [}\n',
    "Literate Agda": "Prose.\n\\begin{code}\nmodule where where ) (\n\\end{code}\n",
    "Literate Haskell": "> module where ) (\n> = = =\n",
    "Makefile": "all: ((((\n\t$(((\n)))) ::: =\n",
    "PHP": "function f($x) { return $x + 1; }\n",
    "RMarkdown": "```{r}\nf <- function(x ) ) ) x + 1 }\n```\n",
    "TeX": "\\end{a}}}}\n\\end{b}}}}\n",
    "YAML": "a: [1, 2\nb: }\n",
}
"""Where a letter with odd brackets in it would pass, since the grammar takes most texts."""
PROSE = "This is (not code, but a letter; it { says: nothing @ all \\ and ] ends <here\n"


def document(text, language, path=None):
    path = path or f"a.{(LANGUAGES[language].extensions or ('x',))[0]}"
    return Document(repo="r", path=path, language=language, text=text, size=len(text))


def reason(text, language, path=None, **options):
    found = Screening(config=ScreeningConfig(**options))(document(text, language, path))
    return found.reason if isinstance(found, Dropped) else None


def test_there_is_an_example_of_every_screened_language_and_all_are_of_the_papers():
    assert not set(GOOD) ^ SCREENED
    assert SCREENED.issubset(LANGUAGES)
    assert len(SCREENED) >= 63


@pytest.mark.parametrize("language", sorted(GOOD))
def test_a_good_file_passes_and_a_broken_one_does_not(language):
    assert reason(GOOD[language], language) is None
    assert reason(BROKEN.get(language, PROSE), language) == "syntax error"


def test_languages_without_a_grammar_pass():
    assert parse(PROSE, "Prolog", "a.pro") is None
    assert reason(PROSE, "Prolog") is None


def test_languages_can_be_switched_off_and_syntax_as_a_whole():
    assert reason("def f(:", "Python") == "syntax error"
    assert reason("def f(:", "Python", off=("Python",)) is None
    assert reason("def f(:", "Python", syntax=False) is None


def test_a_header_may_belong_to_another_language_and_its_extension_chooses_the_grammar():
    template = "template <class T> class A { T x; public: A(T y) : x(y) {} ~A() {} };\n"
    assert reason(template, "C", "a.h") is None
    assert parse(template, "C", "a.c").error_share > parse(template, "C", "a.h").error_share == 0
    assert reason("export const A = () => <div><b>1</b></div>;\n", "TypeScript", "a.tsx") is None
    assert reason("val f : int -> int\n", "OCaml", "a.mli") is None


@pytest.mark.parametrize(
    "text",
    ["x = 1\n  y = 2\n", "print 'old'\n", "(" * 5000 + ")" * 5000, "a = '\\ud800'\n" + "b = [" * 300, "x = 0777\n"],
)
def test_python_is_judged_by_its_own_parser(text):
    assert reason(text, "Python", heuristics=False) == "syntax error"
    found = Screening(config=ScreeningConfig())(document("ok = 1\nx = = 2\n", "Python"))
    assert found.detail.startswith("line 2: ")


def test_the_error_share_counts_only_skipped_text():
    good = "".join(f"int f{i}(int x) {{ return x + {i}; }}\n" for i in range(50))
    assert parse(good, "C", "a.c").error_share == 0
    one = parse(good.replace("return x + 7;", "return x @@@ 7;"), "C", "a.c")
    assert 0 < one.error_share < 0.02
    assert one.problem == "line 8"
    assert parse(PROSE * 10, "C", "a.c").error_share > 0.5


@pytest.mark.parametrize("broken", [1, 7, 40])
def test_a_verdict_does_not_depend_on_the_parsers_early_stop(broken):
    lines = [f"int f{i}(int x) {{ return x {'@@@' if i < broken else '+'} {i}; }}\n" for i in range(50)]
    text = "".join(lines)
    exact = parse(text, "C", "a.c").error_share
    assert exact > 0
    for enough in (exact / 2, exact * 0.999, exact, exact * 1.001, exact * 2, 0.5):
        found = parse(text, "C", "a.c", enough=enough)
        assert (found.error_share > enough) == (exact > enough)
        assert exact <= found.error_share
        if exact > enough:
            assert (found.error_share, found.problem) == (exact, "line 1")


def test_python_is_parsed_and_no_more():
    assert reason("from __future__ import annotations\nx: int = 1\n", "Python") is None
    assert reason("x = 1\nfrom __future__ import annotations\n", "Python") is None  # to the parser, a name like others
    assert reason("def f(x):\n    global x\n", "Python") is None
    assert reason("def f(x):\n    global x x\n", "Python") == "syntax error"


def names(generator, count, length):
    return " ".join("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count))


def test_readability_at_its_limits():
    generator, limits = random.Random(0), HeuristicLimits()
    words = names(generator, 300, 8)
    assert readability(words, limits) is None
    assert readability("<<<<<<< HEAD\na\n=======\nb\n>>>>>>> other\n", limits) == "merge conflict"
    assert readability("Title\n=======\n<<<<<<< not a conflict\n", limits) is None
    assert readability(f"{names(generator, 30, 8)} {'7 ' * 270}", limits) is None
    assert readability(f"{names(generator, 29, 8)} {'7 ' * 271}", limits) == "over 90% numbers"
    pairs = [a + b for a in "abcdefgh" for b in "ijklmnopqr"]
    short = " ".join(pairs) + " " + words[: 19 * 9] + " "
    assert readability(short * 3, limits) == "over 80% of names with one or two characters"
    assert readability((short + names(generator, 30, 8)) * 3, limits) is None
    assert readability(" ".join("abcdefghij") * 30, limits) is None, "too few names to judge by them"
    lines = "".join(f"{names(generator, 3, 8)}\n" for _ in range(6))
    repeated = "the same words once more\n"
    assert readability(lines + repeated * 110, limits) is None  # 110 of 116 lines less the first of them: 94%
    assert readability(lines + repeated * 150, limits) == "over 95% repeated lines"
    assert readability(names(generator, 199, 1), limits) is None  # too short to judge


def test_one_long_function_is_not_modular_but_one_with_inner_functions_is():
    body = "".join(f"  value = value + {i};\n" for i in range(1200))
    assert reason(f"int f(int value) {{\n{body}  return value;\n}}\n", "C") == "one function over 90% of a long file"
    parts = "".join(f"  function f{i}(x) {{\n    x = x + {i};\n    return x;\n  }}\n" for i in range(400))
    assert reason(f"(function () {{\n{parts}}})();\n", "JavaScript") is None
    assert reason(f"int f(int value) {{\n{body[:20000]}}}\n", "C") is None  # under a thousand lines


def test_an_installed_compiler_decides():
    fine, broken = "echo ${a[@]}\n", "if then\n"
    assert accepts(fine, "Shell") is True
    assert accepts(broken, "Shell") is False
    assert accepts("x", "Prolog") is None
    assert reason(broken, "Shell", compilers=True) == "compiler: syntax error"
    assert reason(fine, "Shell", compilers=True) is None


def own_lines(node, owner, found):
    """Of every function in the tree, its lines less those of the functions right within it."""
    if node.is_named and node.child_count and re.search("function|method|constructor", node.type):
        lines = node.end_point[0] - node.start_point[0] + 1
        if owner is not None:
            found[owner] -= lines
        found.append(lines)
        owner = len(found) - 1
    for child in node.children:
        own_lines(child, owner, found)
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_modularity_sees_the_longest_function_at_any_depth(share):
    generator = random.Random(share)

    def function(depth):
        lines = [f"x = {generator.random()};" for _ in range(generator.randrange(12))]
        if depth:
            lines += ["if (x) {", *function(depth - 1), "}", *(line for _ in range(2) for line in function(depth - 1))]
        return ["function f(x) {", *lines, "return x; }"]

    outcomes, told = set(), f"one function over {share:.0%} of a long file"
    for _ in range(60):
        lines = ["x = 0;"] * generator.randrange(20) + function(generator.randrange(4))
        tree = parse("\n".join(lines), "JavaScript", "a.js", function_lines=0).tree
        limits = HeuristicLimits(long_file_lines=1, max_function_share=share)
        found = modularity(tree, len(lines), limits)
        assert (found is not None) == (max(own_lines(tree.root_node, None, [])) > share * len(lines))
        outcomes.add(found)
    assert (told in outcomes) == (share < 1)
