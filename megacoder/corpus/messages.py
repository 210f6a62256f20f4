"""Tasks and their results as JSON, for hosts that exchange files: pure data, nothing that runs when it is read.

A value of a type that JSON lacks is an object with one key that begins with a dot. Dataclasses and errors must be this
package's: they are looked up by name and built from their fields, so that their own checks run; any other name is
refused. Text and paths may hold bytes that are not UTF-8, as file names do.
"""

import dataclasses
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megacoder.core import errors
from megacoder.core.errors import FormatError, MegacoderError

__all__ = ["from_json", "to_json"]

_PACKAGE = "megacoder."


def to_json(value: Any) -> str:
    """The value as JSON; TypeError if it holds anything but data."""
    return json.dumps(_encode(value))


def from_json(text: str) -> Any:
    """What `to_json` was given; FormatError for anything that it does not write."""
    try:
        return _decode(json.loads(text))
    except (ValueError, TypeError, AttributeError, ImportError, RecursionError) as error:
        raise FormatError(f"not a task or a task's result: {error}") from None


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encode(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    kind, content = _parts(value)
    return {f".{kind}": content}


def _parts(value: Any) -> tuple[str, Any]:
    cls = type(value)
    if isinstance(value, Path):
        return "path", str(value)
    if isinstance(value, Counter):
        return "counter", [[_encode(key), count] for key, count in value.items()]
    if cls is dict:
        return "dict", [[_encode(key), _encode(item)] for key, item in value.items()]
    if cls is tuple:
        return "tuple", [_encode(item) for item in value]
    if cls in (set, frozenset):
        return cls.__name__, [_encode(item) for item in sorted(value)]
    if cls is range:
        return "range", [value.start, value.stop, value.step]
    if cls is np.ndarray and value.dtype.kind in "iu":
        return "array", [value.dtype.str, list(value.shape), value.ravel().tolist()]
    if isinstance(value, MegacoderError):
        return "error", [cls.__name__, str(value)]
    if dataclasses.is_dataclass(value) and cls.__module__.startswith(_PACKAGE):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return "dataclass", [cls.__module__, cls.__qualname__, fields]
    raise TypeError(f"a task or result holds {value!r}, which is not plain data")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case ".path":
            return Path(content)
        case ".counter":
            return Counter({_decode(key): count for key, count in content})
        case ".dict":
            return {_decode(key): _decode(item) for key, item in content}
        case ".tuple":
            return tuple(_decode(content))
        case ".set":
            return set(_decode(content))
        case ".frozenset":
            return frozenset(_decode(content))
        case ".range":
            return range(*content)
        case ".array":
            dtype, shape, items = content
            if np.dtype(dtype).kind not in "iu":
                raise ValueError(f"an array of {dtype}")
            return np.array(items, dtype).reshape(shape)
        case ".error":
            name, text = content
            return _of(errors.__name__, name, MegacoderError)(text)
        case ".dataclass":
            module, name, fields = content
            return _of(module, name, object)(**{key: _decode(item) for key, item in fields.items()})
    raise ValueError(f"unknown kind {kind!r}")


def _of(module: str, name: str, base: type) -> Any:
    """The class of that name; ValueError unless it is a dataclass or an error that this package defines."""
    found = getattr(importlib.import_module(module), name) if module.startswith(_PACKAGE) else None
    ours = isinstance(found, type) and found.__module__ == module and issubclass(found, base)
    if not ours or not (base is not object or dataclasses.is_dataclass(found)):
        raise ValueError(f"{module}.{name} is not a class of a task")
    return found
