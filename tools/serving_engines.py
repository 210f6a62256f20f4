"""What each engine makes of an exported folder, all in fp32, so that differences are the folder's and not rounding.

Every function runs in a process of its own and imports its engine there.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ENGINES", "Answers", "Questions"]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What every engine is asked."""

    texts: list[str]
    """to be tokenized"""
    prompts: list[list[int]]
    """ids to be scored and continued"""
    messages: list[dict[str, str]] | None
    """a conversation to be continued; None where there is no chat template"""
    max_new_tokens: int
    """most ids of a continuation"""
    num_positions: int
    """that these need: engines reserve memory for all that they are told of, llama.cpp a row of logits each"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one engine makes of them."""

    texts: list[list[int]]
    """ids of each text, with what the engine puts in front by itself"""
    scores: list[list[float]]
    """log-probability of each id of each prompt but its first"""
    continuations: list[list[int]]
    """greedy ids of each prompt, through the one at which the engine stops"""
    conversation: list[int] | None
    """ids of the prompt that the conversation becomes"""
    sentinels: list[int] | None = None
    """begin, hole and end of fill-in-the-middle, where the engine has to know them"""


def ask_transformers(folder: Path, questions: Questions) -> Answers:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as talk

    talk.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores, continuations = [], []
    for prompt in questions.prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            scores.append(_scores(model(ids).logits[0], prompt))
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=questions.max_new_tokens)
        continuations.append(out[0, len(prompt) :].tolist())
    conversation = None
    if questions.messages is not None:
        conversation = tokenizer.apply_chat_template(
            questions.messages, add_generation_prompt=True, return_dict=False
        )  # fmt: skip
    return Answers(
        texts=[tokenizer(text)["input_ids"] for text in questions.texts],
        scores=scores, continuations=continuations, conversation=conversation,
    )  # fmt: skip


def ask_vllm(folder: Path, questions: Questions) -> Answers:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), dtype="float32", max_model_len=questions.num_positions, enforce_eager=True)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    scored = SamplingParams(temperature=0.0, max_tokens=questions.max_new_tokens, prompt_logprobs=0)  # of its own ids
    answered = engine.generate([{"prompt_token_ids": ids} for ids in questions.prompts], scored, use_tqdm=False)
    conversation = None
    if questions.messages is not None:
        conversation = engine.chat([questions.messages], one, use_tqdm=False)[0].prompt_token_ids
    return Answers(
        texts=[list(found.prompt_token_ids) for found in engine.generate(questions.texts, one, use_tqdm=False)],
        scores=[
            [found[index].logprob for found, index in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
            for answer, ids in zip(answered, questions.prompts, strict=True)
        ],
        continuations=[list(answer.outputs[0].token_ids) for answer in answered],
        conversation=conversation,
    )  # fmt: skip


def ask_llama_cpp(file: Path, questions: Questions) -> Answers:
    """`file` is a GGUF of fp32."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    engine = llama_cpp.Llama(
        str(file), n_ctx=questions.num_positions, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,  # the file's; the binding has its own defaults
    )  # fmt: skip
    vocab = llama_cpp.llama_model_get_vocab(engine.model)
    scores, continuations = [], []
    for prompt in questions.prompts:
        engine.reset()
        engine.eval(prompt)
        scores.append(_scores(torch.from_numpy(engine.scores[: len(prompt)]), prompt))
        new = list[int]()
        while len(new) < questions.max_new_tokens:
            new.append(int(engine.scores[engine.n_tokens - 1].argmax()))
            if llama_cpp.llama_vocab_is_eog(vocab, new[-1]):
                break
            engine.eval(new[-1:])
        continuations.append(new)
    conversation = None
    if questions.messages is not None:
        bos, eos = (llama_cpp.llama_vocab_get_text(vocab, index) for index in (engine.token_bos(), engine.token_eos()))
        template = engine.metadata["tokenizer.chat_template"]
        write = Jinja2ChatFormatter(template, eos_token=eos.decode(), bos_token=bos.decode())
        rendered = write(messages=questions.messages)
        conversation = engine.tokenize(rendered.prompt.encode(), add_bos=not rendered.added_special, special=True)
    sentinels = (llama_cpp.llama_vocab_fim_pre, llama_cpp.llama_vocab_fim_suf, llama_cpp.llama_vocab_fim_mid)
    return Answers(
        texts=[engine.tokenize(text.encode(), special=True) for text in questions.texts],
        scores=scores, continuations=continuations, conversation=conversation,
        sentinels=[find(vocab) for find in sentinels],
    )  # fmt: skip


def _scores(logits_SV: Tensor, prompt: Sequence[int]) -> list[float]:
    logs_SV = logits_SV[:-1].log_softmax(-1)
    return logs_SV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()


ENGINES: dict[str, Callable[[Path, Questions], Answers]] = {
    "transformers": ask_transformers, "vllm": ask_vllm, "llama_cpp": ask_llama_cpp
}  # fmt: skip
"""Name of the package -> what asks it."""
