"""`check_serving.py` finds nothing in what transformers answers, and every fault that is planted in its answers."""

import dataclasses
import json

import check_serving
import pytest
import serving_engines
from evaluation_samples import make_model, make_tokenizer

from megacoder.data.chat_format import ChatFormat, FormatConfig
from megacoder.model.huggingface import export_model


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The model, its tokenizer, the right answers and those of transformers."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = make_tokenizer()
    tokenizer.save(folder / "tokenizer")
    model = make_model(tokenizer, max_position_embeddings=512, init_std=0.2)
    export_model(model, folder / "hf", tokenizer_folder=folder / "tokenizer")
    questions, expected = check_serving.ask(model, tokenizer, ChatFormat(FormatConfig(), tokenizer))
    assert [len(prompt) for prompt in questions.prompts[:2]] == [200, 400]
    assert questions.num_positions == 400 + check_serving.NEW + 1
    return model, tokenizer, expected, serving_engines.ask_transformers(folder / "hf", questions)


def test_transformers_answers_alike(answered):
    score, lost, *rest = check_serving.compared(*answered, 1e-3)
    assert rest == ["9 of 9", "same", ""]
    assert float(score) < 1e-4
    assert float(lost) < 1e-4


def changed_first(lists, change):
    """A copy of lists of lists with its first one changed."""
    return [change(lists[0]), *lists[1:]]


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("scores", lambda score: [*score[:-1], score[-1] - 0.01], "log-probabilities differ by 1.0e-02"),
        ("scores", lambda score: [float("nan"), *score[1:]], "log-probabilities differ by nan"),
        ("continuations", lambda ids: [(ids[0] + 1) % 256, *ids[1:]], "continuation is not greedy"),
        ("continuations", lambda ids: ids[:5], "stops elsewhere"),
        ("texts", lambda ids: ids[1:], "texts [0] have other ids"),
    ],
)
def test_a_planted_fault_is_found(answered, field, change, said):
    model, tokenizer, expected, found = answered
    faulty = dataclasses.replace(found, **{field: changed_first(getattr(found, field), change)})
    assert said in check_serving.compared(model, tokenizer, expected, faulty, 1e-3)[-1]


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("continuations", lambda lists: [[], *lists[1:]], "continuation 0 has 0 ids, not 1 to 32"),
        ("continuations", lambda lists: [lists[0] * 2, *lists[1:]], "continuation 0 has 64 ids, not 1 to 32"),
        ("continuations", lambda lists: [*lists[1:], [-1, 9999]], "2 has ids beyond the vocabulary of 329: [-1, 9999]"),
        ("continuations", lambda lists: lists[1:], "2 continuations of 3"),
        ("scores", lambda lists: [lists[0][1:], *lists[1:]], "198 log-probabilities of 199 for prompt 0"),
        ("scores", lambda lists: lists[1:], "2 prompts have scores of 3"),
        ("texts", lambda lists: lists[1:], "8 texts of 9"),
    ],
)
def test_what_is_no_answer_is_a_row(answered, field, change, said):
    model, tokenizer, expected, found = answered
    faulty = dataclasses.replace(found, **{field: change(getattr(found, field))})
    *cells, reason = check_serving.compared(model, tokenizer, expected, faulty, 1e-3)
    assert cells == [""] * 4
    assert reason.startswith("fails: ")
    assert said in reason


def test_a_model_needs_positions_for_a_prompt_and_its_continuation():
    tokenizer = make_tokenizer()
    for positions in (8, check_serving.NEW, check_serving.NEW + 1):
        model = make_model(tokenizer, max_position_embeddings=positions)
        with pytest.raises(check_serving.ConfigError, match=f"max_position_embeddings = {positions}: a prompt of two"):
            check_serving.ask(model, tokenizer, None)
    model = make_model(tokenizer, max_position_embeddings=check_serving.NEW + 2)
    questions, _ = check_serving.ask(model, tokenizer, None)
    assert ([len(prompt) for prompt in questions.prompts], questions.num_positions) == ([2], check_serving.NEW + 2)


def test_other_control_tokens_are_found(answered):
    model, tokenizer, expected, found = answered
    faulty = dataclasses.replace(found, conversation=found.conversation[1:], sentinels=[-1, -1, -1])
    assert check_serving.compared(model, tokenizer, expected, faulty, 1e-3)[-2:] == [
        "differs", "the conversation has other ids; sentinels are [-1, -1, -1]"
    ]  # fmt: skip


def test_an_engine_that_cannot_be_asked_is_refused():
    with pytest.raises(check_serving.ConfigError, match="--engines sglang: only transformers, vllm, llama_cpp"):
        check_serving.Options(engines=("vllm", "sglang"))


def test_what_llama_cpp_cannot_compute_is_left_out_and_a_converter_that_fails_is_not(tmp_path):
    checkout, folder = tmp_path / "llama.cpp", tmp_path / "model"
    with pytest.raises(check_serving.ConfigError, match=f"--llama-cpp {checkout}: no convert_hf_to_gguf.py in it"):
        check_serving.Options(llama_cpp=checkout)
    for path in (checkout, folder):
        path.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "attention_bias": True}))
    with pytest.raises(check_serving.ConfigError, match="name a checkout of llama"):
        check_serving.converted(folder, checkout, tmp_path)
    (checkout / "convert_hf_to_gguf.py").write_text("raise SystemExit(2)")
    assert check_serving.converted(folder, checkout, tmp_path) is None
    (folder / "config.json").write_text("{}")
    with pytest.raises(check_serving.ConfigError):
        check_serving.converted(folder, checkout, tmp_path)
