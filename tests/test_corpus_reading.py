"""Language by content, encodings, licences: what is read from a file's content."""

import re

import pytest

from megacoder.corpus.ambiguous import AMBIGUOUS, candidate_languages, settled_language
from megacoder.corpus.documents import Document, Dropped
from megacoder.corpus.languages import LANGUAGES, language_of
from megacoder.corpus.licenses import LicenseFilter, is_allowed, is_license_file, license_of, license_of_text
from megacoder.corpus.reading import Selection, decode, make_document

MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\nof this software"
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
GPL3 = "                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n"
LGPL = "                   GNU LESSER GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007\n"
BSD2 = "Redistributions in binary form must reproduce the above copyright notice, this list of conditions"


@pytest.mark.parametrize(
    ("path", "text", "language"),
    [
        ("a.h", "#ifndef A_H\nint f(void);\n#endif\n", "C"),
        ("a.h", "namespace a {\nclass B;\n}\n", "C++"),
        ("a.h", "template <typename T> T f(T x);\n", "C++"),
        ("a.h", "#include <string>\nvoid f();\n", "C++"),
        ("a.h", "#include <string.h>\nvoid f();\n", "C"),
        ("a.h", "#import <Foundation/Foundation.h>\n@interface A : NSObject\n@end\n", None),
        ("a.m", "function y = f(x)\n% square\ny = x.^2;\nend\n", "MATLAB"),
        ("a.m", "#import \"A.h\"\n@implementation A\n@end\n", None),
        ("a.m", "(* a package *)\nf[x_] := x^2\n", "Mathematica"),
        ("a.pl", "use strict;\nmy $x = 1;\n", "Perl"),
        ("a.pl", "parent(tom, bob).\ngrand(X, Z) :- parent(X, Y), parent(Y, Z).\n", "Prolog"),
        ("a.pro", "TEMPLATE = app\nSOURCES += main.cpp\n", None),
        ("a.pro", ":- module(a, [b/1]).\nb(1).\n", "Prolog"),
        ("a.t", "use Test::More;\nok 1;\n", "Perl"),
        ("a.v", "module counter(input clk);\nendmodule\n", "Verilog"),
        ("a.v", "Require Import List.\nTheorem a : True.\nProof. exact I. Qed.\n", None),
        ("a.r", "x <- c(1, 2)\n", "R"),
        ("a.r", "REBOL [\n  Title: \"x\"\n]\n", None),
        ("a.ts", "export const x: number = 1;\n", "TypeScript"),
        ("a.ts", '<?xml version="1.0"?>\n<!DOCTYPE TS>\n<TS version="2.1">\n', None),
        ("a.fs", "module A\nlet x = 1\n", "F#"),
        ("a.fs", "#version 330\nvoid main() {}\n", "GLSL"),
        ("a.rs", "fn main() {}\n", "Rust"),
        ("a.cl", "(defun f (x) x)\n", "Common Lisp"),
        ("a.cl", "__kernel void f(__global int *x) {}\n", None),
        ("a.ml", "let f x = x + 1\n", "OCaml"),
        ("a.ml", "structure A = struct\nend\n", "Standard ML"),
        ("a.cls", "\\NeedsTeXFormat{LaTeX2e}\n", "TeX"),
        ("a.cls", "VERSION 1.0 CLASS\nBEGIN\n", "Visual Basic"),
        ("a.st", "Object subclass: #A\n", "Smalltalk"),
        ("a.st", "<html>$title$</html>\n", None),
        ("a.pp", "unit A;\ninterface\n", "Pascal"),
        ("a.pp", "class a {\n  package { 'x': ensure => present }\n}\n", None),
        ("a.inc", "<?php echo 1;\n", "PHP"),
        ("a.md", "# A project\n", "Markdown"),
        ("a.md", "", "Markdown"),
        ("a.md", ";; Machine description for the VAX\n(define_insn \"add\")\n", None),
        ("a.py", "@interface A\n", "Python"),
    ],
)  # fmt: skip
def test_only_shared_extensions_are_settled_by_content(path, text, language):
    assert settled_language(path, language_of(path), text) == language
    assert language is None or language in candidate_languages(path, language_of(path))


def test_every_shared_extension_ends_in_a_rule_that_always_holds_and_names_known_languages():
    for extension, rules in AMBIGUOUS.items():
        assert rules[-1][:2] == (("",), re.compile("", re.MULTILINE)), extension
        assert {language for _, _, language in rules} - {None} <= LANGUAGES.keys()
        by_name = language_of(f"a.{extension}")
        assert by_name in {None, *(language for _, _, language in rules)}


@pytest.mark.parametrize("hostile", ["class a\n", "class a", "a[", " ", "\n", "(", "a:", "|", ":- ", "static"])
def test_no_text_takes_long_to_settle(hostile):
    """Only a text's start is searched: on all of the first one, `.pp` would take longer than the timeout."""
    for extension in AMBIGUOUS:
        settled_language(f"a.{extension}", None, hostile * (4_000_000 // len(hostile)))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é = 1".encode(), "é = 1"),
        ("é".encode("utf-8-sig"), "é"),
        ("é".encode("utf-16"), "é"),
        (b"\xfe\xff" + "é".encode("utf-16-be"), "é"),
        ("é".encode("utf-32"), "é"),
        ("# -*- coding: latin-1 -*-\né".encode("latin-1"), "# -*- coding: latin-1 -*-\né"),
        ("# vim: set fileencoding=cp1251 :\nж".encode("cp1251"), "# vim: set fileencoding=cp1251 :\nж"),
        ('<meta charset="gbk">中'.encode("gbk"), '<meta charset="gbk">中'),
        ("<?xml encoding='Shift_JIS'?>テ".encode("shift_jis"), "<?xml encoding='Shift_JIS'?>テ"),
        ("<%@page a='b;charset=GBK'%>中".encode("gbk"), "<%@page a='b;charset=GBK'%>中"),
        ('@charset "latin-1";é'.encode("latin-1"), '@charset "latin-1";é'),
        ("/*\n * -*- coding: latin-1 -*- */é".encode("latin-1"), "/*\n * -*- coding: latin-1 -*- */é"),
        ("#!/bin/x\r\n# encoding: cp1251\r\nж".encode("cp1251"), "#!/bin/x\r\n# encoding: cp1251\r\nж"),
    ],
)  # fmt: skip
def test_text_in_a_known_encoding_is_read(data, text):
    assert decode(data) == (text, None)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a\0b", "binary"),
        ("a\0".encode("utf-16"), "binary"),
        ("é".encode("latin-1"), "encoding unknown"),
        (b"# coding: unicode_escape\n\xff", "encoding unknown"),  # not an encoding of text
        (b"# coding: no-such\n\xff", "encoding unknown"),
        (b"text = open(f, encoding='latin-1').read()  # \xe9\n", "encoding unknown"),  # of another file
        (b"x = decode(y, encoding=latin1, charset='gbk') # \xe9\n", "encoding unknown"),
        (b"a\nb\nc\nd\ne\n# coding: latin-1\n\xe9", "encoding unknown"),
        (b"\xff\xfea", "not UTF-16"),
        (b"\xef\xbb\xbf\xff", "not UTF-8"),
    ],
)
def test_undecodable_bytes_have_a_reason(data, reason):
    assert decode(data) == (None, reason)


def test_a_fallback_encoding_is_used_only_where_none_is_known():
    assert decode("é".encode("latin-1"), "latin-1") == ("é", None)
    assert decode("é".encode(), "latin-1") == ("é", None)
    declared = "# coding: koi8-r\nпривет\n"
    assert decode(declared.encode("koi8-r"), "latin-1") == (declared, None)


def test_a_document_whose_language_shows_in_its_text_can_be_dropped():
    only_c = Selection(languages=frozenset({"C"}))
    assert isinstance(make_document("r", "a.h", b"int f(void);\n", only_c, license=None), Document)
    dropped = make_document("r", "a.h", b"namespace a {}\nusing namespace a;\n", only_c, license=None)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.language) == ("language not selected", "C++")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (MIT, "MIT"), (APACHE, "Apache-2.0"), (GPL3, "GPL-3.0"), (LGPL, "LGPL-3.0"), (BSD2, "BSD-2-Clause"),
        (BSD2 + " Neither the name of the copyright holder", "BSD-3-Clause"), ("All rights reserved.", "unknown"),
        ("# SPDX-License-Identifier: MPL-2.0\n", "MPL-2.0"), (GPL3 + LGPL, "GPL-3.0"),
        ("This is free software under the GNU Lesser General Public License version 2.1", "LGPL-2.1"),
    ],
)  # fmt: skip
def test_licence_texts(text, name):
    assert license_of_text(text) == name


@pytest.mark.parametrize(
    ("files", "license_"),
    [
        ({}, "none"),
        ({"LICENSE": MIT}, "MIT"),
        ({"LICENSE-MIT": MIT, "LICENSE-APACHE": APACHE}, "Apache-2.0 OR MIT"),
        ({"COPYING": GPL3, "COPYING.LESSER": LGPL}, "LGPL-3.0"),
        ({"LICENSE": MIT, "COPYING": GPL3}, "GPL-3.0 AND MIT"),
        ({"COPYRIGHT": "(c) us", "LICENSE.txt": MIT}, "MIT"),
        ({"LICENSE": "ours"}, "unknown"),
    ],
)
def test_the_licence_of_a_repository(files, license_):
    assert license_of(files.items()) == license_


def test_licence_files_by_name():
    assert all(map(is_license_file, ["LICENSE", "license.md", "LICENCE.txt", "COPYING", "LICENSE-MIT", "UNLICENSE"]))
    assert not any(map(is_license_file, ["license.py", "licenses.go", "readme", "check_license"]))


def test_a_choice_of_licences_needs_one_allowed_and_several_need_all():
    assert is_allowed("Apache-2.0 OR GPL-3.0", {"apache-2.0"})
    assert not is_allowed("Apache-2.0 AND GPL-3.0", {"apache-2.0"})
    assert is_allowed("GPL-2.0 WITH Classpath-exception-2.0", {"gpl-2.0"})
    stage = LicenseFilter(allow=("mit", "none"))
    kept, bare, lost = (
        stage(Document(repo="r", path="a.py", language="Python", text="x", size=1, license=license_))
        for license_ in ("MIT", None, "GPL-3.0")
    )
    assert isinstance(kept, Document)
    assert isinstance(bare, Document)
    assert isinstance(lost, Dropped)
    assert (lost.reason, lost.detail) == ("licence not allowed", "GPL-3.0")
