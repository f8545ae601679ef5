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
for step in range(6):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.zeros(2**22) for _ in range(8)]  # 16 MiB each
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(word: str) -> int:
    return int(subprocess.run([sys.executable, "-c", STEPS, word], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_serves_the_next_step_without_page_faults():
    num_bytes = 4 * 8 * 4 * 2**22
    largest_page = 2**21  # a transparent huge page
    assert count_page_faults("keep") < num_bytes / largest_page <= count_page_faults("give back")
