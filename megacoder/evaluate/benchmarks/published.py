"""Scores of DeepSeek-Coder as published, in percent, to compare a result with.

From arXiv:2401.14196, tables 3 to 8, and for the 5.7B model from DeepSeek-Coder's repository. HumanEval has scores in
the paper's eight languages only; DS-1000, maths, infilling and CrossCodeEval have them for base models only.
"""

__all__ = ["published_scores"]

_LANGUAGES = ("python", "cpp", "java", "php", "ts", "cs", "sh", "js")
_HUMANEVAL = {
    "1.3B base": (34.8, 31.1, 32.3, 24.2, 28.9, 36.7, 10.1, 28.6),
    "5.7B base": (48.7, 45.3, 41.1, 39.7, 44.7, 41.1, 27.8, 42.2),
    "6.7B base": (49.4, 50.3, 43.0, 38.5, 49.7, 50.0, 28.5, 48.4),
    "33B base": (56.1, 58.4, 51.9, 44.1, 52.8, 51.3, 32.3, 55.3),
    "1.3B instruct": (65.2, 45.3, 51.9, 45.3, 59.7, 55.1, 12.7, 52.2),
    "6.7B instruct": (78.6, 63.4, 68.4, 68.9, 67.2, 72.8, 36.7, 72.7),
    "33B instruct": (79.3, 68.9, 73.4, 72.7, 67.9, 74.1, 43.0, 73.9),
}
_MBPP = {"1.3B base": 46.2, "5.7B base": 57.2, "6.7B base": 60.6, "33B base": 66.0, "1.3B instruct": 49.4,
         "6.7B instruct": 65.4, "33B instruct": 70.0}  # fmt: skip
_LEETCODE = {
    "1.3B instruct": {"Easy": 22.2, "Medium": 1.1, "Hard": 4.5, "": 7.2},
    "6.7B instruct": {"Easy": 44.4, "Medium": 12.1, "Hard": 9.1, "": 19.4},
    "33B instruct": {"Easy": 57.8, "Medium": 22.0, "Hard": 9.1, "": 27.8},
}
_LIBRARIES = ("Matplotlib", "Numpy", "Pandas", "Pytorch", "Scipy", "Sklearn", "Tensorflow", "")
_DS1000 = {
    "1.3B base": (32.3, 21.4, 9.3, 8.8, 8.5, 16.5, 8.9, 16.2),
    "5.7B base": (51.1, 31.8, 19.9, 14.7, 17.0, 29.6, 15.6, 27.7),
    "6.7B base": (48.4, 35.5, 20.6, 19.1, 22.6, 38.3, 24.4, 30.5),
    "33B base": (56.1, 49.6, 25.8, 36.8, 36.8, 40.0, 46.7, 40.2),
}
_PAL_SETS = ("gsm8k", "math", "gsm-hard", "svamp", "tabmwp", "asdiv", "mawps")
_PAL = {
    "1.3B base": (14.6, 16.8, 14.5, 36.7, 30.0, 48.2, 62.3),
    "5.7B base": (38.8, 20.0, 36.8, 52.5, 55.9, 63.9, 84.8),
    "6.7B base": (43.2, 19.2, 40.3, 58.4, 67.9, 67.2, 87.0),
    "33B base": (60.7, 29.1, 54.1, 71.6, 75.3, 76.7, 93.3),
}
_INFILL = {
    "1B base": {"py": 57.4, "java": 82.2, "js": 71.7},
    "7B base": {"py": 66.6, "java": 88.1, "js": 79.7},
    "33B base": {"py": 65.4, "java": 86.6, "js": 82.5},
}
_CROSSCODE = {
    False: {"python": 9.53, "java": 10.80, "ts": 9.59, "cs": 5.26},
    True: {"python": 16.14, "java": 17.72, "ts": 14.03, "cs": 16.23},
}


def published_scores(
    benchmark: str, *, language: str = "", subset: str = "", instruct: bool = False, retrieval: bool = False
) -> dict[str, dict[str, float]]:
    """{model: {group: percent}} of pass@1 or exact match; group "" is the total. Empty where nothing is comparable.

    `language` tells the sets of humaneval and crosscode apart, `subset` those of pal.
    """
    kind = "instruct" if instruct else "base"
    found: dict[str, dict[str, float]] = {}
    if benchmark == "humaneval" and language in _LANGUAGES:
        place = _LANGUAGES.index(language)
        found = {name: {"": scores[place]} for name, scores in _HUMANEVAL.items() if name.endswith(kind)}
    elif benchmark == "mbpp":
        found = {name: {"": score} for name, score in _MBPP.items() if name.endswith(kind)}
    elif benchmark == "leetcode" and instruct:
        found = _LEETCODE
    elif benchmark == "ds1000" and not instruct:
        found = {name: dict(zip(_LIBRARIES, scores, strict=True)) for name, scores in _DS1000.items()}
    elif benchmark == "pal" and subset in _PAL_SETS and not instruct:
        place = _PAL_SETS.index(subset)
        found = {name: {"": scores[place]} for name, scores in _PAL.items()}
    elif benchmark == "infill" and not instruct:
        found = _INFILL
    elif benchmark == "crosscode" and not instruct and language in _CROSSCODE[retrieval]:
        found = {"6.7B base": {"": _CROSSCODE[retrieval][language]}}
    return found
