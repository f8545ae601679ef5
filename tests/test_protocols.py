"""Folds, seeds and shares of the data: whole runs that are planned, resumed and summarized."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_config, tiny_extractor, write_tone
from test_known_corpora import make_iemocap, make_meld
from test_runs import flags, run
from transformers import AutoModelForAudioClassification, set_seed

import run_classification
import run_classification_no_trainer
from speech_emotion.arguments import Arguments, DataArguments, ModelArguments
from speech_emotion.corpora import load_corpus
from speech_emotion.errors import UserError
from speech_emotion.protocols import plan_folds


def load(name, folder):
    return load_corpus(Arguments(ModelArguments(), DataArguments(dataset_name=name, data_dir=str(folder)), None, {}, None, []))


def test_each_speaker_is_the_test_once_and_the_summary_is_what_the_folds_gave(tone_folder, tmp_path):
    summary = run_classification.main(
        flags(tmp_path, tone_folder, cross_validation="loso", num_train_epochs=6, learning_rate=1e-2, report=None)
    )
    out = tmp_path / "out"
    assert [run["fold"] for run in summary["runs"]] == [f"spk{i}" for i in range(5)]
    for i in range(5):
        splits = pd.read_csv(out / f"fold_spk{i}" / "splits.csv")
        speakers = {name: set(part["speaker_id"]) for name, part in splits.groupby("split")}
        assert speakers["test"] == {f"spk{i}"} and speakers["validation"] == {f"spk{(i + 1) % 5}"} and len(speakers["train"]) == 3
        assert (out / f"fold_spk{i}" / "report.html").is_file() and (out / f"fold_spk{i}" / "model.safetensors").is_file()
    uar = [json.loads((out / f"fold_spk{i}" / "test_results.json").read_text())["test_uar"] for i in range(5)]
    assert summary["mean"]["uar"] == pytest.approx(np.mean(uar)) and summary["sd"]["uar"] == pytest.approx(np.std(uar, ddof=1))
    pooled = pd.read_csv(out / "predictions.csv")
    assert len(pooled) == 30 and pooled["clip"].is_unique and summary["pooled"]["test_num_clips"] == 30
    matrix = pd.crosstab(pooled["label"], pooled["prediction"]).reindex(
        index=["high", "low"], columns=["high", "low"], fill_value=0
    )
    assert summary["pooled"]["test_confusion_matrix"] == matrix.to_numpy().tolist()
    assert summary["pooled"]["test_ci95_clustered_by"] == "speaker" and summary["speaker_dependence"] == "speaker-independent"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'href="fold_spk0/report.html"' in page and f"{summary['mean']['uar']:.3f}" in page
    assert json.loads((out / "summary.json").read_text())["mean"] == summary["mean"]


def test_a_protocol_goes_on_where_it_broke_off(tone_folder, tmp_path):
    argv = flags(tmp_path, tone_folder, cross_validation=3, seeds="1 2", num_train_epochs=2)
    first = run_classification.main(argv)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(
        f"fold_{fold}_seed_{seed}" for fold in (1, 2, 3) for seed in (1, 2)
    )
    # As if it had been killed in one run after its first epoch, and before another.
    for name in ("all_results.json", "test_results.json", "model.safetensors"):
        (out / "fold_2_seed_1" / name).unlink()
    last = max((out / "fold_2_seed_1").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    shutil.rmtree(out / "fold_3_seed_2")
    untouched = (out / "fold_1_seed_1" / "model.safetensors").stat().st_mtime_ns
    again = run_classification.main(argv)
    assert (out / "fold_1_seed_1" / "model.safetensors").stat().st_mtime_ns == untouched
    assert again["runs"] == first["runs"] and again["pooled"] == first["pooled"]
    # The same seed, the same split: folds differ in their test clips, seeds do not.
    tests = {
        name: set(pd.read_csv(out / name / "predictions.csv")["clip"])
        for name in ("fold_1_seed_1", "fold_1_seed_2", "fold_2_seed_1")
    }
    assert tests["fold_1_seed_1"] == tests["fold_1_seed_2"] and not tests["fold_1_seed_1"] & tests["fold_2_seed_1"]
    with pytest.raises(UserError, match="holds a run of another recipe: num_train_epochs was 2"):
        run_classification.main(flags(tmp_path, tone_folder, cross_validation=3, seeds="1 2", num_train_epochs=3))


def test_two_processes_go_through_the_folds_together(tone_folder, tmp_path):
    argv = flags(tmp_path, tone_folder, cross_validation=3, num_train_epochs=1, per_device_train_batch_size=2, lora_rank=2,
                 temperature_scaling="true", audit=None, robustness=None)  # fmt: skip
    launcher = (str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
                "accelerate_configs/cpu_2_processes.yaml", "--main_process_port", "0")  # fmt: skip
    done = run(argv, *launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("All runs and their summary are in") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["runs"]) == 3 and summary["pooled"]["test_num_clips"] == 30
    assert run(argv, *launcher).stdout.count("It is done already.") == 3


def test_less_data_is_a_curve_on_the_same_test(tone_folder, tmp_path):
    summary = run_classification_no_trainer.main(
        flags(tmp_path, tone_folder, train_fractions="0.3 1", num_train_epochs=2, report=None)
    )
    assert [row["train_fraction"] for row in summary["curve"]] == [0.3, 1.0]
    out = tmp_path / "out"
    splits = {name: pd.read_csv(out / f"fraction_{name}" / "splits.csv") for name in ("0.3", "1")}
    train = {name: set(frame.loc[frame["split"] == "train", "speaker_id"]) for name, frame in splits.items()}
    assert len(train["0.3"]) == 1 and train["0.3"] < train["1"] and len(train["1"]) == 3
    assert (out / "data_efficiency.png").is_file() and "How much data is enough" in (out / "report.html").read_text(
        encoding="utf-8"
    )
    assert summary["pooled"]["test_num_clips"] == 6  # the largest share alone


def test_folds_of_sessions_of_given_splits_and_of_sentences(tmp_path):
    iemocap = load("iemocap", make_iemocap(tmp_path / "iemocap"))
    folds = plan_folds(iemocap, "loso", None, 0)
    assert [fold.changes["test_groups"] for fold in folds] == [["Session1"], ["Session2"], ["Session3"]]
    assert all(fold.changes["split_by"] == ["session_id"] for fold in folds)
    meld = load("meld", make_meld(tmp_path / "meld"))
    folds = plan_folds(meld, "3", None, 0)
    held = {group for fold in folds for group in fold.changes["test_groups"]}
    assert held == {group for part in meld.values() for group in part["session_id"]}
    assert sum(len(fold.changes["test_groups"]) for fold in folds) == len(held)
    assert all(fold.changes["ignore_splits"] for fold in folds)


def test_folds_resemble_one_another(tmp_path):
    # Five speakers have class W only, five N only: each of five folds should get one of either.
    for speaker in range(10):
        write_tone(tmp_path / f"{speaker + 3:02}a01{'WN'[speaker % 2]}a.wav", 0.1, seed=speaker)
    folds = plan_folds(load("emodb", tmp_path), "5", None, 0)
    for fold in folds:
        assert sorted(int(group) % 2 for group in fold.changes["test_groups"]) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_validation": "2"}, "must be loso or a number of folds from 3 on"),
        ({"cross_validation": "9"}, "5 groups (speaker_id) cannot make 9 folds"),
        ({"cross_validation": "loso", "group_pattern": None}, "needs one column of groups"),
        ({"cross_validation": "loso", "test_groups": "spk1"}, "leave test_groups and validation_groups out"),
        ({"seeds": "1 1"}, "names a seed twice"),
        ({"train_fractions": "0 1"}, "takes different shares"),
        ({"seeds": "1 2", "push_to_hub": "true"}, "several runs give several models"),
        ({"train_fraction": "1.5"}, "must be above 0 and at most 1"),
        ({"class_balanced_sampling": "true", "class_weights": "balanced"}, "take one of them"),
        ({"loss": "focal", "label_smoothing_factor": "0.1"}, "is not defined for the focal loss"),
        ({"augment_noise_snr_db": "5"}, "takes the lowest and the highest ratio"),
        ({"temperature_scaling": "true", "train_on_validation": "true"}, "leave one out"),
        ({"label_map": "{"}, "not valid JSON"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, message, tone_folder, tmp_path):
    with pytest.raises(UserError) as caught:
        run_classification.main(flags(tmp_path, tone_folder, **changes))
    assert message in str(caught.value)


def make_other(folder):
    for i in range(4):
        for letter, frequency in (("W", 880), ("N", 220), ("L", 500)):
            write_tone(folder / "wav" / f"{i + 3:02}a01{letter}a.wav", 0.4, frequency, seed=i)
    return folder


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
def test_other_corpora_are_tested_on_through_a_label_map(script, tone_folder, tmp_path):
    other = make_other(tmp_path / "emodb")
    recipe = tmp_path / "second.json"
    recipe.write_text(json.dumps({"dataset_name": "audio_folder", "data_dir": str(tone_folder), "seed": 5}))
    label_map = json.dumps({"emodb": {"anger": "high", "neutral": "low"}})
    argv = flags(tmp_path, tone_folder, num_train_epochs=20, learning_rate=1e-2, report=None, test_on=f"emodb={other} {recipe}")
    script.main([*argv, "--label_map", label_map])
    first, second = json.loads((tmp_path / "out" / "cross_corpus.json").read_text())["corpora"]
    assert first["corpus"] == "emodb" and first["num_clips"] == 8 and first["uar"] > 0.9
    assert first["mapped"] == "Classes: anger as high, neutral as low." and first["unmapped"] == "boredom (4 clips)"
    assert second["corpus"] == "second" and second["num_clips"] == 30 and second["uar_shared"] >= second["uar"]
    predictions = pd.read_csv(tmp_path / "out" / "predictions_emodb.csv")
    assert set(predictions["label"]) == {"high", "low"} and len(predictions) == 8
    assert "boredom (4 clips)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_wrong_label_map_or_corpus_ends_before_training(tone_folder, tmp_path):
    other = make_other(tmp_path / "emodb")
    argv = flags(tmp_path, tone_folder, test_on=f"emodb={other}")
    with pytest.raises(UserError, match="none of its classes .* is one of the model's"):
        run_classification.main(argv)
    with pytest.raises(UserError, match="'anger' is mapped to 'hihg', but the model has high, low"):
        run_classification.main([*argv, "--label_map", '{"anger": "hihg"}'])
    with pytest.raises(UserError, match="key 'test_on', 'emodb=/nowhere'"):
        run_classification.main(flags(tmp_path, tone_folder, test_on="emodb=/nowhere"))


def train_recipe(recipe, tmp_path, *extra):
    set_seed(0)
    AutoModelForAudioClassification.from_config(tiny_config("wavlm")).save_pretrained(tmp_path / "model")
    tiny_extractor("wavlm").save_pretrained(tmp_path / "model")
    return run_classification.main(
        [f"recipes/{recipe}.json", "--model_name_or_path", str(tmp_path / "model"), "--max_steps", "2", "--bf16", "false",
         "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--report", "false", *extra]
    )  # fmt: skip


def test_the_iemocap_recipe_tests_each_session(tmp_path):
    make_iemocap(tmp_path / "data", num_sessions=5)
    summary = train_recipe("iemocap_wavlm", tmp_path, "--data_dir", str(tmp_path / "data"))
    assert [run["fold"] for run in summary["runs"]] == [f"Session{i}" for i in range(1, 6)]
    assert summary["pooled"]["test_num_clips"] == 25 and summary["speaker_dependence"] == "speaker-independent"


def test_the_cross_corpus_recipe_maps_the_classes_of_both_others(tmp_path):
    for i, emotion in enumerate(("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")):
        for actor in range(1001, 1006):
            write_tone(tmp_path / "crema_d" / "AudioWAV" / f"{actor}_DFA_{emotion}_XX.wav", 0.3, 200 + 100 * i, seed=actor + i)
    for i in range(1, 9):
        write_tone(tmp_path / "ravdess" / "Actor_01" / f"03-01-0{i}-01-01-01-01.wav", 0.3, 200 + 50 * i, seed=i)
    for i, letter in enumerate("WLEAFNT"):
        write_tone(tmp_path / "emodb" / "wav" / f"03a01{letter}a.wav", 0.3, 200 + 50 * i, seed=i)
    results = train_recipe("crema_d_cross_corpus", tmp_path, "--data_dir", str(tmp_path / "crema_d"), "--test_on",
                           f"emodb={tmp_path / 'emodb'}", f"ravdess={tmp_path / 'ravdess'}")  # fmt: skip
    assert results["test_num_clips"] == 6
    emodb, ravdess = json.loads((tmp_path / "out" / "cross_corpus.json").read_text())["corpora"]
    assert emodb["num_clips"] == 6 and emodb["unmapped"] == "boredom (1 clips)"
    assert ravdess["num_clips"] == 6 and ravdess["unmapped"] == "calm (1 clips), surprised (1 clips)"
