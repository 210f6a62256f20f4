"""Instruction tuning: ids and labels as published, packing, malformed input, and a model that learns to stop."""

import dataclasses
import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from data_samples import small_tokenizer, write_dataset, write_jsonl
from train_cases import ALONE, functions, leave

from megacoder.cli import checkpoint_convert
from megacoder.cli import sft as command
from megacoder.core.config import load_toml, to_toml
from megacoder.core.errors import AlikeOnAllRanks, ConfigError, DataError, FormatError, MegacoderError
from megacoder.core.files import exclusive
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.conversation_rows import ColumnsConfig, read_conversation
from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.conversations import ConversationConfig, prepare_conversations
from megacoder.data.indexed import IndexedDataset, bin_path
from megacoder.data.packing import best_fit
from megacoder.evaluate.generate import generate
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import import_with_tokenizer
from megacoder.parallel.config import ParallelConfig
from megacoder.train.config import DataConfig, RunConfig
from megacoder.train.loop import Trainer
from megacoder.train.metrics_log import read_metrics
from megacoder.train.schedule import ScheduleConfig, learning_rate
from megacoder.train.setup import open_conversations
from megacoder.train.sft import DEFAULTS, prepare, prepared_run, sft

SCRIPT_PROMPT = """
You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you only \
answer questions related to computer science. For politically sensitive questions, security and privacy issues, and \
other non-computer science questions, you will refuse to answer.
### Instruction:
{}
### Response:
"""
"""As the published fine-tuning script has it; its leading line break is stripped, its instruction, too."""


SHORT = FormatConfig(kind="custom", system="")
"""The published system text would be most of what a small model reads."""


def conversations(count, *, seed=0):
    """Multi-turn ones, with the habits of real ones: code, blank lines, edges of white space, non-ASCII text."""
    draw = random.Random(seed)
    texts = [*functions(6), "Führer naïve 中文 가각 👍🏽", "  indented\n\n", "x", "\tif (a) {\r\n}\r\n", "1234 + 5 = ?",
             "### Response:\nnot really", "100% of `{x}`\n", "'quoted' \\n \"text\""]  # fmt: skip
    made = []
    for _ in range(count):
        messages = [("system", draw.choice(texts))] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            messages += [("user", draw.choice(texts)), ("assistant", draw.choice(texts))]
        made.append(messages)
    return made


@pytest.fixture(scope="module")
def exported_tokenizer(tmp_path_factory):
    """As transformers loads it from the folder that a run leaves."""
    from transformers import AutoTokenizer  # a test dependency: without it nothing here would be shown

    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save(folder / "source")
    data = write_jsonl(folder / "data.jsonl", [{"instruction": "a", "output": "b"}])

    def load(kind):
        run = prepare(run_config(folder / kind, folder / "source", data, chat=FormatConfig(kind=kind)))
        return AutoTokenizer.from_pretrained(run.data.tokenizer)

    return load


def run_config(output, tokenizer, data, *, chat=FormatConfig(), **changes):  # noqa: B008, it is frozen
    table = {
        "output": str(output), "global_batch_size": 8, "micro_batch_size": 4, "device": "cpu", "dtype": "float32",
        "data": {"tokenizer": str(tokenizer)},
    }  # fmt: skip
    path = output.parent / f"{output.name}.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "data"]
    path.write_text("\n".join(lines) + f"\n[data]\ntokenizer = {json.dumps(str(tokenizer))}\n")
    config = load_toml(RunConfig, path, absent=DEFAULTS)
    stream = changes.pop("stream", {})
    data_config = DataConfig(
        train=config.data.train, tokenizer=config.data.tokenizer,
        stream=config.data.stream.__class__(**{**config.data.stream.__dict__, **stream}),
        conversations=ConversationConfig(train=(data,), format=chat),
    )  # fmt: skip
    return RunConfig(**{**config.__dict__, "data": data_config, **changes})


def joined(segments):
    return [token for segment in segments for token in segment.ids]


def labels_of(segments):
    return [token if segment.trained else -100 for segment in segments for token in segment.ids]


def labels_by_template(theirs, rendered, ids):
    """Of every answer what follows the prompt that asks for it, through the control token that ends it."""
    labels, eot = [-100] * len(ids), theirs.convert_tokens_to_ids("<|EOT|>")
    for number, message in enumerate(rendered):
        if message["role"] == "assistant":
            asked = theirs.apply_chat_template(rendered[:number], add_generation_prompt=True, return_dict=False)
            answered = theirs.apply_chat_template(rendered[: number + 1], return_dict=False)
            part = slice(len(asked), len(answered) - answered[::-1].index(eot))
            labels[part] = ids[part]
    return labels


@pytest.mark.parametrize("kind", ["chat", "script", "custom"])
def test_ids_and_labels_equal_those_of_apply_chat_template(kind, exported_tokenizer):
    theirs, ours = exported_tokenizer(kind), ChatFormat(FormatConfig(kind=kind), small_tokenizer())
    samples = conversations(100)
    assert sum(len(messages) > 3 for messages in samples) > 50, "most have several turns"
    for messages in samples:
        rendered = [{"role": role, "content": content} for role, content in messages]
        ids = theirs.apply_chat_template(rendered, tokenize=True, return_dict=False)
        assert joined(ours.segments(messages)) == ids
        labels = labels_by_template(theirs, rendered, ids)
        assert sum(label != -100 for label in labels) >= 2 * sum(role == "assistant" for role, _ in messages)
        assert labels_of(ours.segments(messages)) == labels
        prompt = theirs.apply_chat_template(rendered[:-1], add_generation_prompt=True, return_dict=False)
        assert joined(ours.segments(messages)[:-2]) == prompt


def test_ids_and_labels_equal_those_of_the_published_script(exported_tokenizer):
    """Prompt and whole are tokenised, and the prompt's length is masked, as in its `preprocess`."""
    theirs, ours = exported_tokenizer("script"), ChatFormat(FormatConfig(kind="script"), small_tokenizer())
    for messages in conversations(100):
        question, answer = messages[-2][1], messages[-1][1]
        source = SCRIPT_PROMPT.format(question.strip()).lstrip()
        whole = theirs(source + f"{answer}\n<|EOT|>").input_ids
        labels = [*[-100] * len(theirs(source).input_ids), *whole[len(theirs(source).input_ids) :]]
        row = {"instruction": question, "output": answer}
        segments = ours.segments(read_conversation(row, ColumnsConfig(), where="here").messages)
        assert joined(segments) == whole
        assert labels_of(segments) == labels


def test_the_two_chat_formats_differ_as_published():
    def render(messages, kind):
        segments = ChatFormat(FormatConfig(kind=kind), small_tokenizer()).segments(messages)
        return small_tokenizer().decode(joined(segments)).removeprefix(SPECIAL_TOKENS["bos"])

    turn = [("user", " hi \n"), ("assistant", "ho")]
    assert "Deepseek Coder model, developed by Deepseek Company" in render(turn, "chat")
    assert "refuse to answer\n### Instruction:\n hi \n\n### Response:\nho\n<|EOT|>\n" in render(turn, "chat")
    assert "DeepSeek Coder model, developed by DeepSeek Company" in render(turn, "script")
    assert render(turn, "script").endswith("refuse to answer.\n### Instruction:\nhi\n### Response:\nho\n<|EOT|>")
    own = render([("system", "Be brief."), *turn], "chat")
    assert own.startswith("Be brief.### Instruction:\n"), "no line break behind a system message of one's own"


def test_any_control_token_may_separate_turns():
    tokenizer = small_tokenizer()
    config = FormatConfig(kind="custom", system="", instruction="<|User|>{content}", response="<|Assistant|>",
                          end="<|EOT|>", after="")  # fmt: skip
    asked, answer, _ = ChatFormat(config, tokenizer).segments([("user", "one"), ("assistant", "uno")])
    user, assistant = (tokenizer.control_id(name) for name in ("user", "assistant"))
    assert asked.ids == [tokenizer.bos_id, user, *tokenizer.encode("one"), assistant]
    assert answer.ids == [*tokenizer.encode("uno"), tokenizer.eot_id]


def test_every_answer_and_its_end_marker_is_trained_and_nothing_else():
    tokenizer = small_tokenizer()
    messages = [("user", "one"), ("assistant", "uno"), ("user", "two"), ("assistant", "dos")]
    segments = ChatFormat(FormatConfig(), tokenizer).segments(messages)
    trained = [tokenizer.decode(segment.ids) for segment in segments if segment.trained]
    assert trained == ["uno\n<|EOT|>", "dos\n<|EOT|>"]
    assert [segment.trained for segment in segments] == [False, True, False, True, False]
    assert segments[1].ids[-1] == tokenizer.eot_id


def test_a_control_token_quoted_in_a_message_stays_text():
    tokenizer = small_tokenizer()
    segments = ChatFormat(FormatConfig(), tokenizer).segments([("user", "say <|EOT|>"), ("assistant", "<|EOT|> it is")])
    assert joined(segments).count(tokenizer.eot_id) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": "\n"}, r"end = '\\n': does not end with a control token of the tokenizer \('<.*\.\.\.\), so"),
        ({"system_message": "S:"}, "format.system_message = 'S:': has {content} 0 times"),
        ({"instruction": "Q:"}, "has {content} 0 times"),
        ({"instruction": "{content}? {content}\n"}, "has {content} 2 times; must have it once"),
        ({"response": "A: "}, "must end with a line break or a control token"),
    ],
)
def test_a_format_that_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ChatFormat(FormatConfig(kind="custom", **changes), small_tokenizer())


GOOD = '{"instruction": "a", "output": "b"}'


def prepared_from(path, prefix, **options):
    return prepare_conversations([path], prefix, small_tokenizer(), ConversationConfig(**options), seq_length=4096)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed JSON"),
        ("[1]", "expected a JSON object, not list"),
        ('{"instruction": "a"}', "'output' is missing"),
        ('{"instruction": 3, "output": "b"}', "'instruction' is 3, expected text"),
        ('{"instruction": "a", "output": " "}', "'output' is empty"),
        ('{"messages": []}', "expected a list of turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer to train on"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "has the role 'robot'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 0 is the assistant's, expected the user's"),
        ('{"messages": [{"role": "user"}]}', "expected role and content"),
        ('{"instruction": "a \\ud800", "output": "b"}', "message 0, the user's, holds half a surrogate pair"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\udfff"}]}',
            "message 1, the assistant's, holds half a surrogate pair",
        ),
    ],
)
def test_a_malformed_line_is_named_or_skipped(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        prepared_from(path, tmp_path / "out")
    prepared = prepared_from(path, tmp_path / "out", malformed="skip")
    assert (prepared.conversations, prepared.skipped) == (2, 1)
    assert message.split(",")[0] in prepared.first_skipped


def test_a_parquet_row_that_is_not_utf8_is_named_or_skipped(tmp_path):
    texts = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    pq.write_table(pa.table({"instruction": texts, "output": ["x", "y", "z"]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: row 1: a text that is not UTF-8"):
        prepared_from(tmp_path / "data.parquet", tmp_path / "out")
    prepared = prepared_from(tmp_path / "data.parquet", tmp_path / "out", malformed="skip")
    assert (prepared.conversations, prepared.skipped) == (2, 1)


def test_empty_lines_are_no_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{GOOD}\r\n  \n{GOOD}\n\n")
    prepared = prepared_from(path, tmp_path / "out")
    assert (prepared.conversations, prepared.skipped) == (2, 0)


@pytest.mark.parametrize("content", ["", "{\n"], ids=["empty", "malformed"])
def test_invalid_conversations_leave_no_folder(tmp_path, content):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    small_tokenizer().save(tmp_path / "tokenizer")
    config = run_config(tmp_path / "run", tmp_path / "tokenizer", data)
    with pytest.raises(DataError, match=r"data\.jsonl"):
        prepare(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # there before: it stays
    with pytest.raises(DataError, match=r"data\.jsonl"):
        prepare(config)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_lines_are_read(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    data = tmp_path / f"data.jsonl{suffix}"
    data.write_bytes(compress(f"{GOOD}\n{GOOD}\n".encode()))
    prepared = prepared_from(data, tmp_path / "out")
    assert (prepared.conversations, prepared.skipped) == (2, 0)
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(FormatError, match=rf"data\.jsonl\{suffix}: not readable"):
        prepared_from(data, tmp_path / "out")


def test_parquet_and_lines_of_messages_give_the_same(tmp_path):
    rows = [{"messages": [{"role": role, "content": content} for role, content in made]} for made in conversations(9)]
    lines = write_jsonl(tmp_path / "data.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    made = []
    for number, path in enumerate([lines, tmp_path / "data.parquet"]):
        prepared_from(path, tmp_path / str(number))
        made.append((tmp_path / f"{number}.bin").read_bytes())
    assert made[0] == made[1]


def test_prepared_data_stays_until_its_inputs_change(tmp_path):
    path, prefix = write_jsonl(tmp_path / "data.jsonl", [json.loads(GOOD)]), tmp_path / "out"
    first = prepared_from(path, prefix)
    stamp = (tmp_path / "out.bin").stat().st_mtime_ns
    assert prepared_from(path, prefix) == first
    assert (tmp_path / "out.bin").stat().st_mtime_ns == stamp
    write_jsonl(path, [json.loads(GOOD)] * 2)
    assert prepared_from(path, prefix).conversations == 2


@pytest.fixture
def stream_of(tmp_path):
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in made]} for made in conversations(60, seed=3)
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    prepared_from(path, tmp_path / "out")
    dataset = IndexedDataset(tmp_path / "out")

    def make(dp_rank=0, dp_size=1, seq_length=512, batch=4):
        return ConversationStream(
            dataset, small_tokenizer(), seq_length=seq_length, seed=1, global_batch_size=batch, dp_rank=dp_rank,
            dp_size=dp_size,
        )  # fmt: skip

    return make, dataset


def test_windows_hold_complete_conversations_masked_from_each_other(stream_of):
    make, dataset = stream_of
    tokenizer, stream, seen = small_tokenizer(), make(seq_length=4096), []
    whole = {tuple(dataset.document(number).tolist()) for number in range(dataset.num_documents)}
    for _ in range(12):
        batch = stream.next_batch()
        for tokens, labels, starts in zip(batch.tokens, batch.labels, batch.starts, strict=True):
            edges = [*starts.nonzero().flatten().tolist(), len(tokens)]
            for start, stop in itertools.pairwise(edges):
                piece, trained = tokens[start:stop], labels[start:stop]
                if piece[0] == tokenizer.pad_id:
                    assert set(trained.tolist()) == {-100}
                    continue
                seen.append(tuple(piece.tolist()))
                counted = trained != -100
                assert torch.equal(trained[:-1][counted[:-1]], piece[1:][counted[:-1]]), "labels are next tokens"
                assert trained[-1] == -100, "none of another conversation"
                assert int((trained == tokenizer.eot_id).sum()) == int((piece == tokenizer.eot_id).sum())
    assert set(seen) <= whole
    assert len(set(seen)) > 40


def test_a_conversation_that_is_too_long_is_cut_at_the_right(stream_of):
    make, dataset = stream_of
    tokens = make(seq_length=128).next_batch().tokens
    beginnings = {tuple(dataset.document(number)[:16].tolist()) for number in range(dataset.num_documents)}
    assert all(tuple(row[:16].tolist()) in beginnings for row in tokens)
    with pytest.raises(ConfigError, match="none of 60 conversations has an answer that begins within it"):
        make(seq_length=2)


def long_conversations(folder):
    """A usual one, one whose question fills a window, and one whose answer exceeds it."""
    rows = [("short", "ok"), ("word " * 300, "ok"), ("short", "word " * 400)]
    return write_jsonl(folder / "long.jsonl", [{"instruction": asked, "output": answer} for asked, answer in rows])


def test_what_a_window_cannot_hold_is_counted_named_and_said(tmp_path, capsys):
    small_tokenizer().save(tmp_path / "tokenizer")
    data = long_conversations(tmp_path)
    config = run_config(tmp_path / "run", tmp_path / "tokenizer", data, chat=SHORT, stream={"seq_length": 128})
    run = prepare(config)
    printed = capsys.readouterr().err.splitlines()
    dataset = IndexedDataset(run.data.train[0])
    lengths = [len(dataset.document(number)) for number in range(3)]
    assert lengths[0] < 128 < min(lengths[1:])
    trained = sum(
        map(len, (dataset.sequence(at) for number in range(3) for at in dataset.document_sequences(number)[1::2]))
    )
    epochs = config.steps * config.global_batch_size * 128 / (lengths[0] + 128)
    assert printed[0] == (
        f"3 conversations: {sum(lengths):,} tokens, {trained:,} of them trained; {config.steps} steps are "
        f"{epochs:,.1f} epochs"
    )
    assert (
        f"1 conversation left out, {lengths[1]:,} tokens: no answer begins within data.stream.seq_length = 128"
        in printed[1]
    )
    assert printed[1].endswith("long.jsonl:2")
    assert f"1 conversation cut at data.stream.seq_length = 128, {lengths[2] - 128:,} tokens lost" in printed[2]
    assert printed[2].endswith("long.jsonl:3")
    stream = ConversationStream(
        dataset, small_tokenizer(), seq_length=128, seed=1, global_batch_size=1, dp_rank=0, dp_size=1
    )
    served = [window for epoch in range(3) for window in stream._windows(epoch, 0)]
    assert {number for window in served for number in window} == {0, 2}, "as counted"


def test_no_epochs_are_said_where_no_window_holds_an_answer(tmp_path, capsys):
    small_tokenizer().save(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "long.jsonl", [{"instruction": "word " * 300, "output": "ok"}])
    with pytest.raises(ConfigError, match="none of 1 conversation has an answer"):
        prepare(run_config(tmp_path / "run", tmp_path / "tokenizer", data, chat=SHORT, stream={"seq_length": 128}))
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("1 conversation: ")
    assert first.endswith(" of them trained")


def test_what_is_too_long_is_skipped_or_an_error(tmp_path):
    data, tokenizer = long_conversations(tmp_path), small_tokenizer()

    def prepared(too_long, seq_length):
        config = ConversationConfig(format=SHORT, too_long=too_long)
        return prepare_conversations([data], tmp_path / "out", tokenizer, config, seq_length=seq_length)

    found = prepared("skip", 128)
    assert (found.conversations, found.unusable, found.cut) == (1, 2, 0)
    assert IndexedDataset(tmp_path / "out").num_documents == 1
    assert prepared("skip", 1 << 20).conversations == 3, "made again for other windows"
    assert prepared("error", 1 << 20).conversations == 3
    with pytest.raises(
        DataError, match=r"long\.jsonl:2: a conversation of \d+ tokens, but data\.stream\.seq_length = 128"
    ):
        prepared("error", 128)
    with pytest.raises(DataError, match=r"no conversation in it; 3 are longer than data\.stream\.seq_length = 2"):
        prepared("skip", 2)


@pytest.mark.parametrize(
    "options", [{"too_long": "skip"}, {"format": FormatConfig(kind="custom", system="Be brief.")}], ids=repr
)
def test_conversations_are_written_again_for_other_options(tmp_path, options):
    data = long_conversations(tmp_path)

    def written(**options):
        config = ConversationConfig(**{"format": SHORT} | options)
        prepare_conversations([data], tmp_path / "out", small_tokenizer(), config, seq_length=128)
        return bin_path(tmp_path / "out").read_bytes()

    assert written() != written(**options)


def test_ranks_serve_the_same_as_one_and_resume_from_a_state(stream_of):
    make, _ = stream_of
    alone, ranks = make(), [make(rank, 2) for rank in range(2)]
    for _ in range(9):
        expected, parts = alone.next_batch(), [stream.next_batch() for stream in ranks]
        for name in ("tokens", "labels", "starts"):
            ours = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(ours, getattr(expected, name))
    resumed = make(0, 4)
    resumed.load_state_dict(ranks[1].state_dict())
    assert torch.equal(resumed.next_batch().tokens[0], alone.next_batch().tokens[0])
    with pytest.raises(ConfigError, match="seq_length is 256, but"):
        make(seq_length=256).load_state_dict(alone.state_dict())


def write_conversations(prefix, lengths):
    """Each of these tokens in all, its number repeated."""
    return write_dataset(prefix, [[[number], [number] * (length - 1), []] for number, length in enumerate(lengths)])


def stream_over(dataset, *, batch=1, dp_rank=0, dp_size=1, epochs=None):
    return ConversationStream(
        dataset, small_tokenizer(), seq_length=256, seed=1, global_batch_size=batch, dp_rank=dp_rank, dp_size=dp_size,
        epochs=epochs,
    )  # fmt: skip


def test_a_single_epoch_serves_every_conversation_once(tmp_path):
    """As an evaluation reads them."""
    dataset = write_conversations(tmp_path / "out", np.random.default_rng(0).integers(8, 256, 30).tolist())
    streams = [stream_over(dataset, batch=4, dp_rank=rank, dp_size=2, epochs=1) for rank in range(2)]
    served = []
    for _ in range(20):
        for batch in (stream.next_batch() for stream in streams):
            served += batch.tokens[batch.starts].tolist()
    pad = small_tokenizer().pad_id
    assert sorted(number for number in served if number != pad) == list(range(30))
    assert (batch.labels == -100).all()
    assert (batch.tokens == pad).all()


def test_long_and_short_conversations_are_served_side_by_side(tmp_path):
    dataset = write_conversations(tmp_path / "out", np.random.default_rng(0).integers(8, 256, 400).tolist())
    stream = stream_over(dataset)
    num_windows = len(stream._windows(0, 0))
    orders = []
    for _ in range(2):
        held = [int(stream.next_batch().starts.sum()) for _ in range(num_windows)]
        halves = [np.mean(held[: num_windows // 2]), np.mean(held[num_windows // 2 :])]
        assert max(halves) < 1.2 * min(halves), "conversations of a window, early and late in an epoch"
        orders.append(held)
    assert orders[0] != orders[1]
    assert stream.state_dict()["epoch"] == 2


def test_lots_are_packed_when_reached_and_any_ranks_resume_within_them(tmp_path, monkeypatch):
    monkeypatch.setattr("megacoder.data.conversation_stream._LOT", 16)
    packed = []
    monkeypatch.setattr(
        "megacoder.data.conversation_stream.best_fit", lambda *lot: packed.append(len(lot[0])) or best_fit(*lot)
    )
    dataset = write_conversations(tmp_path / "out", np.random.default_rng(0).integers(8, 256, 50).tolist())
    alone, states, windows = stream_over(dataset), [], []
    while alone.state_dict()["epoch"] < 2:
        states.append(alone.state_dict())
        windows.append(alone.next_batch().tokens[0])
        assert len(packed) == 1 + alone._packed[1] + 4 * alone._packed[0]
    assert packed == 2 * [16, 16, 16, 2]
    first = [set(window.tolist()) for window, state in zip(windows, states, strict=True) if state["epoch"] == 0]
    pad = small_tokenizer().pad_id
    assert sorted(number for window in first for number in window - {pad}) == list(range(50)), "each once"
    for number in range(len(windows) - 4):
        for rank in range(2):
            resumed = stream_over(dataset, batch=4, dp_rank=rank, dp_size=2)
            resumed.load_state_dict(states[number])
            assert torch.equal(resumed.next_batch().tokens, torch.stack(windows[number + rank : number + 4 : 2]))


def test_a_position_from_when_long_conversations_came_first_is_refused(tmp_path):
    stream = stream_over(write_conversations(tmp_path / "out", [9]))
    state = stream.state_dict()
    del state["order"]["lot"], state["lot"]
    with pytest.raises(ConfigError, match="is of an earlier version, which served long conversations first; choose"):
        stream.load_state_dict(state)


def test_a_dataset_that_holds_no_conversations_is_named(tmp_path):
    dataset = write_dataset(tmp_path / "out", [[[1] * 4] * sequences for sequences in (3, 2)])
    with pytest.raises(DataError, match="out: document 1 has 2 sequences, so it is not a conversation"):
        stream_over(dataset)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A question for each of a few words, which a small model learns by heart."""
    folder = tmp_path_factory.mktemp("toy")
    small_tokenizer().save(folder / "tokenizer")
    words = ["import", "return", "class", "while"]
    rows = [{"instruction": f"say {word}", "output": f"{word} {word}"} for word in words]
    data = write_jsonl(folder / "data.jsonl", rows)
    model = ModelConfig(
        vocab_size=small_tokenizer().vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=512, init_std=0.05,
        rope_theta=10000.0,
    )  # fmt: skip

    def config(output, **changes):
        settings = {
            "model": model, "steps": 70, "stream": {"seq_length": 64}, "checkpoint_every": 70, "eval_every": 1000,
            "schedule": ScheduleConfig(kind="cosine", peak_lr=6e-3, warmup_steps=5), "chat": SHORT,
        }  # fmt: skip
        return run_config(folder / output, folder / "tokenizer", data, **{**settings, **changes})

    return folder, rows, config


def test_an_instructed_model_answers_and_stops(toy, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # one thread: two would wait for each other most of the time
    folder, rows, config = toy
    made = config("run")
    (folder / "run.toml").write_text(to_toml(made))
    command.main([str(folder / "run.toml")])
    curve = read_metrics(folder / "run" / "metrics.jsonl")
    assert curve[-1]["loss"] < 0.2 < 3.0 < curve[0]["loss"]
    checkpoint_convert.export_main([str(folder / "run"), str(folder / "exported"), "--dtype", "fp32"])
    model, tokenizer = import_with_tokenizer(folder / "exported", dtype=torch.float32)
    settings = json.loads((folder / "exported" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eot_id, tokenizer.eos_id], "what serves the model must stop there"
    chat = ChatFormat(SHORT, tokenizer)
    prompts = [
        joined(chat.segments([("user", row["instruction"]), ("assistant", "")])[:-2]) for row in rows
    ]  # fmt: skip
    answers = generate(model, prompts, max_new_tokens=16, stop_ids=())
    for row, answer in zip(rows, answers, strict=True):
        assert tokenizer.eot_id in answer, "it never stops"
        assert tokenizer.decode(answer[: answer.index(tokenizer.eot_id)]) == row["output"] + "\n"


def steps_on(world, config):
    trainer = Trainer(config, world)
    losses = [trainer.update().loss for _ in range(2)]
    trainer.folder.finish()
    trainer.batches.close()
    return losses


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "schedule": "zbv"}, {"cp": 2}, {}], ids=str)
def test_every_layout_gives_the_same_training(ranks, toy, layout):
    _, _, config = toy
    alone = ranks.run(1, steps_on, prepare(config(f"alone-{sorted(layout)}")))[0]
    shared = prepare(config(f"ranks-{sorted(layout)}", parallel=ParallelConfig(**layout)))
    for losses in ranks.run(2, steps_on, shared):
        assert losses == pytest.approx(alone, rel=1e-5)


def test_conversations_come_in_the_order_of_the_datas_seed(toy):
    run = prepare(toy[2]("order", stream={"seq_length": 64, "seed": 5}))
    tokenizer, shares = small_tokenizer(), {"dp_rank": 1, "dp_size": 2}
    told = ConversationStream(
        IndexedDataset(run.data.train[0]), tokenizer, seq_length=64, seed=5, global_batch_size=8, **shares
    )
    assert open_conversations(run, run.data.train[0], tokenizer, **shares).state_dict() == told.state_dict()


def test_held_out_conversations_are_evaluated_once(toy):
    made = toy[2]("held-out", eval_batches=20)
    rows = dataclasses.replace(made.data.conversations, valid=made.data.conversations.train)
    run = prepare(dataclasses.replace(made, data=dataclasses.replace(made.data, conversations=rows)))
    again = prepare_conversations(rows.valid, toy[0] / "again", small_tokenizer(), rows, seq_length=64)
    trainer = Trainer(run, ALONE)
    assert trainer.held_out.num_tokens == {"valid": again.trained_tokens}
    leave(trainer, saving=False)


@pytest.mark.parametrize("name", ["weights", "fim_rates"])
def test_conversations_are_neither_weighted_nor_filled_in(toy, name):
    _, _, config = toy
    data = config("weighted").data
    with pytest.raises(ConfigError, match=rf"data.{name} = \[1.0\] with data.conversations: .*; leave it out"):
        dataclasses.replace(data, **{name: (1.0,)})


def test_settings_that_contradict_are_refused(toy):
    _, _, config = toy
    run = config("contradictory")
    for changes, message in (
        ({"rate": 0.5}, "conversations take no fill-in-the-middle"),
        ({"masks": False}, "conversations of a window are always masked"),
    ):
        stream = run.data.stream.__dict__ | (
            {"fim": run.data.stream.fim.__class__(rate=0.5)} if "rate" in changes else {"document_masks": False}
        )
        data = DataConfig(**{**run.data.__dict__, "stream": run.data.stream.__class__(**stream)})
        with pytest.raises(ConfigError, match=message):
            prepared_run(RunConfig(**{**run.__dict__, "data": data}))


def test_a_run_of_other_settings_leaves_a_begun_run_as_it_was(toy):
    _, _, config = toy
    first = config("begun", steps=1, checkpoint_every=1)
    sft(first)
    others = [path for path in first.output.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in others}
    with pytest.raises(ConfigError, match="choose another output"):
        prepare(config("begun", chat=FormatConfig(kind="script")))
    with exclusive(first.output, what="run"), pytest.raises(MegacoderError, match="another run is working here"):
        prepare(first)
    assert {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"global_batch_size": 7}, "01", "global_batch_size = 7 is not a multiple"),
        ({"model": ModelConfig(vocab_size=50)}, "01", "model.vocab_size = 50, but the tokenizer"),
        ({"init_from": Path("nowhere")}, "01", "nowhere: no such folder"),
        ({"stream": {"seq_length": 2}}, "0", "has an answer that begins within it"),
        ({"data": "{"}, "0", r"broken\.jsonl:1: malformed JSON"),
    ],
)
def test_under_torchrun_bad_input_is_met_before_ranks_meet(toy, tmp_path, monkeypatch, changes, ranks, message):
    """By all alike, or for what is in the data by the first, which reads it while the others wait for it to join."""
    _, _, config = toy
    run = config(f"bad-{sorted(changes)[0]}", **{key: value for key, value in changes.items() if key != "data"})
    if "data" in changes:
        broken = tmp_path / "broken.jsonl"
        broken.write_text(changes["data"] + "\n")
        conversations = dataclasses.replace(run.data.conversations, train=(broken,))
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, conversations=conversations))
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megacoder.train.sft.start_ranks", lambda *_, **__: pytest.fail("ranks meet"))
    for rank in ranks:
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(MegacoderError, match=message) as raised:
            sft(run)
        assert isinstance(raised.value, AlikeOnAllRanks) or ranks == "0", "one rank is enough to say it"


def test_warm_up_by_tokens_and_where_a_cosine_ends():
    by_tokens = ScheduleConfig(kind="cosine", peak_lr=1.0, warmup_steps=7, warmup_tokens=4000, final_share=0.0)
    assert learning_rate(2, 100, by_tokens, tokens_per_step=1000) == pytest.approx(0.5)
    assert learning_rate(4, 100, by_tokens, tokens_per_step=1000) == pytest.approx(1.0)
    assert learning_rate(100, 100, by_tokens, tokens_per_step=1000) == pytest.approx(0.0, abs=1e-12)
    assert np.isclose(learning_rate(100, 100, ScheduleConfig(kind="cosine", peak_lr=1.0, warmup_steps=5)), 0.1)
    with pytest.raises(ConfigError, match=r"final_share = 1\.5"):
        ScheduleConfig(final_share=1.5)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_cosine_falls_between_the_warm_up_and_the_last_step_as_torchs_does(share):
    warmup, total = 10, 90
    ours = ScheduleConfig(kind="cosine", peak_lr=2.0, warmup_steps=warmup, final_share=share)
    optimizer = torch.optim.SGD([torch.zeros(())], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=2.0 * share)
    for step in range(warmup, total + 1):
        assert learning_rate(step, total, ours) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()
