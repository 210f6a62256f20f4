"""One way to fill a dataclass: its defaults, then a TOML file, then the command line.

Every component owns a frozen keyword-only dataclass beside the class it builds; commands compose them. `tyro` turns
the dataclass into options with dotted names (`--schedule.peak-lr 3e-4`); this module adds what tyro lacks: TOML, the
nearest known key for an unknown one, and errors on one line instead of a drawn box. Both parsers are imported where
they are used: a command may have work to start before.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megacoder.core.errors import ConfigError

__all__ = [
    "check_at_least",
    "check_same",
    "check_seconds",
    "did_you_mean",
    "differences",
    "from_dict",
    "load_toml",
    "nearest",
    "parse_args",
    "parse_known_args",
    "print_help",
    "to_dict",
    "to_toml",
]

T = TypeVar("T")


def parse_args(
    cls: type[T], argv: Sequence[str] | None, *, prog: str, default: T | None = None, beside: type | None = None,
    flat: bool = False,
) -> T:  # fmt: skip
    """Parses `argv` (by default the process's own) into `cls`, a dataclass whose field docstrings become the help text.

    Fields typed `tyro.conf.Positional[...]` are positional. `default` supplies the values that `argv` leaves out.
    `beside` is a dataclass that has already taken its options (see `parse_known_args`); a typo may be of one of these.
    With `flat`, a nested dataclass is a group of options in the help and no part of their names. Raises ConfigError
    with one line for anything that does not parse; `--help` prints and exits with 0.
    """
    config, unknown = parse_known_args(cls, argv, prog=prog, default=default, beside=beside, flat=flat)
    if unknown:
        if unknown[0] in ("true", "false"):
            raise ConfigError(
                f"{unknown[0]!r} after a switch: --name turns it on, --no-name off (in a group --group.no-name); "
                f"{_see_help(prog)}"
            )
        names = [*_options(cls, flat=flat), *(_options(beside) if beside is not None else [])]
        raise ConfigError(f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], names)}; {_see_help(prog)}")
    return config


def parse_known_args(
    cls: type[T], argv: Sequence[str] | None, *, prog: str, default: T | None = None, beside: type | None = None,
    flat: bool = False,
) -> tuple[T, list[str]]:  # fmt: skip
    """Like `parse_args`, and returns the words that are not options of `cls`, for `beside`, if given, to take."""
    import tyro

    words = list(sys.argv[1:] if argv is None else argv)
    markers = (tyro.conf.OmitArgPrefixes,) if flat else ()
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn), _joined_docstrings():
            config, unknown = (
                tyro.cli(cls, args=words, prog=prog, default=default, return_unknown_args=True, config=markers)
                if default is not None
                else tyro.cli(cls, args=words, prog=prog, return_unknown_args=True, config=markers)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        options = _options(cls, flat=flat)
        others = _options(beside) if beside is not None else {}
        said = _missing(drawn.getvalue(), words, {**options, **others}) or _reworded(drawn.getvalue(), words, options)
        raise ConfigError(f"{said}; {_see_help(prog)}") from None
    return config, unknown


def print_help(own: type, cls: type[T], *, prog: str, default: T | None = None) -> typing.NoReturn:
    """Prints the options of two dataclasses, `own` first, whose docstring describes the command; exits with 0.

    `default` has values of `cls` that are shown as its defaults.
    """
    import tyro

    fields = [(name, typing.Annotated[part, tyro.conf.arg(name="")]) for name, part in (("own", own), ("cls", cls))]
    both = dataclasses.make_dataclass("both", fields, namespace={"__doc__": own.__doc__})
    with _joined_docstrings():
        tyro.cli(both, args=["--help"], prog=prog, default=None if default is None else both(own(), default))
    sys.exit()


def load_toml(cls: type[T], path: Path, *, absent: dict[str, Any] | None = None) -> T:
    """Reads `path` into `cls`; ConfigError names the file and the key, value or line at fault.

    `absent` has nested values for keys that the file may leave out although `cls` requires them.
    """
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    return from_dict(cls, _merged(absent or {}, table), where=str(path))


def from_dict(cls: type[T], table: dict[str, Any], *, where: str) -> T:
    """Builds `cls` from nested plain values; unknown keys and wrong types are ConfigErrors that begin with `where`."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
    missing = [
        field.name for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in table
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    return cls(**{key: _coerce(known[key], value, f"{where}: {key}") for key, value in table.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain values that `from_dict` reads back; None fields are left out."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_dict(value)
        elif isinstance(value, Path):
            plain[field.name] = str(value)
        elif isinstance(value, tuple):
            plain[field.name] = [str(item) if isinstance(item, Path) else item for item in value]
        elif value is not None:
            plain[field.name] = value
    return plain


def to_toml(config: Any) -> str:
    """The resolved configuration as TOML, scalars first and one table per nested dataclass."""
    return "\n".join(_toml_lines(to_dict(config), prefix="")) + "\n"


def check_same(old: T, new: T, *, where: str, free: Collection[str], advice: str | Callable[[str], str]) -> None:
    """ConfigError naming the first setting in which two configs of one class differ; `free` names, dotted, may.

    `advice` says what to do, about any setting or about that which it is given.
    """
    difference = next(differences(old, new, free), None)
    if difference is not None:
        key, was, now = difference
        todo = advice if isinstance(advice, str) else advice(key)
        raise ConfigError(f"{where} was made with {key} = {_shown(was)}, not {_shown(now)}; {todo}")


def differences(old: Any, new: Any, free: Collection[str] = (), *, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each setting in which two configs of one class differ, but for those in `free`."""
    for field in dataclasses.fields(old):
        name, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if before == after or name in free:
            continue
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            yield from differences(before, after, free, prefix=f"{name}.")
        else:
            yield name, before, after


def check_at_least(config: Any, least: int, *names: str, prefix: str = "") -> None:
    """ConfigError naming the first of these settings that is below `least`; those that are None are unset."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:  # NaN is not
            raise ConfigError(f"{prefix}{name} = {value}: must be at least {least}")


def check_seconds(name: str, value: float) -> None:
    """ConfigError unless `value`, the setting `name`, is a time-out in seconds, whose milliseconds fit into 32 bits."""
    if not 0 < value <= 2e6:
        raise ConfigError(f"{name} = {value}: must be positive, and at most 2e6 (23 days)")


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name that `name` was most probably meant to be, or None; it may have left out an option's group."""
    known = list(known)
    grouped = [option for option in known if option.rpartition(".")[2] == name.lstrip("-")]
    if grouped:
        return grouped[0]
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: typing.Iterable[str], otherwise: str = "") -> str:
    """Goes behind an unknown `name` in an error: the known name that it was probably meant to be, or `otherwise`."""
    match = nearest(name, known)
    return f" (did you mean {match!r}?)" if match else otherwise


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, dict) and isinstance(above.get(key), dict):
            merged[key] = _merged(value, above[key])
    return merged


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(str(value) if isinstance(value, Path) else value)


def _options(cls: Any, prefix: str = "--", *, flat: bool = False) -> dict[str, Any]:
    """Types of options by name."""
    hints = typing.get_type_hints(cls)
    options: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        option = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(hints[field.name]):
            options |= _options(hints[field.name], prefix if flat else f"{option}.", flat=flat)
        else:
            options[option] = hints[field.name]
    return options


def _coerce(expected: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(expected)
    if origin is typing.Annotated:
        return _coerce(typing.get_args(expected)[0], value, where)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} = {value!r}: expected a table")
        return from_dict(expected, value, where=where)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(expected) if option is not type(None)]
        return _coerce(options[0], value, where) if len(options) == 1 else value
    if origin is typing.Literal:
        if value not in typing.get_args(expected):
            raise ConfigError(f"{where} = {value!r}: expected one of {', '.join(map(repr, typing.get_args(expected)))}")
        return value
    if origin is tuple:
        item_type = typing.get_args(expected)[0]
        if isinstance(value, str) and item_type in (str, Path):  # one item needs no brackets, as on the command line
            value = [value]
        if not isinstance(value, list):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        return tuple(_coerce(item_type, item, where) for item in value)
    if expected is Path and isinstance(value, str):
        return Path(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and (
        not isinstance(value, expected) or (expected is int and isinstance(value, bool))
    ):
        raise ConfigError(f"{where} = {value!r}: expected {expected.__name__}")
    return value


def _toml_lines(table: dict[str, Any], prefix: str) -> list[str]:
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):  # TOML's basic strings escape as JSON does, and also DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


@contextlib.contextmanager
def _joined_docstrings() -> Iterator[None]:
    """Gives tyro the docstrings of fields on one line each; it would keep line breaks before indented lines."""
    import docstring_parser
    from docstring_parser import Docstring, DocstringStyle

    original = docstring_parser.parse_from_object

    def joined(obj: Any, style: DocstringStyle = DocstringStyle.AUTO) -> Docstring:
        docstring = original(obj, style)
        for param in docstring.params:
            param.description = param.description and " ".join(param.description.split())
        return docstring

    docstring_parser.parse_from_object = joined
    try:
        yield
    finally:
        docstring_parser.parse_from_object = original


def _undraw(box: str) -> list[str]:
    """The lines of the first paragraph of an error that tyro draws as a box with a title, or where the terminal's
    encoding is not UTF-8 with a line of hyphens below the title."""
    lines = [line[1:].rstrip(" │") for line in box.splitlines()[1:]]
    edge = re.compile(r"[ ─╰╯-]*")
    return list(itertools.takewhile(lambda line: not edge.fullmatch(line), itertools.dropwhile(edge.fullmatch, lines)))


def _missing(box: str, words: Sequence[str], options: Collection[str]) -> str | None:
    """Which options tyro says are missing, and the first word that is no option; None where it says otherwise.

    `options` are the names of all that there are.
    """
    if "Required options" not in box:
        return None
    paragraph = "\n".join(_undraw(box))
    found = re.findall(r"^ {5}(\S+).*\n((?: {6}.*\n?)*)", paragraph, re.MULTILINE)
    said = [
        name if name.startswith("--") else f"{name} ({' '.join(text.split()).removesuffix(' (required)')})"
        for name, text in found
    ]
    known = {*options, *(re.sub(r"^(--(?:.*\.)?)", r"\1no-", name) for name in options)}  # switches, turned off
    given = (word for word in words if word.startswith("--"))
    unknown = [word for word in given if word.partition("=")[0].replace("_", "-") not in known]
    hints = [f"; unknown option {word!r}{did_you_mean(word, options)}" for word in unknown]
    return f"{', '.join(said)} {'is' if len(said) == 1 else 'are'} missing{''.join(hints[:1])}" if said else None


def _reworded(box: str, words: Sequence[str], options: dict[str, Any]) -> str:
    """What tyro says of an option's value, as `from_dict` would; otherwise what it says, on one line."""
    said = (" ".join(" ".join(_undraw(box)).split()) or box.strip()).removesuffix(".")
    if lacks := re.match(r"Missing value for argument '(--\S+)'", said):
        return f"{lacks[1]} needs a value"
    wrong = re.match(r"Error parsing (--\S+): |invalid choice .* for argument '(--\S+)'", said)
    name = (wrong[1] or wrong[2]) if wrong else ""
    values = _values(name, words)
    check, expected = _check_of(options.get(name))
    value = next((value for value in values if not check(value)), None)
    return said if value is None else f"{name} {value!r}: expected {expected}"


def _values(name: str, words: Sequence[str]) -> list[str]:
    """What follows the option, at its last place."""
    values: list[str] = []
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:
            rest = itertools.takewhile(lambda word: not word.startswith("--"), words[at + 1 :])
            values = [value] if equals else list(rest)
    return values


def _check_of(hint: Any) -> tuple[Callable[[str], bool], str]:
    """Whether a word is a value of this type, and what is expected otherwise; accepts all of a type that it omits."""
    origin, parts = typing.get_origin(hint), [part for part in typing.get_args(hint) if part is not type(None)]
    if origin is typing.Literal:
        return parts.__contains__, f"one of {', '.join(map(repr, parts))}"
    if origin in (types.UnionType, typing.Union, tuple):
        return _check_of(parts[0])
    if hint in (int, float):
        return partial(_is, hint), "a whole number" if hint is int else "a number"
    return lambda _: True, ""


def _is(number: type[int] | type[float], word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return True


def _see_help(prog: str) -> str:
    """Which help to read, as it is typed: `prog` is a usage line that may continue after the command's words."""
    command = itertools.takewhile(re.compile(r"[a-z][a-z0-9-]*").fullmatch, prog.split())
    return f"see {' '.join(command)} --help"
