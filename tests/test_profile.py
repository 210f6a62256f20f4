"""The profile of a run: phases that add up, figures checked by hand, any number of ranks, nothing left behind."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command_line import refusal
from plan_memory import ALLOWED, Case, measure
from train_cases import make_case

from megacoder.cli import profile as command
from megacoder.cli.main import main
from megacoder.core.config import parse_args
from megacoder.core.errors import ConfigError
from megacoder.core.rates import known_peak
from megacoder.data.synthetic import SyntheticStream
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.context import ContextParallel
from megacoder.parallel.journal import GroupNote, Journal, Operation
from megacoder.parallel.tensor import TensorParallel
from megacoder.parallel.world import World
from megacoder.train.memory_table import kept_activations
from megacoder.train.op_table import op_table
from megacoder.train.phases import PhaseClock
from megacoder.train.profile import ProfileConfig, profile_on
from megacoder.train.utilization import CONVENTIONS, utilization

ALONE = World(0, 1, 0, torch.device("cpu"), None)
QUICK = ProfileConfig(steps=2, warmup=1, ops=False)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("profile"))


class Ticks:
    """A timer whose marks are 1, 10, 100, ...: every sum of intervals is told apart by its digits."""

    def __init__(self):
        self.marks = [10**power for power in range(30)]

    def mark(self):
        return self.marks.pop(0)

    def seconds(self, first, last):
        return last - first

    def finish(self):
        pass


def test_every_moment_is_in_one_phase():
    journal = Journal()
    clock = journal.listener = PhaseClock(Ticks())
    send = Operation("send", None, GroupNote(journal, (0, 1), "gloo"), peer=1)
    clock.begin_step()  # 1
    journal.at("reading data")  # 10
    journal.at("forward", 0)  # 100
    with send:  # 1e3
        pass  # 1e4: forward again
    journal.at("backward of the input", 0)  # 1e5
    journal.at("backward of the weights", 0)  # 1e6
    journal.at("sums over ranks")  # 1e7
    clock.begin_step()  # 1e8
    journal.at("update")  # 1e9
    clock.end()  # 1e10
    first, second = clock.steps()
    assert first.phases == {
        "other": 9 + (10**8 - 10**7),
        "data": 90,
        "forward": 900 + 90_000,
        "communication": 9_000,
        "backward": 900_000,
        "weight gradients": 9_000_000,
    }
    assert first.operations == {"send": 9_000}
    assert sum(first.phases.values()) == first.seconds == 10**8 - 1
    assert second.phases == {"other": 9 * 10**8, "optimizer": 9 * 10**9}


def test_a_journal_without_a_listener_says_nothing():
    journal = Journal()
    with Operation("send", None, GroupNote(journal, (0, 1), "gloo"), peer=1):
        journal.at("forward")
    assert journal.activity == "forward"


def check_sums(measured, config):
    assert sum(phase.seconds for phase in measured.phases) == pytest.approx(measured.mean_step_seconds, rel=1e-9)
    assert measured.mean_step_seconds <= measured.step_seconds * (1 + 1e-9)
    assert all(phase.seconds <= phase.slowest_seconds * (1 + 1e-9) for phase in measured.phases)
    assert all(phase.seconds > 0 for phase in measured.phases)
    tokens = config.global_batch_size * config.data.stream.seq_length
    assert measured.tokens_per_second * measured.step_seconds == pytest.approx(tokens)
    communication = [phase.seconds for phase in measured.phases if phase.name == "communication"]
    assert sum(measured.operations.values()) == pytest.approx(sum(communication))


def test_one_process_on_the_runs_own_data(case):
    config = case.config("measured")
    measured = profile_on(config, QUICK, ALONE)
    check_sums(measured, config)
    assert [phase.name for phase in measured.phases] == ["data", "forward", "backward", "optimizer", "other"]
    assert measured.step_seconds == pytest.approx(measured.mean_step_seconds, rel=1e-9)
    assert not config.output.exists()
    assert ALONE.journal.listener is None
    assert measured.run["data"] == str(config.data.train[0])
    assert 0 < measured.loss < 10

    model = config.model
    padded = 2 * (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    memory = {row.kind: row.num_bytes for row in measured.memory}
    alignment = 64 * (2 + 4 * model.num_hidden_layers + 2 * model.num_hidden_layers + 1)
    assert 0 <= memory["weights"] - 4 * (model.num_params + padded) <= 4 * alignment
    assert memory["gradients"] == memory["weights"]
    assert memory["moments"] == 2 * memory["weights"]
    # fp32, D = 32, F = 48, H = 4, K = 8, G = 2, so C = 64: two layers and the head, of two sequences of 32 tokens
    layer, head = 4 * (4 * 32 + 64 + 32 + 2 * 48) + 4 * 4 + 8, 4 * 2 * 32 + 4
    assert measured.kept_by_formula == 2 * 32 * (2 * layer + head)
    assert memory["activations and workspaces"] > measured.kept_by_formula
    assert memory["whole process"] > memory["weights"]


def test_what_waits_for_weight_gradients_is_counted_as_kept(case):
    kept = []
    for recompute in ("none", "full"):
        execution = ExecutionConfig(recompute=recompute)
        config = case.config("waiting", parallel=ParallelConfig(schedule="zb-h1"), execution=execution)
        kept.append(kept_activations(config.layout_request, config.layout(1), pp_rank=0, itemsize=4))
    assert kept[0] == 2 * 64 * 4 * (4 * 32 + 64 + 32 + 3 * 48), "inputs and output gradients of all linears"
    head = 64 * (4 * 2 * 32 + 4)
    assert kept[1] == 2 * 64 * 4 * 32 + head, "nothing is postponed, and only the inputs of layers and head are kept"


def test_kept_activations_are_those_of_the_layers_that_each_stage_holds(ranks):
    case = Case(ranks=2, parallel=ParallelConfig(pp=2, schedule="zbv", layers_per_stage=(2, 1, 1, 0)))
    layout = case.request.layout(2)
    for (rank, _), counted in ranks.run(2, measure, case):
        said = kept_activations(case.request, layout, pp_rank=rank, itemsize=4)
        assert said == pytest.approx(counted["activations"], rel=ALLOWED)


def test_plain_blocks_in_bf16_on_random_tokens(case):
    data = {"stream": {"document_masks": True}}
    config = case.config("plain", dtype="bfloat16", execution=ExecutionConfig(block="plain"), data=data)
    measured = profile_on(config, replace(QUICK, synthetic=True), ALONE)
    check_sums(measured, config)
    assert measured.kept_by_formula is None
    memory = {row.kind: row.num_bytes for row in measured.memory}
    assert memory["gradients"] == 2 * memory["weights"]
    assert memory["master weights and moments"] == 5 * memory["weights"]  # of the former the lower halves
    assert measured.run["data"] == "random tokens"


def test_utilization_in_both_conventions_is_the_published_one():
    """The 1.3B model at 4,096 tokens, 62,200 tokens/s on one H100: 63.5% and 55.9%."""
    peak = known_peak("NVIDIA H100 80GB HBM3", torch.bfloat16)
    full, causal = (
        utilization(
            ModelConfig(), 4096, convention=name, tokens_per_second=62_200, num_devices=1, device_peak=peak.flops
        )
        for name in CONVENTIONS
    )
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5504
    products, attention = 6 * (24 * layer + 32256 * 2048), 12 * 24 * 2048 * 4096
    assert full.convention == "full attention (PaLM)"
    assert full.flops_per_token == products + attention
    assert causal.convention == "causal attention"
    assert causal.flops_per_token == products + attention / 2
    assert full.mfu == pytest.approx((products + attention) * 62_200 / 989.4e12)
    assert (full.mfu, causal.mfu) == (pytest.approx(0.635, abs=5e-4), pytest.approx(0.559, abs=5e-4))
    two = utilization(
        ModelConfig(), 4096, convention=full.convention, tokens_per_second=62_200, num_devices=2, device_peak=1e15
    )
    assert two.device_flops == pytest.approx(full.device_flops / 2)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD EPYC 9B14", None),
    ],
)
def test_peaks_by_device_name(name, tflops):
    peak = known_peak(name, torch.bfloat16)
    assert (None if peak is None else peak.flops / 1e12) == tflops
    assert known_peak(name, torch.float32) is None


TINY = ModelConfig(
    vocab_size=100, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=16, vocab_multiple=16,
)  # fmt: skip


def rows_of(dtype=torch.bfloat16, *, model=TINY, **places):
    rows = op_table(
        model, batch=3, sequence=16, dtype=dtype, device=torch.device("cpu"), num_updated=500, budget_seconds=0.0,
        **places,
    )  # fmt: skip
    assert all(row.seconds > 0 and row.rate > 0 for row in rows)
    return {row.name.strip(): row for row in rows}


@pytest.mark.usefixtures("backend")
def test_bytes_and_flops_of_ops_by_hand():
    rows, tokens = rows_of(), 3 * 16
    moved = {name: row.moved_bytes for name, row in rows.items() if row.moved_bytes is not None}
    assert moved == {
        "rms_norm forward": 4 * tokens * 24 * 2 + 4 * tokens + 24 * 2,
        "rms_norm backward": 4 * tokens * 24 * 2 + 4 * tokens + 24 * 2 + 8 * 24,
        "rope": 2 * tokens * 6 * 8 * 2 + 8 * tokens + 4 * 16 * 8,
        "rope backward": 2 * tokens * 8 * 8 * 2 + 8 * tokens + 4 * 16 * 8,
        "swiglu forward": 3 * tokens * 40 * 2,
        "swiglu backward": 6 * tokens * 40 * 2,
        "cross_entropy": 2 * tokens * 112 * 2 + 12 * tokens,
        "adamw": 500 * (5 * 4 + 2 * (2 + 2)),  # of master weights the lower halves, and the bf16 weights
        "gradient norm": 500 * 4,
    }
    of_heads = rows_of(model=replace(TINY, qk_norm=True))
    assert of_heads.keys() - rows.keys() == {"norm and rope", "norm and rope backward"}
    assert of_heads["norm and rope"].moved_bytes == moved["rope"]
    assert of_heads["norm and rope backward"].moved_bytes == moved["rope backward"] + tokens * 6 * 8 * 2
    flops = {name: row.flops for name, row in rows.items() if row.flops is not None}
    pairs = 3 * 4 * 16 * 17 // 2  # of a query and a key that it sees
    weights = 24 * 8 * (4 + 2 * 2) + 4 * 8 * 24 + 2 * 40 * 24 + 40 * 24
    assert flops == {
        "attention forward": 2 * 2 * 8 * pairs,
        "attention backward": 5 * 2 * 8 * pairs,
        "a layer's linears forward": 2 * tokens * weights,
        "input gradients": 2 * tokens * weights,
        "weight gradients": 2 * tokens * weights,
    }
    assert rows_of(torch.float32)["adamw"].moved_bytes == 500 * 7 * 4


def test_ranks_share_the_ops_of_a_layer():
    whole = rows_of(torch.float32)
    half = rows_of(torch.float32, tp=TensorParallel(rank=0, size=2, sequence_parallel=True))
    for name in ("swiglu backward", "attention backward", "weight gradients"):
        assert (half[name].flops or half[name].moved_bytes) == (whole[name].flops or whole[name].moved_bytes) / 2
    assert half["rms_norm forward"].shape == "24 x 24"
    parts = [rows_of(torch.float32, cp=ContextParallel(rank=rank, size=2)) for rank in range(2)]
    assert sum(part["attention forward"].flops for part in parts) == whole["attention forward"].flops


def test_random_tokens_differ_only_by_replica():
    def stream(rank, **settings):
        return SyntheticStream(vocab_size=50, seq_length=8, global_batch_size=6, dp_rank=rank, dp_size=2, **settings)

    first, same, other = (stream(rank).next_batch() for rank in (0, 0, 1))
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == (3, 8)
    assert torch.equal(first.tokens[:, 1:], first.labels[:, :-1])
    assert 0 <= first.tokens.min() <= first.tokens.max() < 50
    assert first.starts is None
    assert stream(0, document_masks=True).next_batch().starts.sum(1).tolist() == [1, 1, 1]


def profile_of_rank(world, config, options):
    measured = profile_on(config, options, world)
    assert world.journal.listener is None
    return measured


@pytest.mark.parametrize(
    ("parallel", "phases"),
    [
        (ParallelConfig(tp=2), {"all-gather", "reduce-scatter", "all-reduce"}),
        (ParallelConfig(pp=2, schedule="zb-h1"), {"send", "receive", "all-reduce"}),
    ],
    ids=["tp=2", "pp=2"],
)
def test_two_ranks(case, ranks, tmp_path, parallel, phases):
    config = case.config("two", parallel=parallel)
    options = replace(QUICK, trace=tmp_path / "trace.json")
    measured, other = ranks.run(2, profile_of_rank, config, options)
    assert measured == other
    check_sums(measured, config)
    assert phases <= measured.operations.keys()
    names = [phase.name for phase in measured.phases]
    assert "communication" in names
    assert ("weight gradients" in names) == (parallel.schedule == "zb-h1")
    assert measured.peak.flops == pytest.approx(2 * measured.matrix_flops)
    assert measured.traces == [str(tmp_path / f"trace-rank-{rank}.json") for rank in range(2)]
    for path in measured.traces:
        with open(path, encoding="utf-8") as file:
            found = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"data", "forward", "backward", "optimizer"} <= found
        assert any(str(name).startswith("communication: ") for name in found)


def test_the_command_without_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shape.toml").write_text(
        'dtype = "float32"\nglobal_batch_size = 2\nmicro_batch_size = 1\n[data.stream]\nseq_length = 16\n[model]\n'
        "vocab_size = 64\nhidden_size = 16\nintermediate_size = 24\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"
        "num_key_value_heads = 2\nhead_dim = 8\nmax_position_embeddings = 16\n"
    )
    options = ["--synthetic", "--steps", "1", "--warmup", "0", "--device", "cpu", "--model.num-hidden-layers", "2"]
    main(["profile", "shape.toml", *options, "--trace", "t.json", "--out", "o.json"])
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 100
    for part in ("full attention (PaLM)", "causal attention", "the float32 matrix rate measured here", "of copy",
                 "swiglu backward", "activations", "other", "kept for backwards"):  # fmt: skip
        assert part in shown.out
    assert "wrote t.json; open it" in shown.err
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.json", "shape.toml", "t.json"]
    saved = json.loads((tmp_path / "o.json").read_text())
    assert {use["convention"] for use in saved["utilization"]} == set(CONVENTIONS)
    assert saved["ops"][0]["share"] == pytest.approx(saved["ops"][0]["per_second"] / saved["copy_bytes"])


def test_two_processes_print_one_json(case):
    words = ["profile", str(case.toml("launched")), "--nproc", "2", "--json", "--no-ops", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "megacoder", *words], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["run"]["ranks"] == 2
    assert {"reduce-scatter", "all-gather"} <= measured["operations"].keys()
    assert measured["ops"] == []
    assert not (case.folder / "launched").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--warmup", "-1"], "--warmup -1: must be at least 0"),
        (["--stepz", "3"], "unknown option '--stepz' (did you mean '--steps'?)"),
        (["--warmpu", "3"], "unknown option '--warmpu' (did you mean '--warmup'?)"),
        (["--model.hidden-sise", "8"], "did you mean '--model.hidden-size'?"),
        (["--trace", "run.toml/t.json"], "--trace run.toml/t.json: cannot be written (/"),
        (["--out", "folder"], "--out folder: cannot be written (it is a folder)"),
        (["--nproc", "two"], "--nproc 'two': expected a whole number"),
        (["--nproc", "0"], "--nproc 0: must be at least 1"),
        (["--parallel.tp", "2"], "needs 2 ranks, only one was started"),
        (["--nproc", "2", "--parallel.tp", "4"], "needs 4 ranks, there are 2"),
        (["--data.tokenizer", "nowhere"], "data.tokenizer = 'nowhere': not there; add --synthetic"),
        (["--data.train", "none/there"], "data.train = 'none/there': not there; add --synthetic"),
    ],
)
def test_mistakes_are_one_line(case, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.toml").write_text(case.toml("refused").read_text())
    assert message in refusal(capsys, "profile", "run.toml", *words, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run.toml"]


def test_the_run_file_is_the_first_argument(capsys):
    with pytest.raises(ConfigError, match="the first argument is the run's TOML file"):
        command.main(["--steps", "3"])
    with pytest.raises(SystemExit):
        command.main(["run.toml", "--help"])
    assert "--synthetic" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="at least 1"):
        parse_args(ProfileConfig, ["--steps", "0"], prog="p")
