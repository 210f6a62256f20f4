"""Infilling: which lines are masked, what the model sees, and how answers are scored."""

import dataclasses

import numpy as np
import pytest
from evaluation_samples import FUNCTION, make_model, make_tokenizer, overfit, source_file, source_files
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import DataError
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig
from megacoder.evaluate.infill import (
    choose_tasks,
    fill_lines,
    is_worth_asking,
    line_above,
    most_frequent_line,
    score,
    summarize,
)
from megacoder.evaluate.prompts import completion_prompt, infill_prompt
from megacoder.evaluate.similarity import edit_similarity

TOKENIZER = make_tokenizer()


def test_an_overfitted_model_fills_in_the_lines_it_was_shown():
    tasks = choose_tasks(source_files(), num_tasks=6)
    model = make_model(TOKENIZER)
    examples = []
    for task in tasks:
        prompt = infill_prompt(TOKENIZER, task.prefix, task.suffix, max_tokens=256)
        assert prompt.num_dropped_lines == 0
        examples.append((prompt.tokens, [*TOKENIZER.encode(task.truth), TOKENIZER.eos_id]))
    before = summarize(fill_lines(model, TOKENIZER, tasks, quiet=True))
    overfit(model, examples, steps=60)
    results = fill_lines(model, TOKENIZER, tasks, quiet=True)
    summary = summarize(results, frequent_line="    total = 0")
    assert [result.completion for result in results] == [task.truth for task in tasks]
    assert (summary.num_tasks, summary.num_files, summary.model.exact_match) == (6, 3, 1.0)
    assert before.model.exact_match == 0.0
    assert summary.line_above.exact_match < 1.0


@pytest.mark.parametrize(("max_prompt_tokens", "room"), [(40, 40), (None, 120), (1000, 120)])
def test_prompts_stay_within_what_the_model_was_trained_to_fill_in(monkeypatch, max_prompt_tokens, room):
    seen = []

    def generated(model, prompts, **options):
        seen.extend(map(len, prompts))
        return [[] for _ in prompts]

    monkeypatch.setattr("megacoder.evaluate.infill.generate", generated)
    model, tasks = make_model(TOKENIZER, max_position_embeddings=128), choose_tasks(source_files(), num_tasks=6)
    fill_lines(model, TOKENIZER, tasks, max_new_tokens=8, max_prompt_tokens=max_prompt_tokens, quiet=True)
    assert len(seen) == 6
    assert room - 24 < max(seen) <= room


def test_tasks_are_full_code_lines_spread_over_the_files():
    files = source_files()
    tasks = choose_tasks(files, num_tasks=5)
    assert len({(task.repo, task.path) for task in tasks}) == 3
    content = {(file.repo, file.path): file.content for file in files}
    for task in tasks:
        assert task.prefix + task.truth + task.suffix == content[task.repo, task.path]
        assert content[task.repo, task.path].split("\n")[task.line - 1] == task.truth
        assert task.prefix.endswith("\n")
        assert task.suffix.startswith("\n")
        assert "small enough" not in task.truth


def test_tasks_depend_on_the_seed_and_not_on_the_order_of_files():
    files = source_files()
    tasks = choose_tasks(files, num_tasks=4, seed=1)
    assert choose_tasks(files[::-1], num_tasks=4, seed=1) == tasks
    assert choose_tasks(files, num_tasks=4, seed=2) != tasks
    assert choose_tasks(files, num_tasks=2, seed=1) == tasks[:2]
    every = choose_tasks(files, num_tasks=10**6)
    assert len(every) == len({(task.path, task.line) for task in every}) == 6 * 5  # five code lines in a function


def test_files_without_a_line_to_ask_for():
    empty = dataclasses.replace(
        source_file("x.py", []), content="# a long path comment.py\n\n# only comments here\nx = 1\n"
    )
    with pytest.raises(DataError, match="no line to fill in"):
        choose_tasks([empty], num_tasks=3)


@pytest.mark.parametrize(
    ("line", "language", "worth"),
    [
        ("    return total_price", "Python", True),
        ("    # return total_price", "Python", False),
        ("  a  =  b", "Python", False),
        ("#include <vector>", "C++", True),
        ("// some explanation", "C++", False),
        (" * some explanation", "Java", False),
        ("-- some explanation", "SQL", False),
        ("int *pointer = &value;", "C", True),
        ("# some explanation", "A language of the future", False),
        ("", "Python", False),
    ],
)
def test_lines_worth_asking_for(line, language, worth):
    assert is_worth_asking(line, language) is worth


def task_for(truth, prefix="x\n"):
    task = choose_tasks([source_file("a.py", ["weight"])], num_tasks=1)[0]
    return dataclasses.replace(task, truth=truth, prefix=prefix)


def test_scores_count_indentation_but_not_trailing_space():
    assert score(task_for("    return x\r"), "    return x  ").exact_match
    wrong = score(task_for("    return x"), "return x")
    assert not wrong.exact_match
    assert wrong.edit_similarity == pytest.approx(1 - 4 / 12)
    assert wrong.row() == {
        "repo": "shop", "path": "a.py", "line": wrong.task.line, "truth": "    return x", "completion": "return x",
        "exact_match": False, "edit_similarity": wrong.edit_similarity,
    }  # fmt: skip


def test_baselines():
    assert line_above(task_for("x", prefix="# a.py\n    first\n\n  \n")) == "    first"
    assert line_above(task_for("x", prefix="")) == ""
    files = source_files()
    assert most_frequent_line(files) == "    for item in items:"
    assert most_frequent_line([]) is None
    results = [score(task_for("    for item in items:", prefix="    for item in items:\n"), "pass")]
    summary = summarize(results, frequent_line="    for item in items:")
    assert summary.model.exact_match == 0.0
    assert summary.line_above.exact_match == summary.most_frequent_line.exact_match == 1.0
    assert summarize(results).most_frequent_line is None
    with pytest.raises(DataError, match="no infilling results"):
        summarize([])


def levenshtein(a, b):
    table = [[max(i, j) if not i or not j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(changed, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@settings(max_examples=60, deadline=None)
@given(st.text("abé😀", max_size=9), st.text("abé😀", max_size=9))
def test_edit_similarity_is_levenshteins(a, b):
    expected = 1 - levenshtein(a, b) / max(len(a), len(b), 1)
    assert edit_similarity(a, b) == pytest.approx(expected)


PREFIX = FUNCTION.format(name="height") * 2
SUFFIX = "\n" + FUNCTION.format(name="price") * 3
ids = TOKENIZER


def test_a_prompt_that_fits_is_unchanged():
    prompt = infill_prompt(TOKENIZER, PREFIX, SUFFIX, max_tokens=10_000)
    assert prompt.num_dropped_lines == 0
    assert prompt.tokens == [
        ids.bos_id, ids.fim_begin_id, *ids.encode(PREFIX), ids.fim_hole_id, *ids.encode(SUFFIX), ids.fim_end_id
    ]  # fmt: skip
    for spm in (False, True):
        assert infill_prompt(TOKENIZER, "", "", max_tokens=4, spm=spm).tokens == [
            ids.bos_id, ids.fim_begin_id, ids.fim_hole_id, ids.fim_end_id
        ]  # fmt: skip


@pytest.mark.parametrize("spm", [False, True])
def test_a_prompt_is_what_training_shows_before_the_middle(spm):
    text = FUNCTION.format(name="height")
    fim = FillInTheMiddle(FimConfig(rate=1.0, spm_rate=float(spm)), CharacterCutter(TOKENIZER), seed=1)
    for file in range(20):
        shown = fim(np.array(ids.encode(text)), epoch=0, file=file).tolist()
        suffix = shown[shown.index(ids.fim_hole_id) + 1 : shown.index(ids.fim_end_id)]
        stop = len(text) - len(ids.decode(suffix))
        asked = (  # for every place where the middle may begin, which SPM does not mark
            (infill_prompt(TOKENIZER, text[:start], text[stop:], max_tokens=10_000, spm=spm), text[start:stop])
            for start in range(stop + 1)
        )
        assert shown in [[*prompt.tokens[1:], *ids.encode(middle), ids.eos_id] for prompt, middle in asked]


@pytest.mark.parametrize("max_tokens", [4, 9, 40, 90, 10_000])
def test_the_order_of_a_prompt_changes_none_of_its_parts(max_tokens):
    psm, spm = (infill_prompt(TOKENIZER, PREFIX, SUFFIX, max_tokens=max_tokens, spm=spm) for spm in (False, True))
    hole, end = psm.tokens.index(ids.fim_hole_id), spm.tokens.index(ids.fim_end_id)
    assert spm.tokens[:3] == [ids.bos_id, ids.fim_begin_id, ids.fim_hole_id]
    assert spm.tokens[3:end] == psm.tokens[hole + 1 : -1]
    assert spm.tokens[end + 1 :] == psm.tokens[2:hole]
    assert spm.num_dropped_lines == psm.num_dropped_lines


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 420), st.integers(0, len(PREFIX)), st.integers(0, len(SUFFIX)))
def test_a_long_prompt_loses_its_farthest_lines(max_tokens, start, stop):
    prefix, suffix = PREFIX[start:], SUFFIX[:stop]
    prompt = infill_prompt(TOKENIZER, prefix, suffix, max_tokens=max_tokens)
    assert len(prompt.tokens) <= max_tokens
    hole = prompt.tokens.index(ids.fim_hole_id)
    before, after = ids.decode(prompt.tokens[2:hole]), ids.decode(prompt.tokens[hole + 1 : -1])
    assert prefix.endswith(before)
    assert suffix.startswith(after)
    assert before in ("", prefix) or prefix[-len(before) - 1] == "\n"
    assert after in ("", suffix) or after.endswith("\n")
    whole = len(ids.encode(prefix)) + len(ids.encode(suffix)) + 4 <= max_tokens
    assert (prompt.num_dropped_lines == 0) == whole == ((before, after) == (prefix, suffix))
    if not whole:  # neither side starves: the longest line has fewer than 24 tokens
        room = max_tokens - 4
        for text, kept in ((prefix, before), (suffix, after)):
            assert len(ids.encode(kept)) > min(len(ids.encode(text)), room // 2) - 24


def test_prompts_with_no_room():
    with pytest.raises(DataError, match="a prompt of 3 tokens cannot hold"):
        infill_prompt(TOKENIZER, PREFIX, SUFFIX, max_tokens=3)
    with pytest.raises(DataError, match="a prompt of 1 token cannot hold"):
        infill_prompt(TOKENIZER, PREFIX, SUFFIX, max_tokens=1)
    with pytest.raises(DataError, match="the last line of the prompt has"):
        completion_prompt(TOKENIZER, "x = 1\n" + "y + " * 100, max_tokens=50)


def test_a_completion_prompt_keeps_the_last_lines():
    prompt = completion_prompt(TOKENIZER, "first line\nsecond line\nthird", max_tokens=20)
    kept = ids.decode(prompt.tokens[1:])
    assert prompt.tokens[0] == ids.bos_id
    assert "first line\nsecond line\nthird".endswith(kept)
    assert kept.startswith("second")
    assert prompt.num_dropped_lines == 1
    assert completion_prompt(TOKENIZER, "", max_tokens=20).tokens == [ids.bos_id]
