"""Box arithmetic against brute force: every element counted."""

import random
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.checkpoint.boxes import Box, boxes_of_range, find_fault, plan_copies
from megacoder.core.errors import CheckpointError

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def regions(draw):
    """A box of some tensor, and that tensor's shape."""
    shape = draw(shapes)
    offsets = tuple(draw(st.integers(0, length)) for length in shape)
    sizes = tuple(draw(st.integers(0, length - offset)) for offset, length in zip(offsets, shape, strict=True))
    return shape, Box(offsets, sizes)


def elements(box):
    return list(product(*(range(offset, end) for offset, end in zip(box.offsets, box.ends, strict=True))))


def random_tiling(region, depth, rng):
    """Cuts `region` in two along some dim, again and again."""
    dims = [dim for dim, size in enumerate(region.sizes) if size > 1]
    if not depth or not dims:
        return [region]
    dim = rng.choice(dims)
    cut = rng.randint(1, region.sizes[dim] - 1)
    first = Box(region.offsets, (*region.sizes[:dim], cut, *region.sizes[dim + 1 :]))
    second = Box(
        (*region.offsets[:dim], region.offsets[dim] + cut, *region.offsets[dim + 1 :]),
        (*region.sizes[:dim], region.sizes[dim] - cut, *region.sizes[dim + 1 :]),
    )
    return random_tiling(first, depth - 1, rng) + random_tiling(second, depth - 1, rng)


@settings(max_examples=200, deadline=None)
@given(regions(), st.data())
def test_a_range_is_its_boxes_end_to_end(case, data):
    shape, region = case
    start = data.draw(st.integers(0, region.volume))
    stop = data.draw(st.integers(start, region.volume))
    boxes = boxes_of_range(region, start, stop)
    assert [index for box in boxes for index in elements(box)] == elements(region)[start:stop]
    assert all(box.volume and box.lies_in(shape) for box in boxes)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_a_matrix_is_a_head_full_rows_and_a_tail():
    boxes = boxes_of_range(Box((10, 100), (6, 8)), 5, 35)
    assert [str(box) for box in boxes] == ["[10:11, 105:108]", "[11:14, 100:108]", "[14:15, 100:103]"]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_a_range_outside_the_region_is_refused(start, stop):
    with pytest.raises(ValueError, match="not a range of the 4 elements"):
        boxes_of_range(Box((0, 0), (2, 2)), start, stop)


@settings(max_examples=200, deadline=None)
@given(regions(), st.integers(0, 2**32), st.sampled_from(["exact", "hole", "overlap"]))
def test_a_fault_is_found_exactly_when_counting_finds_one(case, seed, change):
    _, region = case
    rng = random.Random(seed)
    boxes = random_tiling(region, 4, rng) if region.volume else []
    rng.shuffle(boxes)
    if change == "hole" and boxes:
        boxes.pop()
    elif change == "overlap" and boxes:
        boxes.append(rng.choice(random_tiling(region, 5, rng)))
    counts = Counter(index for box in boxes for index in elements(box))
    fault = find_fault(region, boxes)
    wrong = [index for index in elements(region) if counts[index] != 1]
    assert (fault is None) == (not wrong)
    if fault is not None:
        assert all((counts[index] == 0) if fault.missing else (counts[index] > 1) for index in elements(fault.box))
        assert fault.box.volume
        assert wrong[0][:1] == elements(fault.box)[0][:1]  # the first, along the first dim


def test_cover_of_thousands_of_ranges_on_shards():
    """64 column shards, each cut into 64 ranges that do not line up: about 12,000 boxes."""
    boxes = []
    for shard in range(64):
        region = Box((0, 16 * shard), (512, 16))
        points = [0, *sorted(random.Random(shard).sample(range(1, region.volume), 63)), region.volume]
        for start, stop in pairwise(points):
            boxes += boxes_of_range(region, start, stop)
    whole = Box.whole((512, 1024))
    assert len(boxes) > 10_000
    assert find_fault(whole, boxes) is None
    removed = boxes.pop(5000)
    fault = find_fault(whole, boxes)
    assert fault.missing
    assert removed.offsets[0] == fault.box.offsets[0]


@settings(max_examples=100, deadline=None)
@given(regions(), st.integers(0, 2**32))
def test_a_plan_moves_every_element_once(case, seed):
    shape, region = case
    rng = random.Random(seed)
    whole = Box.whole(shape)
    stored = random_tiling(whole, 4, rng) if whole.volume else []
    rng.shuffle(stored)
    wanted = random_tiling(region, 2, rng) if region.volume else []
    source = np.arange(whole.volume).reshape(shape)
    target = np.full(shape, -1)
    moved = 0
    for copy in plan_copies(wanted, stored, tensor="w"):
        piece = source[stored[copy.source].inside(whole)]
        target[copy.overlap.inside(whole)] = piece[copy.overlap.inside(stored[copy.source])]
        moved += copy.overlap.volume
    assert moved == region.volume
    assert (target[region.inside(whole)] == source[region.inside(whole)]).all()


def test_a_plan_with_a_hole_names_tensor_and_region():
    stored = [Box((0, 0), (2, 4)), Box((3, 0), (1, 4))]
    assert len(plan_copies([Box((0, 1), (2, 2))], stored, tensor="w")) == 1
    with pytest.raises(CheckpointError, match=r"^weight of w: \[2:3, 1:3\] is in no file$"):
        plan_copies([Box((1, 1), (3, 2))], stored, tensor="weight of w")


def test_a_plan_from_nothing_or_from_two_copies_is_refused():
    with pytest.raises(CheckpointError, match=r"w: \[0:2\] is in no file"):
        plan_copies([Box((0,), (2,))], [], tensor="w")
    with pytest.raises(CheckpointError, match=r"w: \[1:2\] is stored twice"):
        plan_copies([Box((0,), (3,))], [Box((0,), (2,)), Box((1,), (2,))], tensor="w")
    assert plan_copies([], [], tensor="w") == []
