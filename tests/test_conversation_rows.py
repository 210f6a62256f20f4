"""Rows of other data sets' forms: weights of messages, names of columns and roles, files that are served repeatedly."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import small_tokenizer, write_jsonl
from test_sft import SHORT, conversations, joined, run_config

from megacoder.core.config import load_toml, to_toml
from megacoder.core.errors import ConfigError, DataError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.data.conversation_rows import ColumnsConfig, RolesConfig, read_conversation
from megacoder.data.conversation_stream import ConversationStream
from megacoder.data.conversations import ConversationConfig, prepare_conversations
from megacoder.data.indexed import IndexedDataset
from megacoder.train.config import RunConfig
from megacoder.train.sft import prepare

WRONG = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "WRONG ANSWER", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "4"},
    ]
}


def write_conversations(folder, rows, *, repeats=(), **options):
    files = [write_jsonl(folder / f"out-{number}.jsonl", part) for number, part in enumerate(rows)]
    config = ConversationConfig(format=SHORT, **options)
    prepared = prepare_conversations(files, folder / "out", small_tokenizer(), config, seq_length=512, repeats=repeats)
    return prepared, IndexedDataset(folder / "out")


def trained_texts(dataset, number=0):
    sequences = list(dataset.document_sequences(number))
    return [small_tokenizer().decode(dataset.sequence(sequence).tolist()) for sequence in sequences[1::2]]


def weighted(*weights):
    """A conversation whose messages have these weights, None for none."""
    roles = ["user", "assistant"] * (len(weights) // 2)
    messages = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
    given = [{} if weight is None else {"weight": weight} for weight in weights]
    return {"messages": [message | more for message, more in zip(messages, given, strict=True)]}


def test_an_answer_of_weight_0_is_read_and_not_trained(tmp_path):
    prepared, dataset = write_conversations(tmp_path, [[WRONG]])
    assert trained_texts(dataset) == ["4\n<|EOT|>"]
    assert len(dataset.document_sequences(0)) == 3, "asked, trained, asked"
    assert prepared.trained_tokens == len(dataset.sequence(1))
    stream = ConversationStream(
        dataset, small_tokenizer(), seq_length=512, seed=1, global_batch_size=1, dp_rank=0, dp_size=1
    )
    batch = stream.next_batch()
    labels = batch.labels[batch.labels != -100]
    assert small_tokenizer().decode(labels.tolist()) == "4\n<|EOT|>"


@pytest.mark.parametrize("kind", ["chat", "script", "custom"])
def test_weights_change_no_id(kind):
    chat = ChatFormat(FormatConfig(kind=kind), small_tokenizer())
    for messages in conversations(60):
        answers = [number for number, (role, _) in enumerate(messages) if role == "assistant"]
        for trained in ({answers[0]}, {answers[-1]}, set(answers[1:])):
            segments = chat.segments(messages, trained=trained)
            assert joined(segments) == joined(chat.segments(messages))
            assert [segment.trained for segment in segments] == [False, *[True, False] * len(trained)]
            trained_by_default = [segment.ids for segment in chat.segments(messages) if segment.trained]
            expected = [ids for number, ids in zip(answers, trained_by_default, strict=True) if number in trained]
            assert [segment.ids for segment in segments if segment.trained] == expected


@pytest.mark.parametrize("weights", [(None, 1), (0, 1), (1, None), (1.0, True), (0, None, 0, 1)], ids=str)
def test_weights_that_change_nothing(tmp_path, weights):
    dataset = write_conversations(tmp_path, [[weighted(*weights)]])[1]
    assert len(trained_texts(dataset)) == len(weights) // 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((None, 0.5), r"out-0\.jsonl:2: message 1 has the weight 0\.5, expected 0 or 1"),
        ((None, "0"), "message 1 has the weight '0', expected 0 or 1"),
        ((2, None), "message 0 has the weight 2, expected 0 or 1"),
        ((None, 0, None, 0), r"out-0\.jsonl:2: every answer has weight 0; there is no answer to train on"),
    ],
)
def test_a_weight_that_cannot_be_meant_is_named_or_skipped(tmp_path, weights, message):
    rows = [[WRONG, weighted(*weights)]]
    with pytest.raises(DataError, match=message):
        write_conversations(tmp_path, rows)
    prepared, _ = write_conversations(tmp_path, rows, malformed="skip")
    assert (prepared.conversations, prepared.skipped) == (1, 1)


def test_parquet_has_weights_too(tmp_path):
    pq.write_table(pa.Table.from_pylist([WRONG, weighted(None, 1)]), tmp_path / "data.parquet")
    config = ConversationConfig(format=SHORT)
    prepare_conversations([tmp_path / "data.parquet"], tmp_path / "out", small_tokenizer(), config, seq_length=512)
    dataset = IndexedDataset(tmp_path / "out")
    assert [trained_texts(dataset, number) for number in range(2)] == [["4\n<|EOT|>"], ["text 1\n<|EOT|>"]]


def test_only_the_last_answer_is_trained_on_request(tmp_path):
    rows = [[weighted(None, None, None, None), WRONG]]
    whole, _ = write_conversations(tmp_path, rows)
    last, dataset = write_conversations(tmp_path, rows, train_on="last")
    assert [trained_texts(dataset, number) for number in range(2)] == [["text 3\n<|EOT|>"], ["4\n<|EOT|>"]]
    assert last.tokens == whole.tokens
    assert last.trained_tokens < whole.trained_tokens, "made again"
    with pytest.raises(DataError, match="the last answer has weight 0; there is no answer to train on"):
        write_conversations(tmp_path, [[weighted(None, 1, None, 0)]], train_on="last")


def pairs(count, name="q"):
    return [{"instruction": f"{name}{number}", "output": f"answer {number}"} for number in range(count)]


def served(dataset):
    """How often each conversation is in the dataset, by what it asks."""
    asked = [small_tokenizer().decode(dataset.document(number).tolist()) for number in range(dataset.num_documents)]
    names = [text.split("### Instruction:\n")[1].split("\n")[0] for text in asked]
    return {name: names.count(name) for name in names}


def test_files_are_served_as_often_as_repeats_say(tmp_path):
    prepared, dataset = write_conversations(
        tmp_path, [pairs(200), pairs(200, "p"), pairs(9, "r")], repeats=(0.5, 2.5, 1)
    )
    counts = served(dataset)
    halves = [sum(counts.get(f"q{number}", 0) for number in range(200)), sum(counts[f"p{n}"] for n in range(200)) - 400]
    assert all(75 < half < 125 for half in halves), halves
    assert {counts[f"p{number}"] for number in range(200)} == {2, 3}
    assert all(counts[f"r{number}"] == 1 for number in range(9))
    assert [f"q{n}" in counts for n in range(200)] == [counts[f"p{n}"] == 3 for n in range(200)], "by row number alone"
    assert (prepared.read, prepared.conversations) == (409, dataset.num_documents)
    assert prepared.tokens == dataset.num_tokens
    assert prepared.trained_tokens == sum(
        len(dataset.sequence(document)) for number in range(dataset.num_documents)
        for document in dataset.document_sequences(number)[1::2]
    )  # fmt: skip
    once, _ = write_conversations(tmp_path, [pairs(200), pairs(200, "p"), pairs(9, "r")])
    assert (once.read, once.conversations) == (409, 409), "made again"


def test_what_repeated_conversations_lose_is_counted_as_often(tmp_path):
    rows = [[{"instruction": "a", "output": "word " * 600}, *pairs(1)]]
    once, thrice = (write_conversations(tmp_path, rows, repeats=(times,))[0] for times in (1, 3))
    assert (once.cut, thrice.cut, thrice.cut_tokens) == (1, 3, 3 * once.cut_tokens)
    assert thrice.first_cut == once.first_cut == f"{tmp_path / 'out-0.jsonl'}:1"


def test_repeats_are_said_and_not_of_held_out_conversations(tmp_path, capsys):
    small_tokenizer().save(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "data.jsonl", pairs(10))
    config = run_config(tmp_path / "run", tmp_path / "tokenizer", data, chat=SHORT, steps=1)
    conversations = replace(config.data.conversations, repeats=(3.0,), valid=(data,))
    (tmp_path / "run.toml").write_text(to_toml(replace(config, data=replace(config.data, conversations=conversations))))
    run = prepare(load_toml(RunConfig, tmp_path / "run.toml"))
    assert "10 conversations in the files, 30 in an epoch (repeats): " in capsys.readouterr().err
    assert [IndexedDataset(prefix).num_documents for prefix in (*run.data.train, *run.data.valid)] == [30, 10]


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        ((1.0,), r"repeats = \[1\.0\]: give one for each of the 2 of train"),
        ((1.0, 0.0), r"0\.0 is not a positive number; leave the file out"),
        ((1.0, -1.0), r"-1\.0 is not a positive"),
        ((1.0, float("nan")), "nan is not a positive"),
        ((float("inf"), 1.0), "inf is not a positive"),
    ],
)
def test_repeats_that_cannot_be_meant_are_refused(tmp_path, repeats, message):
    with pytest.raises(ConfigError, match=message):
        ConversationConfig(train=(tmp_path / "a", tmp_path / "b"), repeats=repeats)


def test_repeats_that_leave_nothing_say_so(tmp_path):
    with pytest.raises(DataError, match=r"no conversation in it; data\.conversations\.repeats leave out all 1"):
        write_conversations(tmp_path, [pairs(1)], repeats=(1e-9,))


SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "one"}, {"from": "gpt", "value": "uno"},
    ],
}  # fmt: skip
PAIR = [("user", "one"), ("assistant", "uno")]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "one", "completion": "uno"}, {"instruction": "prompt", "output": "completion"}),
        ({"query": "one", "answer": "uno", "input": "two"},
         {"instruction": "query", "output": "answer", "input": "context"}),
        ({"turns": [{"speaker": "prompter", "text": "one"}, {"speaker": "bot", "text": "uno"}]},
         {"messages": "turns", "role": "speaker", "content": "text",
          "roles": RolesConfig(user=("prompter",), assistant=("bot",))}),
        (SHAREGPT | {"conversations": SHAREGPT["conversations"][1:]}, {}),
        ({"messages": [{"role": "human", "content": "one"}, {"role": "gpt", "content": "uno"}]}, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parquet", [False, True])
def test_other_names_of_columns_and_roles(tmp_path, row, columns, parquet):
    config = ConversationConfig(format=SHORT, columns=ColumnsConfig(**columns))
    assert read_conversation(row, config.columns, where="here").messages == PAIR
    path = tmp_path / ("data.parquet" if parquet else "data.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        write_jsonl(path, [row])
    prepare_conversations([path], tmp_path / "out", small_tokenizer(), config, seq_length=512)
    expected = joined(ChatFormat(SHORT, small_tokenizer()).segments(PAIR))
    assert np.array_equal(IndexedDataset(tmp_path / "out").document(0), expected)


def test_sharegpt_is_recognized_only_where_nothing_else_is_meant():
    messages = read_conversation(SHAREGPT, ColumnsConfig(), where="here").messages
    assert messages == [("system", "Be brief."), *PAIR]
    both = SHAREGPT | {"instruction": "a", "output": "b"}
    assert read_conversation(both, ColumnsConfig(), where="here").messages == [("user", "a"), ("assistant", "b")]
    named = ColumnsConfig(messages="conversations")
    with pytest.raises(DataError, match=r"here: message 0 is .*, expected role and content"):
        read_conversation(SHAREGPT, named, where="here")


@pytest.mark.parametrize("parquet", [False, True])
def test_sharegpts_system_column_is_the_first_message(tmp_path, parquet):
    turns = [*SHAREGPT["conversations"][1:2], SHAREGPT["conversations"][2] | {"weight": 1}]
    rows = [{"system": system, "conversations": turns} for system in ("Be brief.", "", None)]
    path = tmp_path / ("data.parquet" if parquet else "data.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    prepare_conversations([path], tmp_path / "out", small_tokenizer(), ConversationConfig(format=SHORT), seq_length=512)
    for number, messages in enumerate([[("system", "Be brief."), *PAIR], PAIR, PAIR]):
        expected = joined(ChatFormat(SHORT, small_tokenizer()).segments(messages))
        assert np.array_equal(IndexedDataset(tmp_path / "out").document(number), expected)


def test_weights_count_behind_a_system_column():
    conversation = read_conversation(
        {"system": "Be brief.", "conversations": [
            {"from": "human", "value": "one"}, {"from": "gpt", "value": "nein", "weight": 0},
            {"from": "human", "value": "one"}, {"from": "gpt", "value": "uno"},
        ]}, ColumnsConfig(), where="here",
    )  # fmt: skip
    assert conversation.trained == {4}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SHAREGPT | {"system": "Be long."}, "here: has the column 'system', and message 0 is the system's, too"),
        (SHAREGPT | {"system": ["x"]}, r"here: 'system' is \['x'\], expected text"),
        (pairs(1)[0] | {"weight": 0}, "here: every answer has weight 0; there is no answer to train on"),
        (pairs(1)[0] | {"weight": 0.5}, "here has the weight 0.5, expected 0 or 1"),
        ({"messages": [{"role": "customer", "content": "a"}]},
         r"the role 'customer', expected system, user \(also 'human'\) or assistant \(also 'gpt'\); data\.conv"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_a_conversation(row, message):
    with pytest.raises(DataError, match=message):
        read_conversation(row, ColumnsConfig(), where="here")


@pytest.mark.parametrize("parquet", [False, True])
def test_a_pairs_weight_is_read_from_its_column(tmp_path, parquet):
    rows = [row | {"weight": weight} for row, weight in zip(pairs(3), (1, 0, None), strict=True)]
    path = tmp_path / ("data.parquet" if parquet else "data.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    config = ConversationConfig(format=SHORT, malformed="skip")
    prepared = prepare_conversations([path], tmp_path / "out", small_tokenizer(), config, seq_length=512)
    assert (prepared.conversations, prepared.skipped) == (2, 1)


def test_an_unknown_role_is_not_advised_to_be_skipped(tmp_path):
    with pytest.raises(DataError, match=r"gives a role further names$"):
        write_conversations(tmp_path, [[{"messages": [{"role": "customer", "content": "a"}]}]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"instruction": "output"}, "data.conversations.columns: 'output' is both instruction and output"),
        ({"input": "messages"}, "'messages' is both input and messages"),
        ({"role": "text", "content": "text"}, "'text' is both role and content"),
    ],
)
def test_a_column_has_one_meaning(names, message):
    with pytest.raises(ConfigError, match=message):
        ColumnsConfig(**names)


def test_a_role_has_one_meaning():
    with pytest.raises(ConfigError, match="'bot' is both user and assistant"):
        RolesConfig(user=("bot",), assistant=("bot",))
    with pytest.raises(ConfigError, match="'system' is both user and system"):
        RolesConfig(user=("system",))


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("malformed", ["error", "skip"])
def test_where_a_file_has_other_columns_its_columns_are_named(tmp_path, parquet, malformed):
    rows = [{"query": "a", "response": "b"}] * 3
    path = tmp_path / ("data.parquet" if parquet else "data.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    with pytest.raises(DataError) as raised:
        prepare_conversations(
            [path], tmp_path / "out", small_tokenizer(), ConversationConfig(malformed=malformed), seq_length=512
        )
    assert "its columns: 'query', 'response'; name them in [data.conversations.columns], as in output = " in str(
        raised.value
    )
    assert "skip" not in str(raised.value)


def test_a_skipped_file_is_named(tmp_path, capsys):
    rows = [pairs(2), [{"dialog": [{"role": "user", "content": "a"}]}] * 20, [{"instruction": "a", "output": ""}]]
    prepared, _ = write_conversations(tmp_path, rows, malformed="skip")
    assert (prepared.conversations, prepared.skipped) == (2, 21)
    assert capsys.readouterr().err == (
        f"{tmp_path / 'out-1.jsonl'}: no conversation in its 20 rows; its columns: 'dialog'; name them in "
        '[data.conversations.columns], as in messages = "dialog"\n'
        f"{tmp_path / 'out-2.jsonl'}: no conversation in its 1 row; the first error: {tmp_path / 'out-2.jsonl'}:1: "
        "'output' is empty; there is no answer to train on\n"
    )


def test_a_row_among_others_without_its_columns_can_be_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"response": "b"}, *pairs(1)])))
    with pytest.raises(
        DataError, match=r"'instruction' is missing; a row has .*; data\.conversations\.malformed = \"skip\" skips such"
    ):
        prepare_conversations([path], tmp_path / "out", small_tokenizer(), ConversationConfig(), seq_length=512)
