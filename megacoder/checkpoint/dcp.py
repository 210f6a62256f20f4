"""Weights that torch.distributed.checkpoint wrote through its Hugging Face storage: safetensors of boxes, no pickle.

`HuggingFaceStorageWriter(save_distributed=True)` leaves a file for each rank, `shard-00001-model-00001-of-00002
.safetensors`, whose metadata says where in the global tensor each of its tensors begins. Nothing lists the files that
should exist: torch's own reader loads those it finds and leaves the rest of a tensor unchanged. Here the boxes must
cover every tensor exactly once, in parts of one dtype. (Consolidated, or saved by one rank, such a folder is an
ordinary Hugging Face one.)

DCP's own storage is not read: its index, `.metadata`, is a pickle, and reading a pickle runs the code in it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacoder.checkpoint.boxes import Box, plan_copies
from megacoder.core.errors import FormatError

__all__ = ["DCP_METADATA", "DCP_SHARDS", "DcpFolder"]

DCP_METADATA = ".metadata"
"""The pickled index of DCP's own storage."""
DCP_SHARDS = "shard-*-model-*.safetensors"
"""Glob pattern of the ranks' files."""


class DcpFolder:
    """The tensors of such a folder by name; has the interface of `megacoder.checkpoint.huggingface.TensorFolder`."""

    def __init__(self, folder: Path) -> None:
        """Raises FormatError naming a file that is not in this format."""
        self.folder = folder
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[Box, Any]]] = {}
        for path in sorted(folder.glob(DCP_SHARDS)):
            try:
                file = safe_open(path, framework="pt")
                offsets = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    box = Box(tuple(map(int, offsets[name]["saved_offsets"])), tuple(part.get_shape()))
                    self._pieces.setdefault(name, []).append((box, part))
            except (OSError, SafetensorError) as error:
                raise FormatError(f"{path}: not readable as safetensors: {error}") from None
            except (KeyError, TypeError, ValueError, RecursionError):
                raise FormatError(f"{path}: its metadata does not say where its tensors belong") from None
            self._files.append(file)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()) -> None:
        """Raises FormatError naming a tensor that is missing, entirely or in part, is stored twice or in several
        dtypes, or is neither in `shapes` nor in `ignored` (names or suffixes).
        """
        known_ends = tuple(ignored)
        for name in self._pieces:
            if name not in shapes and not (known_ends and name.endswith(known_ends)):
                raise FormatError(f"{self.folder}: tensor {name} has no place in the model of config.json")
        for name, shape in shapes.items():
            for box, part in self._pieces.get(name, []):
                if not box.lies_in(shape):
                    raise FormatError(f"{self.folder}: {name} has a part {box}; config.json implies {list(shape)}")
                if part.get_dtype() not in ("F32", "BF16", "F16"):
                    raise FormatError(f"{self.folder}: {name} is stored as {part.get_dtype()}, which cannot be loaded")
            dtypes = sorted({part.get_dtype() for _, part in self._pieces.get(name, [])})
            if len(dtypes) > 1:
                raise FormatError(
                    f"{self.folder}: parts of {name} are stored as {' and '.join(dtypes)}; save it again in one dtype"
                )
            list(self._plan(name, Box.whole(shape)))
        self._shapes = dict(shapes)

    def read(self, name: str) -> Tensor:
        """A complete tensor, one of those that were given to `check`."""
        return self._fill(name, Box.whole(self._shapes[name]))

    def read_rows(self, name: str, chunk_elements: int) -> Iterator[Tensor]:
        """The same in order, in chunks of rows with about `chunk_elements` elements."""
        shape = self._shapes[name]
        step = max(1, chunk_elements // max(1, math.prod(shape[1:])))
        for begin in range(0, shape[0], step):
            rows = min(step, shape[0] - begin)
            yield self._fill(name, Box((begin, *(0 for _ in shape[1:])), (rows, *shape[1:])))

    def _fill(self, name: str, wanted: Box) -> Tensor:
        values: Tensor | None = None
        for overlap, box, part in self._plan(name, wanted):
            found = part[overlap.inside(box)]
            if values is None:
                values = torch.empty(wanted.sizes, dtype=found.dtype)
            values[overlap.inside(wanted)] = found
        return torch.empty(wanted.sizes) if values is None else values

    def _plan(self, name: str, wanted: Box) -> Iterator[tuple[Box, Box, Any]]:
        """(elements, the box that holds them, its slice of a file) that make up `wanted`, each element once."""
        pieces = self._pieces.get(name, [])
        copies = plan_copies([wanted], [box for box, _ in pieces], tensor=f"{self.folder}: {name}", error=FormatError)
        for copy in copies:
            yield copy.overlap, *pieces[copy.source]
