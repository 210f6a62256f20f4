"""A checkpoint written by one process, rank file by rank file, from tensors streamed a chunk at a time.

Resharding and importing share this: neither holds more than a chunk, whatever the size of the model, and both leave a
complete checkpoint or none.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megacoder.checkpoint.commit import commit, rank_file_name, write_part
from megacoder.checkpoint.folders import discard, step_name, temporary_for
from megacoder.checkpoint.rank_file import Fragment, bytes_of, plan_rank_file
from megacoder.core.errors import CheckpointError, ConfigError

__all__ = ["write_offline"]


def write_offline(
    root: Path,
    step: int,
    ranks: Iterable[Sequence[Fragment]],
    stream: Callable[[Sequence[Fragment]], Iterator[Tensor]],
    *,
    num_ranks: int,
    layout: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Adds the checkpoint of `step` to the folder of checkpoints `root` and returns it; `latest` then names it, or a
    later one.

    `ranks` lists what each of `num_ranks` ranks holds, as fragments without data, and `stream` yields their elements in
    order. Raises ConfigError where that step exists already, CheckpointError where writing fails.
    """
    final = root / step_name(step)
    if final.exists():
        raise ConfigError(f"{final} exists already; choose another folder, or remove it first")
    was_there = root.exists()
    root.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(root, step, f"{secrets.randbits(48):012x}")
    temporary.mkdir()
    try:
        for rank, fragments in enumerate(ranks):
            file = rank_file_name(rank, num_ranks)
            plan = plan_rank_file(file, fragments)
            data = (bytes_of(chunk) for chunk in stream(plan.fragments))
            write_part(temporary, file, plan, data, step=step, layout=layout, state=state)
        return commit(temporary, num_ranks, timeout_seconds=0.0)
    except OSError as error:
        raise CheckpointError(f"{final} was not written: {error.filename or root}: {error.strerror}") from None
    finally:
        discard(temporary)  # does nothing if all went well: it has been renamed
        if not was_there:
            with contextlib.suppress(OSError):  # fails if all went well: the folder is not empty
                root.rmdir()
