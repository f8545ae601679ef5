"""The benchmarks measure what they say; no test asserts a time."""

import json
import re

import pytest
import torch
from conftest import ROOT
from test_runs import flags

from benchmarks import (
    compare_loops,
    data_road,
    device_speed,
    frozen_parts,
    inference_speed,
    measuring,
    startup_time,
    training_step,
    whole_run,
)


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


def test_the_table_says_what_is_met():
    rows = [measuring.compare("a", 2.0, 10.0, "clips/s", 5), measuring.compare("b", 8.0, 4.0, "s", 3, higher_is_better=False)]
    assert [row.met for row in rows] == [True, False]
    table = measuring.format_rows(rows).splitlines()
    assert table[1].split() == ["a", "2", "clips/s", "10", "clips/s", "5.00x", ">=", "5x", "yes"]
    assert table[2].endswith("NO")


def test_both_sides_take_turns_and_medians_count():
    order = []

    def side(name, values):
        return lambda: order.append(name) or values.pop(0)

    medians = measuring.in_turn({"a": side("a", [1.0, 9.0, 2.0]), "b": side("b", [5.0, 4.0, 6.0])}, 3)
    assert medians == {"a": 2.0, "b": 5.0} and order == ["a", "b", "b", "a", "a", "b"]


def test_lengths_are_those_of_thorsten():
    lengths = measuring.thorsten_lengths()
    assert len(lengths) == 2400 and lengths.min() > 0.5
    assert lengths.sum() / 60 == pytest.approx(175, abs=4)  # minutes of the corpus
    assert lengths[:300].mean() * 300 / 60 == pytest.approx(19, abs=0.5)  # neutral
    assert training_step.measure_padding()[0].met


@pytest.fixture
def small_work(tmp_path, monkeypatch):
    """Benchmarks in a folder of the test's own, with tiny models of the same classes."""
    monkeypatch.setattr(measuring, "work_folder", lambda: tmp_path)
    save, make = measuring.save_model, measuring.make_clips

    def save_tiny_model(folder, kind="wav2vec2", **changes):
        small = {"wav2vec2": measuring.TINY, "whisper": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
                                                         "encoder_ffn_dim": 32}}  # fmt: skip
        return save(folder, kind, **small[kind] | changes)

    def make_few_clips(folder, num_clips, seconds=(2.0, 8.0), seed=0):
        return make(folder, 80, (0.4, 0.6), seed)

    for module in (data_road, training_step, frozen_parts, whole_run, inference_speed, startup_time):
        for name, value in (("work_folder", lambda: tmp_path), ("save_model", save_tiny_model), ("make_clips", make_few_clips)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(training_step, "CONV_CHANNELS", 32)
    monkeypatch.setattr(device_speed, "SIZES", dict.fromkeys(device_speed.SIZES, 128))
    monkeypatch.setattr(device_speed, "MIN_SECONDS", 0.0)
    return tmp_path


def test_frozen_parts_measure_what_they_say(small_work):
    rows = {row.what: row for row in frozen_parts.measure(quick=True)}
    assert rows["logits against the full table's first positions"].met
    assert all(float(row.ratio.removesuffix("x")) > 0 for row in rows.values() if row.ratio)


def test_a_step_is_measured_with_its_operations_and_stages(small_work, capsys):
    folder = str(training_step.save_model(small_work / "wav2vec2-base"))
    row = training_step.measure_rate(folder, False, 1, 2)
    assert row.goal == ">= 55 %" and row.ratio.endswith("%")
    shown = capsys.readouterr().out
    assert "matrix products" in shown and "dropout" in shown and "optimizer" in shown
    shares = [int(share) for share in re.findall(r"(-?\d+)%", shown.split("by stage: ")[1])]
    assert sum(shares) == pytest.approx(100, abs=4)


def test_both_whole_runs_take_the_same_steps(small_work):
    time_row, memory_row, loss_row = whole_run.measure(quick=True)
    assert loss_row.what == "its validation loss after 8 and 8 steps"
    assert time_row.ours.endswith(" s") and memory_row.other.endswith("MiB")


def test_inference_is_compared_on_the_same_answers(small_work):
    files = sorted(str(path) for path in (ROOT / "assets" / "polish_emotions").glob("*.flac"))[:8]
    model = inference_speed.save_model(small_work / "wav2vec2-base")
    rows = inference_speed.measure_model("tiny", model, files, 1, as_files=False)
    assert rows[0].what == "inference, tiny, 8 arrays" and rows[1].met
