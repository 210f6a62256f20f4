"""RoPE in a config.json, which has several spellings.

transformers 4 reads `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are written, and where a
folder has both they must agree. A reader that misses the scaling silently produces garbage, so anything not understood
is refused here.
"""

import math
from dataclasses import fields
from typing import Any

from megacoder.core.config import did_you_mean, from_dict, to_dict
from megacoder.core.errors import ConfigError, FormatError
from megacoder.model.config import ModelConfig
from megacoder.ops.rope_scaling import READ_BY, RopeScaling, default_attention_factor

__all__ = ["rope_from_huggingface", "rope_to_huggingface"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Keys without which transformers refuses a type of RoPE."""


def rope_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """What config.json says about RoPE."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling.kind != "linear" or config.rope_factor != 1.0:
        own = {name: value for name, value in to_dict(scaling).items() if name in READ_BY[scaling.kind]}
        if "attention_factor" in own:  # under older vLLM's name, too
            own["attn_factor"] = own["attention_factor"] / default_attention_factor(config.rope_factor)
        if own.get("truncate"):  # the default, and a key that older readers do not know
            del own["truncate"]
        rope = {"rope_type": scaling.kind, "factor": config.rope_factor, **own}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope | {"type": scaling.kind},
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }


def rope_from_huggingface(table: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta`, `factor` and `scaling`, a RopeScaling, from wherever config.json has them; absent if nowhere.

    FormatError, beginning with `where`, for anything not understood, and where two places contradict each other.
    """
    _check_rotated(table, where)
    own = ("rope_theta", "original_max_position_embeddings")  # outside both, and shared by them
    found = {key: table[key] for key in own if table.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        if table.get(key) is None:
            continue
        for name, value in _said(table[key], key, where).items():
            if found.setdefault(name, value) != value:
                raise FormatError(f"{where}: {name} is {found[name]!r} in one place and {value!r} in {key}")
    kind = found.pop("kind", "linear")
    settings = {name: found[name] for name in READ_BY[kind] if found.get(name) is not None}
    try:
        found["scaling"] = from_dict(RopeScaling, {"kind": kind, **settings}, where="RoPE")
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from None
    return found


def _said(rope: Any, key: str, where: str) -> dict[str, Any]:
    """What the entry `key` says, as the settings of RopeScaling, its factor and, where it has one, its base."""
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: {key} = {rope!r}: expected an object")
    _check_rotated(rope, where)
    given = {name: value for name, value in rope.items() if value is not None and name != "partial_rotary_factor"}
    types = {str(given.pop(name)) for name in ("rope_type", "type") if name in given} or {"default"}
    if len(types) > 1:
        raise FormatError(f"{where}: {key} is of two types, {' and '.join(map(repr, sorted(types)))}")
    (rope_type,) = types
    if rope_type not in _REQUIRED:
        known = ", ".join(map(repr, _REQUIRED))
        raise FormatError(f"{where}: RoPE of type {rope_type!r}; only {known} can be loaded")
    missing = [name for name in _REQUIRED[rope_type] if name not in given]
    if missing:
        raise FormatError(f"{where}: {key} = {rope!r}: RoPE of type {rope_type!r} needs {' and '.join(missing)}")
    if rope_type == "default":
        return {"factor": 1.0, "kind": "linear", **_understood(given, ("rope_theta",), key, where)}
    if rope_type == "yarn":
        _resolve_attention_factor(given, f"{where}: {key} = {rope!r}")
    settings = READ_BY[rope_type]
    given = _understood(given, ("rope_theta", "factor", *settings), key, where)
    defaults = {field.name: field.default for field in fields(RopeScaling) if field.name in settings}
    return {"factor": given.pop("factor"), "kind": rope_type, **defaults, **given}


def _understood(given: dict[str, Any], known: tuple[str, ...], key: str, where: str) -> dict[str, Any]:
    for name in given:
        if name not in known:
            raise FormatError(f"{where}: {key} has the unknown key {name!r}{did_you_mean(name, known)}")
    return given


def _resolve_attention_factor(given: dict[str, Any], said: str) -> None:
    """Puts `attention_factor` in the place of its other spellings, and nothing where these mean the default.

    DeepSeek's `mscale` and `mscale_all_dim` count where it is absent, as in transformers. Older vLLM reads
    `attn_factor` instead, as a share of the default, which must then mean the same.
    """
    pair = [given.pop(name, 0) for name in ("mscale", "mscale_all_dim")]
    factor, share = given["factor"], given.pop("attn_factor", None)
    if not all(type(value) in (int, float) for value in (*pair, factor, share or 0, given.get("attention_factor", 0))):
        raise FormatError(f"{said}: expected numbers")
    default, mscale, all_dim = (default_attention_factor(factor, scale) for scale in (1, *pair))
    if "attention_factor" not in given and pair not in ([0, 0], [1, 0]):  # these mean the default to all readers
        if min(pair) <= 0:
            raise FormatError(f"{said}: expected both mscale and mscale_all_dim, positive, or none")
        given["attention_factor"] = mscale / all_dim
    if share is not None and not math.isclose(share * default, given.get("attention_factor", default), rel_tol=1e-6):
        raise FormatError(f"{said}: attn_factor, which vLLM reads, means another attention factor than the other keys")


def _check_rotated(table: dict[str, Any], where: str) -> None:
    share = table.get("partial_rotary_factor")
    if share not in (None, 1):
        raise FormatError(f"{where}: partial_rotary_factor = {share!r}; only heads rotated in full (1.0) can be loaded")
