"""With `keep_freed_memory`, a new block reuses freed memory without page faults, until the memory is given back."""

import platform
import subprocess
import sys

import pytest

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
    """(whether glibc took the setting, page faults of the last of 12 allocations of 64 MB, of one after the trim)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    kept, *faults = done.stdout.split()
    return kept == "True", *map(int, faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_reused_until_it_is_given_back():
    _, before, _ = page_faults("leave")
    kept, faults, after = page_faults("keep")
    assert kept
    assert faults < 100 < before
    assert after > 100
