"""The paper's file filters: every threshold on both sides, and the fast counts against plain ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.corpus.documents import Document, Dropped, run_stages
from megacoder.corpus.generated import GeneratedFiles, says_generated
from megacoder.corpus.languages import CODE_LANGUAGES, LANGUAGES, as_comment, language_of
from megacoder.corpus.rules import PaperRules, RuleThresholds, alphabetic_share, line_lengths, visible_text
from megacoder.corpus.starcoder2 import StarCoder2Rules
from megacoder.corpus.text_counts import line_counts

RULES = PaperRules()
LIMITS = RuleThresholds()


def html(visible: int, total: int) -> str:
    return "x" * visible + "<" + "b" * (total - visible - 2) + ">"


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("name = 1\n", "Python", None),
        ("", "Python", "empty"),
        (" \n\t\n", "Python", "empty"),
        # mean line: 100 stays, one character more over ten lines goes
        (("a" * 100 + "\n") * 10, "Python", None),
        (("a" * 100 + "\n") * 9 + "a" * 101 + "\n", "Python", "mean line over 100 characters"),
        # longest line, the mean held low by short ones
        ("a" * 1000 + "\n" + "a\n" * 50, "Python", None),
        ("a" * 1001 + "\n" + "a\n" * 50, "Python", "a line over 1000 characters"),
        ("é" * 1000 + "\n" + "a\n" * 50, "Python", None),  # characters, not bytes
        ("é" * 1001 + "\n" + "a\n" * 50, "Python", "a line over 1000 characters"),
        ("a" * 600 + "\r" + "a" * 600 + "\r\n" + "a\n" * 50, "Python", None),  # CR and CRLF end lines too
        # letters: exactly a quarter stays
        ("a" * 25 + "1" * 75, "Python", None),
        ("a" * 24 + "1" * 76, "Python", "under 25% letters"),
        ("é" * 25 + "1" * 75, "Python", None),
        ("²" * 25 + "1" * 75, "Python", "under 25% letters"),
        # the XML declaration must lie whole within the first 100 characters
        ("<?xml version='1.0'?><abc/>", "Python", "XML declaration"),
        ("a" * 86 + "<?xml version=", "Python", "XML declaration"),
        ("a" * 87 + "\n<?xml version=", "Python", None),
        ("<?xml version='1.0'?><abc/>", "XSLT", None),
        # HTML: at least 100 visible characters and a fifth of all
        (html(100, 500), "HTML", None),
        (html(99, 400), "HTML", "HTML with under 100 visible characters"),
        (html(100, 501), "HTML", "HTML under 20% visible"),
        # JSON and YAML: 50 to 5000 characters
        ("a" * 49, "JSON", "data file outside 50 to 5000 characters"),
        ("a" * 50, "JSON", None),
        ("a\n" * 2500, "YAML", None),
        ("a\n" * 2500 + "a", "YAML", "data file outside 50 to 5000 characters"),
        ("a" * 49, "Python", None),
    ],
)
def test_each_rule_on_both_sides_of_its_limit(text, language, reason):
    limits = RuleThresholds(max_mean_line=1000) if language == "HTML" else LIMITS
    assert PaperRules(thresholds=limits).reason(text, language) == reason


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab1 _éß中²\u0301\n\U0001d400"), min_size=1))
def test_the_count_of_letters_decides_as_isalpha_does(text):
    plain = sum(character.isalpha() for character in text) / len(text) < 0.25
    assert (alphabetic_share(line_counts(text), len(text), LIMITS) is not None) == plain


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="a\r\n"), st.integers(1, 4), st.integers(1, 4))
def test_lines_are_those_of_universal_newlines(text, mean, longest):
    lines = [line.rstrip("\r\n") for line in text.replace("\r\n", "\n").replace("\r", "\n").splitlines()] or [""]
    plain = sum(map(len, lines)) > mean * len(lines) or max(map(len, lines)) > longest
    assert (line_lengths(line_counts(text), RuleThresholds(max_mean_line=mean, max_line=longest)) is not None) == plain


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>a  b</p>\n c", "a b c"),
        ("a<!-- <p>hidden</p> -->b", "ab"),
        ("a<script type='x'>if (a < b) hidden()</script>b<STYLE>p {}</STYLE >c", "abc"),
        ("<a title='x > y' href=\"z\">a</a>", "a"),
        ("a &lt; b &amp;&amp; 1 < 2", "a < b && 1 < 2"),
        ("a<script>never closed", "a"),
        ("a<!-- never closed", "a"),
        ("a<p never closed", "a"),
        ("<p class='never closed>a</p>", ""),
    ],
)
def test_visible_text(markup, text):
    assert visible_text(markup) == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="<>!-/a='\"spcrit \n"))
def test_visible_text_never_fails_or_grows_on_any_markup(markup):
    assert len(visible_text(markup)) <= len(markup)


def test_the_table_holds_the_papers_87_languages_and_no_extension_twice():
    assert len(CODE_LANGUAGES) == 87
    assert LANGUAGES.keys() == CODE_LANGUAGES | {"Markdown", "reStructuredText"}
    keys = [key for row in LANGUAGES.values() for key in (*row.extensions, *(f"/{name}" for name in row.filenames))]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a/b.py", "Python"), ("A.PY", "Python"), ("Makefile", "Makefile"), ("x/CMakeLists.txt", "CMake"),
        ("a.tar.gz", None), ("py", None), (".py", None), ("a.d/b", None), ("setup.cu", "CUDA"),
        ("README.md", "Markdown"), ("docs/index.rst", "reStructuredText"), ("notes.txt", None),
    ],
)  # fmt: skip
def test_language_by_file_name(path, language):
    assert language_of(path) == language


def test_comments_as_languages_write_them():
    assert [as_comment("a.x", name) for name in ("Python", "C", "HTML", "OCaml", "reStructuredText")] == [
        "# a.x", "// a.x", "<!-- a.x -->", "(* a.x *)", ".. a.x"
    ]  # fmt: skip


@pytest.mark.parametrize("rules", [PaperRules(), StarCoder2Rules()])
@pytest.mark.parametrize("language", ["Markdown", "reStructuredText"])
def test_paragraphs_of_natural_language_may_be_lines(rules, language):
    paragraph = "What the project is for, and how to install it. " * 40 + "\n"
    assert rules.reason(paragraph, language) is None
    assert rules.reason("它是什么以及如何安装。" * 200 + "\n", language) is None
    assert rules.reason(paragraph, "Python") == "mean line over 100 characters"
    assert rules.reason("a " * 50_000 + "a", language) == "a line over 100000 characters"
    assert rules.reason("| 1 | 2 | 3 |\n" * 9, language) == "under 25% letters"
    assert rules.reason(" \n", language) == "empty"


@pytest.mark.parametrize(
    ("text", "generated"),
    [
        ("# Generated by the protocol buffer compiler.  DO NOT EDIT!\n", True),
        ("#\n#\n#   This file was automatically generated from x\n", True),
        ("# generated by scripts/gen_mapfiles.py\n", True),
        ("\n\n\n\n\n# autogenerated\n", False),  # below the fifth line
        ('"""AST nodes generated by the parser for the compiler."""\n', False),
    ],
)
def test_generated_files_say_so_in_their_first_lines(text, generated):
    assert says_generated(text) == generated


def test_a_dropped_file_passes_later_stages_untouched():
    bad = Document(repo="r", path="a.py", language="Python", text="1" * 50, size=50)
    good = Document(repo="r", path="b.py", language="Python", text="autogenerated", size=13)
    first, second = run_stages([bad, good], [RULES, GeneratedFiles()])
    assert isinstance(first, Dropped)
    assert (first.stage, first.reason, first.size) == ("rules", "under 25% letters", 50)
    assert isinstance(second, Dropped)
    assert second.stage == "generated"
