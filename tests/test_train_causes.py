"""What a run says of an update that it skipped: windows of high loss, weights of large gradients, faults that pass."""

import json
import math
import re
import shlex
from dataclasses import replace

import pytest
import torch
from command_line import refusal, run_command
from train_cases import ALONE, make_case, run_to

from megacoder.checkpoint.folders import CHECKPOINTS
from megacoder.model.partition import ExecutionConfig
from megacoder.model.transformer import Transformer
from megacoder.parallel.config import ParallelConfig
from megacoder.train.guard import GuardConfig, UpdateLimits
from megacoder.train.loop import Trainer
from megacoder.train.setup import load_tokenizer, open_stream


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("causes"))


def skipping(world, config, step, spoil=lambda trainer: None):
    """A trainer that is to skip the update of `step`, and what it says from then on."""
    trainer, lines = Trainer(config, world), []
    while trainer.step < step - 1:
        trainer.update()
    trainer._tell = lambda number, line: lines.append((number, line))
    trainer.guard.note(loss=1.0, grad_norm=1.0, skipped=False, num_tokens=1)
    trainer.guard.limits = lambda: UpdateLimits(loss=-1.0)
    spoil(trainer)
    return trainer, lines


def said_at(world, config, step, spoil=lambda trainer: None):
    """(what is said of `step`, whether weights and gradients are as before, updates) where its update is skipped."""
    trainer, lines = skipping(world, config, step, spoil)
    engine = trainer.engine
    engine.optimizer.traffic.wait_all()
    weights, updates = engine.flat.weight.clone(), engine.optimizer.num_updates
    result = trainer.update()
    assert result.skipped
    trainer._maybe_examine(result)
    engine.optimizer.traffic.wait_all()
    untouched = torch.equal(engine.flat.weight, weights) and not engine.flat.grad.any()
    end(trainer)
    [(_, reason), (_, line)] = lines
    assert reason.startswith("update skipped: ")
    return line, untouched, engine.optimizer.num_updates - updates


def end(trainer):
    trainer.batches.close()
    trainer.folder.finish()


def numbers(line):
    return [float(number) for number in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", line)]


def check_alike(line, expected):
    assert re.sub(r"[\d.]+", "#", line) == re.sub(r"[\d.]+", "#", expected)
    assert numbers(line) == pytest.approx(numbers(expected), rel=2e-3)


SINGLE = {"micro_batch_size": 1}
"""Each window is a microbatch."""


@pytest.fixture(scope="module")
def alone(case):
    line, untouched, updates = said_at(ALONE, case.config("alone", **SINGLE), 3)
    assert (untouched, updates) == (True, 0)
    return line


def test_windows_and_weights_are_those_of_the_plain_model(case, alone):
    config = case.config("plain")
    trainer = Trainer(config, ALONE)
    trainer.update(), trainer.update()
    model = Transformer(config.model)
    model.load_state_dict(trainer.engine.model.state_dict())
    batch = trainer.batches.next_batch()
    end(trainer)
    losses, counts = {}, (batch.labels >= 0).sum(1).tolist()
    for number, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True), start=1):
        loss = model.loss(tokens[None], labels[None])
        loss.backward()
        losses[number] = loss.item() / counts[number - 1]
    norms = {name: param.grad.norm().item() / sum(counts) for name, param in model.named_parameters()}
    loss = sum(losses[number] * counts[number - 1] for number in losses) / sum(counts)
    top, heavy = (sorted(values, key=values.get, reverse=True)[:3] for values in (losses, norms))
    check_alike(
        alone,
        f"computed again, loss {loss:.4g} and gradient norm {math.hypot(*norms.values()):.4g}; of 8 microbatches the "
        f"loss is highest in that of windows {', '.join(f'{one} ({losses[one]:.4g})' for one in top)} (megacoder data "
        f"show {case.folder / 'alone' / 'run.toml'} --step 3 --windows {' '.join(map(str, top))}); the gradient is "
        f"largest of {', '.join(f'{one} ({norms[one]:.4g})' for one in heavy)}",
    )


LAYOUTS = {
    "dp": (2, {}),
    "tp": (2, {"parallel": ParallelConfig(tp=2)}),
    "cp": (2, {"parallel": ParallelConfig(cp=2)}),
    "pp": (2, {"parallel": ParallelConfig(pp=2, schedule="zbv")}),
    "plain": (2, {"execution": ExecutionConfig(block="plain")}),
    "tp-cp": (4, {"parallel": ParallelConfig(tp=2, cp=2)}),
    "pp-dp": (4, {"parallel": ParallelConfig(pp=2)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(ranks, case, alone, layout):
    size, changes = LAYOUTS[layout]
    for line, untouched, updates in ranks.run(size, said_at, case.config(layout, **SINGLE, **changes), 3):
        assert (untouched, updates) == (True, 0)
        check_alike(line.replace(f"/{layout}/run.toml", "/alone/run.toml"), alone)


def test_windows_have_their_numbers_after_data_of_another_batch_size(ranks, case):
    """Three windows were served before, which two ranks do not share evenly."""
    run_to(ALONE, case.config("three", global_batch_size=3, micro_batch_size=1), 1)
    more = {"init_from": case.folder / "three", "init_optimizer": True, "init_data": True, **SINGLE}
    alone, *_ = said_at(ALONE, case.config("after-one", **more), 1)
    for line, *_ in ranks.run(2, said_at, case.config("after-two", **more), 1):
        check_alike(line.split(" (megacoder")[0], alone.split(" (megacoder")[0])


@pytest.mark.parametrize("masked", [False, True])
def test_a_microbatch_is_named_by_all_its_windows(ranks, case, masked):
    """Of an odd length, of which sequence-parallel ranks can share two windows but not one."""
    changes = {"data": {"stream": {"seq_length": 31, "document_masks": masked}}, "parallel": ParallelConfig(tp=2)}
    for line, *_ in ranks.run(4, said_at, case.config(f"odd-{masked}", **changes), 3):
        [windows] = re.findall(r"--windows ((?:\d ?)+)", line)
        pairs = re.findall(r"(\d \d) \(\d", line)
        assert {*pairs} <= {"1 3", "2 4", "5 7", "6 8"}, "two ranks have every other window"
        assert (len(pairs), windows) == (3, " ".join(pairs))


def fail_once(trainer):
    """One rank's gradient is wrong the first time that it is computed."""
    each, times = trainer.engine.forward_backward_each, []

    def failing(microbatches):
        times.append(1)
        if len(times) == 1 and trainer.world.rank == trainer.world.size - 1:
            trainer.engine.flat.grad[3] = math.inf  # before backwards add to it, as if the first had made it
        return each(microbatches)

    trainer.guard.limits = UpdateLimits
    trainer.engine.forward_backward_each = failing


def test_a_fault_that_passes_is_told_from_the_data(ranks, case):
    for line, untouched, _ in ranks.run(2, said_at, case.config("once"), 3, fail_once):
        assert untouched
        assert "which are within the limits: this was no fault of the data; for a moment a device" in line


def poison(trainer):
    """As if something in layer 0 made its gradients and those before it no number."""
    each = trainer.engine.forward_backward_each

    def poisoned(microbatches):
        losses = each(microbatches)
        for name, param in trainer.engine.model.named_parameters():
            if name.startswith(("embed_tokens", "layers.0.")):
                param.grad[0] = math.nan
        return losses

    trainer.guard.limits = UpdateLimits
    trainer.engine.forward_backward_each = poisoned


def test_gradients_that_are_not_finite_are_placed_in_the_model(case):
    line, *_ = said_at(ALONE, case.config("poisoned"), 3, poison)
    assert re.search(r"gradients of 7 of 15 weights are not finite, from layers\.0\.\S+ back$", line), line


def lose(trainer):
    """The loss of the second microbatch is no number."""
    each = trainer.engine.forward_backward_each
    trainer.engine.forward_backward_each = lambda microbatches: [
        replace(loss, total=loss.total * math.nan) if number == 1 else loss
        for number, loss in enumerate(each(microbatches))
    ]


def test_windows_without_a_finite_loss_come_first(case):
    line, *_ = said_at(ALONE, case.config("nan"), 3, lose)
    assert "; the loss of 1 of 4 microbatches is not finite, such as that of windows 3 4 (nan), " in line


class NoBar:
    def update(self, done, text=""):
        """Nothing to draw."""


def examined(trainer, steps):
    lines = []
    trainer._tell = lambda number, line: lines.append((number, line))
    for _ in range(steps):
        trainer._step(None, NoBar())
    end(trainer)
    return [number for number, line in lines if line.startswith("computed again")]


def test_of_many_skipped_updates_few_are_examined(case):
    config = case.config("row", steps=40, checkpoint_every=99, guard=GuardConfig(max_skipped=99))
    trainer, _ = skipping(ALONE, config, 1)
    assert examined(trainer, 20) == [1, 17]


def test_a_run_that_is_asked_to_stop_examines_nothing(case):
    trainer, _ = skipping(ALONE, case.config("stops", steps=1), 1)
    trainer._stop_asked = "SIGTERM"
    assert examined(trainer, 1) == []


def test_the_windows_named_can_be_shown(case, capsys):
    """From the newest checkpoint before the step, in a folder whose name has a space."""
    config = case.config("shown here")
    run_to(ALONE, config, 3)
    (config.output / CHECKPOINTS / "step-00000007").mkdir()  # of steps that were taken back
    line, *_ = said_at(ALONE, config, 5)
    command = re.search(r"\(megacoder (data show .*?)\);", line).group(1)
    *_, option, checkpoint = words = shlex.split(command)
    assert (option, checkpoint) == ("--checkpoint", str(config.output / CHECKPOINTS / "step-00000003"))
    code, out, _ = run_command(capsys, *words)
    assert (code, out.count("=== step 5, window ")) == (0, 6)


def test_windows_are_shown_by_their_numbers_in_the_step(case, capsys):
    path, config = case.toml("numbers"), case.config("numbers")
    _, out, _ = run_command(capsys, "data", "show", path, "--step", "3", "--windows", "7", "2", "--json")
    windows = json.loads(out)["windows"]
    assert [window["window"] for window in windows] == [7, 2]
    tokenizer = load_tokenizer(config)
    stream = open_stream(config, tokenizer, dp_rank=0, dp_size=1)
    batch = [stream.next_batch() for _ in range(3)][-1]
    for window, row in zip(windows, (6, 1), strict=True):
        text = "".join(document["text"] for document in window["documents"])
        assert text == tokenizer.decode(batch.tokens[row].tolist())
    said = refusal(capsys, "data", "show", path, "--step", "3", "--windows", "9", code=2)
    assert "--windows 9: a step has windows 1 to 8" in said
