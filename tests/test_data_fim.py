"""Fill-in-the-middle: equal to cutting and encoding the text in full, deterministic, unbiased."""

import itertools

import numpy as np
import pytest
from data_samples import NASTY_TEXTS, small_tokenizer, source_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.core.errors import ConfigError, DataError
from megacoder.data.control_tokens import SPECIAL_TOKENS
from megacoder.data.cuts import CharacterCutter
from megacoder.data.fim import FillInTheMiddle, FimConfig, masked_spans
from megacoder.data.permutation import draw_bits, draw_many_bits, key_of

ALWAYS = FimConfig(rate=1.0)
CUTTER = CharacterCutter(small_tokenizer())


def fim(config=ALWAYS, seed=7):
    return FillInTheMiddle(config, CUTTER, seed=seed)


def ids_of(text, *, eos=False, dtype=np.uint16):
    tokenizer = small_tokenizer()
    return np.array(tokenizer.encode(text) + [tokenizer.eos_id] * eos, dtype=dtype)


def parts_of(ids):
    """(prefix, suffix, middle) as ids, from a PSM example."""
    tokenizer, ids = small_tokenizer(), list(ids)
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    assert ids[0] == tokenizer.fim_begin_id
    assert ids[-1] == tokenizer.eos_id
    return ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]


def assert_equals_full_encoding(text, ids):
    """The parts join to `text`, and each part's ids are those of encoding that part in full."""
    tokenizer = small_tokenizer()
    prefix, suffix, middle = parts_of(ids)
    texts = [
        tokenizer.decode_bytes(part).decode("utf-8") for part in (prefix, middle, suffix)
    ]  # strict: whole characters
    assert "".join(texts) == text
    assert [prefix, middle, suffix] == [tokenizer.encode(part) for part in texts]


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(0, 2**40))
def test_any_text_is_cut_as_if_encoded_in_full(text, file):
    assert_equals_full_encoding(text, fim()(ids_of(text), epoch=0, file=file))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a \n\r\té中👍1+", min_size=1, max_size=12), st.integers(0, 2**40))
def test_line_breaks_and_wide_characters_are_cut_right(text, file):
    assert_equals_full_encoding(text, fim()(ids_of(text), epoch=0, file=file))


@pytest.mark.parametrize("text", [*source_texts(), *NASTY_TEXTS[1:]])
def test_source_files_are_cut_as_if_encoded_in_full(text):
    ids = ids_of(text, eos=True)
    for epoch in range(4):
        assert_equals_full_encoding(text, fim()(ids, epoch=epoch, file=3))


def test_every_pair_of_cuts_in_a_short_text():
    text = "é = 👍🏽\n\n\rdef f():\n  中 "
    ids = ids_of(text)
    ends = CUTTER.character_ends(ids)
    for first in range(len(text) + 1):
        for last in range(first, len(text) + 1):
            parts = CUTTER.cut(ids, ends, [first, last])
            expected = [text[:first], text[first:last], text[last:]]
            assert [np.concatenate(runs).astype(int).tolist() for runs in parts] == [
                small_tokenizer().encode(part) for part in expected
            ]


def test_spm_puts_prefix_and_middle_after_the_suffix():
    ids, tokenizer = ids_of(source_texts()[0], eos=True), small_tokenizer()
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    prefix, suffix, middle = parts_of(fim()(ids, epoch=0, file=5))
    spm = fim(FimConfig(rate=1.0, spm_rate=1.0))(ids, epoch=0, file=5)
    assert spm.tolist() == [begin, hole, *suffix, end, *prefix, *middle, tokenizer.eos_id]


def test_the_result_depends_only_on_the_arguments():
    ids, transform = ids_of(source_texts()[0]), fim()
    keys = [(epoch, file) for epoch in (0, 1) for file in (0, 1, 2**33)]
    forward = [transform(ids, epoch=epoch, file=file).tolist() for epoch, file in keys]
    backward = [fim()(ids, epoch=epoch, file=file).tolist() for epoch, file in reversed(keys)]
    assert forward == backward[::-1]
    assert len({tuple(result) for result in forward}) == len(keys)
    assert fim(seed=8)(ids, epoch=0, file=0).tolist() != forward[0]


def test_draws_are_pinned():
    """The examples of a run are part of its record: another version of this code must draw the same."""
    key = key_of(1234, 2, 56, 0)
    assert draw_bits(key, 4) == draw_many_bits(key, 4).tolist()
    assert draw_bits(key, 2) == [15869498289067416947, 14708826741792208939]
    assert masked_spans(100, density=0.15, span=5.0, key=key).tolist() == [[3, 14], [33, 35], [63, 65]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_dtype_is_kept_and_untouched_files_are_not_copied(dtype):
    ids = ids_of("x = 1\n", eos=True, dtype=dtype)
    assert fim()(ids, epoch=0, file=0).dtype == dtype
    assert fim(FimConfig(rate=0.0))(ids, epoch=0, file=0) is ids


def test_an_empty_file_stays():
    for ids in (ids_of(""), ids_of("", eos=True)):
        assert fim()(ids, epoch=0, file=0) is ids


def test_fim_and_spm_rates_are_kept():
    """Binomial counts over 4,000 files, five standard deviations; a PSM example starts as SPM does 1 time in 150."""
    ids, transform = ids_of(source_texts()[0][:300]), fim(FimConfig(rate=0.3, spm_rate=0.2))
    begin, hole = small_tokenizer().fim_begin_id, small_tokenizer().fim_hole_id
    results = [transform(ids, epoch=0, file=file) for file in range(4000)]
    transformed = [result for result in results if result[0] == begin]
    assert abs(len(transformed) - 1200) < 5 * np.sqrt(4000 * 0.3 * 0.7)
    share = 0.2 + 0.8 / 150
    assert abs(sum(result[1] == hole for result in transformed) - share * len(transformed)) < 5 * np.sqrt(200)


def test_cuts_are_uniform_over_characters():
    """Chi-square of the two cuts over the 8 places of a text of 7 characters in more tokens."""
    text, files = "é\n中👍b\ré", 4000
    ids, transform, counts = ids_of(text), fim(), np.zeros((8, 8))
    for file in range(files):
        prefix, _, middle = parts_of(transform(ids, epoch=0, file=file))
        first = len(small_tokenizer().decode(prefix))
        counts[first, first + len(small_tokenizer().decode(middle))] += 1
    expected = np.triu(np.full((8, 8), files / 32)) - np.diag(np.full(8, files / 64))  # two orders for distinct cuts
    used = expected > 0
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert counts[~used].sum() == 0
    assert chi_square < 35 + 5 * np.sqrt(2 * 35)


@pytest.mark.parametrize("field", ["rate", "spm_rate", "msp_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_rates_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"fim.{field} = {value}"):
        FimConfig(**{field: value})


def test_ids_of_another_tokenizer_are_refused():
    half = ids_of("é" * 50)[1::2]  # continuation bytes without their first ones
    with pytest.raises(DataError, match="file 4 of the dataset is not UTF-8"):
        fim()(np.concatenate([ids_of("ab"), half]), epoch=0, file=4)


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
@pytest.mark.parametrize("text", source_texts()[:3])
def test_parts_of_a_file_are_transformed_each_by_itself(text, limit):
    ids, tokenizer = ids_of(text, eos=True), small_tokenizer()
    config = FimConfig(rate=1.0, context_tokens=limit)
    parts = list(fim(config)._parts(ids, limit))
    assert np.array_equal(np.concatenate(parts), ids)
    parts[-1] = parts[-1][:-1]  # EOS
    line_break = tokenizer.encode("\n")[0]
    for part, following in itertools.pairwise(parts):
        assert part[-1] == line_break
        next_line = np.flatnonzero(following == line_break)
        assert len(part) + (next_line[0] + 1 if len(next_line) else len(following)) > limit, "a part could hold more"
        assert len(part) <= limit or np.count_nonzero(part == line_break) == 1

    seen = fim(config)(ids, epoch=0, file=5).tolist()
    ends = [place + 1 for place, token in enumerate(seen) if token == tokenizer.eos_id]
    examples = [seen[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    for example, part in zip(examples, parts, strict=True):
        assert_equals_full_encoding(tokenizer.decode(part), example)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n"])
def test_any_line_break_ends_a_part(line_break):
    ids = ids_of(f"x = 1{line_break}" * 50)
    parts = list(fim()._parts(ids, 40))
    assert np.array_equal(np.concatenate(parts), ids)
    assert max(map(len, parts)) <= 40
    assert {small_tokenizer().decode(part.tolist())[-1] for part in parts} <= {*line_break}


def test_parts_are_drawn_for_one_by_one():
    ids, tokenizer = ids_of("x = 1\n" * 400), small_tokenizer()
    halves = fim(FimConfig(rate=0.5, context_tokens=len(ids) // 100))(ids, epoch=0, file=1)
    assert 25 <= np.count_nonzero(halves == tokenizer.fim_hole_id) <= 75


def spans_of(ids):
    """(kept parts, hidden parts) as ids, from an MSP example."""
    tokenizer, ids = small_tokenizer(), list(ids)
    assert (ids[0], ids[-1]) == (tokenizer.fim_begin_id, tokenizer.eos_id)
    end = ids.index(tokenizer.fim_end_id)
    groups = []
    for group in (ids[1:end], ids[end + 1 : -1]):
        holes = [-1, *(place for place, token in enumerate(group) if token == tokenizer.fim_hole_id), len(group)]
        groups.append([group[a + 1 : b] for a, b in itertools.pairwise(holes)])
    return groups


MASKED = FimConfig(rate=1.0, msp_rate=1.0)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=200), st.integers(0, 2**40), st.sampled_from([1.0, 3.0, 10.0]))
def test_masked_spans_of_any_text_are_cut_as_if_encoded_in_full(text, file, span):
    config = FimConfig(rate=1.0, msp_rate=1.0, msp_density=0.3, msp_span=span)
    assert_spans(text, fim(config)(ids_of(text), epoch=0, file=file))


@pytest.mark.parametrize("text", [*source_texts(8), *NASTY_TEXTS[1:]])
def test_masked_spans_of_source_files(text):
    assert_spans(text, fim(MASKED)(ids_of(text, eos=True), epoch=0, file=3))


def assert_spans(text, ids):
    tokenizer = small_tokenizer()
    kept, hidden = spans_of(ids)
    assert len(kept) == len(hidden) + 1
    parts = [part for pair in itertools.zip_longest(kept, hidden, fillvalue=[]) for part in pair]
    texts = [tokenizer.decode_bytes(part).decode("utf-8") for part in parts]
    assert "".join(texts) == text
    assert parts == [tokenizer.encode(part) for part in texts]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.floats(0.001, 1.0), st.floats(1.0, 30.0), st.integers(0, 2**64 - 1))
def test_masked_spans_hide_their_share_and_do_not_touch(characters, density, span, key):
    spans = masked_spans(characters, density=density, span=span, key=key)
    edges = spans.ravel()
    assert 0 <= edges[0] < edges[-1] <= characters
    assert (np.diff(edges) > 0).all()
    hidden = int((spans[:, 1] - spans[:, 0]).sum())
    assert hidden == min(max(round(characters * density), 1), characters)
    assert len(spans) == min(max(round(hidden / span), 1), hidden, characters - hidden + 1)


def test_masked_span_starts_are_uniform():
    """Chi-square over the 7 places of a span of 2 characters in 8."""
    draws = 2000
    places = [int(masked_spans(8, density=0.25, span=2.0, key=key_of(key))[0, 0]) for key in range(draws)]
    counts = np.bincount(places, minlength=7)
    assert len(counts) == 7
    assert ((counts - draws / 7) ** 2 / (draws / 7)).sum() < 6 + 5 * np.sqrt(2 * 6)


def test_kinds_share_the_transformed_files():
    ids = ids_of(source_texts()[0][:400])
    transform = fim(FimConfig(rate=1.0, spm_rate=0.3, msp_rate=0.2))
    begin, hole = small_tokenizer().fim_begin_id, small_tokenizer().fim_hole_id
    results = [transform(ids, epoch=0, file=file) for file in range(2000)]
    assert all(result[0] == begin for result in results)
    spans = sum(np.count_nonzero(result == hole) > 1 for result in results)
    assert abs(spans - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)
    orders = sum(result[1] == hole and np.count_nonzero(result == hole) == 1 for result in results)
    assert abs(orders - 600) < 5 * np.sqrt(2000 * 0.3 * 0.7) + 0.5 / 200 * 2000


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("# pkg/mod.py", "mod.py"), ("#mod.py", "mod.py"), ("// src/a b.cc", "a b.cc"), ("/* x.c */", "x.c"),
        ("<!-- i.html -->", "i.html"), ("-- q.sql", "q.sql"), ("# Makefile", "Makefile"), ("REM a.bat", "a.bat"),
        (";; e.el", "e.el"), ("# m.py\rimport os", "m.py"), ("import os.path", ""), ("", ""), ("# " + "x" * 900, ""),
    ],
)  # fmt: skip
def test_a_file_name_is_read_from_its_path_comment(header, name):
    assert fim()._name(ids_of(f"{header}\nx = 1\n")) == name


@pytest.mark.parametrize(
    ("options", "transformed"),
    [
        ({"never": (".md",)}, [".py", "Makefile", ""]),
        ({"never": (".md", "Makefile")}, [".py", ""]),
        ({"only": (".py", "Makefile")}, [".py", "Makefile"]),
        ({"only": (".py", ".md"), "never": (".md",)}, [".py"]),
    ],
)
def test_languages_can_be_left_as_they_are(options, transformed):
    headers = {".py": "# a/b.py\n", ".md": "# README.md\n", "Makefile": "# c/Makefile\n", "": ""}
    transform, found = fim(FimConfig(rate=1.0, **options)), []
    for kind, header in headers.items():
        ids = ids_of(header + "some text\nof two lines\n")
        if transform(ids, epoch=0, file=1) is not ids:
            found.append(kind)
    assert found == transformed


def test_control_tokens_in_a_text_stay_text_through_every_cut():
    """Only the sentinels put in are control ids, however the file is cut; each part still is its own encoding."""
    tokenizer = small_tokenizer()
    text = "".join(SPECIAL_TOKENS.values()) + "\n" + SPECIAL_TOKENS["fim_hole"] * 2
    first_control = min(tokenizer.token_bytes.index(token.encode()) for token in SPECIAL_TOKENS.values())
    for file in range(60):
        psm = fim()(ids_of(text), epoch=0, file=file)
        assert np.count_nonzero(psm >= first_control) == 4
        assert_equals_full_encoding(text, psm)
        spans = fim(MASKED)(ids_of(text), epoch=0, file=file)
        assert_spans(text, spans)


def test_a_part_of_no_tokens_is_refused():
    with pytest.raises(ConfigError, match="context_tokens = 0"):
        FimConfig(context_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spm_rate": 0.6, "msp_rate": 0.5}, "must be at most 1 together"),
        ({"msp_density": 0.0}, "fim.msp_density = 0.0"),
        ({"msp_density": 1.01}, "fim.msp_density = 1.01"),
        ({"msp_span": 0.5}, "fim.msp_span = 0.5"),
        ({"msp_span": float("nan")}, "fim.msp_span = nan"),
    ],
)
def test_impossible_masks_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FimConfig(**options)
