"""Answers to maths questions: normalized and compared as in the published evaluation."""

import pytest

from megacoder.evaluate.benchmarks.math_answers import normalized, same_answer


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (" \\$15,\\!000. ", "15,000"),
        ("575\\text{ students}", "575"),
        ("\\text{Tuesday}", "{Tuesday}"),
        ("44\\%", "44"),
        ("x = 4", "4"),
        ("f(x)=4", "f(x)=4"),
        ("\\frac56", "\\frac{5}{6}"),
        ("-\\dfrac3{10}", "-\\frac{3}{10}"),
        ("3/4", "\\frac{3}{4}"),
        ("\\sqrt2/2", "\\frac{\\sqrt{2}}{2}"),
        ("1/2/3", "1/2/3"),
        ("x/2", "x/2"),
        ("90^\\circ", "90"),
        ("\\left(1, \\frac 12\\right)", "(1,\\frac{1}{2})"),
        ("12.00", "12"),
        ("(1.0, 2.50)", "(1,2.50)"),
        (".5", "0.5"),
        ("(2+3j)", "(2+3i)"),
        ("(-infinity, inf)", "(-\\infty,inf)"),
        ("3\\mbox{ feet}", "3"),
        ("2\\cdot x", "2x"),
        ("\\mathbf{2} and 3", "{2}3"),
        (None, "None"),
        (12.5, "12.5"),
        ("", ""),
    ],
)
def test_normal_forms(answer, form):
    assert normalized(answer) == form


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        ("25", "0.25", True),
        ("25", "25.002", True),
        ("25", "25.01", False),
        ("1,000", "1000", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "0.51", False),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", "1,2", True),
        ("[1,2]", "1,2", True),
        ("[1,0.5]", "[1,\\frac{1}{2}]", True),
        ("(1,\\frac{1}{2})", "(1.00001,0.5)", True),
        ("(1,2)", "(1,2,3)", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("2\\sqrt{3}", "2*sqrt(3)", True),
        ("2\\sqrt{3}", "2\\sqrt{5}", False),
        ("x^2+2x+1", "(x+1)**2", True),
        ("x^2", "x^3", False),
        ("\\frac{\\sqrt[3]{8}\\pi}{2}", "3.1416", True),
        ("\\pi", "3.144", True),
        ("\\pi", "3.146", False),
        ("6,-2", "6", False),
        ("6,-2", "6,-2,1", False),
        ("even", "odd", False),
        ("\\begin{pmatrix}1\\2\\end{pmatrix}", "[1,2]", False),
        ("", "", False),
        ("5", "", False),
    ],
)
def test_the_same_answer_in_other_words(truth, answer, same):
    assert same_answer(truth, answer) is same
