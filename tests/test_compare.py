"""Two runs on the same clips: a difference that is there is found, one that is not is not claimed."""

import json

import numpy as np
import pandas as pd
import pytest

from speech_emotion.compare import compare_runs, main
from speech_emotion.errors import UserError


def write_run(folder, skill, seed, num_speakers=20, clips_each=15, classes=3, repeats=1, labels_seed=0):
    labels = np.random.default_rng(labels_seed).integers(0, classes, num_speakers * clips_each)
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(repeats):
        right = rng.random(len(labels)) < skill
        predictions = np.where(right, labels, (labels + rng.integers(1, classes, len(labels))) % classes)
        frames.append(pd.DataFrame({"clip": [f"{i}.wav" for i in range(len(labels))], "label": labels, "prediction": predictions,
                                    "speaker_id": [f"{i // clips_each:03}" for i in range(len(labels))]}))  # fmt: skip
    folder.mkdir()
    pd.concat(frames).to_csv(folder / "predictions.csv", index=False)
    return folder


def test_a_better_run_is_said_to_be_better_whichever_comes_first(tmp_path):
    weak, strong = write_run(tmp_path / "weak", 0.6, 1), write_run(tmp_path / "strong", 0.75, 2)
    result = compare_runs(weak, strong)
    assert result["verdict"].startswith("B is better") and result["clustered_by"] == "speaker" and result["num_clips"] == 300
    low, high = result["uar_difference_ci95"]
    assert 0 < low < result["uar_difference"] < high
    assert result["only_b_right"] > result["only_a_right"] and result["mcnemar_p"] < 0.01
    assert compare_runs(strong, weak)["verdict"].startswith("A is better")


def test_equal_runs_are_not_told_apart(tmp_path):
    first, second = write_run(tmp_path / "first", 0.7, 7), write_run(tmp_path / "second", 0.7, 8)
    result = compare_runs(first, second)
    assert result["verdict"].startswith("Neither is shown to be better")
    same = compare_runs(first, first)
    assert same["uar_difference"] == 0 and same["mcnemar_p"] == 1.0 and same["uar_difference_ci95"] == [0, 0]


def test_the_interval_errs_as_often_as_it_says(tmp_path):
    # 60 pairs of equally good runs: an interval of 95 % leaves zero out in about 3 of them.
    wrong = 0
    for pair in range(60):
        a = write_run(tmp_path / f"a{pair}", 0.7, 1000 + pair, num_speakers=15, clips_each=10, labels_seed=pair)
        b = write_run(tmp_path / f"b{pair}", 0.7, 2000 + pair, num_speakers=15, clips_each=10, labels_seed=pair)
        wrong += not compare_runs(a, b)["verdict"].startswith("Neither")
    assert wrong <= 9  # of 60 with 5 to 7 %, the 99th percentile


def test_mcnemar_is_the_exact_binomial_test(tmp_path):
    for name, predictions in (("a", [0] * 10 + [1] * 10), ("b", [0] * 8 + [1] * 12)):
        (tmp_path / name).mkdir()
        pd.DataFrame({"clip": range(20), "label": [1] * 20, "prediction": predictions}).to_csv(
            tmp_path / name / "predictions.csv", index=False
        )
    result = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (result["only_a_right"], result["only_b_right"]) == (0, 2) and result["mcnemar_p"] == pytest.approx(0.5)


def test_several_seeds_are_compared_as_a_whole(tmp_path):
    a, b = write_run(tmp_path / "a", 0.6, 5, repeats=3), write_run(tmp_path / "b", 0.75, 6, repeats=2)
    result = compare_runs(a, b)
    assert result["verdict"].startswith("B is better") and result["mcnemar_p"] is None and result["num_clips"] == 300


def test_runs_on_other_clips_or_labels_are_refused(tmp_path, capsys):
    a = write_run(tmp_path / "a", 0.6, 5)
    with pytest.raises(UserError, match=r"different clips, 15 of them:\n  - 285.wav \(only in"):
        compare_runs(a, write_run(tmp_path / "fewer", 0.6, 5, num_speakers=19))
    with pytest.raises(UserError, match="clips different labels"):
        compare_runs(a, write_run(tmp_path / "relabelled", 0.6, 5, labels_seed=9))
    with pytest.raises(UserError, match="there are no predictions"):
        compare_runs(a, tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column 'clip'"):
        compare_runs(a, tmp_path / "bad")
    main([str(a), str(a), "--json"])
    assert json.loads(capsys.readouterr().out)["num_clips"] == 300
