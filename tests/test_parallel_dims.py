"""Rank arithmetic: every group is what its definition says, for any layout and for thousands of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError
from megacoder.parallel.dims import AXES, ParallelDims

sizes = st.integers(1, 4)
layouts = st.builds(ParallelDims, tp=sizes, cp=sizes, pp=sizes, dp=sizes)


def test_tp_is_innermost_and_dp_outermost():
    dims = ParallelDims(tp=2, cp=2, pp=2, dp=2)
    assert dims.group(5, "tp") == [4, 5]
    assert dims.group(5, "cp") == [5, 7]
    assert dims.group(5, "pp") == [1, 5]
    assert dims.group(5, "dp") == [5, 13]
    assert dims.group(5, "dp", "cp") == [5, 7, 13, 15]
    assert dims.coordinates(5) == (0, 1, 0, 1)
    assert dims.groups("pp", "cp", "tp") == [list(range(8)), list(range(8, 16))]


@settings(max_examples=40)
@given(layouts, st.data())
def test_a_group_is_every_rank_that_agrees_on_the_other_axes(dims, data):
    rank = data.draw(st.integers(0, dims.world_size - 1))
    axes = data.draw(st.lists(st.sampled_from(AXES), unique=True))
    others = [axis for axis in AXES if axis not in axes]
    here = dims.coordinates(rank)
    expected = [
        other
        for other in range(dims.world_size)
        if all(getattr(dims.coordinates(other), axis) == getattr(here, axis) for axis in others)
    ]
    assert dims.group(rank, *axes) == expected


@settings(max_examples=40)
@given(layouts, st.lists(st.sampled_from(AXES), unique=True))
def test_groups_partition_the_ranks(dims, axes):
    groups = dims.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(dims.world_size))
    assert groups == sorted(groups)
    assert all(dims.group(rank, *axes) == group for group in groups for rank in group)


def test_4096_ranks():
    dims = ParallelDims(tp=8, cp=2, pp=16, dp=16)
    assert dims.world_size == 4096
    assert all(dims.rank(**dims.coordinates(rank)._asdict()) == rank for rank in range(4096))
    assert len(dims.groups("tp")) == 512
    assert dims.group(4095, "pp") == [3840 + 15 + 16 * stage for stage in range(16)]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_sizes_below_one_are_refused(axis, size):
    with pytest.raises(ConfigError, match=f"^{axis} = {size}: must be at least 1$"):
        ParallelDims(**{axis: size})


def test_ranks_outside_are_refused():
    dims = ParallelDims(tp=2, dp=2)
    with pytest.raises(ConfigError, match=r"rank 4: tp=2,dp=2 has ranks 0 to 3"):
        dims.coordinates(4)
    with pytest.raises(ConfigError, match=r"tp rank 2: tp = 2 has 0 to 1"):
        dims.rank(tp=2)


def test_a_world_of_another_size_names_layouts_that_fit():
    dims = ParallelDims(tp=4, pp=3)
    dims.check_world_size(12)
    with pytest.raises(ConfigError) as error:
        dims.check_world_size(32)
    assert str(error.value) == (
        "tp=4,pp=3 needs 12 ranks, there are 32; nearest: tp=4,pp=4,dp=2; tp=4,pp=2,dp=4; tp=4,pp=8"
    )
    with pytest.raises(ConfigError, match="0 ranks"):
        dims.check_world_size(0)


@settings(max_examples=25)
@given(layouts, st.integers(1, 200))
def test_the_nearest_layouts_have_that_many_ranks(dims, world_size):
    nearest = dims.nearest(world_size)
    assert nearest
    assert all(other.world_size == world_size for other in nearest)
    if dims.world_size == world_size:
        assert nearest[0] == dims
