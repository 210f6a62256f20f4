"""MinHash: the kernel equals its definition, that equals plain Python, and the estimate errs as theory predicts."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacoder.corpus import minhash
from megacoder.corpus.benchmarks import TestString
from megacoder.corpus.decontamination import BenchmarkIndex, DecontaminationConfig
from megacoder.corpus.minhash import EMPTY, reference_signatures, shingle_hashes, signatures, word_hashes

EDGE_CASES = [
    b"", b" ", b"a", b"...", b"one two three four five", b"one two three four five six", b"A_b \xc3\xa9t\xc3\xa9 9",
    b"x" * 7, b"x" * 8, b"x" * 9, b"x" * 16, b"x" * 17, b"x" * 63 + b" y", b"x" * 64, b"x" * 64 + b" y", b"x" * 65,
    b" " * 64 + b"z", b"a\x00b\xffc", b"ab " * 500, b"@[`{/:^" * 10 + b"AZaz09_",
]  # fmt: skip


def plain_words(text):
    """The definition once more, byte by byte."""
    words, current = [], b""
    for byte in text + b" ":
        if byte >= 128 or chr(byte).isalnum() or byte == ord("_"):
            current += bytes([byte | 0x20 if chr(byte).isupper() and byte < 128 else byte])
        elif current:
            words.append(current)
            current = b""
    return words


def plain_shingles(text, ngram):
    words = plain_words(text)
    length = min(ngram, len(words))
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)] if words else []


@pytest.fixture
def built():
    if minhash._kernels() is None:
        pytest.skip("the C++ kernels are not built")


@pytest.mark.parametrize(("num_hashes", "ngram"), [(64, 5), (256, 1), (128, 13)])
def test_the_kernel_equals_the_definition_on_edge_cases(built, num_hashes, ngram):
    for texts in (EDGE_CASES, [b"\x7f".join(EDGE_CASES)], []):
        ours, words = signatures(texts, num_hashes=num_hashes, ngram=ngram)
        expected, expected_words = reference_signatures(texts, num_hashes=num_hashes, ngram=ngram)
        assert (ours == expected).all()
        assert words.tolist() == expected_words.tolist() == [len(plain_words(text)) for text in texts]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=300) | st.text(max_size=150).map(str.encode), max_size=5))
def test_the_kernel_equals_the_definition_on_any_bytes(texts):
    ours, words = signatures(texts, num_hashes=64, ngram=3)
    expected, expected_words = reference_signatures(texts, num_hashes=64, ngram=3)
    assert (ours == expected).all()
    assert words.tolist() == expected_words.tolist()


@pytest.mark.parametrize("before", ["signatures", "word hashes", "runs"])
def test_the_kernels_share_their_buffers_without_running_over(built, before):
    text = b" ".join(b"%d" % number for number in range(300_000))
    index = BenchmarkIndex([TestString(test="t", text="one two three")], DecontaminationConfig())
    kernels = {
        "signatures": lambda: signatures([text], num_hashes=64, ngram=5),
        "word hashes": lambda: minhash.word_hashes(text),
        "runs": lambda: index.runs(text),
    }
    # buffers belong to a thread and only grow, so what a larger text leaves shows in a thread of its own
    with ThreadPoolExecutor(max_workers=1) as new_thread:
        first = new_thread.submit(kernels[before]).result()
        again, words = new_thread.submit(kernels["signatures"]).result()
    expected, _ = reference_signatures([text], num_hashes=64, ngram=5)
    assert (again == expected).all()
    assert words.tolist() == [300_000]
    if before == "runs":
        assert first == []


def test_without_the_kernel_numpy_answers(monkeypatch):
    monkeypatch.setattr(minhash, "_kernels", lambda: None)
    ours, _ = signatures([b"some words of code"], num_hashes=64, ngram=2)
    assert (ours == reference_signatures([b"some words of code"], num_hashes=64, ngram=2)[0]).all()


@given(
    st.lists(st.sampled_from([b"ab", b"AB", b"c", b"abcdefgh", b"abcdefghi", b"12345678abcdefgh1", b"_"]), max_size=20)
)
def test_equal_shingles_have_equal_hashes_and_others_do_not(words):
    hashes = shingle_hashes(word_hashes(b" ".join(words)), 3).tolist()
    shingles = plain_shingles(b" ".join(words), 3)
    assert len(hashes) == len(shingles)
    assert len(dict(zip(shingles, hashes, strict=True))) == len(set(hashes)) == len(set(shingles))


def test_a_union_has_the_minimum_of_the_signatures():
    first, second = b"def f(x): return x + 1", b"class A: pass  # nothing else here"
    signed, _ = signatures([first, second, b""], num_hashes=64, ngram=1)
    both, _ = signatures([first + b"\n" + second], num_hashes=64, ngram=1)
    assert (np.minimum(signed[0], signed[1]) == both[0]).all()
    assert (signed[2] == EMPTY).all()


@pytest.mark.parametrize("size", [40, 1000])
@pytest.mark.parametrize("jaccard", [0.3, 0.5, 0.7, 0.9])
def test_the_estimate_errs_as_with_independent_hashes(size, jaccard):
    """Over 400 pairs of known similarity: no bias, the standard error of theory, and no heavy tail."""
    generator = np.random.default_rng(int(jaccard * 10) + size)
    common = round(2 * size * jaccard / (1 + jaccard))
    truth = common / (2 * size - common)
    errors = []
    for _ in range(400):
        names = [b"w%d" % number for number in generator.integers(1 << 40, size=2 * size - common)]
        pair = [b" ".join(names[:size]), b" ".join(names[:common] + names[size:])]
        left, right = signatures(pair, num_hashes=256, ngram=1)[0]
        errors.append((left == right).mean() - truth)
    theory = (truth * (1 - truth) / 256) ** 0.5
    assert abs(np.mean(errors)) < 4 * theory / 20
    assert np.std(errors) < 1.15 * theory
    assert np.abs(errors).max() < 5 * theory
