"""Small problems of our own, with solutions, in the form of the multilingual HumanEval sets: prompt, tests, stops.

The published sets come without solutions, and not every machine has them. A problem here is a signature and cases; a
dialect writes both in its language as the sets do, down to which side closes the function. Every solution is written by
hand; the wrong answer to each problem gives the first case's result to every question.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["OWN_LANGUAGES", "own_problems"]

Value = int | bool | str | list[int]


@dataclass(frozen=True)
class _Problem:
    name: str
    text: str
    parameters: Mapping[str, str]
    """name -> int, str or ints"""
    returns: str
    """one of those, or bool"""
    cases: tuple[tuple[tuple[Value, ...], Value], ...]
    """(arguments, result); the first two results differ"""


_PROBLEMS = (
    _Problem("common_divisor", "The greatest common divisor of two positive numbers.", {"a": "int", "b": "int"}, "int",
             (((12, 18), 6), ((7, 13), 1), ((100, 75), 25), ((9, 9), 9))),
    _Problem("is_mirrored", "Whether a text reads the same backwards.", {"text": "str"}, "bool",
             ((("level",), True), (("levels",), False), (("",), True), (("ab",), False))),
    _Problem("count_vowels", "How many of a, e, i, o, u a text has.", {"text": "str"}, "int",
             ((("banana",), 3), (("xyz",), 0), (("aeiou",), 5), (("",), 0))),
    _Problem("widest_gap", "The largest difference between neighbours, 0 where there are none.", {"items": "ints"},
             "int", ((([1, 4, 2, 10],), 8), (([5],), 0), (([3, -3, 3],), 6), (([2, 2],), 0))),
    _Problem("running_maximum", "The largest item so far, for every place.", {"items": "ints"}, "ints",
             ((([1, 3, 2, 5],), [1, 3, 3, 5]), (([4, 1],), [4, 4]), (([-2, -5, -1],), [-2, -2, -1]))),
    _Problem("halving_steps", "Steps to 1, where an even n becomes n / 2 and an odd one 3 n + 1.", {"n": "int"}, "int",
             (((6,), 8), ((1,), 0), ((27,), 111), ((16,), 4))),
    _Problem("shift_letters",
             "Every letter of a text of small letters, so many places on in the alphabet, round its end.",
             {"text": "str", "places": "int"}, "str",
             ((("abc", 1), "bcd"), (("xyz", 3), "abc"), (("code", 26), "code"), (("", 5), ""))),
    _Problem("primes_below", "The primes less than n, in order.", {"n": "int"}, "ints",
             (((12,), [2, 3, 5, 7, 11]), ((4,), [2, 3]), ((3,), [2]), ((30,), [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]))),
)  # fmt: skip


class _Dialect:
    """How a language writes a problem down."""

    comment = "//"
    stop_tokens: tuple[str, ...] = ("\n}",)
    closing = ""
    """what ends a function, where the tests do not"""
    types: ClassVar[Mapping[str, str]] = {}

    def prompt(self, problem: _Problem) -> str:
        """Up to where the body begins."""
        return f"{self.comment} {problem.text}\n{self.signature(problem)}\n"

    def signature(self, problem: _Problem) -> str:
        raise NotImplementedError

    def literal(self, value: Value) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return self.items(", ".join(map(self.literal, value)))
        return f'"{value}"' if isinstance(value, str) else str(value)

    def items(self, inside: str) -> str:
        raise NotImplementedError

    def test(self, problem: _Problem) -> str:
        raise NotImplementedError

    def giving(self, value: Value) -> str:
        """A body that gives one value."""
        return f"    return {self.literal(value)};\n{self.closing}"

    def checks(self, problem: _Problem, form: str) -> str:
        """A line for each case, of a call and what it must give."""
        return "".join(
            form.format(f"{problem.name}({', '.join(map(self.literal, given))})", self.literal(result))
            for given, result in problem.cases
        )

    def typed(self, problem: _Problem) -> str:
        return ", ".join(f"{self.types[kind]} {name}" for name, kind in problem.parameters.items())


class _Cpp(_Dialect):
    types: ClassVar = {"int": "long", "str": "std::string", "bool": "bool", "ints": "std::vector<long>"}

    def signature(self, problem: _Problem) -> str:
        return f"{self.types[problem.returns]} {problem.name}({self.typed(problem)}) {{"

    def items(self, inside: str) -> str:
        return f"std::vector<long>({{{inside}}})"

    def test(self, problem: _Problem) -> str:
        lines = self.checks(problem, "    assert({} == {});\n")
        return f"}}\nint main() {{\n{lines}}}\n"


class _Java(_Dialect):
    comment = "    //"
    stop_tokens = ("\n    }\n",)
    types: ClassVar = {"int": "long", "str": "String", "bool": "boolean", "ints": "long[]"}

    def prompt(self, problem: _Problem) -> str:
        return "import java.util.*;\nclass Problem {\n" + super().prompt(problem)

    def signature(self, problem: _Problem) -> str:
        return f"    public static {self.types[problem.returns]} {problem.name}({self.typed(problem)}) {{"

    def literal(self, value: Value) -> str:
        return f"{value}L" if type(value) is int else super().literal(value)

    def items(self, inside: str) -> str:
        return f"new long[] {{{inside}}}"

    def test(self, problem: _Problem) -> str:
        same = {"int": "{} == {}", "bool": "{} == {}", "str": "{}.equals({})", "ints": "Arrays.equals({}, {})"}
        lines = self.checks(problem, f"    assert({same[problem.returns]});\n")
        return f"    }}\n    public static void main(String[] args) {{\n{lines}    }}\n}}\n"


class _JavaScript(_Dialect):
    stop_tokens = ("\nfunction ", "\n//", "\nconsole.log")
    closing = "}\n"

    def signature(self, problem: _Problem) -> str:
        return f"function {problem.name}({', '.join(problem.parameters)}) {{"

    def items(self, inside: str) -> str:
        return f"[{inside}]"

    def test(self, problem: _Problem) -> str:
        return "const assert = require('node:assert');\n" + self.checks(problem, "assert.deepEqual({}, {});\n")


class _Perl(_Dialect):
    comment = "#"
    stop_tokens = ("\nsub", "\n#", "\n\n")
    closing = "}\n"

    def signature(self, problem: _Problem) -> str:
        return f"sub {problem.name} {{\n    my({', '.join('$' + name for name in problem.parameters)}) = @_;"

    def literal(self, value: Value) -> str:
        return ("1" if value else '""') if isinstance(value, bool) else super().literal(value)

    def items(self, inside: str) -> str:
        return f"[{inside}]"

    def test(self, problem: _Problem) -> str:
        spread = "join(',', map { ref $_ ? @$_ : $_ } $_)"
        return (
            f"sub same {{\n    my($given, $wanted) = map {{ {spread} }} @_;\n    exit 1 if $given ne $wanted;\n}}\n"
            + self.checks(problem, "same({}, {});\n")
        )


class _Shell(_Dialect):
    comment = "#"

    def signature(self, problem: _Problem) -> str:
        kinds = {"int": "an integer", "str": "a string", "ints": "a space-separated list"}
        lines = [f"# ${place} is {kinds[kind]}\n" for place, kind in enumerate(problem.parameters.values(), start=1)]
        return "#\n" + "".join(lines) + f"{problem.name}() {{"

    def prompt(self, problem: _Problem) -> str:
        return "#!/bin/bash\n" + super().prompt(problem)

    def literal(self, value: Value) -> str:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f'"{text.lower() if isinstance(value, bool) else text}"'

    def giving(self, value: Value) -> str:
        return f"    echo {self.literal(value)}\n"

    def test(self, problem: _Problem) -> str:
        lines = [
            f"    [[ $({problem.name} {' '.join(map(self.literal, given))}) = {self.literal(result)} ]]\n"
            for given, result in problem.cases
        ]
        return f"}}\n\nset -e\nrun_test() {{\n{''.join(lines)}}}\n\nrun_test"


class _Rust(_Dialect):
    comment = "///"
    types: ClassVar = {"int": "isize", "str": "String", "bool": "bool", "ints": "Vec<isize>"}

    def signature(self, problem: _Problem) -> str:
        typed = ", ".join(f"{name}: {self.types[kind]}" for name, kind in problem.parameters.items())
        return f"fn {problem.name}({typed}) -> {self.types[problem.returns]} {{"

    def literal(self, value: Value) -> str:
        return f'String::from("{value}")' if isinstance(value, str) else super().literal(value)

    def items(self, inside: str) -> str:
        return f"vec![{inside}]"

    def test(self, problem: _Problem) -> str:
        lines = self.checks(problem, "    assert_eq!({}, {});\n")
        return f"}}\n\nfn main() {{\n{lines}}}\n"


_DIALECTS: dict[str, _Dialect] = {
    "cpp": _Cpp(), "java": _Java(), "js": _JavaScript(), "perl": _Perl(), "rust": _Rust(), "sh": _Shell(),
}  # fmt: skip
OWN_LANGUAGES = tuple(_DIALECTS)
"""As `megacoder.evaluate.sandbox.languages` names them."""

_SOLUTIONS = {
    "cpp": {
        "common_divisor": "while (b) { long rest = a % b; a = b; b = rest; }\nreturn a;",
        "is_mirrored": "return std::equal(text.begin(), text.end(), text.rbegin());",
        "count_vowels": "return std::count_if(text.begin(), text.end(), [](char c) { return strchr(\"aeiou\", c); });",
        "widest_gap": "long most = 0;\nfor (size_t i = 1; i < items.size(); ++i)\n"
                      "    most = std::max(most, std::labs(items[i] - items[i - 1]));\nreturn most;",
        "running_maximum": "for (size_t i = 1; i < items.size(); ++i) items[i] = std::max(items[i], items[i - 1]);\n"
                           "return items;",
        "halving_steps": "long steps = 0;\nfor (; n != 1; ++steps) n = n % 2 ? 3 * n + 1 : n / 2;\nreturn steps;",
        "shift_letters": "for (char& c : text) c = 'a' + (c - 'a' + places) % 26;\nreturn text;",
        "primes_below": "std::vector<long> found;\nfor (long i = 2; i < n; ++i)\n    if (std::all_of(found.begin(), "
                        "found.end(), [i](long p) { return i % p; })) found.push_back(i);\nreturn found;",
    },
    "java": {
        "common_divisor": "while (b != 0) { long rest = a % b; a = b; b = rest; }\nreturn a;",
        "is_mirrored": "return new StringBuilder(text).reverse().toString().equals(text);",
        "count_vowels": "return text.chars().filter(c -> \"aeiou\".indexOf(c) >= 0).count();",
        "widest_gap": "long most = 0;\nfor (int i = 1; i < items.length; i++)\n"
                      "    most = Math.max(most, Math.abs(items[i] - items[i - 1]));\nreturn most;",
        "running_maximum": "for (int i = 1; i < items.length; i++) items[i] = Math.max(items[i], items[i - 1]);\n"
                           "return items;",
        "halving_steps": "long steps = 0;\nfor (; n != 1; steps++) n = n % 2 == 1 ? 3 * n + 1 : n / 2;\nreturn steps;",
        "shift_letters": "StringBuilder out = new StringBuilder();\nfor (char c : text.toCharArray())\n"
                         "    out.append((char) ('a' + (c - 'a' + places) % 26));\nreturn out.toString();",
        "primes_below": "return java.util.stream.LongStream.range(2, n).filter(i ->\n"
                        "    java.util.stream.LongStream.range(2, i).allMatch(p -> i % p != 0)).toArray();",
    },
    "js": {
        "common_divisor": "while (b) [a, b] = [b, a % b];\nreturn a;",
        "is_mirrored": "return text === [...text].reverse().join('');",
        "count_vowels": "return [...text].filter(c => 'aeiou'.includes(c)).length;",
        "widest_gap": "return items.slice(1).reduce((most, item, i) => Math.max(most, Math.abs(item - items[i])), 0);",
        "running_maximum": "return items.map((_, i) => Math.max(...items.slice(0, i + 1)));",
        "halving_steps": "let steps = 0;\nfor (; n !== 1; steps++) n = n % 2 ? 3 * n + 1 : n / 2;\nreturn steps;",
        "shift_letters": "const shifted = c => String.fromCharCode(97 + (c.charCodeAt(0) - 97 + places) % 26);\n"
                         "return [...text].map(shifted).join('');",
        "primes_below": "const found = [];\nfor (let i = 2; i < n; i++) if (found.every(p => i % p)) found.push(i);\n"
                        "return found;",
    },
    "perl": {
        "common_divisor": "($a, $b) = ($b, $a % $b) while $b;\nreturn $a;",
        "is_mirrored": "return $text eq reverse($text);",
        "count_vowels": "return scalar(() = $text =~ /[aeiou]/g);",
        "widest_gap": "my $most = 0;\nfor my $i (1 .. $#$items) {\n"
                      "    my $gap = abs($items->[$i] - $items->[$i - 1]);\n"
                      "    $most = $gap if $gap > $most;\n}\nreturn $most;",
        "running_maximum": "my $most = $items->[0];\nreturn [map { $most = $_ > $most ? $_ : $most } @$items];",
        "halving_steps": "my $steps = 0;\nfor (; $n != 1; $steps++) { $n = $n % 2 ? 3 * $n + 1 : $n / 2; }\n"
                         "return $steps;",
        "shift_letters": "return join('', map { chr(97 + (ord($_) - 97 + $places) % 26) } split(//, $text));",
        "primes_below": "my @found;\nfor my $i (2 .. $n - 1) { push @found, $i unless grep { $i % $_ == 0 } @found; }\n"
                        "return \\@found;",
    },
    "rust": {
        "common_divisor": "let (mut a, mut b) = (a, b);\nwhile b != 0 { (a, b) = (b, a % b); }\na",
        "is_mirrored": "text.chars().eq(text.chars().rev())",
        "count_vowels": "text.chars().filter(|c| \"aeiou\".contains(*c)).count() as isize",
        "widest_gap": "items.windows(2).map(|pair| (pair[1] - pair[0]).abs()).max().unwrap_or(0)",
        "running_maximum": "let mut most = isize::MIN;\n"
                           "items.iter().map(|item| { most = most.max(*item); most }).collect()",
        "halving_steps": "let (mut n, mut steps) = (n, 0);\n"
                         "while n != 1 { n = if n % 2 == 1 { 3 * n + 1 } else { n / 2 }; steps += 1; }\nsteps",
        "shift_letters": "text.bytes().map(|c| ((c - b'a') as isize + places).rem_euclid(26) as u8 + b'a')"
                         ".map(char::from).collect()",
        "primes_below": "(2..n).filter(|i| (2..*i).all(|p| i % p != 0)).collect()",
    },
    "sh": {
        "common_divisor": "local a=$1 b=$2\nwhile ((b)); do set -- $b $((a % b)); a=$1; b=$2; done\necho $a",
        "is_mirrored": "[[ $(echo \"$1\" | rev) = \"$1\" ]] && echo true || echo false",
        "count_vowels": "local kept=${1//[^aeiou]/}\necho ${#kept}",
        "widest_gap": "local most=0 last= item gap\nfor item in $1; do\n    if [[ -n $last ]]; then\n"
                      "        gap=$((item - last)); gap=${gap#-}; ((gap > most)) && most=$gap\n    fi\n"
                      "    last=$item\ndone\necho $most",
        "running_maximum": "local most= item out=()\nfor item in $1; do\n"
                           "    [[ -z $most ]] && most=$item; ((item > most)) && most=$item\n    out+=($most)\ndone\n"
                           "echo \"${out[*]}\"",
        "halving_steps": "local n=$1 steps=0\nwhile ((n != 1)); do ((n = n % 2 ? 3 * n + 1 : n / 2)); "
                         "((steps += 1)); done\necho $steps",
        "shift_letters": "local letters=abcdefghijklmnopqrstuvwxyz out= i before\nfor ((i = 0; i < ${#1}; i++)); do\n"
                         "    before=${letters%%${1:i:1}*}\n    out+=${letters:(${#before} + $2) % 26:1}\ndone\n"
                         "echo \"$out\"",
        "primes_below": "local out=() i p\nfor ((i = 2; i < $1; i++)); do\n    for p in \"${out[@]}\"; do "
                        "((i % p)) || continue 2; done\n    out+=($i)\ndone\necho \"${out[*]}\"",
    },
}  # fmt: skip


def own_problems(language: str) -> list[dict[str, Any]]:
    """Rows with `right`, a solution, and `wrong`, one answer to every question."""
    dialect = _DIALECTS[language]
    rows = []
    for problem in _PROBLEMS:
        body = "".join(f"    {line}\n" for line in _SOLUTIONS[language][problem.name].split("\n"))
        rows.append({
            "task_id": f"own_{problem.name}", "language": language, "prompt": dialect.prompt(problem),
            "stop_tokens": list(dialect.stop_tokens), "test": dialect.test(problem),
            "right": body + dialect.closing, "wrong": dialect.giving(problem.cases[0][1]),
        })  # fmt: skip
    return rows
