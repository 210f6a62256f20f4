"""Whole runs in other layouts equal the run of one process: losses, norms, held-out losses, weights and moments."""

import dataclasses
import shutil

import pytest
import torch
from checkpoint_cases import state_of
from data_samples import write_texts
from ranks import RankFailed
from train_cases import ALONE, changed, losses_of, make_case, run, run_to

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.core.config import load_toml
from megacoder.core.errors import ConfigError
from megacoder.data.fim import FimConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.model.config import ModelConfig
from megacoder.model.kept import waiting_share
from megacoder.model.partition import ExecutionConfig
from megacoder.model.transformer import Transformer, weight_pieces
from megacoder.ops.adamw import AdamWConfig
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.schedules.program import build_program
from megacoder.parallel.schedules.simulate import Costs
from megacoder.parallel.tensor import TensorParallel
from megacoder.train import layout as layout_module
from megacoder.train import run_folder
from megacoder.train.config import RunConfig
from megacoder.train.layout import LayoutRequest
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import read_metrics
from megacoder.train.schedule import ScheduleConfig
from megacoder.train.setup import load_tokenizer, open_stream

HELD_OUT_SETS = {"held_out_loss/short-valid", "held_out_loss/valid"}
FP8 = ExecutionConfig(fp8=True)

LAYOUTS = {
    "tp=2": (2, ParallelConfig(tp=2, sequence_parallel=False)),
    "tp=2 sequence parallel": (2, ParallelConfig(tp=2)),
    "tp=4": (4, ParallelConfig(tp=4)),
    "pp=2": (2, ParallelConfig(pp=2)),
    "pp=2 zbv": (2, ParallelConfig(pp=2, schedule="zbv")),
    "pp=4 explicit": (4, ParallelConfig(pp=4, layers_per_stage=(0, 1, 1, 0))),
    "tp=2 dp=2": (4, ParallelConfig(tp=2)),
    "pp=2 dp=2": (4, ParallelConfig(pp=2, schedule="zb-h1")),
    "tp=2 pp=2": (4, ParallelConfig(tp=2, pp=2, schedule="zb-h1")),
    "cp=2": (2, ParallelConfig(cp=2)),
    "tp=2 cp=2": (4, ParallelConfig(tp=2, cp=2)),
    "cp=2 dp=2": (4, ParallelConfig(cp=2)),
    "tp=2 pp=2 dp=2": (8, ParallelConfig(tp=2, pp=2, bucket_elements=1000)),
    "cp=2 pp=2 dp=2": (8, ParallelConfig(cp=2, pp=2, schedule="interleaved")),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """With data beside the usual of which every window of 32 tokens holds several documents."""
    case = make_case(tmp_path_factory.mktemp("layouts"))
    tokenizer = Tokenizer.load(case.folder / "tokenizer")
    for name in ("train", "valid"):
        texts = [f"value_{number} = {number % 7}\n" for number in range(200)]
        write_texts(case.folder / f"short-{name}", texts, tokenizer)
    return case


def config_of(case, output, *, tied, document_masks=True, **changes):
    """Tied runs are on short documents, which do not see each other, and have a second held-out set."""
    short = {
        "train": (case.folder / "short-train",), "valid": (case.folder / "short-valid", case.folder / "valid"),
        "stream": {"document_masks": document_masks},
    }  # fmt: skip
    settings = {"model": {"tie_word_embeddings": tied}, "data": short if tied else {}, **changes}
    return case.config(output, steps=4, checkpoint_every=2, eval_every=2, **settings)


@pytest.fixture(scope="module")
def alone(case):
    """The run of one process: untied, and tied with documents that do not see each other."""
    for tied in (False, True):
        Trainer(config_of(case, f"alone-{tied}", tied=tied), ALONE).run()
    return {tied: case.folder / f"alone-{tied}" for tied in (False, True)}


def check_state(found, expected, tolerance=1e-4):
    """Weights and moments, by kind and name."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert (tensor - expected[key]).norm() <= tolerance * expected[key].norm(), key


def check_same(found, expected):
    rows, expected_rows = read_metrics(found / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert len(rows) == len(expected_rows)
    for row, other in zip(rows, expected_rows, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() & {"loss", "grad_norm", "tokens", "held_out_loss", *HELD_OUT_SETS}:
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)
    check_state(state_of(found), state_of(expected))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied and packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_in_any_layout_equals_one_process(ranks, case, alone, name, tied):
    size, parallel = LAYOUTS[name]
    config = config_of(case, f"{name}-{tied}", tied=tied, parallel=parallel)
    ranks.run(size, run, config)
    check_same(config.output, alone[tied])


def test_document_masks_change_training(case, alone):
    config = config_of(case, "together", tied=True, document_masks=False)
    Trainer(config, ALONE).run()
    together, apart = (read_metrics(folder / "metrics.jsonl") for folder in (config.output, alone[True]))
    assert together[0]["tokens"] == apart[0]["tokens"]
    assert together[-1]["held_out_loss"] != pytest.approx(apart[-1]["held_out_loss"], rel=1e-4)


def test_a_run_resumes_in_another_layout(ranks, case, alone):
    """Four steps, each by other ranks; only the last writes metrics."""
    layouts = [LAYOUTS[name] for name in ("tp=2 pp=2", "pp=2 dp=2", "tp=4", "pp=2 zbv")]
    for step, (size, parallel) in enumerate(layouts, start=1):
        ranks.run(size, run_to, config_of(case, "moving", tied=True, parallel=parallel), step)
    check_state(state_of(case.folder / "moving"), state_of(alone[True]))


CONTINUED = {"one process": (1, ParallelConfig()), **{name: LAYOUTS[name] for name in ("tp=2 pp=2", "cp=2 dp=2")}}


def continued_config(case, output, **changes):
    """What goes on from the run of one process with its optimizer, under another batch size, decay and data."""
    return config_of(
        case, output, tied=False, init_from=case.folder / "alone-False", init_optimizer=True, global_batch_size=4,
        micro_batch_size=1, optimizer=AdamWConfig(weight_decay=0.3, beta2=0.9),
        schedule=ScheduleConfig(kind="constant", peak_lr=3e-3, warmup_steps=0),
        data={"stream": {"fim": FimConfig(rate=1.0), "seed": 7}}, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def continued(case, alone):
    """(losses, weights and moments) of torch's AdamW on the plain model in fp64, from the same checkpoint."""
    config, reader = continued_config(case, "by-hand"), CheckpointReader(alone[False])

    def filled(kind):
        model = Transformer(config.model).double()
        for piece in weight_pieces(model):
            piece.view.data.copy_(reader.read_tensor(piece.hf_name, kind))
        return model

    model, first, second = map(filled, ("weight", "exp_avg", "exp_avg_sq"))
    groups = [[param for param in model.parameters() if (param.dim() > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1], "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.9), eps=config.optimizer.eps,
    )  # fmt: skip
    for param, exp_avg, exp_avg_sq in zip(model.parameters(), first.parameters(), second.parameters(), strict=True):
        step = torch.tensor(float(reader.state["num_updates"]))
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg.data, "exp_avg_sq": exp_avg_sq.data}
    stream, losses = open_stream(config, load_tokenizer(config), dp_rank=0, dp_size=1), []
    for _ in range(config.steps):
        batch = stream.next_batch()
        loss = model.loss(batch.tokens, batch.labels) / (batch.labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    kinds = {"weight": model, "exp_avg": first, "exp_avg_sq": second}  # the moments were updated in place
    state = {(kind, piece.hf_name): piece.view for kind, part in kinds.items() for piece in weight_pieces(part)}
    return losses, state


@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_that_starts_with_anothers_optimizer_continues_its_updates(ranks, case, continued, name):
    size, parallel = CONTINUED[name]
    config = continued_config(case, f"continued-{name}", parallel=parallel)
    ranks.run(size, run, config)
    losses, expected = continued
    assert losses_of(config.output) == pytest.approx(losses, rel=1e-5)
    first = read_metrics(config.output / "metrics.jsonl")[0]
    assert (first["step"], first["lr"]) == (1, 3e-3)
    check_state(state_of(config.output), expected)
    assert CheckpointReader(config.output).state["num_updates"] == 4 + 4
    ranks.run(size, run, dataclasses.replace(config, steps=5))  # resumes, and does not start from the other run again
    assert CheckpointReader(config.output).state["num_updates"] == 4 + 5


def moved(config, folder):
    """With the data of `config` in another folder, and another held-out set."""
    folder.mkdir()
    for path in [*config.data.train[0].parent.glob("train.*"), config.data.tokenizer]:
        path.rename(folder / path.name)
    moved_to = {"train": (folder / "train",), "valid": (folder / "train",), "tokenizer": folder / "tokenizer"}
    return changed(config, data=moved_to)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_resumes_after_its_data_has_moved(ranks, tmp_path, alone, size):
    config = config_of(make_case(tmp_path), "run", tied=False)
    ranks.run(size, run_to, config, 2)
    there = moved(config, tmp_path / "there")
    ranks.run(size, run, there)
    assert load_toml(RunConfig, config.output / "run.toml") == there
    check_state(state_of(config.output), state_of(alone[False]))


def start_apart(world, config):
    """Each rank with a folder of its own, as on hosts that share none."""
    Trainer(dataclasses.replace(config, output=config.output / f"host-{world.rank}"), world).run()


@pytest.mark.parametrize("is_new", [True, False])
def test_hosts_that_share_no_output_folder_do_not_start(ranks, case, alone, is_new):
    config = config_of(case, f"apart-{is_new}", tied=False)
    if not is_new:
        shutil.copytree(alone[False], config.output / "host-0")
    message = r"host-0/checkpoints: rank 1 does not see what rank 0 writes there; all hosts must see the same output"
    with pytest.raises(RankFailed, match=message):
        ranks.run(2, start_apart, config)
    assert not list(config.output.rglob("*.tmp-*"))


def start_blind(world, config):
    """The last rank's host has not heard of the checkpoints yet, as one with a slow network file system."""
    with pytest.MonkeyPatch.context() as patch:
        if not world.is_first:
            patch.setattr(run_folder, "step_folders", lambda root: [])
        Trainer(config, world).run()


def test_ranks_that_see_different_checkpoints_do_not_start(ranks, case, alone):
    config = config_of(case, "blind", tied=False)
    shutil.copytree(alone[False], config.output)
    message = (
        r"rank 0 would resume from step 4 and rank 1 sees no checkpoint; all hosts must see the same output folder"
    )
    with pytest.raises(RankFailed, match=message):
        ranks.run(2, start_blind, config)


def request(**changes):
    model = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    settings = {"parallel": ParallelConfig(), "seq_length": 32, "global_batch_size": 8, "micro_batch_size": 2}
    return LayoutRequest(model=model, **{**settings, **changes})


def postponed(**execution):
    """How many weight gradients wait for a W, by rank."""
    parallel = ParallelConfig(pp=2, schedule="zb-h1", layers_per_stage=(1, 1))
    layout = request(parallel=parallel, execution=ExecutionConfig(**execution)).layout(2)
    return [sum(action.op == "W" for action in actions) for actions in layout.schedule.ranks]


def test_layers_that_recompute_postpone_only_the_weight_gradients_that_there_is_room_for():
    assert postponed() == postponed(block="plain", recompute="full") == [4, 4]
    assert postponed(recompute="norms") == [1, 4]
    assert postponed(recompute="full") == [0, 0]


def test_transfers_are_placed_by_a_head_whose_gradients_are_in_the_last_stages_forward():
    layout = request(parallel=ParallelConfig(pp=2, layers_per_stage=(1, 1))).layout(2)
    stage, head = layout.layer_costs.layer + layout.layer_costs.embedding, layout.layer_costs.head
    placed = [
        build_program(layout.schedule, Costs(forward=forward, input_grad=(stage, stage), weight_grad=(stage, stage)))
        for forward in ((stage, stage + 3 * head), (stage + 3 * head, stage), (stage, stage + head))
    ]
    assert [program == layout.program for program in placed] == [True, False, False]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_runs_room_is_reckoned_by_what_its_ranks_keep(case, monkeypatch, sequence_parallel, fp8):
    """Less under sequence parallelism, whose ranks keep a part of the residual stream, and in fp8."""
    shares = []
    monkeypatch.setattr(
        layout_module, "limit_waiting",
        lambda schedule, *, waiting_share, **_: (shares.append(waiting_share), schedule)[1],
    )  # fmt: skip
    config = case.config(
        "x", model={"head_dim": 16, "intermediate_size": 64}, execution=ExecutionConfig(recompute="norms", fp8=fp8),
        parallel=ParallelConfig(tp=2, pp=2, schedule="zb-h1", sequence_parallel=sequence_parallel),
    )  # fmt: skip
    config.layout(4)
    tp = TensorParallel(size=2, sequence_parallel=sequence_parallel)
    assert shares == [waiting_share(config.model, "norms", tp=tp, fp8=fp8)]


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (2, {"parallel": ParallelConfig(tp=4)}, "tp=4 needs 4 ranks, there are 2; nearest that work on 2 ranks: tp=2"),
        (6, {"parallel": ParallelConfig(tp=3)}, "tp = 3: model.num_attention_heads = 4 is not a multiple of 3"),
        (8, {"parallel": ParallelConfig(dp=3)}, "dp=3 needs 3 ranks, there are 8; nearest that work on 8 ranks: "),
        (8, {"parallel": ParallelConfig(pp=8)}, "8 stages for 2 layers: .*; nearest that work on 8 ranks: pp=4,dp=2"),
        (4, {"parallel": ParallelConfig(pp=4, schedule="zbv")}, "8 stages for 2 layers: .*: pp=2,dp=2"),
        (2, {"parallel": ParallelConfig(pp=2, layers_per_stage=(1, 2))}, "places 3 layers of 2; nearest .*: .1, 1.$"),
        (2, {"parallel": ParallelConfig(pp=2, chunks=3)}, "schedule '1f1b' with 3 chunks.*takes any number$"),
        (4, {"parallel": ParallelConfig(pp=2, dp=1, layers_per_stage=(1, 1))}, ": pp=2,dp=2; cp=2,pp=2; tp=2,pp=2$"),
        (2, {"micro_batch_size": 3}, "global_batch_size = 8 is not a multiple of micro_batch_size = 3$"),
        (1, {"parallel": ParallelConfig(pp=2)}, "^pp=2 needs 2 ranks, only one was started; start them with --nproc 2"),
        (7, {}, "global_batch_size = 8 is not a multiple of dp = 7 .*; no layout of 7 ranks works"),
        (8, {"parallel": ParallelConfig(cp=3)}, "cp=3,dp=2 needs 6 ranks, there are 8; .*: cp=4,dp=2; cp=2,dp=4"),
        (4, {"seq_length": 36, "parallel": ParallelConfig(cp=4)}, "36 tokens cannot be cut .*; nearest .*: cp=2,dp=2"),
        (2, {"seq_length": 31, "micro_batch_size": 1, "parallel": ParallelConfig(tp=2)}, "1 x 31 tokens .*: dp=2"),
        (4, {"execution": FP8, "parallel": ParallelConfig(tp=2)}, r"intermediate_size = 24 .*; nearest [^;]*: dp=4"),
        (2, {"execution": FP8, "seq_length": 20, "micro_batch_size": 1}, "microbatch = 20 .*; this does not depend on"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_an_alternative(world_size, changes, message):
    with pytest.raises(ConfigError, match=message):
        request(**changes).layout(world_size)


def test_the_head_counts_when_layers_are_placed():
    """With 32,256 ids and a hidden size of 512 the head costs as much as several layers."""
    model = ModelConfig(
        vocab_size=32256, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    layout = dataclasses.replace(request(parallel=ParallelConfig(pp=2)), model=model, seq_length=512).layout(2)
    assert layout.placement.layers_per_stage == (6, 2)
