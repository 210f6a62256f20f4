"""The training loop: the same run for any number of ranks, resumed equals uninterrupted, stops cleanly."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import flip_a_byte, state_of
from command_line import refusal, run_command, wait_until
from kill_test import descendants
from train_cases import ALONE, changed, leave, losses_of, make_case, run, run_to, scalars, stop_in

from megacoder.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import from_dict, load_toml, to_dict
from megacoder.core.errors import AlikeOnAllRanks, ConfigError, FormatError, MegacoderError
from megacoder.core.rates import Peak
from megacoder.data.fim import FimConfig
from megacoder.data.megatron_stream import MegatronStream
from megacoder.data.sidecar import fingerprint, open_dataset
from megacoder.data.stream import TokenStream
from megacoder.model.init import init_weights
from megacoder.model.transformer import Transformer, weight_pieces
from megacoder.ops.rope_scaling import RopeScaling
from megacoder.parallel.config import ParallelConfig
from megacoder.train.config import RunConfig
from megacoder.train.launch import how_it_ended
from megacoder.train.loop import Interrupted, Trainer, train
from megacoder.train.metrics_log import MetricsLog, read_metrics
from megacoder.train.report import write_run_report
from megacoder.train.run_folder import check_same_run, open_start
from megacoder.train.schedule import ScheduleConfig, learning_rate
from megacoder.train.setup import load_tokenizer, open_stream, resolve_dtype, threads_of_a_rank
from megacoder.train.utilization import CONVENTIONS, utilization
from megacoder.train.validation import set_names

GOING_ON = "with init_from = '.*alone', init_optimizer = true, init_data = true$"
NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
TIMES = {"tokens_per_second", "tflops_per_device", "memory_gib", "checkpoint_seconds", "data_seconds"}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("run"))


def curve(folder):
    """Everything that is logged but times."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.partition("/")[0] not in TIMES} for row in rows]


def command(toml, *arguments, nproc=2):
    return [sys.executable, "-m", "megacoder", "train", str(toml), "--nproc", str(nproc), *arguments]


def launch(toml, *arguments, nproc=2):
    words = command(toml, *arguments, nproc=nproc)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)


def wait_for_steps(folder):
    """Until a run has logged three."""
    wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3, 200)


@pytest.fixture(scope="module")
def alone(case):
    """The uninterrupted run in this process."""
    config = case.config("alone")
    train(config)
    return config.output


def test_freed_memory_is_given_back_when_the_engine_is_built_and_after_its_first_update(case, monkeypatch):
    given_back = []
    monkeypatch.setattr("megacoder.train.engine.return_freed_memory", lambda: given_back.append(True))
    trainer = Trainer(case.config("given-back"), ALONE)
    counts = [len(given_back)]
    for _ in range(3):
        trainer.update()
        counts.append(len(given_back))
    assert counts == [1, 2, 2, 2]


def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(case):
    toml = case.toml("orphaned", steps=100_000, checkpoint_every=100_000, eval_every=100_000)
    launcher = subprocess.Popen(command(toml), stderr=subprocess.PIPE, text=True)
    output = case.folder / "orphaned"
    wait_for_steps(output)
    ranks = descendants(launcher.pid)
    launcher.kill()
    _, said = launcher.communicate(timeout=60)  # at the end of what the ranks say
    assert "torchrun has exited; the rank stops as on a signal" in said
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    reached = CheckpointReader(output / "checkpoints").step
    assert reached == read_metrics(output / "metrics.jsonl")[-1]["step"]


def test_all_options_may_change_before_the_first_step(case):
    config = case.config("nothing-done")
    Trainer(config, ALONE).folder.finish()
    other = case.config("nothing-done", seed=7)
    trainer = Trainer(other, ALONE)
    assert load_toml(RunConfig, config.output / "run.toml").seed == 7
    trainer.folder.finish()
    train(other)
    with pytest.raises(ConfigError, match="was made with seed = 7, not 8; set it back, or choose another output"):
        train(case.config("nothing-done", seed=8))


def test_a_second_run_in_a_folder_is_refused_on_every_rank(case):
    trainer = Trainer(case.config("taken"), ALONE)
    done = launch(case.toml("taken"))
    trainer.folder.finish()
    assert done.returncode == 1
    assert done.stderr.count("another run is working here") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(f"{NO_MEMORY}\nmore"), f"out of memory: {NO_MEMORY}"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory: CUDA out of memory."),
        (MemoryError(), "out of memory"),
    ],
    ids=["host", "gpu", "python"],
)
def test_out_of_memory_is_one_line(error, line, case, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr("megacoder.cli.train.train", fail)
    said = refusal(capsys, "train", case.toml("too-large"))
    assert said == f"megacoder: {line}; `megacoder plan` says what a model and its batches need\n"


def test_a_run_learns_and_logs(alone):
    rows = read_metrics(alone / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    held_out = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert list(held_out) == [1, 4, 8]
    assert held_out[8] < held_out[1]
    assert rows[-1]["tokens"] == 8 * 8 * 32
    assert CheckpointReader(alone / "checkpoints").step == 8


def test_tensorboard_reads_the_log(alone):
    rows = read_metrics(alone / "metrics.jsonl")
    assert scalars(alone, "loss") == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]


@pytest.fixture(scope="module")
def three_sets(case, alone):
    """The run with two more held-out sets, of which one has the name of the first."""
    other = case.folder / "other"
    other.mkdir()
    for path in case.folder.glob("train.*"):
        (other / path.with_stem("valid").name).write_bytes(path.read_bytes())
    config = case.config("three-sets", data={"valid": (case.folder / "valid", other / "valid", case.folder / "train")})
    train(config)
    return config


def test_each_held_out_set_has_a_loss_and_their_mean_is_the_held_out_loss(case, alone, three_sets, capfd):
    first = f"{case.folder.name}/valid"
    names = [f"held_out_loss/{name}" for name in (first, "other/valid", "train")]
    rows = [row for row in read_metrics(three_sets.output / "metrics.jsonl") if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [1, 4, 8]
    for row, other in zip(rows, [row for row in curve(alone) if "held_out_loss" in row], strict=True):
        losses = [row[name] for name in names]
        assert row["held_out_loss"] == pytest.approx(sum(losses) / 3)
        assert losses[0] == other["held_out_loss"], "a single set is logged under that name alone"
        assert losses[1] == losses[2] < losses[0], "those trained on"
    assert not any("/" in key for row in curve(alone) for key in row), "a single set's loss has no name"

    for name in ("held_out_loss", *names):
        logged = [value for _, value in scalars(three_sets.output, name)]
        assert logged == pytest.approx([row[name] for row in rows])
    capfd.readouterr()
    repeated = dataclasses.replace(three_sets, output=case.folder / "said", steps=1)
    train(repeated)
    (row,) = read_metrics(repeated.output / "metrics.jsonl")
    said = ", ".join(f"{name.partition('/')[2]} {row[name]:.4f}" for name in names)
    assert f"step 1: held-out loss {row['held_out_loss']:.4f} ({said})\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["data/heldout"], ["heldout"]),
        (["data/python", "more/java"], ["python", "java"]),
        (["python/heldout", "java/heldout", "go"], ["python/heldout", "java/heldout", "go"]),
        (["a/x/y", "b/x/y", "a/y"], ["a/x/y", "b/x/y", "a/y"]),
        (["x/a/b", "a/b", "/b"], ["x/a/b", "a/b", "//b"]),
        ([], []),
    ],
)
def test_held_out_sets_are_named_by_what_tells_their_paths_apart(prefixes, names):
    assert set_names(list(map(Path, prefixes))) == names


def test_one_held_out_set_needs_no_brackets_and_none_is_named_twice(case):
    table = to_dict(case.config("sets"))
    table["data"]["valid"] = "data/heldout"
    assert from_dict(RunConfig, table, where="run.toml").data.valid == (Path("data/heldout"),)
    table["data"]["valid"] = ["data/heldout", "./data/heldout"]
    with pytest.raises(ConfigError, match=r"data.valid = \['data/heldout', 'data/heldout'\]: names a dataset twice"):
        from_dict(RunConfig, table, where="run.toml")


def test_the_report_shows_each_held_out_set(three_sets, case, capsys):
    assert run_command(capsys, "report", three_sets.output, "--out", case.folder / "sets.html")[0] == 0
    text = (case.folder / "sets.html").read_text()
    row = read_metrics(three_sets.output / "metrics.jsonl")[-1]
    for name in (f"{case.folder.name}/valid", "other/valid"):
        assert f">{name}</text>" in text
        assert re.search(rf">{name}</td>.*{row[f'held_out_loss/{name}']:.3f} at 8</td>", text)


def test_the_same_seed_gives_the_same_bits(case, alone):
    config = case.config("again")
    train(config)
    assert curve(config.output) == curve(alone)


def test_two_ranks_under_torchrun_equal_one_process(case, alone):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [*torchrun, "megacoder", "train", str(case.toml("two"))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for ours, reference in zip(curve(case.folder / "two"), curve(alone), strict=True):
        assert ours == {key: pytest.approx(value, rel=2e-5) for key, value in reference.items()}
    found = state_of(case.folder / "two")
    for key, reference in state_of(alone).items():
        assert (found[key] - reference).norm() <= 1e-4 * reference.norm() + 1e-9, key


def test_microbatches_do_not_change_the_run(case, alone):
    config = case.config("whole", micro_batch_size=8)
    train(config)
    for ours, reference in zip(curve(config.output), curve(alone), strict=True):
        assert ours == {key: pytest.approx(value, rel=2e-5) for key, value in reference.items()}


@pytest.mark.parametrize("stop_at", [2, 4, 5])  # a held-out loss is due in step 4, and measured on resuming
def test_stopped_and_resumed_equals_uninterrupted(case, alone, stop_at):
    config = case.config(f"stopped-{stop_at}")
    trainer = Trainer(config, ALONE)
    stop_in(trainer, stop_at)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_at} "):
        trainer.run()
    assert CheckpointReader(config.output / "checkpoints").step == stop_at, "what it says it wrote is on disk by now"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [row["step"] for row in curve(config.output)] == list(range(1, stop_at + 1))
    train(config)
    assert curve(config.output) == curve(alone)
    found = state_of(config.output)
    assert all(torch.equal(found[key], tensor) for key, tensor in state_of(alone).items())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_a_step_stops_the_run_after_that_step(case, monkeypatch, capfd, name):
    trainer = Trainer(case.config(f"{name}-in-step"), ALONE)
    forward_backward = trainer.engine.forward_backward

    def interrupted(microbatches):
        part = forward_backward(microbatches)
        if trainer.step + 1 == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return part

    monkeypatch.setattr(trainer.engine, "forward_backward", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 2 "):
        trainer.run()
    promised = "writing a checkpoint after this step" in capfd.readouterr().err
    assert promised == (name == "SIGINT"), "SIGTERM may come from torchrun, since another rank has failed"


def test_a_signal_in_the_last_step_costs_no_held_out_loss(case, alone):
    config = case.config("last-step")
    trainer = Trainer(config, ALONE)
    stop_in(trainer, config.steps)
    trainer.run()
    assert curve(config.output) == curve(alone)


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (1, "exit code 1; its own message is above"),
        (-signal.SIGKILL, "SIGKILL; if nobody sent it, the machine may have run out of memory"),
        (-signal.SIGBUS, "SIGBUS; a file was truncated while it was read, or its disk has failed"),
    ],
)
def test_how_a_rank_ended_is_described(code, how):
    assert how_it_ended(code) == how


def test_two_runs_in_one_folder_are_refused(case):
    config = case.config("held")
    first = Trainer(config, ALONE)
    with pytest.raises(MegacoderError, match="another run is working here"):
        train(config)
    first.folder.finish()
    train(config)


def test_auto_dtype_is_recorded_and_kept(case):
    config = case.config("auto", dtype="auto", steps=1)
    train(config)
    recorded = load_toml(RunConfig, config.output / "run.toml").dtype
    assert recorded in ("bfloat16", "float32")
    other = "float32" if recorded == "bfloat16" else "bfloat16"
    with pytest.raises(ConfigError, match=f"dtype = '{recorded}', not '{other}'"):
        train(case.config("auto", dtype=other, steps=1))
    train(config)


def test_auto_is_the_dtype_that_a_run_began_with_wherever_it_resumes(case, alone, monkeypatch):
    monkeypatch.setattr("megacoder.train.setup.faster_dtype", lambda _: torch.bfloat16)
    dtypes = {name: resolve_dtype(case.config(name, dtype="auto"), ALONE) for name in (alone.name, "not-begun")}
    assert dtypes == {"alone": "float32", "not-begun": "bfloat16"}


def test_a_crash_repeats_only_the_steps_since_the_checkpoint(case, alone):
    config = case.config("crashed")
    trainer = Trainer(config, ALONE)
    update = trainer.update

    def crash():
        if trainer.step == 4:
            raise RuntimeError("power cut")
        return update()

    trainer.update = crash
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.run()
    trainer.folder.finish()
    train(config)
    assert curve(config.output) == curve(alone)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 0), (signal.SIGHUP, 129)])
def test_interrupted_under_the_launcher_and_resumed_on_other_ranks(case, alone, number, code):
    name, settings = f"signalled-{number}", {"steps": 100_000, "schedule": {"kind": "constant"}}
    toml = case.toml(name, **settings)
    process = subprocess.Popen(
        command(toml), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup would have had ignored
    )  # fmt: skip
    wait_for_steps(case.folder / name)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == code, stderr
    assert stderr.count("stopped at step") == 1
    step = CheckpointReader(case.folder / name / "checkpoints").step
    assert step == read_metrics(case.folder / name / "metrics.jsonl")[-1]["step"] >= 3
    resumed = Trainer(case.config(name, **settings), ALONE)
    assert resumed.step == step
    assert math.isfinite(resumed.update().loss)


def test_a_schedulers_signal_reaches_only_ranks_and_torchrun_exits_cleanly(case):
    """As Slurm's --signal does where the job's script has told torchrun to ignore it."""
    toml = case.toml("told", steps=100_000, schedule={"kind": "constant"}, stop_signals=("SIGUSR2",))
    words = [
        "sh", "-c", 'trap "" USR2; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", "2", "--max-restarts", "3", "-m", "megacoder", "train", str(toml),
    ]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for_steps(case.folder / "told")
    for number in [process.pid, *descendants(process.pid)]:  # all of a step, as Slurm does
        os.kill(number, signal.SIGUSR2)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert stderr.count("stopped at step") == 1
    rows = read_metrics(case.folder / "told" / "metrics.jsonl")
    assert CheckpointReader(case.folder / "told").step == rows[-1]["step"] >= 3


def test_a_finished_run_has_nothing_to_do_and_nothing_to_refuse(case, alone):
    train(case.config("alone", log_every=2, eval_every=100))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["valid"], r"dataset 1 of data.train has 10 documents and [\d,]+ tokens, but the run began with 40 and "),
        (["train", "valid"], "data.train has 2 datasets, but the run began with 1; put them back"),
    ],
)
def test_a_run_does_not_resume_on_other_data_and_keeps_its_settings(case, alone, names, message):
    config, before = case.config("alone"), (alone / "run.toml").read_bytes()
    with pytest.raises(ConfigError, match=message):
        train(changed(config, data={"train": tuple(case.folder / name for name in names)}))
    assert (alone / "run.toml").read_bytes() == before
    train(config)


def test_a_run_that_is_extended_is_the_longer_run_from_the_start(case, capfd):
    train(case.config("long", steps=10))
    for changes in ({"steps": 4, "schedule": {"kind": "constant"}}, {"steps": 8, "schedule": {"kind": "constant"}}):
        train(case.config("extended", **changes))
    train(case.config("extended", steps=10))
    assert curve(case.folder / "extended") == [
        {**there, **{key: here[key] for key in here.keys() - there.keys()}}  # a held-out loss where a part ended
        for there, here in zip(curve(case.folder / "long"), curve(case.folder / "extended"), strict=True)
    ]
    assert "all 10 steps are done" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 16}, r"steps = 16 \(was 8\): .* done 8 steps, and the learning rate of step 7 was 0.003162277"),
        ({"steps": 7}, "steps = 7: the run in .* has done 8 already; choose another output, .* init_from = '.*alone'"),
        ({"schedule": {"peak_lr": 0.02}}, "schedule: .* of step 1 was 0.005, not 0.01;"),
        (
            {"optimizer": {"beta1": 0.8}},
            "optimizer.beta1 = 0.9, not 0.8; set it back, or choose another output, and go on from this run's state "
            + GOING_ON,
        ),
        ({"global_batch_size": 4}, "global_batch_size = 8, not 4; set it back, .* init_data = true$"),
        ({"data": {"stream": {"fim": {"rate": 0.1}}}}, "data.stream.fim.rate = 0.5, not 0.1; .* init_data = true$"),
        ({"data": {"stream": {"seed": 1}}}, "data.stream.seed = 1234, not 1; .* init_optimizer = true$"),
        ({"model": {"hidden_size": 64}}, "hidden_size = 32, not 64; set it back, or choose another output$"),
        ({"init_from": "alone", "steps": 9}, "was made with init_from = None, not '.*alone'; set it back, or choose"),
    ],
)
def test_a_run_whose_past_would_change_is_refused(case, alone, changes, message):
    changes = changes | ({"init_from": alone} if "init_from" in changes else {})
    with pytest.raises(ConfigError, match=message):
        train(case.config("alone", **changes))
    assert load_toml(RunConfig, alone / "run.toml").steps == 8


def test_the_rate_of_the_last_step_done_is_past(case):
    config = case.config("seven")
    run_to(ALONE, config, 7)
    with pytest.raises(ConfigError, match=r"done 7 steps, and the learning rate of step 7 was 0\.0031.*, not 0\.01;"):
        train(changed(config, schedule={"kind": "constant"}))


def test_a_run_blends_its_datasets_as_it_is_told(case):
    data = {"train": (case.folder / "train", case.folder / "valid"), "weights": (3.0, 1.0), "fim_rates": (0.0, 1.0)}
    config = case.config("x", data=data)
    tokenizer = load_tokenizer(config)
    told = TokenStream(
        [open_dataset(prefix, tokenizer) for prefix in data["train"]], tokenizer, config.data.stream,
        weights=[3.0, 1.0], fim_rates=[0.0, 1.0], global_batch_size=8, dp_rank=1, dp_size=2,
    )  # fmt: skip
    ours = open_stream(config, tokenizer, dp_rank=1, dp_size=2)
    for _ in range(4):
        assert torch.equal(ours.next_batch().tokens, told.next_batch().tokens)


def test_megatrons_order_is_for_the_samples_of_all_steps(case):
    config = case.config(
        "x", data={"compat": "megatron", "weights": (3.0,), "stream": {"add_bos": False, "fim": FimConfig(rate=0.0)}},
        steps=50,
    )  # fmt: skip
    tokenizer, data = load_tokenizer(config), config.data
    shares = {"global_batch_size": 8, "dp_rank": 1, "dp_size": 2}
    planned = MegatronStream(
        [open_dataset(data.train[0], tokenizer)], tokenizer, data.stream, data.megatron,
        num_samples=400, weights=[3.0], **shares,
    )  # fmt: skip
    ours = open_stream(config, tokenizer, dp_rank=1, dp_size=2)
    assert ours.state_dict() == planned.state_dict()
    assert torch.equal(ours.next_batch().tokens, planned.next_batch().tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"global_batch_size": 16},
        {"max_grad_norm": 0.5},
        {"dtype": "bfloat16"},
        {"optimizer": {"weight_decay": 0.2}},
        {"model": {"rope_theta": 5e4}},
        {"model": {"tie_word_embeddings": True}},
        {"data": {"weights": (2.0,)}},
        {"data": {"fim_rates": (0.25,)}},
        {"data": {"compat": "megatron"}},
        {"data": {"stream": {"seed": 7}}},
        {"data": {"stream": {"seq_length": 16}}},
        {"data": {"stream": {"document_masks": True}}},
        {"data": {"stream": {"packing": "best_fit", "document_masks": True}}},
        {"data": {"stream": {"fim": FimConfig(rate=0.25)}}},
    ],
    ids=str,
)
def test_a_begun_run_keeps_what_decides_its_updates(case, alone, changes):
    assert check_same_run(case.config("alone")).steps == 8
    with pytest.raises(ConfigError, match=r"was made with .*; set it back, or choose another output"):
        check_same_run(case.config("alone", **changes))


def test_weights_start_a_model_that_computes_the_same_with_them(case, alone):
    """Positions may change; the shapes of weights are not enough, as those of heads of another size show."""
    longer = {"rope_theta": 5e4, "rope_factor": 2.0, "max_position_embeddings": 128, "vocab_multiple": 64}
    assert open_start(case.config("longer", init_from=alone, model=longer)).step == 8
    for model in (
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ):
        with pytest.raises(ConfigError, match=f"was made with {next(iter(model))} = "):
            open_start(case.config("other", init_from=alone, model=model))


def test_initial_weights_are_of_the_runs_seed(case):
    config = case.config("seed-7", seed=7)
    trainer, model = Trainer(config, ALONE), Transformer(config.model)
    init_weights(model, seed=7)
    for piece, expected in zip(weight_pieces(trainer.engine.model), weight_pieces(model), strict=True):
        assert torch.equal(piece.view, expected.view), piece.hf_name
    leave(trainer, saving=False)


def test_a_run_that_starts_from_weights_alone_starts_its_optimizer_afresh(case, alone):
    """Also where the checkpoint has moments."""
    trainer, reader = Trainer(case.config("fresh", init_from=alone), ALONE), CheckpointReader(alone)
    optimizer = trainer.engine.optimizer
    assert (trainer.step, optimizer.num_updates) == (0, 0)
    assert not optimizer.exp_avg.any()
    assert not optimizer.exp_avg_sq.any()
    for piece in weight_pieces(trainer.engine.model):
        assert torch.equal(piece.view, reader.read_tensor(piece.hf_name)), piece.hf_name
    leave(trainer, saving=False)


def test_only_given_weights_may_have_spare_ids(case, alone):
    """As DeepSeek-Coder's do; with weights from scratch a larger vocabulary is a mistake, a smaller one always."""
    for more, init_from, fits in ((0, None, True), (8, alone, True), (8, None, False), (-1, alone, False)):
        config = case.config("x", init_from=init_from, model={"vocab_size": case.vocab_size + more})
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"set model\.vocab_size = \d+"):
            assert load_tokenizer(config).vocab_size == case.vocab_size


def test_a_worker_error_is_reported_once_and_stops_the_launcher(case):
    done = launch(case.toml("refused"), "--model.vocab-size", "999")
    assert done.returncode == 2
    assert done.stderr.count("model.vocab_size = 999") == 1
    assert not (case.folder / "refused").exists(), "a refusal must not bar the corrected run"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(case, alone, tmp_path, ranks, capfd, size):
    output = tmp_path / "run"
    shutil.copytree(alone, output)
    newest = CheckpointReader(output)
    before = state_of(output)
    damaged = max(newest.folder.glob("*.safetensors"))
    flip_a_byte(damaged)
    config = dataclasses.replace(case.config("alone"), output=output, parallel=ParallelConfig(dp=size))
    capfd.readouterr()
    train(config) if size == 1 else ranks.run(size, run, config)
    said = capfd.readouterr().err
    if size == 1:  # other ranks' words are their processes'
        assert said.count(f"skipping {newest.folder.name}: {damaged}: bytes 0 to ") == 1
        assert "resuming from step 6\n" in said
        after = state_of(output)
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert CheckpointReader(output).step == 8
    assert [row["loss"] for row in read_metrics(output / "metrics.jsonl")] == pytest.approx(losses_of(alone), rel=2e-5)


def test_damaged_weights_to_start_from_are_an_error(case, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    flip_a_byte(max(CheckpointReader(tmp_path / "run").folder.glob("*.safetensors")))
    with pytest.raises(AlikeOnAllRanks, match=r"wrong CRC-32"):
        train(case.config("from-damaged", init_from=tmp_path / "run"))


@pytest.mark.parametrize("wrong", ["data", "output", "checkpoint"])
def test_an_error_of_any_rank_is_reported_once(case, alone, tmp_path, wrong):
    output = tmp_path / "run"
    if wrong == "output":
        output.touch()
    elif wrong == "checkpoint":
        shutil.copytree(alone, output)
        for folder in (output / "checkpoints").iterdir():
            if folder.is_dir():
                flip_a_byte(max(folder.glob("*.safetensors")))
    words = ["--output", str(output)] + ["--data.train", "nothere"] * (wrong == "data")
    done = launch(case.toml(f"wrong-{wrong}"), *words)
    path = {"data": "nothere.idx", "output": str(output), "checkpoint": "step-00000003/"}[wrong]
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(path) == 1
    assert "Traceback" not in done.stderr


def test_the_launcher_leaves_signals_as_they_were(case):
    """What comes after it in a process, as after quickstart's training, answers them itself."""
    code = (
        "import signal; from megacoder.train.launch import launch_workers; launch_workers(['--version'], nproc=1);"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split()[-1] == "True", done.stderr


def test_conversations_go_to_sft(case, capsys):
    toml = case.toml("talks", data={"train": (), "conversations": {"train": (Path("talks.jsonl"),)}})
    said = f"megacoder: {toml} trains on conversations; use megacoder sft {toml}\n"
    assert refusal(capsys, "train", toml, code=2) == said
    for words in (["profile", toml], ["data", "digest", toml, "--steps", "1:2"]):
        told = f"been prepared by megacoder sft; name the run.toml in its output folder, {case.folder / 'talks'}"
        assert told in refusal(capsys, *words, code=2)


@pytest.mark.parametrize(
    ("ranks", "asked", "threads"), [("1", None, 8), ("1", "3", 3), ("1", "1", 1), ("4", "1", 2), ("4", "3", 3)]
)
def test_a_users_number_of_threads_counts_and_torchruns_does_not(monkeypatch, ranks, asked, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_of_a_rank(8) == threads


@pytest.mark.parametrize(("name", "said"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("LOCAL_WORLD_SIZE", "two")])
def test_torchruns_variables_set_by_hand_to_something_else_are_refused(case, capsys, monkeypatch, name, said):
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "1"}
    for variable, value in (place | {name: said}).items():
        monkeypatch.setenv(variable, value)
    told = refusal(capsys, "train", case.toml("by-hand"), code=2)
    assert told == f"megacoder: {name} = {said!r}: expected a number, as torchrun sets it\n"


def test_a_run_within_its_warmup_says_so(case, capfd):
    train(case.config("cold", steps=2, schedule=ScheduleConfig(peak_lr=1e-2, warmup_steps=9)))
    assert "steps = 2: the run ends within the warm-up of 9 steps (" in capfd.readouterr().err


def test_ranks_that_do_not_divide_the_batch_are_refused_before_they_start(case):
    done = launch(case.toml("three"), nproc=3)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "megacoder: global_batch_size = 8 is not a multiple of dp = 3 x micro_batch_size = 2; nearest that work on 3 "
    )
    assert not (case.folder / "three").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm = inf: must be positive, or 0 for no clipping"),
        ({"timeout_seconds": math.inf}, "timeout_seconds = inf"),
        ({"checkpoint": {"timeout_seconds": math.inf}}, "checkpoint.timeout_seconds = inf"),
        ({"schedule": {"peak_lr": -1.0}}, "peak_lr = -1.0"),
        ({"model": {"max_position_embeddings": 16}}, "seq_length = 32 exceeds model.max_position_embeddings = 16"),
    ],
)
def test_settings_out_of_range_are_refused(case, changes, message):
    table = to_dict(case.config("x"))
    for key, value in changes.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, table, where="run.toml")


def test_without_clipping_large_gradients_count_in_full(case):
    norms = {}
    for limit in (0.0, 1e9, 1e-3):
        config = case.config(f"clip-{limit}", max_grad_norm=limit, steps=2, checkpoint_every=2)
        train(config)
        norms[limit] = [row["grad_norm"] for row in curve(config.output)]
    assert norms[0.0] == norms[1e9] != norms[1e-3]


def test_an_update_without_a_trained_token_is_skipped(case):
    trainer = Trainer(case.config("nothing-trained"), ALONE)
    before = [param.clone() for param in trainer.engine.model.parameters()]
    next_batch = trainer.batches.next_batch

    def without_labels():
        batch = next_batch()
        batch.labels.fill_(-100)
        return batch

    trainer.batches.next_batch = without_labels
    result = trainer.update()
    assert (result.skipped, result.num_tokens, trainer.guard.num_skipped) == (True, 0, 1)
    assert all(map(torch.equal, before, trainer.engine.model.parameters()))


def test_damaged_data_is_refused_with_the_file_named(case, tmp_path):
    damaged = make_case(tmp_path)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FormatError, match=r"train\.bin"):
        train(damaged.config("run"))


def test_three_stage_schedule():
    config = ScheduleConfig(peak_lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:90] == pytest.approx([math.sqrt(0.1)] * 10)
    assert rates[90:] == pytest.approx([0.1] * 10)
    cosine = ScheduleConfig(kind="cosine", peak_lr=1.0, warmup_steps=0)
    assert learning_rate(100, 100, cosine) == pytest.approx(0.1)
    assert learning_rate(1, 100, ScheduleConfig(kind="constant", peak_lr=0.5, warmup_steps=0)) == 0.5


def test_a_warm_up_by_tokens_counts_those_of_global_batches(case):
    config = case.config("x", schedule={"peak_lr": 1.0, "warmup_tokens": 1000})  # of steps of 8 x 32 tokens
    assert config.warmup_steps == 1000 / 256
    assert [config.learning_rate(step) for step in (1, 2, 3, 4)] == pytest.approx([0.256, 0.512, 0.768, 1.0])


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
@pytest.mark.parametrize("final_share", [0.0, 0.1])
def test_a_decay_at_the_end_follows_a_constant_rate(decay, half, final_share):
    config = ScheduleConfig(
        kind="wsd", peak_lr=2.0, warmup_steps=10, decay_share=0.2, decay=decay, final_share=final_share
    )
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 5 for step in range(1, 11)])
    assert set(rates[9:80]) == {2.0}
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[80] < 2.0
    assert rates[89] == pytest.approx(2.0 * (final_share + (1 - final_share) * half))
    assert rates[99] == pytest.approx(2.0 * final_share)
    assert learning_rate(5, 5, config) == pytest.approx(1.0), "within the warm-up"
    assert learning_rate(11, 11, config) == pytest.approx(2.0 * final_share), "a warm-up that leaves a step"


def test_a_constant_run_gets_a_decay_which_may_be_put_off_until_it_begins(case, capfd):
    wsd = {"kind": "wsd", "decay_share": 0.5, "final_share": 0.0}
    train(case.config("decayed", steps=4, schedule={"kind": "constant"}))
    train(changed(case.config("decayed", steps=8, schedule=wsd), checkpoint_every=8, eval_every=100))
    assert [row["lr"] for row in read_metrics(case.folder / "decayed" / "metrics.jsonl")][3:] == pytest.approx(
        [1e-2, 7.5e-3, 5e-3, 2.5e-3, 0.0]
    )
    train(case.config("put-off", steps=4, schedule=wsd | {"decay_share": 0.01}))
    train(case.config("put-off", steps=6, schedule=wsd | {"decay_share": 0.01}))
    with pytest.raises(ConfigError, match=r"schedule: .* done 6 steps, and the learning rate of step 4 was 0.01, not "):
        train(case.config("put-off", steps=6, schedule=wsd))


def test_metrics_past_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "lo')  # a crash in the middle of a line
    MetricsLog(tmp_path, resume_step=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_dataset_replaced_by_one_of_the_same_size_is_refused(tmp_path):
    case = make_case(tmp_path)
    constant = {"kind": "constant"}
    train(case.config("run", steps=3, schedule=constant))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    tokens = tmp_path / "train.bin"
    content = tokens.read_bytes()
    before = fingerprint(tmp_path / "train")
    tokens.write_bytes(content[2:4] + content[2:])  # one token is another
    now = fingerprint(tmp_path / "train")
    with pytest.raises(ConfigError) as raised:
        train(case.config("run", steps=4, schedule=constant))
    assert before != now
    assert str(raised.value) == (
        f"{tmp_path / 'train'} is another dataset (fingerprint {now}) than the one that {checkpoint} was trained on "
        f"({before}); put that one back, or choose another output"
    )
    del raised
    gc.collect()  # the refused run's lock
    manifest = read_manifest(checkpoint / MANIFEST)
    del manifest.state["fingerprints"]  # as before there were any
    (checkpoint / MANIFEST).write_bytes(encode_manifest(manifest))
    train(case.config("run", steps=4, schedule=constant))
    tokens.write_bytes(content)
    with pytest.raises(ConfigError, match=f"another dataset .fingerprint {before}"):
        train(case.config("run", steps=5, schedule=constant))


@pytest.mark.parametrize("line", [b"1", b'{"loss": 1}', b"\xff", b"{"])
def test_a_damaged_line_of_metrics_is_named_left_in_place_and_out_of_what_is_read(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4]
    named = f"{path}:2: not a line of metrics; it stays there, and its step is left out\n"
    assert capsys.readouterr().err == named
    log = MetricsLog(tmp_path, resume_step=3, amend={"held_out_loss": 2.0})
    log.write(4, {"loss": 1.0})
    log.close()
    assert path.read_bytes() == (
        b'{"step": 1}\n' + line + b'\n{"step": 3, "held_out_loss": 2.0}\n{"step": 4, "loss": 1.0}\n'
    )
    assert capsys.readouterr().err == named


def test_a_run_with_damaged_metrics_resumes_and_reports(tmp_path, capfd):
    case = make_case(tmp_path)
    constant = {"kind": "constant"}
    train(case.config("run", steps=4, checkpoint_every=4, schedule=constant))
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = b"\0" * 512 + b"\n", b'{"step": 3, "loss": 4.\n'
    path.write_bytes(b"".join(lines))
    capfd.readouterr()
    train(case.config("run", steps=8, checkpoint_every=4, schedule=constant))
    named = f"{path}:2: not a line of metrics, nor 1 more line; it stays there, and its step is left out"
    assert capfd.readouterr().err.splitlines().count(named) == 1
    assert path.read_bytes().splitlines(keepends=True)[:4] == lines
    assert [row["step"] for row in read_metrics(path)] == [1, 4, 5, 6, 7, 8]
    capfd.readouterr()
    assert write_run_report(tmp_path / "run", tmp_path / "report.html") == 8
    assert capfd.readouterr().err == f"{named}\n"


def test_a_smaller_rope_base_than_that_of_the_weights_is_refused(case, alone):
    theta = load_toml(RunConfig, alone / "run.toml").model.rope_theta
    with pytest.raises(ConfigError, match=rf"model\.rope_theta = 500\.0, below the {theta} of "):
        train(case.config("shorter", init_from=alone, steps=1, model={"rope_theta": 500.0}))
    assert not (case.folder / "shorter").exists()


@pytest.mark.parametrize("seed", [1234, 4321])
def test_data_that_the_weights_have_begun_with_are_named_if_they_come_again(case, alone, capfd, seed):
    train(case.config(f"from-alone-{seed}", init_from=alone, steps=1, data={"stream": {"seed": seed}}))
    named = (
        f"data.stream.seed = 1234, as in the run that these weights come from: {case.folder / 'train'} will be read in "
        "the same order from its beginning; init_data = true goes on where that run stopped, and another seed starts "
        "with other documents"
    )
    assert capfd.readouterr().err.count(named) == (seed == 1234)


def test_the_use_of_the_device_is_logged_by_convention(case, alone, monkeypatch):
    monkeypatch.setattr("megacoder.train.loop.known_peak", lambda name, dtype: Peak(1e12, "here"))
    config = case.config("used", steps=1)
    train(config)
    (row,) = read_metrics(config.output / "metrics.jsonl")
    for convention in CONVENTIONS:
        used = utilization(
            config.model, 32, convention=convention, tokens_per_second=row["tokens_per_second"], num_devices=1,
            device_peak=1e12,
        )  # fmt: skip
        assert row[f"tflops_per_device/{convention}"] == pytest.approx(used.device_flops / 1e12)
        assert row[f"mfu/{convention}"] == pytest.approx(used.mfu)
    assert not any(key.startswith("mfu") for key in read_metrics(alone / "metrics.jsonl")[0]), "no peak is known"


def test_a_run_introduces_itself_and_reports_held_out_losses(case, capfd):
    train(case.config("introduced", steps=2, checkpoint_every=2))
    lines = capfd.readouterr().err.splitlines()
    assert any("M parameters in float32, dp=1, 2 steps of 8 x 32 tokens" in line for line in lines)
    assert sum("step 1: held-out loss " in line for line in lines) == 1


@pytest.mark.parametrize(("factor", "told"), [(1.0, True), (2.0, False)])
def test_a_run_says_that_its_rope_is_made_for_fewer_positions(case, capfd, factor, told):
    """As where the kind of scaling was set and the factor forgotten."""
    scaling = RopeScaling(kind="yarn", original_max_position_embeddings=16)
    train(case.config(f"reach-{told}", steps=1, model={"rope_factor": factor, "rope_scaling": scaling}))
    assert ("positions: made for 16 positions; raise model.rope_factor" in capfd.readouterr().err) == told
