"""Tensors, layouts and checkpoints written by simulated ranks, shared by the checkpoint tests."""

import errno
import hashlib
import itertools
import json
import os

import pytest
import torch

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.commit import commit, rank_file_name, write_part
from megacoder.checkpoint.folders import temporary_for
from megacoder.checkpoint.rank_file import Fragment, live_bytes, plan_rank_file
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.parallel.world import World

ALONE = World(0, 1, 0, torch.device("cpu"), None)
SHAPES = {"scalar": (), "norm": (7,), "empty": (3, 0, 2), "matrix": (9, 5), "row": (1, 4), "cube": (3, 4, 5)}


@pytest.fixture(autouse=True, scope="module")
def no_flush():
    """For tests of content: waiting for the disk is most of the time of a small save, and changes nothing read back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def no_space(*_, **__):
    """In the place of what writes: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip_a_byte(path):
    """The last one."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def state_of(path):
    """(kind, name) -> tensor of the newest checkpoint there."""
    reader = CheckpointReader(path)
    return {key: reader.read_tensor(key[1], key[0]) for key in reader.tensors()}


def sealed(table):
    """The bytes of a manifest of these members, sealed as only a program that means to would."""
    members = [f'"{key}":{json.dumps(item, separators=(",", ":"))},\n' for key, item in table.items()]
    body = ("{" + "".join(members)).encode()
    return body + b'"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def make_tensors(shapes=SHAPES, seed=0, kinds=("weight", "exp_avg", "exp_avg_sq")):
    """(kind, name) -> fp32 tensor of distinct values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for kind, (name, shape) in itertools.product(kinds, shapes.items())
    }


def cuts(length, parts, random):
    """`parts` random ranges that tile [0, length)."""
    points = [0, *sorted(random.randint(0, length) for _ in range(parts - 1)), length]
    return list(itertools.pairwise(points))


def lay_out(tensors, *, tp, dp, random):
    """For each of tp * dp ranks its fragments: tensors cut along some dim over tp, the shards' ranges over dp."""
    ranks = [[] for _ in range(tp * dp)]
    for (kind, name), tensor in tensors.items():
        whole = Box.whole(tensor.shape)
        dim = random.randrange(tensor.ndim) if tensor.ndim else None
        if dim is None:
            regions = [whole]
        else:
            regions = [
                Box(
                    (*whole.offsets[:dim], begin, *whole.offsets[dim + 1 :]),
                    (*whole.sizes[:dim], end - begin, *whole.sizes[dim + 1 :]),
                )
                for begin, end in cuts(tensor.shape[dim], tp, random)
            ]
        for tp_rank, region in enumerate(regions):
            for dp_rank, (start, stop) in enumerate(cuts(region.volume, dp, random)):
                data = tensor[region.inside(whole)].flatten()[start:stop].clone()
                ranks[tp_rank * dp + dp_rank].append(
                    Fragment(
                        name=name, kind=kind, global_shape=tuple(tensor.shape), region=region, start=start, stop=stop,
                        data=data,
                    )
                )  # fmt: skip
    return ranks


def whole_fragments(tensors):
    """All of every tensor, as the one rank of a world of one owns it."""
    return [
        Fragment(
            name=name, kind=kind, global_shape=tuple(tensor.shape), region=Box.whole(tensor.shape), start=0,
            stop=tensor.numel(), data=tensor.flatten(),
        )
        for (kind, name), tensor in tensors.items()
    ]  # fmt: skip


def save_as_ranks(root, step, ranks, state=None):
    """A checkpoint as `len(ranks)` processes write it; returns its folder."""
    temporary = temporary_for(root, step, "test")
    temporary.mkdir(parents=True)
    for rank, fragments in enumerate(ranks):
        file = rank_file_name(rank, len(ranks))
        plan = plan_rank_file(file, fragments)
        write_part(
            temporary, file, plan, live_bytes(plan.fragments), step=step, layout={"ranks": len(ranks)},
            state=state or {},
        )  # fmt: skip
    return commit(temporary, len(ranks), timeout_seconds=0.0)


def blank(fragment):
    """The same fragment with nothing in it yet."""
    return Fragment(**{**vars(fragment), "data": torch.full_like(fragment.data, float("nan"))})
