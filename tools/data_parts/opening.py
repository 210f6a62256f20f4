"""A dataset of 100 million documents: seconds and memory from nothing to the first batch, at step 0 and after resuming.

The dataset is synthesised: documents of 64 tokens, whose index is written in full (2 GB) and whose tokens are a hole in
a file. Since all documents are of one length, the data position after any number of steps can be computed; for a few
steps it is compared with the stream's own. Each measurement is a process of its own; its memory is what
`smaps_rollup` calls anonymous, less what the imports had taken.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_parts.corpus import Corpus
from megacoder.core.console import say
from megacoder.core.files import replacing
from megacoder.data.fim import FimConfig
from megacoder.data.indexed import IndexedDataset, bin_path, idx_path
from megacoder.data.stream import Batch, StreamConfig, TokenStream
from megacoder.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bench_data import Options

__all__ = ["measure"]

DOCUMENTS, TOKENS = 100_000_000, 64
WINDOWS, SEQ_LENGTH, STREAMS = 64, 4096, 1024
STEPS = {"at step 0": 0, "at step 20,000": 20_000}  # within the first epoch
CHUNK = 1 << 22


def measure(options: "Options", corpus: Corpus) -> dict[str, dict[str, float | str]]:
    """Medians of processes that open, resume and draw a batch."""
    prefix = corpus.folder / "hundred-million"
    if not idx_path(prefix).exists():
        say(f"{prefix}: synthesising {DOCUMENTS:,} documents")
        _synthesise(prefix)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    IndexedDataset(prefix)  # reads all of the index, into the page cache
    for _ in range(options.rounds):
        for name, step in STEPS.items():
            command = [sys.executable, "-m", "data_parts.opening", str(prefix), str(corpus.tokenizer), str(step)]
            done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    return {
        name: {column: round(statistics.median(run[column] for run in found), 3) for column in found[0]}
        for name, found in runs.items()
    }


def _synthesise(prefix: Path) -> None:
    with replacing(bin_path(prefix)) as path, path.open("wb") as tokens:
        tokens.truncate(2 * TOKENS * DOCUMENTS)
    with replacing(idx_path(prefix)) as path, path.open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08")
        index.write(np.array([DOCUMENTS, DOCUMENTS + 1], "<u8").tobytes())
        for factor, dtype, count in ((0, "<i4", DOCUMENTS), (2 * TOKENS, "<i8", DOCUMENTS), (1, "<i8", DOCUMENTS + 1)):
            for start in range(0, count, CHUNK):
                numbers = np.arange(start, min(start + CHUNK, count), dtype=np.int64)
                index.write((numbers * factor if factor else np.full_like(numbers, TOKENS)).astype(dtype).tobytes())


def _position(start: dict[str, Any], step: int) -> dict[str, Any]:
    """The data position after `step` steps, from that after none."""
    served, streams = step * WINDOWS // STREAMS * SEQ_LENGTH, []
    for stream, dataset, epoch, place, file, offset in start["streams"]:
        documents, tokens = divmod(offset + served, TOKENS + 1)  # with BOS
        streams.append([stream, dataset, epoch, place + documents, file, tokens])
    return {**start, "windows": step * WINDOWS, "streams": streams}


def _open(dataset: IndexedDataset, tokenizer: Tokenizer) -> TokenStream:
    config = StreamConfig(seq_length=SEQ_LENGTH, num_streams=STREAMS, fim=FimConfig(rate=0.0))
    return TokenStream([dataset], tokenizer, config, global_batch_size=WINDOWS, dp_rank=0, dp_size=1)


def _first_batch(prefix: Path, tokenizer: Tokenizer, step: int) -> tuple[TokenStream, Batch, dict[str, float]]:
    """Opens, resumes and draws; the seconds of each."""
    start = time.perf_counter()
    dataset = IndexedDataset(prefix)
    opened = time.perf_counter()
    stream = _open(dataset, tokenizer)
    if step:
        stream.load_state_dict(_position(stream.state_dict(), step))
    ready = time.perf_counter()
    batch = stream.next_batch()
    done = time.perf_counter()
    return stream, batch, {
        "seconds_to_open": opened - start, "seconds_to_resume": ready - opened, "seconds_of_batch": done - ready,
        "seconds": done - start,
    }  # fmt: skip


def _anonymous_megabytes() -> float:
    (line,) = (
        line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:")
    )
    return int(line.split()[1]) / 1024


def main() -> None:
    """One measurement: prefix, tokenizer and step in, JSON out."""
    prefix, tokenizer, step = Path(sys.argv[1]), Tokenizer.load(Path(sys.argv[2])), int(sys.argv[3])
    before = _anonymous_megabytes()
    stream, batch, seconds = _first_batch(prefix, tokenizer, step)
    megabytes = _anonymous_megabytes() - before
    del batch  # which was part of it
    if not step:
        start, few = _open(IndexedDataset(prefix), tokenizer).state_dict(), 3 * STREAMS // WINDOWS
        for _ in range(few - 1):
            stream.next_batch()
        assert stream.state_dict() == _position(start, few), "the position is computed wrong"
    print(json.dumps({**seconds, "private_megabytes": megabytes}))


if __name__ == "__main__":
    main()
