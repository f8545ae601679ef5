"""predict.py on files and folders, good and bad; emotion over time."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT, tone, write_tone
from test_audio import bad_files
from test_inference import save_trained
from test_runs import ENVIRONMENT

import predict
from speech_emotion.errors import UserError
from speech_emotion.inference import load_classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_trained("wav2vec2", tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture
def clips(tmp_path):
    root = tmp_path / "clips"
    for i, seconds in enumerate((0.4, 2.0, 0.7, 5.0)):
        write_tone(root / f"speaker{i % 2}" / f"{i}.{'flac' if i == 2 else 'wav'}", seconds, 200 + 100 * i, [16000, 44100][i % 2])
    return root


def test_a_folder_becomes_a_table_in_the_order_of_its_paths(model, clips, tmp_path):
    assert predict.main([model, str(clips), "--output", str(tmp_path / "r.csv"), "--device", "cpu"]) == 0
    frame = pd.read_csv(tmp_path / "r.csv")
    paths = sorted(str(path) for path in clips.rglob("*") if path.is_file())
    assert list(frame["file"]) == paths
    answers = load_classifier(model, "cpu").classify(paths)
    columns = [column for column in frame if column.startswith("probability_")]
    np.testing.assert_allclose(frame[columns], [answer.probabilities for answer in answers], atol=1e-6)
    assert list(frame["label"]) == [answer.label for answer in answers]
    assert predict.main([model, *paths, "--output", str(tmp_path / "r.jsonl"), "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == list(frame["label"]) and [line["file"] for line in lines] == paths


def test_unreadable_files_are_listed_and_the_rest_is_answered(model, clips, tmp_path, capsys):
    bad = bad_files(clips / "speaker0")
    good = 4
    assert predict.main([model, str(clips), str(tmp_path / "nowhere.wav"), "--output", str(tmp_path / "r.csv")]) == 1
    said = capsys.readouterr().err
    frame = pd.read_csv(tmp_path / "r.csv")
    assert len(frame) == good
    assert "nowhere.wav: no such file" in said
    listed = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(listed) >= len(bad) and f"{good} of {good + len(listed)} recordings are in" in said


def test_the_timeline_follows_the_recording(model, tmp_path, capsys):
    path = write_tone(tmp_path / "long.wav", 7.3, 300)
    assert (
        predict.main([model, str(path), "--timeline", "--window", "2", "--hop", "0.5", "--output", str(tmp_path / "t.csv")]) == 0
    )
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    starts, ends = ([float(row[end]) for row in rows] for end in ("start", "end"))
    assert starts[:3] == [0.0, 0.5, 1.0] and starts[-1] == pytest.approx(5.3) and ends[-1] == pytest.approx(7.3)
    assert all(end - start == pytest.approx(2.0, abs=1e-3) for start, end in zip(starts, ends, strict=True))
    sums = [sum(float(value) for key, value in row.items() if key.startswith("probability_")) for row in rows]
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    # Each window's answer is that for the stretch alone.
    classifier = load_classifier(model, "cpu")
    waveform, _ = soundfile.read(path, dtype="float32")
    alone = classifier.classify([{"array": waveform[8000:40000], "sampling_rate": 16000}])[0]
    timeline = classifier.timeline(path, 2.0, 0.5)
    np.testing.assert_allclose(timeline.probabilities[1], alone.probabilities, atol=1e-5)
    short = classifier.timeline({"array": tone(0.5, 300), "sampling_rate": 16000}, 2.0, 0.5)
    assert len(short.labels) == 1 and short.ends[0] == pytest.approx(0.5)
    with pytest.raises(UserError, match="window and hop"):
        classifier.timeline(path, 2.0, 0.0)


def test_models_with_a_window_of_their_own_keep_to_it(tmp_path):
    whisper = load_classifier(save_trained("whisper", tmp_path / "w"), "cpu")
    timeline = whisper.timeline({"array": tone(5.0, 300), "sampling_rate": 16000})
    assert timeline.ends[0] == pytest.approx(2.0) and timeline.ends[-1] == pytest.approx(5.0)
    with pytest.raises(UserError, match="is longer than the model's 2 s"):
        whisper.timeline({"array": tone(5.0, 300), "sampling_rate": 16000}, 3.0)


def test_paths_from_the_standard_input_and_exit_codes(model, clips, tmp_path):
    def run(*argv, lines=""):
        return subprocess.run([sys.executable, str(ROOT / "predict.py"), *argv], input=lines, capture_output=True, text=True,
                              env=ENVIRONMENT, cwd=tmp_path, timeout=240)  # fmt: skip

    paths = sorted(str(path) for path in clips.rglob("*.wav"))
    done = run(model, "-", lines="\n".join(paths) + "\n")
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == paths and "Traceback" not in done.stderr
    for argv, message in (
        (("/nowhere/model", paths[0]), "no audio-classification model"),
        ((model, "-"), "listed no recordings"),
        ((model, paths[0], "--output", "/nowhere/r.csv"), "is not there or cannot be written"),
        ((model, paths[0], "--output", "r.txt"), "must end in .csv or .jsonl"),
    ):
        done = run(*argv)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    os.makedirs(tmp_path / "empty")
    assert "holds no recordings" in run(model, str(tmp_path / "empty")).stderr
