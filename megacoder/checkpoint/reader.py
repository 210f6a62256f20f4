"""Loading: any range of any tensor, from a checkpoint written in any layout.

Which rank wrote what does not matter: the boxes wanted are intersected with the boxes stored, the plan must cover
every element wanted exactly once, and only those bytes are read, after their checksums have been verified. A tensor
that is missing, damaged, or of a different shape or dtype is an error that names it. Nothing is filled in, but for the
rows by which tensors have grown that a caller names.
"""

import threading
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacoder.checkpoint.boxes import Box, boxes_of_range, plan_copies
from megacoder.checkpoint.folders import find_checkpoint, folder_faults, open_checkpoint
from megacoder.checkpoint.manifest import MANIFEST, TensorEntry, read_manifest
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.tensor_file import DTYPES, StoredTensor, TensorFile, dtype_name
from megacoder.core.config import did_you_mean
from megacoder.core.errors import CheckpointError
from megacoder.parallel.world import World, failing_together, gather_json

__all__ = ["CHUNK_ELEMENTS", "CheckpointReader", "open_together", "verify_checkpoint"]

CHUNK_ELEMENTS = 1 << 22
"""Elements of a streamed tensor held at a time: 16 MiB in fp32, as much as one checksum covers."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Item size -> a dtype of that width that NumPy has too."""

_READERS = 2
"""Threads that load; their work waits for the disk or runs without the GIL."""

_MOST_MAPPED = 128
"""Files mapped at a time: each mapping holds a file descriptor, and the limit is often 1,024 per process."""


class CheckpointReader:
    """A complete checkpoint, open for reading."""

    def __init__(self, path: Path) -> None:
        """Opens the checkpoint at `path`, or the newest complete one in the folder of checkpoints `path`.

        Raises CheckpointError naming the file when one is missing, cut off or not part of the checkpoint.
        """
        self.folder = find_checkpoint(path)
        self._manifest = open_checkpoint(self.folder)
        self._stored = self._manifest.tensors_by_file()
        self._unchecked = {name: set(range(len(sums.crc32))) for name, sums in self._manifest.files.items()}
        self._mapped: dict[str, TensorFile] = {}
        self._mapping = threading.Lock()

    @property
    def step(self) -> int:
        """Training steps done, those whose update was skipped included."""
        return self._manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What the training loop handed to `save`."""
        return self._manifest.state

    @property
    def layout(self) -> dict[str, Any]:
        """How the run that wrote this was laid out."""
        return self._manifest.layout

    @property
    def files(self) -> dict[str, int]:
        """Name -> bytes."""
        return {name: sums.size for name, sums in self._manifest.files.items()}

    def tensors(self) -> dict[tuple[str, str], TensorEntry]:
        """(kind, name) -> global shape, dtype and pieces."""
        return self._manifest.tensors

    def read(self, fragment: Fragment, *, growing: Container[str] = ()) -> None:
        """Fills `fragment.data`. CheckpointError names a tensor that is missing or differs, or the file at fault.

        A tensor of a name in `growing` may have more rows than the stored one: those of a weight begin as the mean of
        the stored rows, those of moments as zeros.
        """
        what = f"{fragment.kind} of {fragment.name}"
        entry = self._entry(fragment.kind, fragment.name)
        rows, *rest = fragment.global_shape or (0,)
        if fragment.name in growing and tuple(rest) == entry.shape[1:] and rows > entry.shape[0]:
            fragment = self._fill_new_rows(fragment, entry.shape)
        if entry.shape != fragment.global_shape:
            raise CheckpointError(
                f"{self.folder}: {what} has shape {list(entry.shape)}; the model needs {list(fragment.global_shape)}"
            )
        if entry.dtype != dtype_name(fragment.data.dtype):
            raise CheckpointError(
                f"{self.folder}: {what} is stored as {entry.dtype}; requested as {dtype_name(fragment.data.dtype)}"
            )
        host = fragment.data.detach()
        if host.device.type != "cpu":
            host = torch.empty_like(host, device="cpu")
        self._fill(entry, fragment.boxes(), host.view(_INTEGERS[host.itemsize]).numpy(), what)
        if host.device != fragment.data.device:
            fragment.data.detach().copy_(host)

    def read_all(self, fragments: Iterable[Fragment], *, growing: Container[str] = ()) -> None:
        """Fills every fragment (see `read`), several at a time: one is read from disk while another is checked."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="load") as pool:
            for _ in pool.map(partial(self.read, growing=growing), fragments):
                pass

    def stream(self, fragments: Iterable[Fragment]) -> Iterator[Tensor]:
        """The fragments' elements in order, a chunk at a time; the fragments' own data is never touched.

        Each chunk, (elements,), belongs to one fragment and is valid until the next is requested.
        """
        buffers: dict[torch.dtype, Tensor] = {}
        for fragment in fragments:
            dtype = fragment.data.dtype
            if dtype not in buffers:
                buffers[dtype] = torch.empty(CHUNK_ELEMENTS, dtype=dtype)
            for start in range(fragment.start, fragment.stop, CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, fragment.stop)
                chunk = buffers[dtype][: stop - start]
                self.read(replace(fragment, start=start, stop=stop, data=chunk))
                yield chunk

    def whole(self, name: str, kind: str = "weight") -> Fragment:
        """All of a tensor, as a fragment for `stream`."""
        entry = self._entry(kind, name)
        region = Box.whole(entry.shape)
        return Fragment(
            name=name, kind=kind, global_shape=entry.shape, region=region, start=0, stop=region.volume,
            data=torch.empty(region.volume, dtype=DTYPES[entry.dtype], device="meta"),
        )  # fmt: skip

    def read_tensor(self, name: str, kind: str = "weight") -> Tensor:
        """A whole global tensor."""
        whole = self.whole(name, kind)
        values = torch.empty(whole.stop, dtype=whole.data.dtype)
        self.read(replace(whole, data=values))
        return values.view(whole.global_shape)

    def verify(self) -> list[str]:
        """A line for each file with a wrong header or checksum, and for each tensor not covered exactly once."""
        faults = []
        for name in self.files:
            try:
                self._file(name).check_all()
            except CheckpointError as error:
                faults.append(str(error))
        return faults + [f"{self.folder / MANIFEST}: {fault}" for fault in self._manifest.cover_faults()]

    def _fill_new_rows(self, fragment: Fragment, stored: tuple[int, ...]) -> Fragment:
        """Fills the rows of `fragment` that the tensor of shape `stored` lacks; returns the part that is stored."""
        region, data = fragment.region, fragment.data.detach()
        first, end = (min(row, stored[0]) for row in (region.offsets[0], region.ends[0]))
        there = Box((first, *region.offsets[1:]), (end - first, *region.sizes[1:]))
        start, stop = (min(edge, there.volume) for edge in (fragment.start, fragment.stop))
        new = boxes_of_range(region, max(fragment.start, there.volume), max(fragment.stop, there.volume))
        row = self._mean_row(fragment.name) if new and fragment.kind == "weight" else torch.zeros(stored[1:])
        at = stop - start
        for box in new:
            columns = Box(box.offsets[1:], box.sizes[1:]).inside(Box.whole(stored[1:]))
            data[at : at + box.volume].view(box.sizes).copy_(row[columns])
            at += box.volume
        return replace(fragment, global_shape=stored, region=there, start=start, stop=stop, data=data[: stop - start])

    def _mean_row(self, name: str) -> Tensor:
        """The mean of a weight's rows, fp32; summed in fp64 and row by row, with the same bits on every rank."""
        whole = self.whole(name)
        num_rows, *shape = whole.global_shape
        row = whole.stop // num_rows
        step = max(1, CHUNK_ELEMENTS // row) * row
        parts = (
            replace(whole, start=start, stop=stop, data=whole.data[start:stop])
            for start in range(0, whole.stop, step)
            for stop in (min(start + step, whole.stop),)
        )
        total = np.zeros(row)
        for part in self.stream(parts):
            total += part.view(-1, row).float().numpy().sum(axis=0, dtype=np.float64)
        return torch.from_numpy((total / num_rows).astype(np.float32)).view(shape)

    def _file(self, name: str) -> TensorFile:
        with self._mapping:
            if name not in self._mapped:
                if len(self._mapped) == _MOST_MAPPED:
                    self._mapped.pop(next(iter(self._mapped)))
                self._mapped[name] = self._map(name)
            return self._mapped[name]

    def _map(self, name: str) -> TensorFile:
        try:
            return TensorFile(self.folder / name, self._manifest.files[name], self._stored[name], self._unchecked[name])
        except CheckpointError:
            if self.folder.is_dir():
                raise
            raise CheckpointError(
                f"{self.folder}: was removed while it was read, as a run does that keeps only its newest checkpoints; "
                "name a newer one, or make the run keep more (checkpoint.keep_last)"
            ) from None

    def _entry(self, kind: str, name: str) -> TensorEntry:
        entry = self._manifest.tensors.get((kind, name))
        if entry is None:
            known = [known for other, known in self._manifest.tensors if other == kind]
            hint = did_you_mean(name, known, otherwise=f"; it has {len(known)} tensors of kind {kind!r}")
            raise CheckpointError(f"{self.folder / MANIFEST}: no {kind} of {name}{hint}")
        return entry

    def _fill(self, entry: TensorEntry, wanted: list[Box], flat: np.ndarray, what: str) -> None:
        """Fills `flat`, the wanted boxes end to end."""
        ends = np.cumsum([box.volume for box in wanted])
        targets = [
            flat[end - box.volume : end].reshape(box.sizes) for box, end in zip(wanted, ends.tolist(), strict=True)
        ]
        stored = [piece.box for piece in entry.pieces]
        for copy in plan_copies(wanted, stored, tensor=f"{self.folder / MANIFEST}: {what}"):
            piece, target = entry.pieces[copy.source], wanted[copy.target]
            part = Box(
                tuple(a - b for a, b in zip(copy.overlap.offsets, piece.box.offsets, strict=True)), copy.overlap.sizes
            )
            index: Any = (*copy.overlap.inside(target), ...)  # with the ellipsis a 0-d part is a view, too
            stored_tensor = StoredTensor(piece.key, entry.dtype, piece.box.sizes)
            self._file(piece.file).read(stored_tensor, part, targets[copy.target][index])


def open_together(path: Path, world: World) -> CheckpointReader:
    """On every rank the checkpoint that the first one finds at `path`: between two looks a run may publish a newer one.

    Raises AlikeOnAllRanks where any rank cannot open it.
    """
    with failing_together(world):
        found = str(find_checkpoint(path)) if world.is_first else None
    folder = gather_json(found, world)[0]
    with failing_together(world):
        return CheckpointReader(Path(folder))


def verify_checkpoint(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, a line for each file or tensor at fault; empty when nothing is.

    Reads every byte, but opens the files only if all of them are there.
    """
    try:
        faults = folder_faults(folder, read_manifest(folder / MANIFEST))
        return faults or CheckpointReader(folder).verify()
    except CheckpointError as error:
        return [str(error)]
