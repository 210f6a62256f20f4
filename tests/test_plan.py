"""The planner: its arithmetic against the parts that run, its search, and the command."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from plan_memory import ALLOWED, CASES, KINDS, Case, measure, without_tiles
from plan_published import ROWS, START, chosen_variant, fit, predict

from megacoder.cli import plan, plan_cluster
from megacoder.core.config import load_toml
from megacoder.core.errors import ConfigError
from megacoder.model.config import ModelConfig
from megacoder.model.copies import late_parameters
from megacoder.model.kept import kept_weight_bytes, waiting_share
from megacoder.model.partition import ExecutionConfig
from megacoder.model.presets import PRESETS, find_preset
from megacoder.model.transformer import TransformerPart
from megacoder.ops import cpp
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.context import UNCUT
from megacoder.parallel.dims import ParallelDims
from megacoder.parallel.flat import FlatParameters
from megacoder.parallel.schedules.generators import SCHEDULES, build_schedule
from megacoder.parallel.schedules.simulate import Costs, makespan, simulate
from megacoder.parallel.schedules.waiting import limit_waiting
from megacoder.parallel.tensor import TensorParallel
from megacoder.train.config import RunConfig
from megacoder.train.layout import LayoutRequest
from megacoder.train.planning.devices import DEVICES, Device, Shares, find_device
from megacoder.train.planning.job import Job, Variant
from megacoder.train.planning.memory import least_memory, local_elements, rank_memory
from megacoder.train.planning.pipelines import pipeline
from megacoder.train.planning.scaling import advise, parse_count
from megacoder.train.planning.search import RECOMPUTES, SearchSpace, estimate, search, variant_pipeline
from megacoder.train.planning.step_time import quick_seconds, stage_costs, step_time, throughput
from megacoder.train.planning.work import boundary_seconds, head_seconds, layer_times, shard_link
from megacoder.train.planning.workspace import Workspace

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL_33B = PRESETS["33b"].model
JOB_33B = Job(model=MODEL_33B, seq_length=4096, global_batch_size=512)


def test_presets_have_the_published_sizes():
    published = {
        "1.3b": 1_346_471_936, "5.7b": 5_700_325_376, "6.7b": 6_740_512_768, "33b": 33_342_991_360,
        "v1.5-7b": 6_910_365_696, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512,
        "qwen3-1.7b": 1_720_574_976, "qwen3-8b": 8_190_735_360,
    }  # fmt: skip
    assert {name: PRESETS[name].model.num_params for name in published} == published
    with pytest.raises(ConfigError, match=r"unknown model '33B' .did you mean '33b'\?"):
        find_preset("33B")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_quick_makespan_is_the_simulated_one(name):
    for p, m in ((1, 3), (2, 5), (5, 13)):
        schedule = build_schedule(name, num_ranks=p, num_microbatches=m)
        stages = range(schedule.stage_map.num_stages)
        costs = Costs(
            forward=tuple(1.0 + 0.3 * (s % 3) for s in stages), input_grad=tuple(1.5 - 0.2 * (s % 2) for s in stages),
            weight_grad=tuple(0.7 + 0.1 * s for s in stages), latency=0.25,
        )  # fmt: skip
        assert makespan(schedule, costs) == pytest.approx(simulate(schedule, costs).makespan, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "chunks", "recompute"),
    [
        ("1f1b", 1, "none"), ("interleaved", 3, "none"), ("zb-h1", 1, "none"), ("zb-h1", 1, "norms"),
        ("zbv", 2, "none"), ("zbv", 2, "selective"), ("zbv", 2, "full"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("microbatches", [24, 40])
def test_an_extrapolated_pipeline_has_the_time_and_memory_of_the_full_list(name, chunks, recompute, microbatches):
    variant = Variant(dims=ParallelDims(pp=4, dp=1), schedule=name, chunks=chunks, recompute=recompute)
    job = replace(JOB_33B, global_batch_size=microbatches)
    pipe = variant_pipeline(job, variant)
    assert pipe.rounds_left_out > 0
    whole = build_schedule(name, num_ranks=4, num_microbatches=microbatches, num_chunks=chunks)
    if recompute != "none":
        share = waiting_share(MODEL_33B, recompute)
        whole = limit_waiting(whole, layers=pipe.placement.layers_per_stage, waiting_share=share)
    costs = stage_costs(job, variant, pipe, DEVICES["h800"], Shares())
    assert pipe.seconds(costs) == pytest.approx(simulate(whole, costs).makespan, rel=0.005)
    for rank, actions in enumerate(whole.ranks):
        layers = [len(pipe.placement.layers(stage)) for stage in whole.stage_map.stages[rank]]
        most = {"whole": 0, "waiting": 0}
        live = dict(most)
        for op, _, chunk in actions:
            live["whole"] += layers[chunk] * ((op == "F") - (op in "BI"))
            live["waiting"] += layers[chunk] * ((op == "I") - (op == "W"))
            most = {kind: max(most[kind], live[kind]) for kind in live}
        assert max(held.whole for held in pipe.held[rank]) == most["whole"]
        assert max(held.waiting for held in pipe.held[rank]) == most["waiting"]


@pytest.mark.parametrize("execution", [ExecutionConfig(), ExecutionConfig(recompute="norms", fp8=True)], ids=str)
def test_layers_and_weight_gradients_are_placed_as_the_run_places_them(execution):
    variant = Variant(
        dims=ParallelDims(pp=4, dp=2), schedule="zbv", chunks=2, recompute=execution.recompute, fp8=execution.fp8
    )
    request = LayoutRequest(
        model=MODEL_33B, parallel=ParallelConfig(pp=4, schedule="zbv"), seq_length=4096, global_batch_size=24,
        micro_batch_size=1, execution=execution,
    )  # fmt: skip
    layout, planned = request.layout(8), variant_pipeline(replace(JOB_33B, global_batch_size=24), variant)
    assert planned.rounds_left_out == 0
    assert (planned.placement, planned.schedule) == (layout.placement, layout.schedule)


@pytest.mark.parametrize(
    "index", [1, 4, 6, 12, 16, 18, 20, 22, 25, 26, 27, 28, 29], ids=lambda index: str(CASES[index])
)
def test_predicted_memory_is_what_ranks_allocate(ranks, index):
    """Thirteen of the 30 layouts of tools/check_plan.py."""
    case = CASES[index]
    pipe = variant_pipeline(case.job, case.variant)
    for (rank, cp_rank), counted in ranks.run(case.ranks, measure, case):
        with without_tiles():
            said = rank_memory(case.job, case.variant, pipe, rank, device_type="cpu", cp_rank=cp_rank)
        for kind in KINDS:
            assert getattr(said, kind) == pytest.approx(counted[kind], rel=ALLOWED), (rank, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes", [{"bias": True}, *({"qk_norm": True, "recompute": mode} for mode in ("none", "norms", "full"))], ids=str
)
def test_predicted_memory_of_more_weights_is_what_a_process_allocates(ranks, changes, dtype):
    case = Case(ranks=1, parallel=ParallelConfig(), dtype=dtype, kv_heads=2, **changes)
    [(_, counted)] = ranks.run(1, measure, case)
    with without_tiles():
        said = rank_memory(case.job, case.variant, variant_pipeline(case.job, case.variant), 0, device_type="cpu")
    for kind in KINDS:
        assert getattr(said, kind) == pytest.approx(counted[kind], rel=0.001), kind


@pytest.mark.skipif(not cpp.has_amx(), reason="this processor does not multiply tiles")
def test_attention_on_tiles_takes_less_memory():
    case = next(case for case in CASES if case.dtype == torch.bfloat16)
    pipe = variant_pipeline(case.job, case.variant)
    on_tiles = rank_memory(case.job, case.variant, pipe, 0, device_type="cpu")
    with without_tiles():
        blocked = rank_memory(case.job, case.variant, pipe, 0, device_type="cpu")
    assert on_tiles.buffers < blocked.buffers
    assert on_tiles.activations == blocked.activations


@pytest.mark.parametrize("schedule", ["zb-h1", "zbv", "dualpipev"])
@pytest.mark.parametrize("recompute", ["norms", "selective", "full"])
def test_recomputation_saves_no_less_memory_where_weight_gradients_are_postponed(schedule, recompute):
    chunks = 1 if schedule == "zb-h1" else 2
    kept = []
    for name, count, mode in ((schedule, chunks, recompute), ("1f1b", 1, recompute), (schedule, chunks, "none")):
        variant = Variant(dims=ParallelDims(pp=8, dp=8), schedule=name, chunks=count, recompute=mode)
        pipe = variant_pipeline(JOB_33B, variant)
        kept.append(max(rank_memory(JOB_33B, variant, pipe, rank).activations for rank in range(8)))
    # 1f1b's first rank has 7 of the 62 layers, the largest of zbv 2 x 4; dualpipev holds 2 p + 1 of their 2 p chunks
    assert kept[0] <= (1.0 if chunks == 1 else 1.25) * kept[1]
    assert kept[0] < 0.9 * kept[2]


@pytest.mark.parametrize(
    ("dims", "schedule", "chunks"),
    [
        (ParallelDims(tp=8, dp=8), "1f1b", 1), (ParallelDims(tp=2, pp=8, dp=4), "1f1b", 1),
        (ParallelDims(tp=2, pp=8, dp=4), "interleaved", 4), (ParallelDims(tp=2, pp=8, dp=4), "zb-h1", 1),
        (ParallelDims(cp=2, pp=8, dp=4), "zbv", 2), (ParallelDims(pp=8, dp=8), "dualpipev", 2),
    ],
    ids=str,
)  # fmt: skip
def test_keeping_fewer_activations_costs_time(dims, schedule, chunks):
    """Which the search relies on: of these it tries less recomputation first, and no more than is needed."""
    variants = [Variant(dims=dims, schedule=schedule, chunks=chunks, recompute=mode) for mode in RECOMPUTES]
    estimates = [estimate(JOB_33B, variant, DEVICES["h800"], Shares()) for variant in variants]
    kept = [(entry.largest.activations, entry.largest.total) for entry in estimates]
    times = [entry.step.total for entry in estimates]
    quick = [quick_seconds(JOB_33B, variant, DEVICES["h800"], Shares()) for variant in variants]
    assert all(more[0] > less[0] and more[1] > less[1] for more, less in pairwise(kept))
    assert times == sorted(times)
    assert quick == sorted(quick)
    assert len(set(times)) == len(RECOMPUTES) == 4


def test_the_quick_estimates_do_not_mislead_the_search():
    for schedule, chunks, pp, recompute in (
        ("1f1b", 1, 8, "none"), ("zbv", 2, 8, "none"), ("interleaved", 4, 4, "none"), ("1f1b", 1, 1, "none"),
        ("zb-h1", 1, 8, "norms"), ("zbv", 2, 8, "selective"), ("dualpipev", 2, 8, "full"),
    ):  # fmt: skip
        variant = Variant(
            dims=ParallelDims(tp=4, pp=pp, dp=16 // pp), schedule=schedule, chunks=chunks, recompute=recompute
        )
        pipe = variant_pipeline(JOB_33B, variant)
        exact = step_time(JOB_33B, variant, pipe, DEVICES["h800"], Shares()).total
        assert quick_seconds(JOB_33B, variant, DEVICES["h800"], Shares()) == pytest.approx(exact, rel=0.15)
        most = max(rank_memory(JOB_33B, variant, pipe, rank).total for rank in range(pp))
        assert least_memory(JOB_33B, variant) <= 1.05 * most
    few, variant = replace(JOB_33B, global_batch_size=2), Variant(dims=ParallelDims(pp=8))
    pipe = variant_pipeline(few, variant)
    assert least_memory(few, variant) <= max(rank_memory(few, variant, pipe, rank).total for rank in range(8))


def test_links_are_shared_by_the_groups_of_a_node():
    device, shares = DEVICES["h100"], Shares(links=1.0)
    alone = shard_link(Variant(dims=ParallelDims(dp=8)), device, shares)
    assert alone.bytes_per_second == 450e9, "within a node"
    whole_node = shard_link(Variant(dims=ParallelDims(dp=16)), device, shares)
    assert whole_node.bytes_per_second == 400e9, "eight ranks of the group have the node's eight adapters"
    one_each = shard_link(Variant(dims=ParallelDims(tp=8, dp=2)), device, shares)
    assert one_each.bytes_per_second == 50e9


def test_tensor_parallel_exchanges_cost_by_bytes_and_latency():
    slow = replace(DEVICES["h100"], node_gb_per_s=45.0)
    variant = Variant(dims=ParallelDims(tp=8, dp=1))
    fast_forward, slow_forward = (
        layer_times(JOB_33B, variant, device, Shares()).forward for device in (DEVICES["h100"], slow)
    )
    moved = 4 * 4096 * 7168 * 2 * 7 / 8  # four exchanges of the residual stream
    assert slow_forward - fast_forward == pytest.approx(moved * (1 / 45e9 - 1 / 450e9) / Shares().links, rel=1e-6)


def test_a_layer_takes_the_time_of_its_flops():
    """Where memory is fast enough not to count, and either products or attention are."""
    device, fast = DEVICES["h100"], 1e12
    flops = {
        "products": (1.0, 1.0, 1.0, 2 * MODEL_33B.num_layer_matmul_params),
        "attention": (1.0, 2.5, 0.0, MODEL_33B.attention_flops_per_token(4096, causal=True) / 3 / 62),
    }  # fmt: skip
    for part, (forward, input_grad, weight_grad, per_token) in flops.items():
        shares = Shares(**{"copies": fast, "products": fast, "attention": fast, part: 0.5})
        times = layer_times(JOB_33B, Variant(dims=ParallelDims()), device, shares)
        unit = 4096 * per_token / (989.4e12 * 0.5)
        assert times.forward == pytest.approx(forward * unit, rel=1e-5)
        assert times.input_grad == pytest.approx(input_grad * unit, rel=1e-5)
        assert times.weight_grad == pytest.approx(weight_grad * unit, rel=1e-5, abs=1e-9)
    head = head_seconds(JOB_33B, Variant(dims=ParallelDims()), device, Shares(copies=fast, products=0.5))
    assert head == pytest.approx(4096 * 6 * MODEL_33B.padded_vocab_size * 7168 / (989.4e12 * 0.5), rel=1e-5)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("norms", 3), ("selective", 3), ("full", 1)])
@pytest.mark.parametrize(("kv_heads", "tp", "columns"), [(8, 1, 64 * 128), (8, 2, 32 * 128), (1, 2, 29 * 128)])
def test_norms_of_heads_are_read_once_more_and_made_again_where_they_are_not_kept(
    recompute, passes, kv_heads, tp, columns
):
    """Queries and keys: once behind the rotation in the backward; made again, read and written."""
    plain, normed = (
        layer_times(
            replace(JOB_33B, model=replace(MODEL_33B, num_key_value_heads=kv_heads, qk_norm=qk_norm)),
            Variant(dims=ParallelDims(tp=tp), recompute=recompute), DEVICES["h100"], Shares(copies=0.5),
        )
        for qk_norm in (False, True)
    )  # fmt: skip
    seconds = passes * 4096 * columns * 2 / (3350e9 * 0.5)
    assert normed.input_grad - plain.input_grad == pytest.approx(seconds, rel=1e-6)
    assert (normed.forward, normed.weight_grad) == (plain.forward, plain.weight_grad)


def test_fp8_products_count_only_where_a_layer_runs_in_fp8():
    plain, fp8 = (
        layer_times(JOB_33B, Variant(dims=ParallelDims(), fp8=fp8), DEVICES["h100"], Shares(copies=1e12)).weight_grad
        for fp8 in (False, True)
    )
    assert plain / fp8 == pytest.approx(1978.9 * 0.45 / (989.4 * 0.60), rel=1e-3)


def test_the_head_is_in_the_last_stages_forward():
    variant = Variant(dims=ParallelDims(pp=4), schedule="zbv", chunks=2)
    given = JOB_33B, variant, variant_pipeline(JOB_33B, variant), DEVICES["h100"], Shares()
    costs, layer = stage_costs(*given), layer_times(JOB_33B, variant, *given[3:])
    beside = [
        time - layers * layer.forward
        for time, layers in zip(costs.forward, given[2].placement.layers_per_stage, strict=True)
    ]
    assert beside == pytest.approx([0.0] * 7 + [head_seconds(JOB_33B, variant, *given[3:])], abs=1e-8)


@pytest.mark.parametrize(
    ("dims", "stage_per_node", "gb_per_s"),
    [
        (ParallelDims(pp=8), False, 450.0), (ParallelDims(tp=2, pp=4), False, 450.0),
        (ParallelDims(pp=16), False, 400.0), (ParallelDims(tp=8, pp=2), False, 50.0),
        (ParallelDims(tp=4, pp=4), False, 100.0), (ParallelDims(pp=4, dp=2), True, 50.0),
    ],
    ids=str,
)  # fmt: skip
def test_stages_pass_on_a_ranks_own_rows(dims, stage_per_node, gb_per_s):
    device = replace(DEVICES["h100"], node_latency_us=0.0, network_latency_us=0.0)
    variant = Variant(dims=dims, stage_per_node=stage_per_node)
    moved = 4096 // dims.tp * 7168 * 2
    assert boundary_seconds(JOB_33B, variant, device, Shares(links=1.0)) == pytest.approx(moved / (gb_per_s * 1e9))


@pytest.mark.parametrize(
    ("dims", "link", "share"), [(ParallelDims(cp=4), "node", 1), (ParallelDims(tp=8, cp=2), "network", 8)], ids=str
)
def test_keys_of_whole_sequences_are_gathered_twice(dims, link, share):
    """In the forward and in the backward, keys and values of the other ranks, which may be on other nodes."""
    fast, slow = (
        layer_times(JOB_33B, Variant(dims=dims), replace(DEVICES["h100"], **{f"{link}_gb_per_s": rate}), Shares())
        for rate in (400.0, 40.0)
    )
    moved = (dims.cp - 1) * 2 * 4096 // dims.cp * (MODEL_33B.num_key_value_heads // dims.tp) * MODEL_33B.head_dim * 2
    more = pytest.approx(moved * (1 / 40e9 - 1 / 400e9) * share / Shares().links, rel=1e-6)
    assert slow.forward - fast.forward == more
    assert slow.input_grad - fast.input_grad == more


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_exchanges_and_updates_move_these_bytes(recompute):
    """Gradients in fp32, of which the backward hides what it covers, and weights, of which the forward does."""
    variant, shares = Variant(dims=ParallelDims(dp=8), recompute=recompute), Shares(links=1.0, copies=1.0)
    pipe = variant_pipeline(JOB_33B, variant)
    elements = rank_memory(JOB_33B, variant, pipe, 0).weights / 2
    [forward], [input_grad], [weight_grad], *_ = vars(
        stage_costs(JOB_33B, variant, pipe, DEVICES["h100"], shares)
    ).values()
    rate = elements * 2 * 7 / 8 / (1.2 * forward)  # at which weights take 1.2 forwards, and gradients 2.4
    device = replace(DEVICES["h100"], node_gb_per_s=rate / 1e9, node_latency_us=0.0)
    step = step_time(JOB_33B, variant, pipe, device, shares)
    assert step.exchange == pytest.approx(0.2 * forward + max(0.0, 2.4 * forward - input_grad - weight_grad))
    assert (2.4 * forward > input_grad + weight_grad) == (recompute == "none")
    assert step.update == pytest.approx(elements * (4 + (4 + 4 + 3 * 8 + 2) / 8) / 3350e9)


def test_throughput_counts_both_conventions():
    variant = Variant(dims=ParallelDims(dp=8))
    reached = throughput(JOB_33B, variant, DEVICES["h800"], 100.0)
    tokens = 512 * 4096 / 100.0
    attention = 12 * 62 * 7168 * 4096
    assert reached.tokens_per_second == pytest.approx(tokens)
    assert reached.mfu_full == pytest.approx(tokens * (6 * MODEL_33B.num_matmul_params + attention) / 8 / 989.4e12)
    assert reached.mfu_causal < reached.mfu_full


def test_a_search_finds_layouts_that_fit_and_says_why_others_do_not():
    found = search(JOB_33B, DEVICES["h800"], Shares(), num_devices=64, space=SearchSpace())
    assert found.fits == sorted(found.fits, key=lambda fit: fit.step.total)
    assert all(fit.largest.total < 82e9 and fit.variant.dims.world_size == 64 for fit in found.fits)
    too_short = "cp leaves a rank fewer than 1,024 tokens of a sequence"
    assert {"tp spans nodes", "does not fit into memory", too_short} <= found.reasons.keys() == found.examples.keys()
    assert sum(found.reasons.values()) + found.num_fitting == found.num_tried
    assert len({fit.variant.dims for fit in found.fits}) == len(found.fits) > 3


def test_a_search_finds_no_microbatch_that_tensor_parallel_ranks_cannot_share():
    job, space = replace(JOB_33B, seq_length=4092), SearchSpace(tp=8, micro_batch_sizes=(1, 2), schedules=("1f1b",))
    found = search(job, DEVICES["h800"], Shares(), num_devices=64, space=space)
    assert {fit.variant.micro_batch_size for fit in found.fits if fit.variant.dims.cp == 1} == {2}
    assert "a microbatch's tokens do not divide by tp" in found.reasons


def test_a_microbatchs_share_of_the_batch_is_counted():
    variant = Variant(dims=ParallelDims(tp=2, cp=2, dp=8), micro_batch_size=4)
    assert (variant.microbatches(JOB_33B), variant.tokens(JOB_33B), variant.rows(JOB_33B)) == (16, 8192, 4096)
    assert replace(variant, sequence_parallel=False).rows(JOB_33B) == 8192


def test_gpipe_holds_every_microbatch():
    pipe = pipeline("gpipe", ranks=4, chunks=1, microbatches=40, model=MODEL_33B, seq_length=4096)
    assert [max(held.whole for held in moments) for moments in pipe.held] == [
        40 * layers for layers in pipe.placement.layers_per_stage
    ]


@pytest.mark.parametrize(
    ("devices", "layouts"),
    [
        (60, (ParallelDims(cp=2, pp=5, dp=6), ParallelDims(tp=2, pp=5, dp=6))),
        (64, (ParallelDims(pp=2, dp=32), ParallelDims(dp=64))),
    ],
)
def test_no_fast_layout_is_hidden_behind_variants_of_others(devices, layouts):
    job = replace(JOB_33B, model=find_preset("6.7b").model, global_batch_size=2304)
    best = search(job, DEVICES["h800"], Shares(), num_devices=devices, space=SearchSpace()).fits[:5]
    for dims in layouts:
        [fastest] = search(job, DEVICES["h800"], Shares(), num_devices=devices, space=SearchSpace(dims=dims)).fits
        [shown] = [fit for fit in best if fit.variant.dims == dims]
        assert shown.step.total <= 1.001 * fastest.step.total


@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 1), ("zbv", 4)])
def test_a_layout_recomputes_no_more_than_it_must(schedule, pp):
    dims = ParallelDims(tp=4, pp=pp, dp=16 // pp)
    chunks = 2 if schedule == "zbv" else 1
    variants = [
        Variant(dims=dims, schedule=schedule, chunks=chunks, micro_batch_size=2, recompute=mode) for mode in RECOMPUTES
    ]
    needed = [estimate(JOB_33B, variant, DEVICES["h800"], Shares()).largest.total / 1e9 for variant in variants]
    space = SearchSpace(dims=dims, schedules=(schedule,), micro_batch_sizes=(2,))
    for mode, gigabytes in zip(RECOMPUTES, needed, strict=True):
        device = replace(DEVICES["h800"], memory_gb=gigabytes + 0.01, reserved_gb=0.0)
        [fit] = search(JOB_33B, device, Shares(), num_devices=16, space=space).fits
        assert fit.variant.recompute == mode


def test_sixteen_thousand_ranks():
    job = replace(JOB_33B, global_batch_size=4096)
    found = search(job, DEVICES["h800"], Shares(), num_devices=16_384, space=SearchSpace(schedules=("1f1b", "zbv")))
    assert found.fits[0].variant.dims.world_size == 16_384


def test_models_that_fit_nowhere_are_refused_with_the_nearest_miss():
    with pytest.raises(
        ConfigError, match=r"no layout of 1 x h800 works; the nearest: .* needs at least .* GB of 81\.9"
    ):
        plan.main(["--model", "33b", "--devices", "1", "--micro-batch", "1"])


def test_the_command_prints_json(capsys):
    plan.main(["--model", "6.7b", "--device", "a100", "--devices", "64", "--tokens", "2T", "--top", "2",
               "--schedule", "1f1b", "--json"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    best = report["layouts"][0]
    assert len(report["layouts"]) == 2
    assert best["memory"]["total"] == sum(
        best["memory"][kind] for kind in ("weights", "gradients", "optimizer", "activations", "buffers")
    )
    assert best["device_hours"] == pytest.approx(64 * 24 * best["days"])
    assert best["days"] * 86_400 == pytest.approx(2e12 / best["tokens_per_second"])
    assert best["memory"]["activations_by_recompute"][best["recompute"]] == best["memory"]["activations"]
    assert report["advice"]["batch_sequences"] == pytest.approx(2300, abs=1)


def test_the_memory_of_a_small_model_is_in_mb(capsys):
    for model, unit in ((Path(__file__).parent.parent / "examples/pretrain_13m.toml", "MB"), ("1.3b", "GB")):
        plan.main(["--model", str(model), "--device", "h200", "--devices", "1"])
        assert f"\n{unit} on the most loaded rank, out of " in capsys.readouterr().out


def test_the_command_draws_and_shows_tables(tmp_path, capsys):
    picture = tmp_path / "best.svg"
    plan.main(["--model", "1.3b", "--devices", "8", "--pp", "2", "--batch", "64", "--draw", str(picture)])
    shown = capsys.readouterr().out
    assert "MFU full" in shown
    assert "layouts and ways to run them fit" in shown
    assert picture.stat().st_size > 1000


def test_advice_is_the_published_one():
    law = advise(PRESETS["6.7b"].model, seq_length=4096, tokens=parse_count("2T"))
    assert law.peak_lr == pytest.approx(4.2e-4, rel=0.01)
    assert law.batch_sequences == pytest.approx(2304, rel=0.01)
    assert advise(MODEL_33B, seq_length=4096, tokens=2e12).batch_sequences == 4033


def test_advice_needs_no_model(capsys):
    plan.main(["--tokens", "2T"])
    assert "4.21e-04" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "8"], "need --model"),
        (["--model", "6.7c"], "unknown model '6.7c' .did you mean '6.7b'"),
        (["--model", "6.7b", "--device", "h900"], "unknown device 'h900' .did you mean"),
        (["--model", "6.7b", "--tokens", "2Q"], "tokens '2Q': expected a number"),
        (["--model", "5.7b"], "the batch of 5.7b is unpublished; give --batch"),
        (["--model", "6.7b", "--tp", "3"], "--tp 3: 8 devices are not a multiple"),
        (["--model", "6.7b", "--seq", "32768"], "exceeds the model's 16384 positions"),
        (["--model", "6.7b", "--schedule", "zbw"], "--schedule 'zbw': expected one of"),
        (["--model", "6.7b", "--device", "a100", "--fp8"], "--fp8: device a100 has no fp8_tflops"),
        (["--model", "nowhere.toml"], "nowhere.toml: no such file"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(ConfigError, match=message):
        plan_cluster.main(words)


def test_what_a_run_does_and_the_plan_leaves_out_is_said(tmp_path, capsys):
    text = (EXAMPLES / "pretrain_1.3b.toml").read_text()
    path, words = tmp_path / "run.toml", ["--devices", "8", "--schedule", "1f1b", "--top", "1"]
    path.write_text(text + "\n[execution]\ncuda_graph = true\nfp8 = true\n")
    plan.main(["--model", str(path), *words])
    shown = capsys.readouterr().out
    assert "Not counted: execution.cuda_graph = true: the graph keeps its memory" in shown
    assert "Not counted: execution.fp8 = true: give --fp8" in shown
    path.write_text(text)
    plan.main(["--model", str(path), *words, "--json"])
    assert json.loads(capsys.readouterr().out)["not_counted"] == []


def planned(path, capsys, *words):
    """What the command says of a run's own layout, as JSON and in words."""
    words = ["--model", str(path), "--schedule", "1f1b", "--top", "2", *words]
    plan.main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    plan.main(words)
    return report, capsys.readouterr().out


def run_file(tmp_path, more="", **changes):
    text = (EXAMPLES / "pretrain_1.3b.toml").read_text()
    head, _, _ = text.partition("[parallel]")
    for name, value in changes.items():
        head = re.sub(rf"^{name} = .*$", f"{name} = {value}", head, flags=re.MULTILINE)
    (tmp_path / "run.toml").write_text(f"{head}\n{more}")
    return tmp_path / "run.toml"


def test_the_layout_of_a_run_is_shown_among_the_fastest(tmp_path, capsys):
    path = run_file(tmp_path, "[parallel]\ntp = 2\n[execution]\nrecompute = 'full'\n", micro_batch_size=4)
    report, shown = planned(path, capsys, "--devices", "8")
    own, fastest = report["configured"], report["layouts"][0]
    assert own["fits"]
    assert own["reason"] is None
    layout = own["layout"]
    assert (layout["tp"], layout["dp"], layout["micro_batch_size"], layout["recompute"]) == (2, 4, 4, "full")
    job = Job(model=load_toml(RunConfig, path).model, seq_length=4096, global_batch_size=report["global_batch_size"])
    variant = Variant(dims=ParallelDims(tp=2, dp=4), micro_batch_size=4, recompute="full")
    said = estimate(job, variant, DEVICES["h800"], Shares())
    assert (layout["step_seconds"], layout["memory"]["total"]) == (said.step.total, said.largest.total)
    assert not any(row["as_configured"] for row in report["layouts"])
    assert shown.count("│ 2 1 1 4 * ") == 2, "in both tables"
    longer = layout["step_seconds"] / fastest["step_seconds"] - 1
    assert f"* as configured in {path}: a step takes {longer:.1%} longer than the fastest one found" in shown
    _, shown = planned(path, capsys, "--devices", "8", "--tp", "8")
    assert "than the fastest one found" in shown
    assert "│ 2 1 1 4 * " in shown, "options that choose among layouts leave it"


def test_the_layout_of_a_run_is_shown_once_where_it_is_the_fastest(tmp_path, capsys):
    report, _ = planned(run_file(tmp_path), capsys, "--devices", "8")
    best = report["layouts"][0]
    parallel = "[parallel]\n" + "".join(f"{axis} = {best[axis]}\n" for axis in ("tp", "cp", "pp"))
    path = run_file(
        tmp_path, f"{parallel}[execution]\nrecompute = '{best['recompute']}'\n",
        micro_batch_size=best["micro_batch_size"],
    )  # fmt: skip
    report, shown = planned(path, capsys, "--devices", "8")
    assert [row["as_configured"] for row in report["layouts"]] == [True, False]
    assert report["configured"]["layout"] == report["layouts"][0]
    assert shown.count(" * ") == 2
    assert f"* as configured in {path}: the fastest layout that was found" in shown


@pytest.mark.parametrize(
    ("devices", "parallel", "changes", "reason"),
    [
        (8, "tp = 3", {}, "tp=3,dp=2 needs 6 ranks, there are 8; nearest that work on 8 ranks: "),
        (1, "pp = 2", {}, "pp=2 needs 2 ranks, there is 1; nearest that work on 1 rank: dp=1"),
        (8, "dp = 3", {}, "dp=3 needs 3 ranks, there are 8; nearest"),
        (8, "tp = 8", {"global_batch_size": 1023, "micro_batch_size": 2}, "global_batch_size = 1023 is not a multiple"),
        (8, "pp = 2\nlayers_per_stage = [20, 3]", {}, "places 23 layers of 24; nearest that works: [12, 12]"),
    ],
)
def test_a_layout_of_a_run_that_does_not_work_is_one_line(tmp_path, capsys, devices, parallel, changes, reason):
    path = run_file(tmp_path, f"[parallel]\n{parallel}\n", **changes)
    report, shown = planned(path, capsys, "--devices", str(devices))
    assert not report["configured"]["fits"]
    assert report["configured"]["layout"] is None
    assert reason in report["configured"]["reason"]
    [line] = [line for line in shown.splitlines() if line.startswith(f"As configured in {path}: ")]
    assert reason in line
    assert " * " not in shown


def test_a_layout_of_a_run_that_does_not_fit_is_shown_last_with_the_reason(tmp_path, capsys):
    path = run_file(tmp_path, "[parallel]\nschedule = 'gpipe'\npp = 2\n", micro_batch_size=8)
    report, shown = planned(path, capsys, "--devices", "8")
    own = report["configured"]
    assert not own["fits"]
    assert own["layout"]["memory"]["total"] > 81.9e9
    gigabytes = f"{own['layout']['memory']['total'] / 1e9:.2f} GB of 81.90"
    assert own["reason"] == f"does not fit into memory, {gigabytes} on its most loaded rank"
    assert f"* as configured in {path}: {own['reason']}\n" in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert ["*" in row for row in rows] == [False, False, True] * 2


def test_a_preset_configures_no_layout(capsys):
    plan.main(["--model", "1.3b", "--devices", "8", "--schedule", "1f1b", "--top", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["configured"] is None


def test_dtype_and_plain_blocks_are_those_of_the_run(tmp_path, capsys):
    path = run_file(tmp_path, "[execution]\nblock = 'plain'\n", dtype="'float32'")
    report, shown = planned(path, capsys, "--devices", "8")
    assert report["dtype"] == "float32"
    assert report["configured"]["layout"]["memory"]["weights"] == pytest.approx(4 * report["parameters"], rel=0.01)
    assert 'Not counted: execution.block = "plain": ' in shown
    report, _ = planned(path, capsys, "--devices", "8", "--dtype", "bfloat16")
    assert report["configured"]["layout"]["memory"]["weights"] == pytest.approx(2 * report["parameters"], rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "norms", "selective", "full"])
def test_fp8_casts_are_counted(recompute):
    variants = [Variant(dims=ParallelDims(tp=8, dp=8), recompute=recompute, fp8=fp8) for fp8 in (False, True)]
    bf16, fp8 = (rank_memory(JOB_33B, variant, variant_pipeline(JOB_33B, variant), 0) for variant in variants)
    weights = 2 * MODEL_33B.num_layer_matmul_params // 8
    per_token = 2 * (4 * 7168 + (3 * 19200 + 2 * 56 * 128 + 2 * 8 * 128) // 8)
    product = 4 * (2 * 19200 // 8) * 7168
    assert fp8.buffers - bf16.buffers <= weights + 4096 * per_token + product
    assert fp8.total - bf16.total >= (weights if recompute in ("selective", "full") else 0)
    assert fp8.buffers > bf16.buffers


def test_fp8_casts_of_key_value_heads_that_ranks_copy_are_counted():
    """The 5.7B model has one; of eight ranks each holds it."""
    model = PRESETS["5.7b"].model
    with torch.device("meta"):
        part = TransformerPart(model, TensorParallel(size=8), cp=UNCUT, layers=(0,), embedding=False, head=False)
    held = sum(parameter.numel() for parameter in part.parameters() if parameter.dim() == 2)
    assert kept_weight_bytes(model, "none", tp=TensorParallel(size=8), fp8=True) == held
    assert held > model.num_layer_matmul_params // 8


@pytest.mark.parametrize("recompute", ["none", "norms", "selective", "full"])
def test_a_layers_fp8_weight_gradients_are_whole_in_fp32_before_they_are_added(recompute):
    """Those of the head are not, which does not run in fp8."""
    dims = ParallelDims(tp=1)
    bf16, fp8 = (
        Workspace(job=JOB_33B, variant=Variant(dims=dims, recompute=recompute, fp8=fp8)) for fp8 in (False, True)
    )
    product = 4 * 2 * 19200 * 7168
    assert (bf16.weight_gradients, fp8.weight_gradients) == (0, product)
    while_added = fp8.backward - fp8.backward_input
    assert product / 4 < while_added <= product, "the peak of a postponed backward may be at another moment"
    assert (fp8.head, fp8.embedding_backward) == (bf16.head, bf16.embedding_backward)


def test_a_device_can_be_given_as_a_toml_file(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text("matrix_tflops = 100.0\nmemory_gb = 40.0\nmemory_gb_per_s = 900.0\nnode_gb_per_s = 50.0\n"
                    "network_gb_per_s = 12.5\ndevices_per_node = 4\n")  # fmt: skip
    assert find_device(str(path)) == Device(
        name="board", matrix_tflops=100.0, memory_gb=40.0, memory_gb_per_s=900.0, node_gb_per_s=50.0,
        network_gb_per_s=12.5, devices_per_node=4,
    )  # fmt: skip
    path.write_text("matrix_tflops = -1.0\nmemory_gb = 40.0\nmemory_gb_per_s = 900.0\nnode_gb_per_s = 50.0\n"
                    "network_gb_per_s = 12.5\n")  # fmt: skip
    with pytest.raises(ConfigError, match=r"device board: matrix_tflops = -1\.0: must be positive"):
        find_device(str(path))


def test_fitting_recovers_known_shares():
    """Rows whose published figure is a prediction by other shares: the fit returns to those."""
    truth = replace(START, products=0.5, links=0.6)
    made = []
    for row in ROWS:
        if row.name.split()[1] in ("1.7B", "7.1B", "16B", "32B", "70B") and "fp8" not in row.name:
            variant = chosen_variant(row)
            made.append((replace(row, tokens_per_second=predict(row, variant, truth)), variant))
    assert fit(made).products == pytest.approx(0.5, rel=0.05)


def test_the_simulated_time_grows_with_the_bubble():
    def bubble(microbatches):
        pipe = pipeline("1f1b", ranks=8, chunks=1, microbatches=microbatches, model=MODEL_33B, seq_length=4096)
        costs = Costs.uniform(8)
        return pipe.seconds(costs) / (3 * microbatches) - 1

    assert bubble(8) == pytest.approx(7 / 8)
    assert bubble(800) == pytest.approx(7 / 800, rel=1e-6)


@pytest.mark.parametrize(
    ("itemsize", "dp", "device_type", "per_weight"),
    [(4, 1, "cuda", 8), (4, 2, "cpu", 6), (2, 1, "cuda", 12), (2, 1, "cpu", 10), (2, 2, "cpu", 5)],
)
def test_master_weights_are_counted_where_they_are_held(itemsize, dp, device_type, per_weight):
    model = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=16)  # fmt: skip
    job = Job(model=model, seq_length=64, global_batch_size=4, itemsize=itemsize)
    variant = Variant(dims=ParallelDims(dp=dp))
    memory = rank_memory(job, variant, variant_pipeline(job, variant), 0, device_type=device_type)
    assert memory.optimizer / (memory.weights / itemsize) == pytest.approx(per_weight)
    assert least_memory(job, variant, device_type=device_type) <= memory.total


@pytest.mark.parametrize(("embedding", "head"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("tied", "kv_heads", "tp", "more"),
    [(True, 4, 1, {}), (True, 2, 4, {}), (False, 4, 2, {}), (True, 2, 4, {"qkv_bias": True}),
     (True, 2, 4, {"qk_norm": True})],
)  # fmt: skip
def test_elements_are_those_of_the_flat_buffers(embedding, head, tied, kv_heads, tp, more):
    model = ModelConfig(vocab_size=500, hidden_size=40, intermediate_size=72, num_hidden_layers=4, head_dim=6,
                        num_attention_heads=4, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
                        **more)  # fmt: skip
    variant = Variant(dims=ParallelDims(tp=tp, dp=3), bucket_elements=5000)
    part = TransformerPart(model, variant.tp, cp=UNCUT, layers=range(3), embedding=embedding, head=head)
    flat = FlatParameters(
        part.named_parameters(), dtype=torch.float32, device=torch.device("cpu"), num_shards=3,
        late=late_parameters(part), bucket_elements=5000,
    )  # fmt: skip
    assert local_elements(model, variant, layers=3, embedding=embedding, head=head) == flat.numel


def test_what_fits_a_kind_of_device_is_not_ruled_out_for_another_kind():
    """On one CPU bf16 weights are half of their master weights."""
    model = ModelConfig(vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=128)  # fmt: skip
    job, variant = Job(model=model, seq_length=16, global_batch_size=1), Variant(dims=ParallelDims(), recompute="full")
    needed = estimate(job, variant, DEVICES["cpu"], Shares()).largest.total / 1e9
    device = replace(DEVICES["cpu"], memory_gb=needed + 1e-6, reserved_gb=0.0)
    space = SearchSpace(dims=ParallelDims(), micro_batch_sizes=(1,), recomputes=("full",))
    assert least_memory(job, variant) > device.room
    assert len(search(job, device, Shares(), num_devices=1, space=space).fits) == 1


def test_a_search_runs_layers_as_asked():
    space = SearchSpace(dims=ParallelDims(tp=8, dp=8), fp8=True, overlaps_exchange=True, micro_batch_sizes=(1,))
    [fit] = search(JOB_33B, DEVICES["h800"], Shares(), num_devices=64, space=space).fits
    assert (fit.variant.fp8, fit.variant.overlaps_exchange) == (True, True)


def test_a_search_counts_the_memory_of_its_kind_of_device():
    model = ModelConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=4, head_dim=16)  # fmt: skip
    job = Job(model=model, seq_length=64, global_batch_size=4)
    for device in (DEVICES["cpu"], DEVICES["h800"]):
        [fit, *_] = search(job, device, Shares(), num_devices=1, space=SearchSpace()).fits
        pipe = variant_pipeline(job, fit.variant)
        assert fit.memory == (rank_memory(job, fit.variant, pipe, 0, device_type=device.device_type),)
