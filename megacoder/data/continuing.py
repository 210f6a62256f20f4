"""Another run's place in the data, for a run that goes on from there with other settings (`init_data`).

A place is four integers for each stream of each dataset (see `megacoder.data.stream`), and nothing in them depends on
batch size, sequence length, ranks, weights or which datasets follow. So these may change, and every dataset goes on
where it was: none of its documents is served twice in an epoch or left out. What decides a dataset's own order (its
number among the datasets, seed, streams) or the length of its files may not. Fill-in-the-middle is between the two: the
file that a stream is in goes on after as many tokens in its new form; with best-fit packing a place is a window of a
group of documents, whose windows depend on the length of windows and files, so that these may not change.
"""

from typing import Any

from megacoder.core.errors import ConfigError
from megacoder.data.stream import STRETCHES, check_version

__all__ = ["continued"]

_ADVICE = "set it back, or leave init_data out"
_FREE = {"datasets", STRETCHES, "weights", "blend_round", "num_streams", "fim", "fim_rates"}
"""Of an order: may differ, or are compared by themselves."""


def continued(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The state to load in a run that goes on after `theirs`, another whole run's; `ours` is this rank's at its start.

    ConfigError where the place means something else in this run's order.
    """
    there, here = theirs["order"], ours["order"]
    for key, kind in (("conversations", "was tuned on conversations"), ("compat", "reads Megatron's order of samples")):
        if key in there:
            raise ConfigError(f"init_data = true: the run of init_from {kind}; leave init_data out")
    check_version(theirs)
    _check_datasets(there["datasets"], here["datasets"])
    for key in [*here, *(key for key in there if key not in here)]:
        if key not in _FREE and here.get(key) != there.get(key):
            name = "data.tokenizer" if key == "tokenizer" else f"data.stream.{key}"
            raise ConfigError(
                f"init_data = true: {name} is {here.get(key)!r}, but the run of init_from has read its data with "
                f"{there.get(key)!r}; {_ADVICE}"
            )
    if here["packing"] == "best_fit":
        _check_fim(there, here)
    for number, (streams, before) in enumerate(zip(here[STRETCHES], there[STRETCHES], strict=False), start=1):
        if streams != before:
            raise ConfigError(
                f"init_data = true: data.stream.num_streams cuts dataset {number} into {streams} streams, but the run "
                f"of init_from has read {before}; {_ADVICE}"
            )
    added = [place for place in ours["streams"] if place[1] >= len(there["datasets"])]
    return {
        "windows": theirs["windows"], "first_window": theirs["windows"], "order": here,
        "streams": [*theirs["streams"], *added],
    }  # fmt: skip


def _check_datasets(before: list[list[int]], now: list[list[int]]) -> None:
    keep = "datasets keep their places (weight 0 in data.weights draws nothing from one), and new ones go to the end"
    if len(now) < len(before):
        raise ConfigError(
            f"init_data = true: data.train has {len(now)} datasets, but the run of init_from has {len(before)}; {keep}"
        )
    for number, (here, there) in enumerate(zip(now, before, strict=False), start=1):
        if here != there:
            raise ConfigError(
                f"init_data = true: dataset {number} of data.train has {here[0]:,} documents and {here[1]:,} tokens, "
                f"but that of the run of init_from {there[0]:,} and {there[1]:,}; {keep}"
            )


def _check_fim(there: dict[str, Any], here: dict[str, Any]) -> None:
    count = len(there["datasets"])
    rates = [order.get("fim_rates") or [order["fim"]["rate"]] * count for order in (here, there)]
    for name, now, before in (("stream.fim", here["fim"], there["fim"]), ("fim_rates", rates[0][:count], rates[1])):
        if now != before:
            raise ConfigError(
                f"init_data = true: data.{name} is {now!r}, but the run of init_from has read its data with "
                f'{before!r}, and packing = "best_fit" packs files as they are served; {_ADVICE}'
            )
