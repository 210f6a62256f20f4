"""The benchmarks by name."""

from megacoder.evaluate.benchmarks.base import Benchmark
from megacoder.evaluate.benchmarks.crosscode import CrossCode
from megacoder.evaluate.benchmarks.ds1000 import DS1000
from megacoder.evaluate.benchmarks.humaneval import HumanEval
from megacoder.evaluate.benchmarks.infilling import Infilling
from megacoder.evaluate.benchmarks.leetcode import LeetCode
from megacoder.evaluate.benchmarks.mbpp import Mbpp
from megacoder.evaluate.benchmarks.pal import Pal

__all__ = ["BENCHMARKS"]

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (HumanEval, Mbpp, LeetCode, DS1000, Pal, Infilling, CrossCode)
}
