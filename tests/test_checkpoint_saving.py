"""Saves that wait, fail, are killed or meet old ones: an earlier complete checkpoint always remains."""

import ast
import errno
import os
import re
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from checkpoint_cases import (
    ALONE,
    make_tensors,
    no_flush,  # noqa: F401
    no_space,
    save_as_ranks,
    whole_fragments,
)
from network_hosts import free_port

import megacoder
from megacoder.checkpoint import commit as commit_module
from megacoder.checkpoint import rank_file
from megacoder.checkpoint import writer as writer_module
from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.commit import await_outcome, commit, rank_file_name, write_part
from megacoder.checkpoint.folders import best_checkpoint, discard, rotate, step_folders, temporary_for
from megacoder.checkpoint.rank_file import Fragment, Staging, live_bytes, plan_rank_file
from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.checkpoint.writer import CheckpointConfig, CheckpointWriter, SaveFailed
from megacoder.core.errors import CheckpointError
from megacoder.parallel.world import start_world

SYNC, ASYNC = CheckpointConfig(asynchronous=False), CheckpointConfig()


def steps(root):
    return [step for step, _ in step_folders(root)]


def names(root):
    return sorted(child.name for child in root.iterdir())


def save(writer, step, tensors, **state):
    return writer.save(step, whole_fragments(tensors), state=state, layout={"dp": 1})


def assert_holds(path, tensors):
    reader = CheckpointReader(path)
    for (kind, name), tensor in tensors.items():
        assert torch.equal(reader.read_tensor(name, kind), tensor)


@pytest.fixture
def full_disk(monkeypatch):
    """Call it with a number of bytes: that many more can be written, until it is called again."""
    left = [None]
    write = os.write

    def limited(descriptor, view):
        if left[0] is None or descriptor in (1, 2):
            return write(descriptor, view)
        if left[0] == 0:
            no_space()
        written = write(descriptor, view[: left[0]])  # a disk takes what still fits
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return lambda room: left.__setitem__(0, room)


@pytest.mark.parametrize("config", [SYNC, ASYNC])
def test_a_save_is_complete_and_alone_in_its_folder(tmp_path, config):
    tensors = make_tensors()
    writer = CheckpointWriter(tmp_path / "new" / "run", ALONE, config)
    assert save(writer, 1000, tensors, cursor=7) > 0
    writer.wait()
    root = tmp_path / "new" / "run"
    assert names(root) == ["latest", "step-00001000"]
    assert (root / "latest").read_text() == "step-00001000\n"
    assert names(root / "step-00001000") == ["manifest.json", "rank-00000-of-00001.safetensors"]
    assert_holds(root, tensors)
    assert verify_checkpoint(root / "step-00001000") == []


def test_changes_after_an_asynchronous_save_are_not_in_it(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = write_part
    monkeypatch.setattr(
        writer_module, "write_part", lambda *args, **kwargs: (may_write.wait(10), write(*args, **kwargs))
    )
    tensors = make_tensors()
    fragments, state = whole_fragments(tensors), {"cursor": [1]}
    writer = CheckpointWriter(tmp_path, ALONE, ASYNC)
    writer.save(1, fragments, state=state, layout={})
    for fragment in fragments:
        fragment.data.fill_(-1.0)
    state["cursor"].append(2)
    may_write.set()
    writer.wait()
    assert CheckpointReader(tmp_path).state == {"cursor": [1]}
    assert_holds(tmp_path, make_tensors())


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    may_write, events = threading.Event(), []
    write = write_part

    def slow(*args, step, **kwargs):
        events.append(f"begin {step}")
        if step == 1:
            may_write.wait(10)
        write(*args, step=step, **kwargs)
        events.append(f"end {step}")

    monkeypatch.setattr(writer_module, "write_part", slow)
    writer = CheckpointWriter(tmp_path, ALONE, ASYNC)
    save(writer, 1, make_tensors())
    release = threading.Timer(0.2, may_write.set)
    release.start()
    save(writer, 2, make_tensors())
    writer.wait()
    assert events == ["begin 1", "end 1", "begin 2", "end 2"]
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("block_bytes", [1 << 28, 64])
def test_staging_is_reused_and_grows(block_bytes, monkeypatch):
    monkeypatch.setattr(rank_file, "_BLOCK_BYTES", block_bytes)
    staging = Staging()
    fragments = plan_rank_file("f", whole_fragments(make_tensors())).fragments
    expected = b"".join(live_bytes(fragments))
    pieces = staging.copy_out(fragments)
    assert len(pieces) == -(-len(expected) // block_bytes)
    assert b"".join(pieces) == expected
    first = staging._blocks[0].data_ptr()
    assert b"".join(staging.copy_out(fragments[2:])) == b"".join(live_bytes(fragments[2:]))
    assert staging._blocks[0].data_ptr() == first
    assert sum(map(len, staging.copy_out(fragments * 2))) == 2 * len(expected)


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_is_one_line_and_touches_no_earlier_checkpoint(tmp_path, full_disk, room):
    tensors, later = make_tensors(), make_tensors(seed=1)
    writer = CheckpointWriter(tmp_path, ALONE, SYNC)
    save(writer, 1, tensors)
    full_disk(room)
    with pytest.raises(CheckpointError) as caught:
        save(writer, 2, later)
    line = r"saving step 2 failed: (.*): No space left on device; the checkpoint needs 0\.000 GB, [\d.,]+ GB are free; "
    assert re.fullmatch(f"{line}earlier checkpoints are untouched", str(caught.value))[1] == str(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert_holds(tmp_path, tensors)
    full_disk(None)
    save(writer, 3, later)  # the run may go on
    assert_holds(tmp_path, later)


def test_an_error_in_the_background_reaches_the_next_call_once(tmp_path, full_disk):
    tensors = make_tensors()
    writer = CheckpointWriter(tmp_path, ALONE, ASYNC)
    save(writer, 1, tensors)
    writer.wait()
    full_disk(50)
    save(writer, 2, tensors)
    with pytest.raises(CheckpointError, match=r"saving step 2 failed: .*No space left on device"):
        save(writer, 3, tensors)
    full_disk(None)
    assert names(tmp_path) == ["latest", "step-00000001"]
    writer.wait()
    save(writer, 4, tensors)
    writer.wait()
    assert steps(tmp_path) == [1, 4]


def test_a_bug_in_the_background_keeps_its_type(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(writer_module, "write_part", broken)
    writer = CheckpointWriter(tmp_path, ALONE, ASYNC)
    save(writer, 1, make_tensors())
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert names(tmp_path) == []


def test_ctrl_c_in_a_synchronous_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commit_module, "write_tensor_file", interrupted)
    writer = CheckpointWriter(tmp_path, ALONE, SYNC)
    with pytest.raises(KeyboardInterrupt):
        save(writer, 1, make_tensors())
    assert names(tmp_path) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    writer = CheckpointWriter(tmp_path / "run", ALONE, SYNC)
    (tmp_path / "run").rmdir()
    with pytest.raises(CheckpointError, match=r"saving step 1 failed: .*step-00000001.*: No such file"):
        save(writer, 1, make_tensors())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"rng": (1, 2)}, "'rng' would come back different"),
        ({3: "x"}, "3 would come back different"),
        ({"loss": float("nan")}, "not plain JSON"),
        ({"path": Path("x")}, "not plain JSON: Object of type"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, message):
    writer = CheckpointWriter(tmp_path, ALONE, SYNC)
    with pytest.raises(CheckpointError, match=message):
        writer.save(1, [], state=state, layout={})
    assert names(tmp_path) == []


# Order and durability


def test_everything_is_flushed_before_the_rename_and_latest_moves_last(tmp_path, monkeypatch):
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name_of(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return "ROOT" if path == tmp_path else path.name.split(".tmp-")[0]

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"flush {name_of(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {Path(b).name}"), replace(a, b)))
    save(CheckpointWriter(tmp_path, ALONE, SYNC), 1, make_tensors())
    part = "rank-00000-of-00001.json"
    assert events == [
        "flush rank-00000-of-00001.safetensors", f"flush {part}.part", f"rename {part}",
        "flush manifest.json.part", "rename manifest.json", "flush step-00000001", "rename step-00000001", "flush ROOT",
        "flush latest", "rename latest", "flush ROOT",
    ]  # fmt: skip


def killed_at(operation, root, step, tensors):
    """Saves in a child that dies before its `operation`th system call on files; False when it needed fewer."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def count(*_):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

        def counted(function):
            return lambda *args: (count(), function(*args))[1]

        # Audit events cover open, rename, remove, mkdir and rmdir; write and fsync have none.
        os.write, os.fsync = counted(os.write), counted(os.fsync)
        sys.addaudithook(lambda event, args: event.split(".")[0] in ("open", "os", "shutil") and count())
        try:
            save(CheckpointWriter(root, ALONE, CheckpointConfig(asynchronous=False, keep_last=1)), step, tensors)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", [2, 1])
def test_killed_anywhere_an_older_or_the_new_checkpoint_is_complete(tmp_path, step):
    """keep_last=1, so that there is nothing else to fall back to; step 1 again replaces the one that is there."""
    old, new = make_tensors(kinds=("weight",)), make_tensors(kinds=("weight",), seed=1)
    found = []
    for operation in range(1000):
        root = tmp_path / str(operation)
        save_as_ranks(root, 1, [whole_fragments(old)], state={"run": "old"})
        if not killed_at(operation, root, step, new):
            break
        CheckpointWriter(root, ALONE, SYNC)  # the restart
        assert not [name for name in names(root) if ".tmp-" in name or name.endswith(".part")]
        reader = CheckpointReader(root)
        assert reader.verify() == []
        assert_holds(root, old if reader.state == {"run": "old"} else new)
        found.append(reader.state.get("run", "new"))
    assert 20 < operation < 1000
    assert found.index("new") > 0
    assert "old" not in found[found.index("new") + 1 :]


def test_only_leftovers_of_a_killed_run_are_removed_at_start(tmp_path):
    save_as_ranks(tmp_path, 1, [whole_fragments(make_tensors())])
    (tmp_path / "step-00000002.tmp-abc-0").mkdir()
    (tmp_path / "step-00000002.tmp-abc-0" / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "latest.tmp-123").write_text("step")
    (tmp_path / "config.toml").write_text("")
    CheckpointWriter(tmp_path, ALONE, SYNC)
    assert names(tmp_path) == ["config.toml", "latest", "step-00000001"]


def test_latest_moves_back_only_from_a_broken_checkpoint(tmp_path):
    """A conversion or a writer that is late adds an earlier step; one that goes on from before a broken step must."""
    for step in (5, 3):
        save_as_ranks(tmp_path, step, [[]])
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    (tmp_path / "step-00000005" / "rank-00000-of-00001.safetensors").unlink()
    save_as_ranks(tmp_path, 4, [[]])
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def refusing(function, name):
    """As `function`, but for paths that end so, which the system will not have."""

    def refused(source, *rest):
        if str(source).endswith(name) or any(str(path).endswith(name) for path in rest):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        return function(source, *rest)

    return refused


@pytest.mark.parametrize(
    ("operation", "name", "line"),
    [
        ("replace", "latest", "latest was not updated to step-00000002, which is complete: Permission denied"),
        ("rename", ".tmp-rotated", "older checkpoints were not removed: "),
    ],
)
def test_an_error_after_a_complete_save_does_not_fail_it(tmp_path, monkeypatch, capsys, operation, name, line):
    tensors = make_tensors()
    writer = CheckpointWriter(tmp_path, ALONE, CheckpointConfig(keep_last=1))
    save(writer, 1, make_tensors(seed=1))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refusing(getattr(os, operation), name))
        save(writer, 2, tensors)
        writer.wait()
    assert line in capsys.readouterr().err
    assert_holds(tmp_path, tensors)
    save(writer, 3, tensors)
    writer.wait()
    assert names(tmp_path) == ["latest", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


# Rotation


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [70]), (3, None, [50, 60, 70]), (2, 30, [30, 60, 70]), (1, 20, [20, 40, 60, 70]), (9, None, None)],
)
def test_rotation_keeps_the_last_and_every_so_many(tmp_path, keep_last, keep_every, kept):
    every = [10, 20, 30, 40, 50, 60, 70]
    for step in every:
        save_as_ranks(tmp_path, step, [[]])
    removed = rotate(tmp_path, step=70, keep_last=keep_last, keep_every=keep_every)
    assert steps(tmp_path) == (kept or every)
    assert len(removed) + len(steps(tmp_path)) == len(every)
    assert names(tmp_path)[0] == "latest"


def test_rotation_ignores_broken_checkpoints_and_keeps_later_steps(tmp_path):
    for step in (10, 20, 30, 40, 90):
        save_as_ranks(tmp_path, step, [[]])
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    rotate(tmp_path, step=40, keep_last=2, keep_every=None)
    assert steps(tmp_path) == [20, 30, 40, 90]


def save_one(root, step, state):
    writer = CheckpointWriter(root, ALONE, CheckpointConfig(asynchronous=False, keep_last=9))
    save(writer, step, make_tensors(kinds=("weight",)), **state)


def test_rotation_spares_the_best_of_those_that_are_there(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0, 60: 2.5, 90: 0.1}
    for step, loss in losses.items():
        held_out = {} if loss is None else {"held_out": {"loss": loss, "tokens": {"valid": 7}}}
        save_one(tmp_path, step, held_out)
    rotate(tmp_path, step=60, keep_last=1, keep_every=None, keep_best=True)
    assert steps(tmp_path) == [20, 60, 90], "the first of equal ones; a later step is of another attempt"
    loss, step, folder = best_checkpoint(tmp_path, step=60)
    assert (loss, step, folder.name) == (1.0, 20, "step-00000020")
    (folder / "manifest.json").unlink()
    assert best_checkpoint(tmp_path, step=60)[1] == 60, "a broken one is none"


def test_losses_of_other_held_out_data_are_not_compared(tmp_path):
    for step, (loss, tokens) in enumerate([(1.0, 7), (3.0, 8), (2.0, 8), (4.0, 8)], start=1):
        held_out = {"held_out": {"loss": loss, "tokens": {"valid": tokens}}}
        save_one(tmp_path, step, held_out)
    assert best_checkpoint(tmp_path, step=9)[:2] == (2.0, 3)
    assert best_checkpoint(tmp_path, step=1)[:2] == (1.0, 1)
    assert best_checkpoint(tmp_path / "none", step=1) is None


def test_the_writer_rotates(tmp_path):
    writer = CheckpointWriter(tmp_path, ALONE, CheckpointConfig(keep_last=2, keep_every=4))
    for step in range(1, 8):
        save(writer, step, make_tensors(kinds=("weight",)))
    writer.wait()
    assert steps(tmp_path) == [4, 6, 7]


# Several ranks


def test_ranks_that_leave_a_hole_or_overlap_make_no_checkpoint(tmp_path):
    fragments = whole_fragments({("weight", "w"): torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=r"weight of w: \[0:4, 0:4\] of shape \[4, 4\] is stored twice"):
        save_as_ranks(tmp_path, 1, [fragments, fragments])
    half = Fragment(**{**vars(fragments[0]), "stop": 6, "data": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"weight of w: \[1:2, 2:4\] of shape \[4, 4\] is in no file"):
        save_as_ranks(tmp_path / "hole", 1, [[half]])
    narrow = Fragment(**{**vars(fragments[0]), "data": torch.zeros(16, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"weight of w is F32 \[4, 4\] on one rank and BF16 \[4, 4\] on another"):
        save_as_ranks(tmp_path / "dtype", 1, [[half], [narrow]])
    assert steps(tmp_path) == []


def test_a_rank_that_is_late_or_gives_up_is_noticed(tmp_path):
    temporary = temporary_for(tmp_path, 1, "test")
    temporary.mkdir()
    file = rank_file_name(0, 3)
    write_part(temporary, file, plan_rank_file(file, []), [], step=1, layout={}, state={})
    message = r"2 of 3 ranks did not finish writing in 0\.05 s; the first is rank-00001-of-00003"
    with pytest.raises(CheckpointError, match=message):
        commit(temporary, 3, timeout_seconds=0.05)
    with pytest.raises(CheckpointError, match="the first rank did not commit step-00000001"):
        await_outcome(temporary, timeout_seconds=0.05)
    discard(temporary)
    assert names(tmp_path) == []
    await_outcome(temporary, timeout_seconds=0.0)
    with pytest.raises(CheckpointError, match="another rank gave up"):
        commit(temporary, 3, timeout_seconds=10.0)
    discard(temporary)  # by a second rank that fails


def test_a_rank_writes_no_further_once_another_has_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(commit_module, "_LOOK_EVERY", 16)
    temporary = temporary_for(tmp_path, 1, "test")
    temporary.mkdir()
    fragments = plan_rank_file("f", whole_fragments({("weight", "w"): torch.zeros(12)})).fragments
    asked = []

    def data():
        view = next(iter(live_bytes(fragments)))
        for start in (0, 16, 32):
            asked.append(start)
            if start == 16:
                discard(temporary)
            yield view[start : start + 16]

    file = rank_file_name(1, 2)
    with pytest.raises(CheckpointError, match="is gone: another rank gave up, or this host no longer sees"):
        write_part(temporary, file, plan_rank_file(file, fragments), data(), step=1, layout={}, state={})
    assert asked == [0, 16]


def rank_of_two(rank, root, port):
    """Two real ranks: saves that succeed, that one of them cannot finish, and a load of the other's half."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    world = start_world("cpu", timeout_seconds=60.0)
    values = torch.arange(21.0).reshape(7, 3)

    def half(number, offset):
        start, stop = (0, 10) if number == 0 else (10, 21)
        data = values.flatten()[start:stop] + offset
        return Fragment(
            name="w", kind="weight", global_shape=(7, 3), region=Box.whole((7, 3)), start=start, stop=stop, data=data
        )

    writer = CheckpointWriter(root, world, ASYNC)
    writer.save(1, [half(rank, 100)], state={"cursor": 1}, layout={"dp": 2})
    writer.save(2, [half(rank, 200)], state={"cursor": 2}, layout={"dp": 2})
    writer.wait()
    write = os.write

    def to_a_full_disk(descriptor, data):  # ranks speak through pipes, which need no disk
        return no_space() if stat.S_ISREG(os.fstat(descriptor).st_mode) else write(descriptor, data)

    def broken(*_, **__):
        raise ZeroDivisionError

    for full, found in (([1], "rank 1"), ([0, 1], "(rank [01]|2 of 2 ranks)")):
        if rank in full:
            os.write = to_a_full_disk
        writer.save(3, [half(rank, 300)], state={}, layout={"dp": 2})
        with pytest.raises(SaveFailed, match=f"saving step 3 failed on {found}: {root}: No space left"):
            writer.wait()
        os.write = write
    if rank == 1:
        writer_module.write_part = broken
    writer.save(3, [half(rank, 300)], state={}, layout={"dp": 2})
    expected = ZeroDivisionError if rank == 1 else SaveFailed
    with pytest.raises(expected, match="" if rank == 1 else "ZeroDivisionError"):
        writer.wait()
    writer_module.write_part = write_part
    other = half(1 - rank, 0)
    other.data.zero_()
    reader = CheckpointReader(root)
    assert (reader.step, reader.state) == (2, {"cursor": 2})
    reader.read(other)
    assert torch.equal(other.data, half(1 - rank, 200).data)
    sync = CheckpointWriter(root / "sync", world, SYNC)
    sync.save(4, [half(rank, 400)], state={}, layout={"dp": 2})
    assert torch.equal(CheckpointReader(root / "sync").read_tensor("w"), values + 400)
    world.close()


def test_ranks_agree_on_the_cause_and_count_those_that_met_it(tmp_path):
    writer = CheckpointWriter(tmp_path, ALONE, SYNC)
    gone, full, broken = ("gave up", "it is gone"), ("full", f"{tmp_path}: No space left"), ("other", "x: I/O error")
    for reports, said in {
        (gone, full, None, full): f"failed on 2 of 4 ranks: {tmp_path}: No space left; the checkpoint needs ",
        (broken, gone, full): f"failed on rank 2: {tmp_path}: No space left; the checkpoint needs ",
        (None, gone, broken): "failed on rank 2: x: I/O error; earlier checkpoints are",
        (None, gone): "failed on rank 1: it is gone; earlier checkpoints are",
    }.items():
        assert said in str(writer._failure(reports))


def test_two_processes_save_fail_together_and_load(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, args=(tmp_path, free_port()), nprocs=2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002", "sync"]
    assert names(tmp_path / "sync") == ["latest", "step-00000004"]
    assert verify_checkpoint(tmp_path / "step-00000002") == []


# No code that a file could bring along


MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.distributed.checkpoint"}
CALLS = {"torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load",
         "pd.read_pickle", "pandas.read_pickle"}  # fmt: skip
"""Of numpy, `load` does only where it is told to, and there is no need for it here."""


def unpickling(source):
    """Lines that import what unpickles, call functions that do, or send objects, which the other end unpickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names = {ast.unparse(node)}
        elif isinstance(node, ast.keyword):
            names = {"torch.load"} if node.arg == "allow_pickle" else set()
        else:
            continue
        heads = {".".join(name.split(".")[:length]) for name in names for length in (1, 3)}
        sends = any(name.endswith(("gather_object", "_object_list")) for name in names)
        if heads & MODULES or names & CALLS or sends:
            found.append(node.lineno)
    return found


def test_no_module_unpickles():
    root = Path(megacoder.__file__).parent
    paths = [*root.rglob("*.py"), *(root.parent / "examples").rglob("*.py"), *(root.parent / "csrc").rglob("*.py")]
    assert len(paths) > 100
    assert {str(path): lines for path in paths if (lines := unpickling(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "x = torch.load(p)", "from torch import load", "np.load(p)",
     "import torch.distributed.checkpoint as dcp", "from torch.distributed.checkpoint import load",
     "f(allow_pickle=True)", "dist.all_gather_object(a, b)", "from torch.distributed import broadcast_object_list"],
)  # fmt: skip
def test_unpickling_would_be_seen(line):
    assert unpickling(line) == [1]
