"""Every collective against what its docstring promises: on 1 to 4 ranks, and as the identity without a group."""

import os
import socket

import pytest
import torch

from megacoder.core.errors import ConfigError, MegacoderError, RankLost
from megacoder.parallel.collectives import (
    all_gather_into,
    all_reduce_sum,
    barrier,
    broadcast_from_first,
    start_reduce_scatter_sum,
)
from megacoder.parallel.world import World, gather_json, launched_ranks, start_world

SIZES = [1, 2, 3, 4]
WORLD_OF_ONE = World(0, 1, 0, torch.device("cpu"), None)
VALUES = [
    {"rank": 0, "text": "naïve 中文 👩‍👩‍👧"},
    None,
    [],
    {"long": "é" * 5000, "nested": [1, 2.5, True, {"": None}]},
]


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reduce_random(world):
    tensor = draw(world.rank, 1000)
    all_reduce_sum(tensor, world.group)
    return tensor


def reduce_scatter_random(world, in_place):
    length = 70
    full = draw(world.rank, world.size * length)
    shard = full[world.rank * length :][:length] if in_place else torch.full((length,), torch.nan)
    start_reduce_scatter_sum(shard, full, world.group).wait()
    return shard


def gather_random(world, dtype, in_place):
    length = 33
    full = torch.full((world.size * length,), torch.nan, dtype=dtype)
    shard = full[world.rank * length :][:length] if in_place else torch.empty(length, dtype=dtype)
    shard.copy_(draw(world.rank, length))
    all_gather_into(full, shard, world.group)
    return full


def broadcast_random(world, dtype):
    tensor = draw(world.rank, 9, dtype=dtype)
    broadcast_from_first(tensor, world.group)
    return tensor


def gather_values(world):
    return gather_json(VALUES[world.rank], world)


def files_after_barrier(world, folder):
    (folder / str(world.rank)).touch()
    barrier(world.group)
    return len(list(folder.iterdir()))


@pytest.fixture(params=[None, *SIZES], ids=lambda size: "no group" if size is None else f"{size} ranks")
def run(request, ranks):
    """Runs a function on some ranks, or in a world of one without a group."""
    if request.param is None:
        return lambda function, *args: [function(WORLD_OF_ONE, *args)]
    return lambda function, *args: ranks.run(request.param, function, *args)


def test_all_reduce_sums_to_the_same_bits_everywhere(run):
    results = run(reduce_random)
    exact = sum(draw(rank, 1000).double() for rank in range(len(results)))
    assert (results[0] - exact).abs().max() <= 1e-6
    for result in results:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_gives_each_rank_its_slice_of_the_sum(ranks, size, in_place):
    results = ranks.run(size, reduce_scatter_random, in_place)
    exact = sum(draw(rank, 70 * len(results)).double() for rank in range(len(results)))
    for result, expected in zip(results, exact.split(70), strict=True):
        assert (result - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_gather_puts_slices_in_rank_order(run, dtype, in_place):
    results = run(gather_random, dtype, in_place)
    expected = torch.cat([draw(rank, 33, dtype=dtype) for rank in range(len(results))])
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broadcast_overwrites_by_the_first_ranks_tensor(run, dtype):
    for result in run(broadcast_random, dtype):
        assert torch.equal(result, draw(0, 9, dtype=dtype))


def test_gather_json_returns_every_value_on_every_rank(run):
    for result in (results := run(gather_values)):
        assert result == VALUES[: len(results)]


def test_no_rank_leaves_a_barrier_before_all_have_come(run, tmp_path):
    results = run(files_after_barrier, tmp_path)
    assert results == [len(results)] * len(results)


def start_as_torchrun_does(world, port):
    torch.distributed.destroy_process_group()
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    started = start_world("cpu", timeout_seconds=60)
    values = gather_json([started.rank, started.size, started.local_rank, started.is_first], started)
    started.close()
    return values, str(started.device), torch.distributed.is_initialized()


def test_start_world_joins_the_ranks_that_torchrun_started(ranks):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for outcome in ranks.run_apart(2, start_as_torchrun_does, port):
        assert outcome.failure is None
        assert outcome.result == ([[0, 2, 0, True], [1, 2, 1, False]], "cpu", False)


def test_a_rank_left_waiting_says_where_it_waits(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match=rf"^rank 0 of 2 could not join the others at 127.0.0.1:{port}: .*1/2 clients"):
        start_world("cpu", timeout_seconds=1, join_seconds=1)


TORCHRUN_SETS = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None, "LOCAL_RANK": None}, "WORLD_SIZE = '4' is set, but not LOCAL_RANK, MASTER_ADDR: "),
        (
            {"RANK": ""},
            "WORLD_SIZE = '4' is set, but not RANK: start ranks with torchrun, which sets them all, or unset",
        ),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four': expected a number, as torchrun sets it"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '': expected a number"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT = '-1': expected a number"),
        ({"RANK": "4"}, "RANK = 4, but WORLD_SIZE = 4: ranks are counted from 0"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK = 0, but WORLD_SIZE = 0"),
    ],
)
def test_incomplete_torchrun_variables_are_refused(monkeypatch, changes, message):
    for name, value in (TORCHRUN_SETS | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    for call in (launched_ranks, lambda: start_world("cpu", timeout_seconds=1, join_seconds=1)):
        with pytest.raises(ConfigError, match=f"^{message}"):
            call()


def test_torchruns_variables_make_a_launched_rank(monkeypatch):
    for name, value in TORCHRUN_SETS.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == 4
    monkeypatch.delenv("WORLD_SIZE")
    assert launched_ranks() is None


@pytest.mark.parametrize("said", ["two", ""])
def test_a_number_of_torchruns_that_is_none_is_refused_without_a_world_size(monkeypatch, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", said)
    with pytest.raises(ConfigError, match=f"^LOCAL_RANK = '{said}': expected a number"):
        start_world("cpu")


def test_start_world_is_a_world_of_one_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = start_world("cpu")
    assert (world.rank, world.size, world.group, world.is_first) == (0, 1, None, True)
    world.close()


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MegacoderError, match="rank 2 of this node has no GPU: 2 found; start fewer processes"):
        start_world("cuda")
