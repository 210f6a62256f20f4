"""The recognizer of Python: CPython's parser accepts all that it accepts, and it accepts nearly all of Python."""

import ast
import random
import re
import warnings
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megacoder
from megacoder.core.native import native
from megacoder.corpus import syntax
from megacoder.corpus.syntax import parse

pytestmark = pytest.mark.skipif(not hasattr(native(), "surely_python"), reason="the kernels are not built")

VALID = r'''
x, *y = a[1:2, ::3], b; (a, [b, *c], d.e, f[0]) = g = 1; () = [] = h
x: int = 3; a.b: "t" = yield; c[0]: d
(x) += 1; y //= yield 2; a @= b; c **= d; e >>= f; g.h |= i[j]
del a, (b, c), [d.e, f[1]], (g)
def f(a, b=1, /, c=2, *args, d, e=3, **kw) -> int: return a
def f(a, /, *, b: int = 1, c,): pass
lambda x, /, y=2, *, z: (yield), lambda *a, b=1, **c: a if b else lambda: c
class A(B, *C, metaclass=D, **E): "doc"
class A(): x = 1; y = 2;
import a.b as c, d; from . import a; from ...a.b import (c as d, e,); from .. import a as b, c; from a import *
global a, b; assert a, b; raise a from b; raise; pass; break; continue
return; return a, *b
yield; x = yield a, *b; y = yield from c
print(a, *b, c=d, *e, **f, g=h)(x for x in y)(a := 1, b)((yield), **k).d
[a, *b, c := d], [x for x, y in z if a if b for c in d], [], (a, *b,), (a := b), (x async for x in y), (yield from a)
{a, *b}, {x for x in y}, {}, {a: b, **c, d: e if f else g}, {k: v for k, v in x}, {**a, **b,}, {a := 1}
a[b:c, d, ...], a[:], a[::], a[b:], a[:b:c], a[*b], a[b := c], a[b, *c]
not a and b or not c in d is not e not in f == g < h > i <= j >= k != l
-a ** -b * +c @ ~d // e % f << g >> h & i | j ^ k - await m ** n
a if b else c if d else e
x = 0x1F + 0o17 - 0b1_0 * 1_000 / 1.5 % 1. + .5 + 1e5 + 1.e-5j + 00 + 0_0 + 1J + 0.0 + 0xFf
'a' "b" '\x41\u0041\U0010ffff\n\'' r'\d' R"\"" u'é', b'a' B"\x41" rb'\u' Rb"\x"
"""a "b" \""" '
""" + ''"" + """"a"""
f"a{b}c{{d}}{e!r}{f:>{g}.{h!s}}{i=}{j = !a:x}{k['l']}{(lambda: m)}{n if o else p}{q, r}{s != t}{u == v:w}"
f'{a}' "b" rf"\{c}\d{{2}}{d:%H:%M}" F'{x:{y}}' fr'{z!r:^{w}}' f'{yield}{await a}{ {1: 2}[3] }{a[b:c]}{f(a=b)}{x:=5}'
f"""a{b} {c["d"]} {f'{e}'} {
 g
} {{}} {"h"!r:>{10}}"""
match = case = type = _ = print; match(x); match[a](b).c = 3; match, case; match: int; case.x; match * a
print >>sys.stderr, "x"; __debug__ and x; async_ = 1
if a: b
while x := f(): break
@a.b(c)
@d[e := 1]
async def f(): pass
if a:
    b
elif c:

  # comment
  d
else: e
for x, in y, *z:
    pass
else: pass
for (a, b), c.d, *e[0] in f: pass
async def f():
    async with a as b, c as (d, e): pass
    async for x in y:
        await z
    else: return [x async for x in y if await z]
try:
    a
except B as c: d
except (E, F): g
except: h
else: i
finally: j
try: a
finally: b
try: a
except* B as c: d
except* E: f
with a as b, c: pass
with (a as b, c as d.e, f,): pass
with (a, b) as c, (d): pass
with (yield a) as b[0], (c for d in e): pass
with (a).b as (c, [d]): pass
match x:
    case 1 | -2.5 | "a" "b" | b'c' | None | True: pass
    case [a, b, *_] if c: pass
    case (a, *b): pass
    case {"k": v, a.b: 1, **rest}: pass
    case A(1, b, c=2, d=[e]): pass
    case A.B() as f: pass
    case {} | [] | (): pass
    case (x): pass
    case x, *y: pass
    case _: pass
match *a, b:
    case c: pass
match -x: # comment
    case match: case
x = [
  1,  # comment
2,

    3] + \
  4
if x: \
    y
'''  # fmt: skip
"""A statement begins at each line that no colon, bracket or string before it leaves open: `_statements` cuts them."""

INVALID = r'''
x = = 2 | x = 1 + | x y | 1 = x | f() = 1 | a + b = c | None = 1 | (a, 1) = b | [a, f()] = b | a if b else c = d
*a, b += c
a, b += 1 | f() += 1 | (a, b): int | f(): int | (x).b: int | "a" += b | x = yield = y | (yield) = x | (a := b) = c
a := b | (a.b := c) | (a := b := c) | f(a.b=c) | f(1=c) | f(a=1, b) | f(**a, *b) | f(**a, b) | f(a for a in b, c)
f(c, a for a in b)
del f() | del a + b | del *a, b | del | (*a) | (a, *) | [a b] | {a: b, c} | {a, b: c} | {*a: b}
{**a, b} | {a: *b}
[a for a in b, c] | [a for f() in b] | [a for a in lambda: b] | [for a in b]
[a for a b] | a[] | a[b:c:d:e]
lambda a, a=1, b: c | lambda *: a | lambda (a): b | lambda a: | lambda: yield | not | a not b | a is is b | a < not b
- not a | a ** not b
await | await await a | a. | a.1 | a..b | a.if | .a | a b"c" | "a" b"b" | b"a" f"b" | b"a" "b" | a if b | a if b else
else | a else b
return yield | raise a, b | raise from a | assert | assert a, | global | global a, | global a.b | import
import a as b.c | import a, | import .a
from a import | from a import b, | from a import (b | from a import () | from a import (*) | from . import b.c
from import a | from a.b
class | class A | class A: | class A(x for x in y): pass | class 1: pass | def f: pass | def f(: pass | def f():
def f()
def f(a=1, b): pass | def f(*): pass | def f(*, **a): pass | def f(/, a): pass | def f(a, /, b, /): pass
def f(*a, *b): pass | def f(**a, b): pass
def f(a, (b, c)): pass | def f(*a=1): pass | def f(a:): pass | def f(*, a, /): pass | def f(a.b): pass
def f() -> : pass | def f(a b): pass
if a | if a: | if: a | if a: if b: c | if *a: b | elif a: b | while: a | for a: b | for a in: b | for f() in a: b
for a + b in c: d | for 1 in a: b
try: a | except: a | finally: a | with: a | with a as f(): b | with a, : b | with (a as b): c; with d
with a as b as c: d | with (a as b) as c: d
x = 012 | 0777 | 1__0 | 1_ | 0x | 0b2 | 0o8 | 1e | 1.e | 0xg | 1_000_ | 0_7 | 1.2.3 | 1a | 0b1.0 | 1e5.0 | 1._5 | 0b_
"a | 'a | """a | "\x4" | "\u004" | "\U00110000" | "\N{NO SUCH NAME}" | b"é" | b"\x4" | f"{a" | f"a}" | f"{}" | f"{ }"
f"{a b}" | f"{a!}" | f"{a!x}" | ur"a"
f"{a!r }}" | f"{a:{b:{c:{d}}}}" | f"{lambda: a}" | f"{a!=}" | f"{a=b}" | f"{(a}" | f"{a)}" | f"{a:{}}"
f"\x4{a}" | f"{a!r=}" | f"{a;b}" | f"{a:}{" | bf"a"
(a] | (a | a) | [a | {a | {(a}) | ( | a ) b | $a | a ? b | a ! b | `a` | a <> b | a && b | a++ | a =! b | -> a
a -> b | a\b
print "x" | exec "x" | print a, b | match x | case x: pass | type X | @a | @a pass | pass pass | pass; ; pass | ; | ,
* | ... ... | if a: pass else: pass | a; if b: c
'''  # fmt: skip
"""Statements, one to a bar."""

INVALID_LINES = (
    " x = 1", "if a:\nb", "if a:\n  b\n c", "a\n b", "if a:\n\tb\n        c", "if a:\n        b\n\tc",
    "if a:\n        if b:\n\t c", "if a:\n  b\n \x0c c",
    "def f():\n# c", "if a:\n b\nelse\n c", "try:\n a\nb", "try: a\nexcept: b\nexcept* c: d", "try: a\nelse: b",
    "try: a\nexcept*: b", "try: a\nfinally: b\nelse: c", "for a in b: c\nelif d: e", "match x:\n case a.b as _: c",
    "match x:\n pass", "match x:\n case 1 + 1: a", "match x:\n case A(b=1, c): d", "match x:\n case {**a, 1: b}: c",
    "match x:\n case *a: b", "match x:\n case a(): b\n c", "match x: case a: b",
    "match x:\n case f(): a\n case (*b): c", "match x:\n case -a: b", "match x:\n case {a: b}: c",
    "match x:\n case A(a, _=b): c", "match x:\n case {**_}: c", "match x:\n case a | : b",
    "match x:\n case a.b(c).d: e", "match x:\n case 1 as a.b: c", "match x:\n case A(B(c)=d): e", "x = 'a\nb'",
    "x = (1,\n", "@a\nx = 1", "@a\n@b", "async x", "async def f()\n pass", "async if a: b", "x = 1 \\ \n + 2", "a\0b",
)  # fmt: skip

UNSURE = (
    "é = 1", "\ufeffx = 1", "x = 1\ry = 2", '"\\N{DIGIT ONE}"', "1if a else b", "def f(*a: *b): pass", "*a",
    "(x): int", "012.5", "x = '\ud800'", "from __future__ import barry_as_FLUFL", "match x:\n case 1 + 2j: a",
    "\\\nx = 1", "__debug__ = 1", f"x = {'7' * 4200}", "type X = int", 'f"{*a}"', "[*a for a in b]",
    "{**a for a in b}", "def f[T](x: T): pass", "try: a\nexcept B, C: d", 't"{a}"', 'f"{a["b"]}"', "f'{a\n}'",
    'f"{"a"}"', "f'{\"\\n\"}'", "f'{a # b\n}'", "f'''{a:\n}'''",
)  # fmt: skip
"""Not Python to one version and Python to another, or Python all the same."""


def surely_python(text):
    return native().surely_python(text)


def without_the_kernel():
    return mock.patch.object(syntax, "native", return_value=None)


def is_python(text):
    """To CPython; only within `without_the_kernel`."""
    return parse(text, "Python", "a.py").error_share == 0


def statements(text):
    """Statements at the margin, with what belongs to them."""
    lines, nodes = text.split("\n"), ast.parse(text).body
    starts = [min([node, *getattr(node, "decorator_list", [])], key=lambda at: at.lineno).lineno - 1 for node in nodes]
    cut = ["\n".join(lines[start : node.end_lineno]) for start, node in zip(starts, nodes, strict=True)]
    return list(dict.fromkeys(cut))  # those of one line come as the line


def own_sources():
    return sorted(Path(megacoder.__file__).parent.rglob("*.py"))


def stdlib_sources():
    return sorted(Path(ast.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("text", [*statements(VALID), "if a:\n\tb\n\tif c:\n\t    d\n\n\x0cif e: f"])
def test_python_is_accepted(text):
    within = "class A:\n" + "".join(f"  {line}\n" for line in text.split("\n"))
    for written in (text, f"\n# a\n{text}\n", text.replace("\n", "\r\n") + "\r\n", f"{text} # é", within):
        with without_the_kernel():
            assert is_python(written)
        assert surely_python(written)


@pytest.mark.parametrize(
    "text", [*(line for row in INVALID.split("\n") if row for line in row.split(" | ")), *INVALID_LINES]
)
def test_text_that_is_not_python_is_declined(text):
    for written in (text, f"{text}\n", f"x = 1\n{text}\ny = 2\n"):
        with without_the_kernel():
            assert not is_python(written)
        assert not surely_python(written)


@pytest.mark.parametrize("text", UNSURE)
def test_uncertain_texts_are_declined(text):
    assert not surely_python(text)
    assert not surely_python(f"x = 1\n{text}\n")


def test_a_file_ending_in_a_backslash_is_not_python():
    for text in ("x = 1 \\", "x = 1 \\\n", "x = (1, \\\n"):
        with without_the_kernel():
            assert not is_python(text)
        assert not surely_python(text)
    assert surely_python("x = 1 \\\n\n")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(", ")"), ("f(", ")"), ("{a: ", "}"), ("a[", "]"), ("not ", ""), ("-", ""), ("a ** ", ""),
        ("a if b else ", ""), ("lambda: ", ""), ("lambda a=", ": b"), ("[a for b in ", "]"), ("x and (not -", ")"),
    ],
)  # fmt: skip
def test_nesting_is_accepted_as_deep_as_every_parser_allows(before, after):
    taken = [surely_python(before * depth + "x" + after * depth) for depth in (1, 10, 20, 2000, 100_000)]
    assert taken == [True, True, True, False, False]
    depths = [depth for depth in range(1, 700) if surely_python(before * depth + "x" + after * depth)]
    with without_the_kernel():
        assert is_python(before * depths[-1] + "x" + after * depths[-1])


def test_blocks_and_long_runs():
    def blocks(depth):
        return "".join(" " * i + "if a:\n" for i in range(depth)) + " " * depth + "b\n"

    assert surely_python(blocks(60))
    assert not surely_python(blocks(99))
    assert surely_python("if a: b\n" + "elif a: b\n" * 200)
    assert not surely_python("if a: b\n" + "elif a: b\n" * 20_000)
    for piece in ("x + ", "x.y(z)[0].", "x or ", "-x ** y, ", "'s' ", "x < "):
        assert surely_python(piece * 20_000 + ("'s'" if "'" in piece else "x"))
    assert surely_python(f"x = {'7' * 3999}, 0x{'7' * 9999}")


def mutants(generator, pieces, count):
    """Texts of a few statements in which a few tokens, or a character of one, were moved, lost or doubled."""
    cut = [re.findall(r"\w+|\n *| +|[^\w\s]", piece) for piece in pieces]
    pool = [token for tokens in cut for token in tokens]
    for _ in range(count):
        tokens = list(generator.choice(cut))
        for _ in range(generator.randint(1, 3)):
            at, other = generator.randrange(len(tokens)), generator.randrange(len(tokens))
            match generator.randrange(6):
                case 0:
                    tokens[at : at + generator.randint(1, 3)] = []
                case 1:
                    tokens[at], tokens[other] = tokens[other], tokens[at]
                case 2:
                    tokens[at] = generator.choice(pool)
                case 3:
                    tokens.insert(at, generator.choice(pool))
                case 4:
                    tokens[at:at] = tokens[other : other + 3]
                case 5:
                    tokens[at] = tokens[at][1:] + generator.choice("()[]{}:;,.=*'\"\n\t #\\0_jfb")
            tokens = tokens or ["x"]
        yield "".join(tokens)


@pytest.mark.parametrize("source", ["table", "megacoder", "stdlib"])
def test_only_python_is_accepted_of_mutants(source):
    generator = random.Random(source)
    if source == "table":
        pieces = statements(VALID)
    else:
        paths = generator.sample(own_sources() if source == "megacoder" else stdlib_sources(), 20)
        pieces = [piece for path in paths for piece in statements(path.read_text(encoding="utf-8")) if len(piece) < 500]
    taken = [text for text in mutants(generator, pieces, 40_000) if surely_python(text)]
    assert len(taken) > 4000
    with without_the_kernel():
        assert [text for text in taken if not is_python(text)] == []


FRAGMENTS = [*"()[]{}:,=*", *re.findall(r"\w+|\n *|[^\w\s]", VALID), " ", "\n", "\n ", "\n  ", '"', "f'{", "}'", "'''"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(" ".join) | st.text("ab1_.x({[}])'\"\\\n\r\t\f #:=!,f"))
def test_only_python_is_accepted_of_any_text(text):
    with without_the_kernel():
        assert is_python(text) or not surely_python(text)


@pytest.mark.parametrize(("sources", "share"), [(own_sources, 0.99), (stdlib_sources, 0.8)])
def test_nearly_all_real_code_is_accepted(sources, share):
    texts = [path.read_text(encoding="utf-8") for path in sources()]
    assert len(texts) > 100
    taken = sum(len(text) for text in texts if surely_python(text))
    assert taken > share * sum(map(len, texts))  # a later Python's own modules use what only that one has


def test_verdicts_do_not_depend_on_the_kernel():
    for text in [*statements(VALID), *INVALID.split("\n"), *INVALID_LINES, *UNSURE, "", "\n", "#", "'\\d'"]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = parse(text, "Python", "a.py")
        with without_the_kernel():
            assert parse(text, "Python", "a.py") == found
