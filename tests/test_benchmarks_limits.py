"""The published limits on prompts and context hold for a model here, in transformers and behind a server alike."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_samples import make_model, make_tokenizer

from megacoder.core.errors import ConfigError, DataError
from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.evaluate.benchmarks.base import Settings, Task
from megacoder.evaluate.benchmarks.completions import Decoding, Request
from megacoder.evaluate.benchmarks.crosscode import CrossCode
from megacoder.evaluate.benchmarks.endpoint import EndpointSource
from megacoder.evaluate.benchmarks.limits import certainly_fits, limited_texts, num_bytes
from megacoder.evaluate.benchmarks.local import LocalSource, TransformersSource
from megacoder.evaluate.sampling import Sampling
from megacoder.model.huggingface import export_model

LINES = [f"total = total + {number}\n" for number in range(40)]
PROMPT = "".join(LINES)


def asked(prompt: str = PROMPT, *, limit: int | None = 60, pieces: tuple[str, ...] = (), title: str = "") -> Request:
    task = Task(id="t", prompt=prompt, context=pieces, context_title=title)
    return Request(task=task, sample=0, stops=(), max_prompt_tokens=limit)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    tokenizer.save(folder / "tokenizer")
    export_model(make_model(tokenizer), folder / "hf", tokenizer_folder=folder / "tokenizer")
    return folder / "hf"


def asked_of_a_server(monkeypatch, requests, **options) -> list[str]:
    source = EndpointSource("http://localhost:1/v1", Decoding(), model="m", workers=1, **options)
    bodies = []
    monkeypatch.setattr(source, "_call", lambda path, body: bodies.append(body) or {"choices": [{"text": ""}]})
    list(source.complete(requests))
    return [body["prompt"] for body in bodies]


@pytest.mark.parametrize(
    ("pieces", "limit", "expected"),
    [
        (("a\n", "bb\n"), 20, "T\na\nbb\nx\ny"),
        (("aaaa\n", "bb\n"), 12, "x\ny"),
        (("a\n", "bbbbbbbb\n", "c\n"), 12, "T\na\nx\ny"),
        ((), 3, "x\ny"),
        ((), 2, "y"),
        (("a\n" * 300, "b\n"), None, "x\ny"),
    ],
)
def test_pieces_are_whole_and_a_prompt_loses_its_first_lines(pieces, limit, expected):
    request = asked("x\ny", limit=limit, pieces=pieces, title="T\n")
    assert limited_texts([request], count=num_bytes, frame=0) == [expected]


def test_a_last_line_that_does_not_fit_is_named(capsys):
    with pytest.raises(DataError, match="the last line of the prompt has 5 tokens; there is room for 4"):
        limited_texts([asked("x\nlong.", limit=5)], count=num_bytes, frame=1)
    limited_texts([asked("x\ny", limit=2), asked("x")], count=num_bytes, frame=1)
    assert capsys.readouterr().err == "prompts without their first lines, which did not fit: 1 of 2\n"


def test_every_source_asks_the_same(monkeypatch, model_folder):
    tokenizer = make_tokenizer()
    requests = [asked(pieces=("# first\n", PROMPT), title="# of others\n"), asked("x = 1")]
    texts = asked_of_a_server(monkeypatch, requests, tokenizer=model_folder)
    assert texts[0].startswith("# of others\n# first\ntotal")
    assert texts[0].endswith("".join(LINES[-2:]))
    assert texts[1] == "x = 1"
    decoding = Decoding(max_new_tokens=8)
    tokens = LocalSource(model=make_model(tokenizer), tokenizer=tokenizer, decoding=decoding)._prompts(requests)
    assert tokens == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert len(tokens[0]) <= 60 < len(tokens[0]) + len(tokenizer.encode(LINES[0]))
    pytest.importorskip("transformers")
    source, seen = TransformersSource(model_folder, decoding, device="cpu"), []
    monkeypatch.setattr(source.model, "generate", lambda ids, **options: seen.append(ids[0].tolist()) or ids)
    list(source.complete(requests))
    assert seen == tokens


def test_samples_of_a_task_differ_and_do_not_depend_on_their_batch():
    tokenizer = make_tokenizer()
    requests = [replace(asked("x = 1"), sample=sample) for sample in range(4)]
    texts = {}
    for batch_size in (1, 4):
        source = LocalSource(
            model=make_model(tokenizer), tokenizer=tokenizer, batch_size=batch_size,
            decoding=Decoding(sampling=Sampling(temperature=1.0), max_new_tokens=8),
        )  # fmt: skip
        texts[batch_size] = {request.sample: text for request, text in source.complete(requests)}
    assert texts[1] == texts[4]
    assert len(set(texts[1].values())) == 4


def test_transformers_draws_every_sample_anew_and_as_asked(monkeypatch, model_folder):
    pytest.importorskip("transformers")
    drawn = []
    for sampling in (Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3), Sampling(temperature=1.0), Sampling()):
        source = TransformersSource(model_folder, Decoding(sampling=sampling, max_new_tokens=4), device="cpu")
        monkeypatch.setattr(
            source.model, "generate", lambda ids, **options: drawn.append((torch.initial_seed(), options)) or ids
        )
        list(source.complete([replace(asked("x = 1"), sample=sample) for sample in (0, 1)]))
    assert [seed for seed, _ in drawn[:4]] == [3_000_009, 3_000_010, 0, 1]
    kinds = [
        [options.get(name) for name in ("do_sample", "temperature", "top_k", "top_p")] for _, options in drawn[::2]
    ]
    assert kinds == [[True, 0.7, 5, 0.9], [True, 1.0, None, 1.0], [False, None, None, None]]


def test_a_server_needs_a_tokenizer_only_near_a_limit(monkeypatch):
    requests = [asked("x = 1"), asked()]
    assert [certainly_fits(request, frame=1) for request in requests] == [True, False]
    assert asked_of_a_server(monkeypatch, requests[:1]) == ["x = 1"]
    with pytest.raises(ConfigError, match=r"task 't': its prompt may exceed the published limit of 60 .*--tokenizer"):
        asked_of_a_server(monkeypatch, requests)
    assert not certainly_fits(asked("x", limit=5000, pieces=("a" * 600,)), frame=1)
    halves = [certainly_fits(asked("x", limit=21, pieces=("a" * size,)), frame=1) for size in (10, 11)]
    assert halves == [True, False], "other files get half of the room at most"
    with pytest.raises(ConfigError, match=r"--tokenizer gone: no tokenizer\.json that can be read"):
        EndpointSource("http://localhost:1/v1", Decoding(), model="m", tokenizer=Path("gone"))


def test_a_long_question_in_chat_keeps_the_template_whole():
    tokenizer = make_tokenizer()
    chat = ChatFormat(FormatConfig(), tokenizer)
    frame = chat.prompt([("user", "")])
    model = make_model(tokenizer, max_position_embeddings=len(frame) + 100)
    source = LocalSource(model=model, tokenizer=tokenizer, decoding=Decoding(max_new_tokens=20, chat=True))
    [tokens] = source._prompts([asked(limit=None)])
    assert len(tokens) <= len(frame) + 80
    kept = next(number for number in range(40) if tokens == chat.prompt([("user", "".join(LINES[number:]))]))
    assert kept > 0
    assert torch.tensor(tokens)[0] == tokenizer.bos_id


def test_the_text_that_the_data_retrieved_is_cut_at_lines():
    row = {"prompt": "x", "groundtruth": "y", "crossfile_context": {"text": "# a\n# b\n"}}
    [task] = CrossCode(Settings(retrieval=True)).tasks([row])
    assert (task.context_title, task.context) == ("", ("# a\n", "# b\n"))
