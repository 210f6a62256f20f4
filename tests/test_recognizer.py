"""The recognizer of grammars compared with tree-sitter: it accepts what tree-sitter parses, and leaves out errors."""

import functools
import math
import random
from pathlib import Path
from unittest import mock

import pytest
import tree_sitter_language_pack
from test_corpus_screening import BROKEN, GOOD, PROSE

from megacoder.core.native import native
from megacoder.corpus import syntax
from megacoder.corpus.config import CorpusConfig
from megacoder.corpus.heuristics import FUNCTION_WORDS
from megacoder.corpus.languages import LANGUAGES
from megacoder.corpus.screening import ScreeningConfig
from megacoder.corpus.syntax import parse

pytestmark = pytest.mark.skipif(not hasattr(native(), "Recognizer"), reason="the kernels are not built")

CSRC = Path(__file__).parents[1] / "csrc"
_CHARACTERS = "(){}[];:,.\"'`/\\<>=*&|!?@#$% \n\ta0_-+"


@functools.cache
def recognizer(grammar):
    return native().Recognizer(tree_sitter_language_pack.get_binding(grammar), FUNCTION_WORDS)


def left_out(text, grammar, share=0.0, function_lines=math.inf, open_end=False):
    return recognizer(grammar).left_out(text.encode(), share, function_lines, open_end)


def has_error(text, grammar):
    return syntax._parser(grammar).parse(text.encode()).root_node.has_error


def grammars():
    """Each with texts that are good in it, of any of its languages."""
    found = {}
    for language, grammar in syntax._GRAMMARS.items():
        if language not in syntax._CODE:
            found.setdefault(grammar, []).append(GOOD[language])
    return sorted(found.items())


def mutants(generator, text, count):
    for _ in range(count):
        made = text
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(made) + 1)
            end = at + generator.choice((0, 1, 1, 2, 5, 20))
            made = made[:at] + generator.choice(("", generator.choice(_CHARACTERS), made[at:end] * 2)) + made[end:]
        yield made


@pytest.mark.parametrize(("grammar", "texts"), grammars())
def test_what_tree_sitter_parses_is_accepted_and_nothing_else(grammar, texts):
    generator = random.Random(grammar)
    outcomes = {True: 0, False: 0}
    for text in texts:
        assert left_out(text, grammar) == 0
        twice = text if has_error(text * 2, grammar) else text * 2
        for made in [twice, "\ufeff" + twice, *mutants(generator, twice, 60)]:
            good = not has_error(made, grammar)
            assert (left_out(made, grammar) == 0) == good, made
            outcomes[good] += 1
    assert all(outcomes.values())


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_are_counted_in_characters_without_the_byte_order_mark(mark):
    """A block's lines are aligned with its first, which here follows a letter of two bytes."""
    texts = [f"{mark}x = let {{- é -}} a = b\n{' ' * indent}c = d\n    in a\n" for indent in (15, 16, 17)]
    assert [left_out(text, "haskell") for text in texts] == [-1, 0, -1]
    assert [has_error(text, "haskell") for text in texts] == [True, False, True]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("go", "package {}\n"),
        ("javascript", "export function {}(x) {{ return x; }}\n"),
        ("ocaml", "let {} x = x + 1\n"),
        ("php", "<?php\nfunction {}($x) {{ return $x; }}\n"),
    ],
)
def test_reserved_words_are_no_names(grammar, text):
    name, reserved = text.format("name"), text.format("else")
    assert (left_out(name, grammar), left_out(reserved, grammar)) == (0, -1)
    assert (has_error(name, grammar), has_error(reserved, grammar)) == (False, True)


def test_real_files_and_their_mutants_are_judged_as_by_tree_sitter():
    generator = random.Random(0)
    outcomes = {True: 0, False: 0}
    for path in sorted(CSRC.glob("cpp/*.h")):
        text = path.read_text()
        for made in [text, *mutants(generator, text, 12)]:
            good = not has_error(made, "cpp")
            taken = left_out(made, "cpp") == 0
            assert good or not taken
            outcomes[good] += 1
            assert taken or not good  # rare forks aside, of which these files have none
    assert min(outcomes.values()) > 10


def test_only_lines_around_an_error_are_skipped():
    lines = [f"int f{i}(int x) {{\n  return x + {i};\n}}\n" for i in range(40)]
    wrong = "int g(int x)) ++ {\n"
    for at in (0, 1, 20, 39):
        text = "".join([*lines[:at], wrong, *lines[at:]])
        assert left_out(text, "c") == -1
        assert left_out(text, "c", share=0.5) == len(wrong)
    text = "".join(wrong * (i % 8 == 3) + line for i, line in enumerate(lines))
    assert left_out(text, "c", share=5 * len(wrong) / len(text)) == 5 * len(wrong)
    assert left_out(text, "c", share=(5 * len(wrong) - 1) / len(text)) == -1


def test_only_the_wrong_lines_are_skipped_and_the_rest_parses():
    inner = "int f(int x) {\n  if (x) {\n    x = 1;\n    @@ ) (;\n    x = 2;\n  }\n  return x;\n}\n"
    assert left_out(inner, "c", share=0.5) == len("    @@ ) (;\n")
    assert not has_error(inner.replace("    @@ ) (;\n", ""), "c")
    between = "int x[] = {\n#ifdef A\n  1,\n#endif\n  2\n};\n"
    assert left_out(between, "c", share=0.5) == len("#ifdef A\n  ") + len("#endif\n  ")
    assert not has_error(between.replace("#ifdef A\n", "").replace("#endif\n", ""), "c")


def test_blocks_that_skipped_lines_would_close_may_stay_open():
    functions = "int g(int x) {\n  return x;\n}\n" * 10
    text = f'#ifdef A\nextern "C" {{\n#endif\n{functions}#ifdef A\n}}\n#endif\n{functions}'
    assert left_out(text, "c", share=0.2) == left_out(text, "c", open_end=True) == -1
    assert left_out(text, "c", share=0.2, open_end=True) == len("}\n") + len("}\n")  # that line, and the last one
    assert left_out(text, "c", share=3.5 / len(text), open_end=True) == -1
    for line, closes in ((") ) (\n", False), (") ) # (\n", True)):  # a directive may have closed it
        text = f'extern "C" {{\nint x;\n{line}{functions}'
        assert left_out(text, "c", share=0.2, open_end=True) == (len(line) + len("}\n") if closes else -1)
    for cut in ("int g(int x) {\n  return x;\n", "int g(int x) {\n  x = 1;\n  x = 2;"):
        assert left_out(cut, "c", share=0.9, open_end=True) == -1  # nothing was left out


_LETTER = "This is a letter and no code; who reads it, finds nothing but words in it.\n" * 100
_SWALLOWED = {
    "Java": 'class A {\n int x;\n ) ) (\n int y;\n String s = """\n',
    "C#": 'class A {\n int x;\n ) ) (\n int y;\n string s = $@"',
    "C++": 'int x;\n ) ) (\nint y;\nauto s = R"x(',
    "PHP": "<?php\n$a = 1;\n) ) (\n$b = 2;\n$c = <<<EOT\n",
    "JavaScript": "a = 1;\n)))\nb = 2\n<a>",
    "HTML": "<p>\n< <<\n<b>\n<script>",
    "Shell": 'a=1\n) ) (\nb=2\nc="',
}
"""Where one error and a string, or the like, that is never closed stand before a letter."""


@pytest.mark.parametrize("language", sorted(_SWALLOWED))
def test_text_inside_an_unclosed_string_is_not_code(language):
    path = f"a.{LANGUAGES[language].extensions[0]}"
    found = parse(_SWALLOWED[language] + _LETTER, language, path, enough=0.25)
    assert found.error_share > 0.25


def test_a_line_that_turns_code_into_text_or_a_string_is_not_skipped():
    page = "<?php @ php\n" + "for (($x) += 1 {\n" * 20
    assert parse(page, "PHP", "a.php", enough=0.25).error_share > 0.25
    docstring = '"""\nWords.\n"""\n' + "from a import b, c\nd = [b, c]\n" * 40
    assert parse(docstring, "Java", "A.java", enough=0.01).error_share > 0.01


@pytest.mark.parametrize("language", ["C#", "Go", "Java", "JavaScript", "PHP", "Ruby", "Rust", "Scala", "TypeScript"])
def test_verdicts_on_cut_or_foreign_files_equal_tree_sitters(language):
    path, enough = f"a.{LANGUAGES[language].extensions[0]}", ScreeningConfig().max_share(language)
    long = GOOD[language] * (1 if language in ("Go", "PHP") else 10)
    texts = [long[: len(long) * tenth // 10] for tenth in range(1, 10)]
    texts += [text * 4 for other, text in GOOD.items() if other != language]
    for text in texts:
        found = parse(text, language, path, enough=enough)
        with mock.patch.object(syntax, "_recognizer", return_value=None):
            alone = parse(text, language, path, enough=enough)
        assert (found.error_share > enough) == (alone.error_share > enough), text


@pytest.mark.parametrize("language", sorted(syntax._GRAMMARS))
def test_verdicts_on_clear_cases_equal_tree_sitters(language):
    path = f"a.{(LANGUAGES[language].extensions or ('x',))[0]}"
    enough = ScreeningConfig().max_share(language)
    for text in (GOOD[language], GOOD[language] * 4, BROKEN.get(language, PROSE)):
        found = parse(text, language, path, enough=enough)
        with mock.patch.object(syntax, "_recognizer", return_value=None):
            alone = parse(text, language, path, enough=enough)
        assert (found.error_share > enough) == (alone.error_share > enough)
        if found.error_share > enough:
            assert found.problem == alone.problem


@pytest.mark.parametrize(
    ("grammar", "text", "lines"),
    [
        ("c", "int f(int x) {{\n{}}}\n", 2),
        ("java", "class A {{\n  A() {{\n{}  }}\n}}\n", 2),
        ("javascript", "class A {{\n  get f() {{\n{}  }}\n}}\n", 2),
        ("ruby", "def f\n{}end\n", 2),
        ("go", "package a\nfunc f() {{\n{}}}\n", 2),
        ("rust", "fn f() {{\n{}}}\n", 2),
    ],
)
def test_a_function_over_the_line_limit_needs_a_tree(grammar, text, lines):
    text = text.format("x = 1;\n" * 30 if grammar != "ruby" else "x = 1\n" * 30)
    assert left_out(text, grammar) == 0
    assert left_out(text, grammar, function_lines=31 + lines) == 0  # counted from the end of what stands before
    assert left_out(text, grammar, function_lines=29 + lines) == -1


def test_pathological_texts_are_declined_without_crashing():
    assert left_out("", "c") == 0
    assert left_out("\ufeffint x;\n", "c") == 0
    assert left_out("int x; /* \0 */\n", "c") == (-1 if has_error("int x; /* \0 */\n", "c") else 0)
    assert left_out("\n\n\n  \n", "c") == 0
    assert left_out('int x = "\U0001f600\u00e9";\n', "c") == 0
    for text in ("(" * 50_000, "f(a)(" * 20_000, "if (a) " * 20_000, "{" * 50_000, "a<b>(c)*" * 9000, "\\\n" * 9000):
        for grammar in ("c", "cpp", "javascript", "java", "csharp", "typescript"):
            assert left_out(text, grammar, share=0.2, open_end=True) == -1


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("javascript", "x = (a, {%sb, c}, [d]) => e;\n"),
        ("c", "void h(){ a * b; a (b); A%s(b)(c); }\n"),
        ("java", "class A { void f() { A<B> c; a < b; (A) b; (a, b) -> c; (A & B) c; A%s::new; } }\n"),
        ("typescript", "x = <T>(%sa: B, {b, c}, [d]) => e;\n"),
    ],
)
def test_unclosed_comments_in_ambiguous_texts(grammar, text):
    assert left_out(text % ("/**/" * 200_000), grammar) == 0  # none costs a call within another


def test_invalid_grammars_are_refused():
    with pytest.raises(TypeError):
        native().Recognizer("c")


def test_a_build_without_the_recognizer_has_another_identity(tmp_path):
    config = CorpusConfig(input=(tmp_path,), out=tmp_path / "out")
    with_it = config.identity()
    with mock.patch("megacoder.corpus.config.native", return_value=None):
        without = config.identity()
    assert {key for key in with_it if with_it[key] != without[key]} == {"recognizer"}


@pytest.mark.parametrize("share", [-0.5, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share = .*: must be from 0 to 1"):
        left_out("int x;\n", "c", share=share)
