"""`megacoder eval NAME` for published benchmarks: answers of a model, a server or a file, scored in the sandbox."""

import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from megacoder.cli.eval_inputs import file_content, model_content
from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError
from megacoder.core.files import write_json
from megacoder.evaluate.benchmarks.base import Benchmark, ProgramBenchmark, Settings, Task
from megacoder.evaluate.benchmarks.catalogue import BENCHMARKS
from megacoder.evaluate.benchmarks.completions import CompletionSource, Decoding, FileSource
from megacoder.evaluate.benchmarks.published import published_scores
from megacoder.evaluate.benchmarks.scoring import Notes, Summary, collect, judge, summarize
from megacoder.evaluate.sandbox.host import Launcher, Sandbox
from megacoder.evaluate.sandbox.languages import short_name

if TYPE_CHECKING:  # it imports torch, which scoring a file does not need
    from megacoder.parallel.tensor import TensorParallel

__all__ = ["crosscode", "ds1000", "humaneval", "infill", "leetcode", "mbpp", "pal"]


# `Optional[X]`, since at the first `X | None` tyro imports a type checker, which takes as long as ten programs.
@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Score a benchmark by its published protocol, on a data file that you provide."""

    data: Path
    """the benchmark's JSONL file"""
    model: Optional[Path] = None
    """answers from this Hugging Face folder, run or checkpoint"""
    endpoint: Optional[str] = None
    """answers from a server with OpenAI's interface, such as http://localhost:8000/v1; OPENAI_API_KEY is its key"""
    completions: Optional[Path] = None
    """answers from a JSONL file of task_id and completion; several samples are several lines per task"""
    language: Optional[str] = None
    """language of the programs; if unset, what the data says, else python"""
    instruct: bool = False
    """ask in the format that the model was tuned with and take the answer's code block"""
    shots: Optional[Path] = None
    """file of worked examples; pal needs one"""
    retrieval: bool = False
    """crosscode: put the code retrieved from other files into the prompt"""
    samples: int = 1
    """answers per task"""
    temperature: float = 0.0
    """0 takes the likeliest token; several samples need more than 0"""
    top_k: int = 0
    """draw from this many likeliest tokens; 0 draws from all"""
    top_p: float = 1.0
    """draw from the fewest tokens whose probabilities sum to this"""
    seed: int = 0
    """the same seed draws the same answers"""
    max_new_tokens: Optional[int] = None
    """longest answer in tokens; if unset, the benchmark's own"""
    batch_size: int = 16
    """answers generated at a time"""
    limit: Optional[int] = None
    """number of tasks to run, from the first; if unset, all"""
    seconds: Optional[float] = None
    """CPU time a program gets, instead of the published limit"""
    workers: int = os.cpu_count() or 1
    """programs run, or requests sent, at a time"""
    unsafe: bool = False
    """run programs with your own rights, for machines where no sandbox works"""
    out: Optional[Path] = None
    """folder for completions and results, one line each; the same command with the same inputs resumes from it"""
    json: bool = False
    """print the summary as JSON"""
    api_model: Optional[str] = None
    """the model's name on the server; if unset, the server's first model"""
    tokenizer: Optional[Path] = None
    """folder with tokenizer.json, to count a server's prompts near a limit too; if unset, the model's"""
    tp: int = 1
    """tensor-parallel processes that share the model"""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """dtype to compute in; stored: the model's own"""

    def __post_init__(self) -> None:
        given = [name for name in ("model", "endpoint", "completions") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'none'} given: give exactly one of --model, --endpoint, --completions"
            )
        for name in ("samples", "workers", "batch_size", "limit", "max_new_tokens", "tp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.tp > 1 and self.model is None:
            raise ConfigError(f"--tp {self.tp}: only a --model can be shared by processes, not {given[0]}")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"--seconds {self.seconds}: must be positive")
        if self.samples > 1 and self.temperature == 0 and self.completions is None:
            raise ConfigError(f"--samples {self.samples}: greedy answers are all the same; give a --temperature")


def run(name: str, argv: Sequence[str]) -> None:
    """Scores one benchmark."""
    with _started_ahead(BENCHMARKS[name], argv) as ahead:
        _run(name, argv, ahead)


def _started_ahead(kind: type[Benchmark], argv: Sequence[str]) -> AbstractContextManager[Launcher | None]:
    """The launcher of Python programs, loading while options are read; None if they come later, or are not Python."""
    if issubclass(kind, ProgramBenchmark) and "--completions" in argv and "--language" not in argv:
        return closing(Launcher.ahead(kind.preload))
    return nullcontext()


def _run(name: str, argv: Sequence[str], ahead: Launcher | None) -> None:
    args = parse_args(EvalArgs, argv, prog=f"megacoder eval {name}")
    kind = BENCHMARKS[name]
    settings = Settings(
        language=args.language or "python", instruct=args.instruct, shots=args.shots, retrieval=args.retrieval,
        seconds=args.seconds,
    )  # fmt: skip
    benchmark = kind(settings)
    tasks = benchmark.load(args.data)
    if args.language is None and (said := tasks[0].row.get("language")):
        benchmark = kind(replace(settings, language=str(said)))
        tasks = benchmark.load(args.data)
    if isinstance(benchmark, ProgramBenchmark):
        benchmark.toolchain()  # a missing compiler is named now, not after hours of generation
    samples = args.samples
    if args.completions is not None:
        ready = FileSource(args.completions)
        samples = ready.check(tasks)
    tasks = tasks[: args.limit]
    tp = None
    fixed = {key: str(value) for key, value in asdict(args).items() if key not in _FREE} | {"samples": str(samples)}
    args = replace(args, model=_resolved(args.model))
    if args.tp > 1:
        from megacoder.cli.model_folder import share_model

        tp = share_model(args.tp, ["eval", name, *argv, "--model", str(args.model)])
        if tp is None:
            return
        if tp.rank > 0:
            _follow(args, benchmark, tasks, tp)
            return
    contents: dict[str, str] = {}
    if args.out is not None:
        contents = _contents(args)
    judged = {"benchmark": name, "protocol": kind.protocol, **fixed}
    with Notes.open(args.out, judged, contents=contents) as notes:
        _resume_note(notes)
        if any((task.id, sample) not in notes.completions for task in tasks for sample in range(samples)):
            source = ready if args.completions is not None else _source(args, benchmark, tp)
            collect(benchmark, tasks, source, notes, samples=samples, quiet=args.completions is not None)
        judge(benchmark, tasks, notes, start_sandbox=partial(_start_sandbox, args, benchmark, ahead))
        summary = summarize(tasks, notes, samples=samples)
        if args.out is not None:
            write_json(args.out / "summary.json", asdict(summary))
    if args.json:
        print(json.dumps(asdict(summary)))
    else:
        _print(name, summary, benchmark.settings)


def _follow(args: EvalArgs, benchmark: Benchmark, tasks: Sequence[Task], tp: "TensorParallel") -> None:
    """Generates what the first rank does, which writes nothing before all ranks have read what is there."""
    notes = Notes.glance(args.out)
    if any((task.id, sample) not in notes.completions for task in tasks for sample in range(args.samples)):
        collect(benchmark, tasks, _source(args, benchmark, tp), notes, samples=args.samples, quiet=True)


_FREE = ("workers", "unsafe", "out", "json", "batch_size", "endpoint", "tp")
"""Options that change no result, so that an evaluation may resume with different ones."""


def _resolved(model: Path | None) -> Path | None:
    """The very checkpoint that all ranks will load: a run in progress may have written another by then."""
    if model is None:
        return None
    from megacoder.checkpoint.folders import find_checkpoint
    from megacoder.cli.model_folder import is_checkpoint  # imports torch, which scoring a file does not need

    return find_checkpoint(model) if is_checkpoint(model) else model


def _contents(args: EvalArgs) -> dict[str, str]:
    """The content of each path that scores depend on."""
    files = {"data": args.data, "completions": args.completions, "shots": args.shots}
    found = {name: file_content(path, option=f"--{name}") for name, path in files.items() if path is not None}
    if args.model is not None:
        found["model"] = model_content(args.model)
    if args.tokenizer is not None:
        found["tokenizer"] = file_content(args.tokenizer / "tokenizer.json", option="--tokenizer")
    return found


def _resume_note(notes: Notes) -> None:
    if notes.completions:
        say(f"{notes.folder}: {len(notes.completions)} completions, {len(notes.results)} results exist already")


def _source(args: EvalArgs, benchmark: Benchmark, tp: "TensorParallel | None") -> CompletionSource:
    decoding = Decoding(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed, chat=args.instruct,
        max_new_tokens=args.max_new_tokens or benchmark.max_new_tokens,
    )  # fmt: skip
    if args.endpoint is not None:
        from megacoder.evaluate.benchmarks.endpoint import EndpointSource

        return EndpointSource(
            args.endpoint, decoding, model=args.api_model, tokenizer=args.tokenizer, workers=args.workers
        )
    assert args.model is not None
    from megacoder.checkpoint.huggingface import read_config
    from megacoder.cli.model_folder import chat_format_of, is_checkpoint, load_model  # imports torch
    from megacoder.core.device import probe
    from megacoder.data.chat_format import FormatConfig
    from megacoder.evaluate.benchmarks.local import LocalSource, TransformersSource
    from megacoder.parallel.tensor import ALONE

    if (args.model / "config.json").is_file() and not is_checkpoint(args.model):
        architectures = read_config(args.model).get("architectures") or ["none named"]
        if architectures != ["LlamaForCausalLM"] and tp is not None:
            raise ConfigError(f"--tp {args.tp}: {args.model} is {architectures[0]}, which runs on one process only")
        if architectures != ["LlamaForCausalLM"]:
            return TransformersSource(args.model, decoding, device=probe().device_type)
    model, tokenizer = load_model(args.model, args.dtype, tokenizer=args.tokenizer, tp=tp or ALONE)
    return LocalSource(
        model=model, tokenizer=tokenizer, decoding=decoding, batch_size=args.batch_size,
        format=chat_format_of(args.model, tokenizer=args.tokenizer) if args.instruct else FormatConfig(),
    )  # fmt: skip


def _start_sandbox(args: EvalArgs, benchmark: Benchmark, ahead: Launcher | None) -> Sandbox:
    assert isinstance(benchmark, ProgramBenchmark)
    toolchain = benchmark.toolchain()
    preload = benchmark.preload if toolchain.language.name == "python" else ()
    missing = [module for module in preload if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{benchmark.name}: programs need {', '.join(missing)}; install with pip")
    return Sandbox(
        workers=args.workers, mode="unsafe" if args.unsafe else None, preload=preload, tools=toolchain.visible,
        ahead=ahead,
    )  # fmt: skip


def _print(name: str, summary: Summary, settings: Settings) -> None:
    """Scores by group, with published ones beside them."""
    language = short_name(settings.language)
    known = published_scores(name, language=language, instruct=settings.instruct, retrieval=settings.retrieval)
    metrics = list(summary.scores[""])
    groups = sorted(summary.scores, key=lambda group: (group == "", group))
    rows = [
        [
            group or "all",
            f"{summary.group_sizes[group]:,}",
            *(f"{summary.scores[group][metric]:.1%}" for metric in metrics),
            *(f"{scores[group]:.1f}%" if group in scores else "" for scores in known.values()),
        ]
        for group in groups
    ]
    title = name if name != "humaneval" else f"humaneval, {language}"
    table(title, ["", "tasks", *metrics, *(f"DeepSeek-Coder {model}" for model in known)], rows)
    if summary.verdicts:
        print(", ".join(f"{count:,} {verdict}" for verdict, count in sorted(summary.verdicts.items())))


humaneval, mbpp, leetcode, ds1000 = (partial(run, name) for name in ("humaneval", "mbpp", "leetcode", "ds1000"))
pal, infill, crosscode = (partial(run, name) for name in ("pal", "infill", "crosscode"))
