"""Memory is not asked for again at each step."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from speech_emotion.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(10 * 2**20) for _ in range(8)]  # 40 MiB each, more than glibc ever keeps by itself
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(word: str) -> int:
    return int(subprocess.run([sys.executable, "-c", STEPS, word], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_serves_the_next_step():
    assert count_page_faults("keep") < count_page_faults("give back") / 4
