"""Freed memory that is asked for again comes from the process itself, not from the kernel, until it is given back."""

import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from megacoder.core.memory import keep_freed_memory, return_freed_memory

torch.set_num_threads(1)
kept = sys.argv[1] == "keep" and keep_freed_memory()
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
return_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(64 << 20, dtype=torch.uint8)
print(kept, faults[-1], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    """(whether the setting took, page faults of the last of 12 equal allocations of 64 MB, of one after all that)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    kept, *faults = done.stdout.split()
    return kept == "True", *map(int, faults)


def test_freed_memory_is_used_again_until_it_is_given_back():
    _, before, _ = page_faults("leave")
    kept, faults, after = page_faults("keep")
    if kept:  # another C library has no such setting, and need not have the problem
        assert faults < 100 < before
        assert after > 100
