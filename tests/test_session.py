"""The frame of a run: cores, precision, exit codes."""

import errno
import os

import pytest
import torch

from speech_emotion import arguments as arguments_module
from speech_emotion.arguments import has_fast_bfloat16, parse_arguments
from speech_emotion.errors import UserError, list_offenders, run_as_command
from speech_emotion.session import use_all_cores


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_cores_are_used_whatever_the_launcher_says(monkeypatch, tmp_path, restored_threads):
    arguments = parse_arguments(["recipes/demo.json", "--output_dir", str(tmp_path), "--use_cpu"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for omp, processes, expected in (("1", "1", cores), ("1", "2", max(1, cores // 2)), ("3", "1", 7)):
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        torch.set_num_threads(7)
        use_all_cores(arguments)
        assert torch.get_num_threads() == expected  # a number that the user chose stays


def test_bfloat16_is_used_where_it_is_fast_and_can_be_switched_off(monkeypatch, tmp_path):
    argv = ["recipes/demo.json", "--output_dir", str(tmp_path), "--use_cpu"]
    for fast in (True, False):
        monkeypatch.setattr(arguments_module, "has_fast_bfloat16", lambda use_cpu, fast=fast: fast)
        assert parse_arguments(argv).training.bf16 is fast
        assert parse_arguments([*argv, "--bf16", "false"]).training.bf16 is False
        assert parse_arguments([*argv, "--bf16"]).training.bf16 is True
    assert has_fast_bfloat16(use_cpu=True) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("m.csv: no column"), 2, "error: m.csv: no column"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (RuntimeError("PytorchStreamWriter failed writing file"), 2, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "--resume_from_checkpoint last"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_message(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_as_command(main)
    shown = capsys.readouterr().err
    assert caught.value.code == code and message in shown and "Traceback" not in shown


def test_a_defect_of_ours_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_as_command(main)


def test_long_lists_of_offenders_are_cut():
    shown = list_offenders(f"clip {i}" for i in range(25))
    assert shown.splitlines()[0] == "  - clip 0" and shown.endswith("... and 5 more")
