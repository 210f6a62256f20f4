"""Preprocessing: exact content, identical for any number of workers, resumed after a kill, unfit inputs rejected."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import refusal, run_command
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts, write_dataset, write_jsonl

from megacoder.core.errors import ConfigError, DataError, FormatError, MegacoderError
from megacoder.core.files import exclusive
from megacoder.data import preprocess as module
from megacoder.data.indexed import IndexedDataset, bin_path, idx_path
from megacoder.data.preprocess import PreprocessConfig, preprocess
from megacoder.data.sidecar import Sidecar, open_dataset
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_training import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    """Three input files of a few documents, a tokenizer folder, and the documents in order."""
    texts = [*NASTY_TEXTS, *(text[:3000] for text in source_texts(20))]
    samples = [index // 3 for index in range(len(texts))]
    rows = [{"content": text, "sample": sample} for text, sample in zip(texts, samples, strict=True)]
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows[:12])
    write_jsonl(folder / "b.jsonl", [])
    write_jsonl(folder / "c.jsonl", rows[12:])
    small_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def config_of(folder, *, output="out", **options):
    options = {
        "document_key": "sample", "workers": 1, "encoder": "tokenizers", "input": (folder / "in",), **options,
    }  # fmt: skip
    return PreprocessConfig(tokenizer=folder / "tokenizer", output=folder / output, **options)


def pair(folder, name="out"):
    return bin_path(folder / name).read_bytes(), idx_path(folder / name).read_bytes()


def test_documents_files_and_eos_are_as_described(corpus):
    sidecar = preprocess(config_of(corpus))
    dataset, tokenizer = IndexedDataset(corpus / "out"), small_tokenizer()
    rows = [json.loads(line) for name in "ac" for line in (corpus / "in" / f"{name}.jsonl").open()]
    assert dataset.num_documents == 10
    assert dataset.num_sequences == len(rows) == 30
    for document in range(10):
        texts = [row["content"] for row in rows if row["sample"] == document]
        ids = [tokenizer.encode(text) for text in texts]
        ids[-1].append(tokenizer.eos_id)
        assert [dataset.sequence(i).tolist() for i in dataset.document_sequences(document)] == ids
    assert sidecar == Sidecar.read(corpus / "out")
    assert (sidecar.documents, sidecar.sequences, sidecar.tokens) == (10, 30, dataset.num_tokens)
    assert sidecar.bytes == sum(len(row["content"].encode()) for row in rows)
    assert sidecar.tokenizer == tokenizer.digest
    assert {path.name for path in corpus.iterdir()} == {"in", "tokenizer", "out.bin", "out.idx", "out.json"}


def test_without_a_key_each_row_is_a_document(corpus):
    assert preprocess(config_of(corpus, document_key=None)).documents == 30


def test_empty_documents_are_places_without_ids(corpus, monkeypatch, capsys):
    """As tools/preprocess_data.py --append-eod has it: no EOS, and no sequence."""
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 50)
    texts = ["", "x = 1", "", "", "y", ""]
    write_jsonl(corpus / "in" / "a.jsonl", [{"content": text} for text in texts])
    (corpus / "in" / "b.jsonl").unlink()
    write_jsonl(corpus / "in" / "c.jsonl", [{"content": ""}])
    ids = [[*small_tokenizer().encode(text), small_tokenizer().eos_id] for text in texts if text]
    write_dataset(corpus / "expected", [[], [ids[0]], [], [], [ids[1]], [], []])
    for workers in (1, 2):
        sidecar = preprocess(config_of(corpus, output=f"out{workers}", workers=workers, document_key=None))
        assert pair(corpus, f"out{workers}") == pair(corpus, "expected")
        assert (sidecar.documents, sidecar.sequences) == (7, 2)
        assert capsys.readouterr().err.endswith("7 documents, 5 of them empty; 6 tokens, 6 bytes of text\n")
    write_jsonl(corpus / "in" / "a.jsonl", [{"content": ""}])
    with pytest.raises(DataError, match="no text in"):
        preprocess(config_of(corpus, document_key=None))


def test_empty_documents_of_parts_made_before_are_counted(corpus, capsys):
    write_jsonl(corpus / "in" / "a.jsonl", [{"content": text} for text in ("", "x", "")])
    (corpus / "in" / "c.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"c\.jsonl:1: malformed JSON"):
        preprocess(config_of(corpus, document_key=None))
    write_jsonl(corpus / "in" / "c.jsonl", [{"content": ""}, {"content": "y"}])
    capsys.readouterr()
    preprocess(config_of(corpus, document_key=None))
    assert capsys.readouterr().err.endswith(": 5 documents, 3 of them empty; 4 tokens, 2 bytes of text\n")


def test_empty_files_stay_in_a_document_that_has_text(corpus):
    write_jsonl(
        corpus / "in" / "a.jsonl", [{"content": text, "sample": at // 2} for at, text in enumerate(["", "x", "", ""])]
    )
    for name in "bc":
        (corpus / "in" / f"{name}.jsonl").unlink()
    preprocess(config_of(corpus))
    ids = [*small_tokenizer().encode("x"), small_tokenizer().eos_id]
    write_dataset(corpus / "expected", [[[], ids], []])
    assert pair(corpus) == pair(corpus, "expected")


def test_any_number_of_workers_writes_the_same_bytes(corpus, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 2000)  # so that there are many pieces
    preprocess(config_of(corpus))
    preprocess(config_of(corpus, output="three", workers=3))
    preprocess(config_of(corpus, output="fast", workers=2, encoder="auto"))
    assert pair(corpus, "three") == pair(corpus, "fast") == pair(corpus)


def test_a_second_run_does_nothing(corpus, monkeypatch):
    first = preprocess(config_of(corpus))
    (corpus / "out.parts").mkdir()  # as if it had been killed right at its end
    monkeypatch.setattr(module, "_write", None)
    assert preprocess(config_of(corpus, workers=2)) == first
    assert not (corpus / "out.parts").exists()


def test_two_runs_do_not_write_one_output(corpus):
    with (
        exclusive(corpus / "out.parts", what="preprocess"),
        pytest.raises(MegacoderError, match=r"out.parts: another preprocess is working here"),
    ):
        preprocess(config_of(corpus))


@pytest.mark.parametrize("change", ["text_key", "document_key", "tokenizer", "inputs"])
def test_another_configuration_is_refused(corpus, change):
    preprocess(config_of(corpus))
    options = {}
    if change == "tokenizer":
        (corpus / "tokenizer" / "tokenizer.json").unlink()
        train_tokenizer(source_texts(3), vocab_size=600).save(corpus / "tokenizer")
    elif change == "inputs":
        write_jsonl(corpus / "in" / "b.jsonl", [{"content": "more", "sample": 0}])
    else:
        options[change] = "path"
    with pytest.raises(ConfigError, match=rf"out.json: made with different options \({change}\)"):
        preprocess(config_of(corpus, **options))


def test_a_dataset_of_another_program_is_not_overwritten(corpus):
    write_dataset(corpus / "out", [[[0, 1, 2]]])
    before = pair(corpus)
    with pytest.raises(ConfigError, match=r"out.idx: made by another program"):
        preprocess(config_of(corpus))
    assert pair(corpus) == before


def read_inputs(monkeypatch):
    """Records the names of the input files that are read from now on."""
    names, original = [], module.DocumentReader

    def recording(path, **options):
        names.append(path.name)
        return original(path, **options)

    monkeypatch.setattr(module, "DocumentReader", recording)
    return names


def test_finished_files_are_not_read_again_after_an_error(corpus, monkeypatch):
    broken = corpus / "in" / "b.jsonl"
    broken.write_text('{"content": "x", "sample": 9}\n{"content": \n')
    with pytest.raises(DataError, match=r"b.jsonl:2: malformed JSON"):
        preprocess(config_of(corpus))
    assert not idx_path(corpus / "out").exists()
    broken.write_text("")
    names = read_inputs(monkeypatch)
    preprocess(config_of(corpus))
    assert names == ["b.jsonl", "c.jsonl"]
    preprocess(config_of(corpus, output="clean"))
    assert pair(corpus) == pair(corpus, "clean")


@pytest.mark.parametrize("change", ["text_key", "document_key", "tokenizer"])
def test_parts_of_another_configuration_are_not_used(corpus, change):
    rows = [{"content": f"x = {number}\n", "other": f"y = {number}\n", "sample": number // 2} for number in range(6)]
    write_jsonl(corpus / "in" / "a.jsonl", rows)
    (corpus / "in" / "c.jsonl").write_text("{")
    with pytest.raises(DataError):
        preprocess(config_of(corpus))
    assert any((corpus / "out.parts").glob("*.idx"))
    write_jsonl(corpus / "in" / "c.jsonl", rows)
    options = {"text_key": {"text_key": "other"}, "document_key": {"document_key": None}, "tokenizer": {}}[change]
    if change == "tokenizer":
        (corpus / "tokenizer" / "tokenizer.json").unlink()
        train_tokenizer(source_texts(3), vocab_size=600).save(corpus / "tokenizer")
    preprocess(config_of(corpus, **options))
    preprocess(config_of(corpus, output="clean", **options))
    assert pair(corpus) == pair(corpus, "clean")


def test_a_damaged_part_is_made_again(corpus):
    (corpus / "in" / "c.jsonl").write_text("{")
    with pytest.raises(DataError):
        preprocess(config_of(corpus))
    for part in (corpus / "out.parts").glob("*.bin"):
        part.write_bytes(part.read_bytes()[:-1])
    write_jsonl(corpus / "in" / "c.jsonl", [{"content": "x", "sample": 1}])
    preprocess(config_of(corpus))
    preprocess(config_of(corpus, output="clean"))
    assert pair(corpus) == pair(corpus, "clean")


@pytest.mark.parametrize(("workers", "encoder"), [(1, "tokenizers"), (2, "tokenizers"), (2, "auto")])
def test_a_killed_run_resumes(corpus, monkeypatch, workers, encoder):
    texts = source_texts(30) * (5 if encoder == "auto" else 1)  # the last file takes 0.4 s: time to kill the run in
    write_jsonl(corpus / "in" / "z.jsonl", [{"content": f"{n}\n{text}", "sample": n} for n, text in enumerate(texts)])
    command = [
        sys.executable, "-m", "megacoder", "preprocess", "--input", str(corpus / "in"), "--document-key", "sample",
        "--tokenizer", str(corpus / "tokenizer"), "--output", str(corpus / "out"), "--workers", str(workers),
        "--encoder", encoder,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        while len(list((corpus / "out.parts").glob("*.idx"))) < 3:
            assert run.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not idx_path(corpus / "out").exists()
    wait_until_gone(run.pid)
    names = read_inputs(monkeypatch)
    preprocess(config_of(corpus))
    assert names == ["z.jsonl"]
    preprocess(config_of(corpus, output="clean"))
    assert pair(corpus) == pair(corpus, "clean")
    assert sorted(path.name for path in corpus.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def wait_until_gone(group):
    """Workers notice that their parent was killed; without that they would stay until this times out."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("workers outlived their parent")


def test_a_full_disk_is_one_line_and_loses_nothing(corpus):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # stands in for a full device: write() fails
    try:
        with pytest.raises(DataError, match="File too large; finished files are kept"):
            preprocess(config_of(corpus))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(corpus.glob("out.*.tmp*")) == []
    preprocess(config_of(corpus))
    assert open_dataset(corpus / "out", small_tokenizer()).num_documents == 10


def test_input_without_documents_is_refused(corpus):
    with pytest.raises(DataError, match=r"no documents in .*b.jsonl"):
        preprocess(config_of(corpus, input=(corpus / "in" / "b.jsonl",)))
    assert not list(corpus.glob("out*"))
    with pytest.raises(DataError, match=r"c.jsonl:1: no key 'text'"):
        preprocess(config_of(corpus, input=(corpus / "in" / "c.jsonl",), text_key="text", output="other"))
    assert not (corpus / "other.parts").exists()


@pytest.mark.parametrize("workers", [0, -1, 1025])
def test_numbers_of_workers_that_cannot_be_are_refused(corpus, workers):
    with pytest.raises(ConfigError, match=rf"workers = {workers}: must be 1 to 1024"):
        config_of(corpus, workers=workers)


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(corpus, output):
    with pytest.raises(ConfigError, match=rf"output = '{output}': expected a prefix"):
        PreprocessConfig(input=(corpus / "in",), tokenizer=corpus / "tokenizer", output=Path(output))


def test_a_folder_is_not_taken_for_a_prefix(corpus, capsys):
    (corpus / "data").mkdir()
    words = ["--input", corpus / "in", "--tokenizer", corpus / "tokenizer", "--output", f"{corpus / 'data'}/"]
    said = refusal(capsys, "preprocess", *words, code=2)
    assert f"is a folder; name a prefix of file names, such as {corpus / 'data' / 'train'}" in said
    assert sorted(os.listdir(corpus)) == ["data", "in", "tokenizer"]


def test_a_dataset_of_another_tokenizer_is_refused(corpus):
    preprocess(config_of(corpus))
    other = train_tokenizer(source_texts(3), vocab_size=600)
    with pytest.raises(ConfigError, match=f"out: made with the tokenizer {small_tokenizer().digest[:12]}, not with"):
        open_dataset(corpus / "out", other)
    Sidecar.path(corpus / "out").write_text('{"documents": 1}')
    with pytest.raises(FormatError, match=r"out.json: not a dataset's description"):
        open_dataset(corpus / "out", small_tokenizer())
    Sidecar.path(corpus / "out").unlink()  # as from Megatron: nothing to compare with
    assert open_dataset(corpus / "out", other).num_documents == 10


def test_the_commands_from_files_to_a_report(corpus, capsys):
    def run(*words):
        code, out, err = run_command(capsys, *words)
        assert code == 0, err
        return out

    paths = ["--input", corpus / "in", "--output"]
    run("tokenizer", "train", *paths, corpus / "tok", "--vocab-size", 400)
    assert Tokenizer.load(corpus / "tok").num_regular_tokens == 400
    made_with = ["--tokenizer", corpus / "tok"]
    run("preprocess", *paths, corpus / "set", *made_with, "--workers", 1, "--encoder", "tokenizers")
    report = json.loads(run("data", "inspect", corpus / "set", *made_with, "--json", "--documents", 2))
    assert (report["documents"], report["sequences"], report["dtype"]) == (30, 29, "uint16")
    assert report["tokens_per_document"]["< 1"] == 1  # the empty text
    assert sum(report["tokens_per_document"].values()) == 30
    assert list(report["beginnings"]) == ["0", "15"]
    assert report["beginnings"]["15"].startswith(source_texts()[5][:20])
    assert "--- document 10\n" in run("data", "inspect", corpus / "set", *made_with)


def test_what_cannot_be_trained_is_refused_before_anything_is_read(corpus, capsys, monkeypatch):
    words = ["tokenizer", "train", "--input", corpus / "in", "--output", corpus / "tok"]
    assert run_command(capsys, *words, "--vocab-size", "400")[0] == 0
    monkeypatch.setattr("megacoder.data.tokenizer_training.sample_texts", None)  # calling it would be a TypeError
    said = refusal(capsys, *words, "--vocab-size", "10", code=2)
    assert said == "megacoder: vocab_size = 10: must be at least 256, one token for each byte\n"
    code, _, err = run_command(capsys, *words, "--vocab-size", "400")
    assert (code, err.count("up to date, 409 ids"), err.count("\n")) == (0, 1, 1)
    said = refusal(capsys, *words, "--vocab-size", "500", code=2)
    assert "tokenizer.json holds another tokenizer, made with different options (vocab_size); choose another" in said
    for option, value, name in (("--text-key", "text", "text_key"), ("--sample-mb", "1", "sample_mb")):
        said = refusal(capsys, *words, "--vocab-size", "400", option, value, code=2)
        assert f"made with different options ({name})" in said
    os.utime(corpus / "in" / "a.jsonl", ns=(0, 0))  # of the same size
    assert "made with different options (inputs)" in refusal(capsys, *words, "--vocab-size", "400", code=2)
    small_tokenizer().save(corpus / "given")
    said = refusal(capsys, *words[:-1], corpus / "given", code=2)
    assert "tokenizer.json holds another tokenizer (1,033 ids); choose another --output, or remove it" in said
    (corpus / "tok" / "tokenizer.json").write_text("")
    assert "not a tokenizer" in refusal(capsys, *words, "--vocab-size", "400", code=2)


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_the_training_of_a_tokenizer_and_leaves_nothing(tmp_path, number, code, said):
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, size=(600, 20_000), dtype=np.uint8)
    letters[:, ::9] = 32
    write_jsonl(tmp_path / "in.jsonl", [{"content": row.tobytes().decode()} for row in letters])
    words = ["tokenizer", "train", "--input", "in.jsonl", "--output", "tok", "--vocab-size", "200000"]
    command = [sys.executable, "-m", "megacoder", *words]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not lines or "learning from" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1]
        time.sleep(0.5)
        process.send_signal(getattr(signal, number))
        start = time.monotonic()
        rest = process.stderr.read()
        assert (process.wait(), rest) == (code, f"megacoder: {said}\n")
    assert time.monotonic() - start < 15
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_sample_too_small_for_the_vocabulary_is_reported(corpus, capsys):
    words = ["tokenizer", "train", "--output", corpus / "tok", "--vocab-size", 30_000, "--input"]
    code, _, err = run_command(capsys, *words, corpus / "in" / "a.jsonl")
    assert (code, "the sample yields only" in err) == (0, True)
    words[3] = corpus / "other"
    code, _, err = run_command(capsys, *words, corpus / "in" / "b.jsonl")
    assert (code, "megacoder: no documents in" in err) == (1, True)
