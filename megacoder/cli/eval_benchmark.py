"""`megacoder eval NAME` for published benchmarks: answers of a model, a server or a file, scored in the sandbox."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megacoder.cli.eval_inputs import answers_of, file_content, model_content, settings_of
from megacoder.cli.loading import Following, Loading
from megacoder.core.config import parse_args
from megacoder.core.console import say, table
from megacoder.core.errors import ConfigError, FormatError
from megacoder.core.files import write_json
from megacoder.core.processes import num_cores
from megacoder.evaluate.benchmarks.base import Benchmark, ProgramBenchmark, Settings, Task
from megacoder.evaluate.benchmarks.catalogue import BENCHMARKS
from megacoder.evaluate.benchmarks.completions import CompletionSource, Decoding, FileSource
from megacoder.evaluate.benchmarks.pal import set_of
from megacoder.evaluate.benchmarks.published import published_scores
from megacoder.evaluate.benchmarks.scoring import Notes, Summary, collect, judge, summarize
from megacoder.evaluate.sampling import Sampling
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
    """the benchmark's JSONL file (also .gz, .zst)"""
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
    spm: bool = False
    """infill: ask with the suffix first, for a model trained in that order (data.stream.fim.spm_rate)"""
    samples: int = 1
    """answers per task; several need a temperature"""
    max_new_tokens: Optional[int] = None
    """longest answer in tokens; if unset, the benchmark's own"""
    batch_size: int = 16
    """answers generated at a time; in bf16 another number rounds otherwise, which changes some answers"""
    limit: Optional[int] = None
    """number of tasks to run, from the first; if unset, all"""
    seconds: Optional[float] = None
    """CPU time a program gets, instead of the published limit"""
    workers: Optional[int] = None
    """programs run, or requests sent, at a time; if unset, one per core"""
    unsafe: bool = False
    """run programs with your own rights, for machines where no sandbox works"""
    out: Optional[Path] = None
    """folder for completions and results, one line each; the same command with the same inputs resumes from it. With
    --follow, each checkpoint has a folder in it"""
    json: bool = False
    """print the summary as JSON, with --follow a line per checkpoint"""
    api_model: Optional[str] = None
    """the model's name on the server; if unset, the server's first model"""
    sampling: Sampling = field(default_factory=Sampling)
    loading: Loading = field(default_factory=Loading)
    following: Following = field(default_factory=Following)

    def __post_init__(self) -> None:
        given = [name for name in ("model", "endpoint", "completions") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'none'} given: give exactly one of --model, --endpoint, --completions"
            )
        self.following.check(self.model, self.loading)
        for name in ("samples", "workers", "batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.loading.tp > 1 and self.model is None:
            raise ConfigError(f"--tp {self.loading.tp}: only a --model can be shared by processes, not {given[0]}")
        if self.endpoint is not None and self.sampling.top_k > 0:
            raise ConfigError(f"--top-k {self.sampling.top_k}: OpenAI's interface has no such option; use --top-p")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"--seconds {self.seconds}: must be positive")
        if self.samples > 1 and self.sampling.temperature == 0 and self.completions is None:
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
    args = parse_args(EvalArgs, argv, prog=f"megacoder eval {name}", flat=True)
    if args.spm and (name != "infill" or args.completions is not None):
        raise ConfigError("--spm: only for eval infill, where a --model or an --endpoint is asked")
    benchmark, tasks = _load(name, args)
    finished = None if args.completions is None else FileSource(args.completions)
    if finished is not None:
        args = replace(args, samples=finished.check(tasks))
    tasks = tasks[: args.limit]
    if args.following.follow:
        _follow(name, args, benchmark, tasks)
        return
    model = _resolved(args.model)
    if model is not None:
        _check_loading(args, model)
    tp = None
    if args.loading.tp > 1:
        from megacoder.cli.model_folder import share_model

        tp = share_model(args.loading.tp, ["eval", name, *argv, "--model", str(model)])
        if tp is None:
            return
    open_source = partial(_open_source, args, benchmark, finished=finished, model=model, tp=tp)
    if tp is not None and tp.rank > 0:  # the first rank writes nothing before all have read what is there
        collect(benchmark, tasks, Notes.glance(args.out), open_source=open_source, samples=args.samples, quiet=True)
        return
    summary = _evaluate(name, args, benchmark, tasks, model=model, open_source=open_source, ahead=ahead)
    if args.json:
        print(json.dumps(asdict(summary)))
    else:
        _print(name, summary, benchmark.settings, tasks[0])


def _evaluate(
    name: str, args: EvalArgs, benchmark: Benchmark, tasks: Sequence[Task], *, model: Path | None,
    open_source: Callable[[], CompletionSource], ahead: Launcher | None = None,
) -> Summary:  # fmt: skip
    """Requests and judges what `args.out` does not have yet."""
    with Notes.open(args.out, {} if args.out is None else _identity(name, args, benchmark, model)) as notes:
        if notes.completions:
            say(f"{notes.folder}: {len(notes.completions)} completions, {len(notes.results)} results exist already")
        quiet = args.completions is not None
        collect(benchmark, tasks, notes, open_source=open_source, samples=args.samples, quiet=quiet)
        judge(benchmark, tasks, notes, start_sandbox=partial(_start_sandbox, args, benchmark, ahead))
        summary = summarize(tasks, notes, samples=args.samples)
        if args.out is not None:
            write_json(args.out / "summary.json", asdict(summary))
    return summary


def _follow(name: str, args: EvalArgs, benchmark: Benchmark, tasks: Sequence[Task]) -> None:
    """Scores the checkpoints of the run `args.model`, each with a folder of its own in `args.out`."""
    from megacoder.cli.follow import follow  # imports torch, which scoring a file does not need

    def score(checkpoint: Path) -> dict[str, float]:
        its = replace(args, model=checkpoint, out=None if args.out is None else args.out / answers_of(checkpoint))
        open_source = partial(_open_source, its, benchmark, finished=None, model=checkpoint, tp=None)
        summary = _evaluate(name, its, benchmark, tasks, model=checkpoint, open_source=open_source)
        return {
            f"{metric}/{group}" if group else metric: score
            for group, scores in sorted(summary.scores.items())
            for metric, score in scores.items()
        }

    assert args.model is not None
    settings = _identity(name, args, benchmark, None)
    follow(args.model, args.following.follow_as or name, score, settings=settings, as_json=args.json)


def _load(name: str, args: EvalArgs) -> tuple[Benchmark, list[Task]]:
    """The benchmark, in the language that is asked for or that the data says, and all of its tasks."""
    settings = Settings(
        language=args.language or "python", instruct=args.instruct, shots=args.shots, retrieval=args.retrieval,
        seconds=args.seconds,
    )  # fmt: skip
    benchmark = BENCHMARKS[name](settings)
    tasks = benchmark.load(args.data)
    if args.language is None and (said := tasks[0].row.get("language")):
        benchmark = BENCHMARKS[name](replace(settings, language=str(said)))
        tasks = benchmark.load(args.data)
    if isinstance(benchmark, ProgramBenchmark):
        benchmark.toolchain()  # a missing compiler is named now, not after hours of generation
    return benchmark, tasks


def _resolved(model: Path | None) -> Path | None:
    """The very checkpoint that all ranks will load: a run in progress may have written another by then."""
    if model is None:
        return None
    from megacoder.checkpoint.folders import find_checkpoint
    from megacoder.cli.model_folder import is_checkpoint  # imports torch, which scoring a file does not need

    return find_checkpoint(model) if is_checkpoint(model) else model


def _identity(name: str, args: EvalArgs, benchmark: Benchmark, model: Path | None) -> dict[str, Any]:
    """What scores depend on, with the content of each path and of `model`."""
    files = {"data": args.data, "completions": args.completions, "shots": args.shots}
    contents = {option: file_content(path, option=f"--{option}") for option, path in files.items() if path is not None}
    if model is not None:
        contents["model"] = model_content(model)
    settings = settings_of(name, args, contents, protocol=benchmark.protocol)
    if args.instruct and model is not None and not _why_transformers(model, instruct=True):
        from megacoder.cli.model_folder import chat_format_of

        settings["chat_format"] = str(chat_format_of(model, tokenizer=args.loading.tokenizer).resolved)
    return settings


def _open_source(
    args: EvalArgs, benchmark: Benchmark, *, finished: FileSource | None, model: Path | None,
    tp: "TensorParallel | None",
) -> CompletionSource:  # fmt: skip
    if finished is not None:
        return finished
    max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    decoding = Decoding(sampling=args.sampling, max_new_tokens=max_new_tokens, chat=args.instruct, spm=args.spm)
    if args.endpoint is not None:
        from megacoder.evaluate.benchmarks.endpoint import EndpointSource

        return EndpointSource(
            args.endpoint, decoding, model=args.api_model, tokenizer=args.loading.tokenizer,
            workers=args.workers or num_cores(),
        )  # fmt: skip
    assert model is not None
    from megacoder.cli.model_folder import chat_format_of, load_model  # imports torch
    from megacoder.core.device import probe
    from megacoder.data.chat_format import FormatConfig
    from megacoder.evaluate.benchmarks.local import LocalSource, TransformersSource
    from megacoder.parallel.tensor import ALONE

    if _why_transformers(model, instruct=args.instruct) is not None:
        return TransformersSource(model, decoding, device=probe().device_type)
    loaded, tokenizer = load_model(model, args.loading, tp=tp or ALONE)
    return LocalSource(
        model=loaded, tokenizer=tokenizer, decoding=decoding, batch_size=args.batch_size,
        format=chat_format_of(model, tokenizer=args.loading.tokenizer) if args.instruct else FormatConfig(),
    )  # fmt: skip


def _check_loading(args: EvalArgs, model: Path) -> None:
    """ConfigError for options that are nothing to transformers, where that runs the model."""
    given = {name: value for name, value in vars(args.loading).items() if value != getattr(Loading(), name)}
    reason = _why_transformers(model, instruct=args.instruct) if given else None
    if reason is not None:
        name, value = next(iter(given.items()))
        raise ConfigError(
            f"--{name} {value}: {model} has {reason}, so that transformers runs it as it is stored, in one process; "
            f"leave --{name} out"
        )


_TEMPLATED = ("qwen2", "qwen3", "mistral")
"""Models of makers whose chat templates are not DeepSeek-Coder's."""


def _why_transformers(model: Path, *, instruct: bool) -> str | None:
    """What a Hugging Face folder has that only transformers can run: another architecture, a Mistral's tokenizer or,
    where one of `_TEMPLATED` is asked to `instruct`, another chat template; None for what runs here."""
    from megacoder.checkpoint.huggingface import read_config
    from megacoder.cli.model_folder import is_checkpoint  # imports torch
    from megacoder.data.chat_format import FormatConfig
    from megacoder.data.folder_settings import chat_template_in
    from megacoder.model.huggingface import can_load

    if is_checkpoint(model) or not (model / "config.json").is_file():
        return None
    table = read_config(model)
    template = chat_template_in(model) if instruct and table.get("model_type") in _TEMPLATED else None
    if table.get("model_type") == "mistral" and not _can_use_tokenizer(model):
        return "a tokenizer that is not byte-level BPE"
    if not can_load(table):
        return f"the architecture {(table.get('architectures') or ['none named'])[0]}"
    return "another chat template" if template is not None and FormatConfig.from_jinja(template) is None else None


def _can_use_tokenizer(model: Path) -> bool:
    """Whether the tokenizer of a folder is one of those that can be used here; most of Mistral's are SentencePiece."""
    from megacoder.data.tokenizer import Tokenizer

    try:
        Tokenizer.load(model)
    except FormatError:
        return False
    return True


def _start_sandbox(args: EvalArgs, benchmark: Benchmark, ahead: Launcher | None) -> Sandbox:
    assert isinstance(benchmark, ProgramBenchmark)
    toolchain = benchmark.toolchain()
    preload = benchmark.preload if toolchain.language.name == "python" else ()
    missing = [module for module in preload if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{benchmark.name}: programs need {', '.join(missing)}; install with pip")
    return Sandbox(
        workers=args.workers or num_cores(), mode="unsafe" if args.unsafe else None, preload=preload,
        tools=toolchain.visible, ahead=ahead,
    )  # fmt: skip


def _print(name: str, summary: Summary, settings: Settings, first: Task) -> None:
    """Scores by group, with published ones beside them where there are any; `first` tells the sets of pal apart."""
    language = short_name(settings.language)
    known = published_scores(
        name, language=language, subset=set_of(first.row) if name == "pal" else "", instruct=settings.instruct,
        retrieval=settings.retrieval,
    )  # fmt: skip
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
