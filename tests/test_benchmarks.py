"""The benchmarks measure what they say; no test asserts a time."""

import json

import pytest
import torch
from test_runs import flags

from benchmarks import compare_loops, device_speed


def test_device_speed_measures_every_device_and_precision(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device_speed, "SIZES", dict.fromkeys(device_speed.SIZES, 128))
    monkeypatch.setattr(device_speed, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(device_speed, "COPY_NUM_BYTES", 2**16)
    results = device_speed.main(["--output", str(tmp_path / "speed.json")])
    assert results[0]["device"] == "cpu"
    assert len(results) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert {"float32", "bfloat16"} <= results[0]["flops"].keys() and results[0]["copy"]["within"] > 0
    assert json.loads((tmp_path / "speed.json").read_text()) == results
    assert "vs CPU float32" in capsys.readouterr().out


def test_the_median_ignores_warm_ups(monkeypatch):
    durations = iter([100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    clock = [0.0]
    monkeypatch.setattr(device_speed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(device_speed, "MIN_SECONDS", 10.0)

    def action():
        clock[0] += next(durations)

    assert device_speed.median_seconds(action, torch.device("cpu")) == 3.0


def test_compare_loops_prints_one_table_and_both_curves(tone_folder, tmp_path, capsys):
    ratios = compare_loops.main(
        ["--rounds", "1", "--folder", str(tmp_path / "compare"),
         *flags(tmp_path, tone_folder, output_dir=None, num_train_epochs=1)]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "test UAR" in shown and "Trainer" in shown and "by hand" in shown and "peak memory" in shown
    assert (tmp_path / "compare" / "loss_curves.png").stat().st_size > 1000
    assert ratios["time_ratio"] > 0 and ratios["largest_loss_difference"] == pytest.approx(0, abs=1e-2)
