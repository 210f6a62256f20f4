"""The benchmarks' own machinery: ranks that answer, fail and exit; contenders that train; correct summaries."""

import dataclasses
import json

import bench_ops
import pytest
import torch
from bench_common import append_record, write_record
from bench_gpu import largest_batch
from bench_parallel import Record, summary
from bench_ranks import Answer, ContenderFailed, Ranks
from bench_schedules import Options, published_idle, rows_of
from contenders.entries import CONTENDERS
from contenders.one_gpu import build

from megacoder.core.errors import ConfigError
from megacoder.model.partition import ExecutionConfig
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.simulate import Costs, simulate
from megacoder.train.op_table import op_table

TINY = {
    "batch": 2, "sequence": 16, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 6,
    "num_heads": 2, "num_microbatches": 4,
}  # fmt: skip


def job_of(entry, dtype="float32"):
    return {
        **TINY, "row": entry.row, "dtype": dtype, "variant": entry.variant, "layers_per_stage": entry.layers_per_stage
    }  # fmt: skip


def entry_of(row, name):
    return next(entry for entry in CONTENDERS if (entry.row, entry.name) == (row, name))


@pytest.mark.parametrize("row", ["tp", "pp", "dp"])
def test_ours_lowers_the_loss_and_the_limit_does_the_same_work(row):
    ours = next(entry for entry in CONTENDERS if entry.row == row)
    with Ranks("contenders.megacoder", job_of(ours), size=2) as ranks:
        losses = [ranks.call().results for _ in range(3)]
    assert all(first == second for first, second in losses)
    assert losses[0][0] == pytest.approx(4.16, abs=0.02)  # ln 64
    assert losses[2][0] < losses[0][0]
    with Ranks("contenders.limit", job_of(entry_of(row, "limit")), size=2, backend="apart") as ranks:
        answer = ranks.call()
    assert len(answer.by_rank) == 2
    assert answer.seconds >= max(answer.by_rank)


def test_a_contender_that_cannot_be_built_says_why():
    job = job_of(CONTENDERS[0]) | {"num_heads": 3}
    with pytest.raises(ContenderFailed, match=r"ConfigError: .*head_dim = 5"):
        Ranks("contenders.megacoder", job, size=2)
    with pytest.raises(ContenderFailed, match=r"No module named 'contenders\.nobody'"):
        Ranks("contenders.nobody", job, size=1)


def test_a_call_that_fails_names_the_error_and_ends_the_ranks():
    with Ranks("contenders.torch_ddp", job_of(entry_of("dp", "torch DDP")), size=2) as ranks:
        with pytest.raises(ContenderFailed, match="unexpected keyword argument 'color'"):
            ranks.call(color="red")
        assert all(process.poll() is not None for process in ranks._processes)


@pytest.mark.parametrize("fits", [2, 3, 7, 8, 9, 15, 16, 21])
@pytest.mark.parametrize("bend", [0, 1, -1])
def test_the_largest_batch_is_the_last_that_fits(fits, bend):
    """Whatever the guess, from two sizes, makes of memory that does not grow evenly."""
    tried = []

    def peak(batch):
        tried.append(batch)
        return 100 + 10 * batch + bend * batch * batch // 8 if batch <= fits else None

    largest, found = largest_batch(peak, start=8, capacity=100 + 10 * fits + 9)
    assert largest == fits == max(found)
    assert len(found) >= 2
    assert len(tried) < 25


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen3"])
def test_every_compiled_op_stands_beside_one_of_ours(shape, monkeypatch):
    monkeypatch.setattr(bench_ops.torch, "compile", lambda formula, **_: formula)
    monkeypatch.setattr(bench_ops, "median_seconds", lambda call, device: (call(), 1.0)[1])
    options, cpu = bench_ops.Options(shape=shape, batch=1, sequence=16), torch.device("cpu")
    rows = op_table(
        bench_ops.SHAPES[shape], batch=1, sequence=16, dtype=torch.bfloat16, device=cpu, num_updated=100,
        budget_seconds=0.0,
    )  # fmt: skip
    alone = {"rope backward", "gradient norm"}
    of_memory = {row.name for row in rows if row.moved_bytes is not None}
    assert bench_ops.compiled_peers(options, cpu).keys() == of_memory - alone


@pytest.mark.parametrize("name", ["liger", "plain"])
def test_peers_have_no_norms_of_heads(name):
    with pytest.raises(ConfigError, match=f"{name} has no norms of heads here"):
        build(name, bench_ops.SHAPES["tiny-qwen3"], 16, 1, ExecutionConfig())


def test_too_little_memory_for_two_sequences_is_an_error():
    with pytest.raises(ConfigError, match="two sequences do not fit"):
        largest_batch(lambda batch: 10 if batch == 1 else None, start=8, capacity=15)


def record(name, *seconds, failed=None):
    found = Record(dataclasses.replace(CONTENDERS[0], name=name, module=name))
    found.answers = [Answer(time, (time, time / 2), (time, time), (0, 0), (None, 1.0)) for time in seconds]
    found.losses, found.failed = [5.0, 4.0, 3.0], failed
    return found


def test_summary_compares_within_rounds():
    ours, slow, limit = (
        record("megacoder", 1.0, 4.0, 2.0),
        record("slow", 2.0, 12.0, 8.0),
        record("limit", 0.5, 3.0, 1.0),
    )
    rows = summary([ours, slow, limit, record("absent", failed="not tried")], 1000)
    assert rows["slow"]["tokens_per_second"] == 125.0
    assert rows["slow"]["speed_of_first"] == 3.0
    assert rows["megacoder"]["share_of_limit"] == 0.5
    assert rows["limit"]["share_of_even_limit"] == 0.75
    assert rows["slow"]["loss"] == [5.0, 3.0]
    assert rows["absent"] == {"bf16": "fp32 master", "failed": "not tried"}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_published_idle_equals_simulated_idle_except_for_dualpipev(name):
    schedule = build_schedule(name, num_ranks=4, num_microbatches=8)
    time = 1 / schedule.num_chunks
    stages = schedule.stage_map.num_stages
    costs = Costs.uniform(stages, forward=time, input_grad=time, weight_grad=time)
    simulated = simulate(schedule, costs).idle(0)
    assert published_idle(name, 4) == pytest.approx(2 * simulated if name == "dualpipev" else simulated)


def test_ranks_that_sleep_are_measured(ranks):
    options = Options(schedules=("gpipe", "zbv"), ranks=2, milliseconds=4.0, rounds=1)
    rows = rows_of(ranks, options, 4)
    assert [row["schedule"] for row in rows] == ["gpipe", "zbv"]
    for row in rows:
        assert row["seconds"] > 4 * 3 * 0.004  # no rank can have slept less
        assert 0 < row["idle"] < 1


def test_records_name_the_options_but_no_paths(tmp_path):
    options = Options(ranks=2, out=tmp_path / "out.json")
    write_record(tmp_path / "out.json", machine={"cores": 2}, options=options, results=[1])
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["machine"], written["results"]) == ({"cores": 2}, [1])
    assert (written["options"]["ranks"], "out" in written["options"]) == ("2", False)
    for result in (1, 2):
        append_record(tmp_path / "out.jsonl", ops="torch", options={"batch": 8, "out": tmp_path}, result=result)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"ops": "torch", "options": {"batch": 8}, "result": result} for result in (1, 2)]
