"""Whole runs through the command line, on small recordings and random models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ARCHITECTURES, GROUPS, ROOT, save_tiny, tiny_config, tiny_extractor, write_tone
from safetensors.numpy import load_file
from test_audio import bad_files
from transformers import AutoModelForAudioClassification, pipeline, set_seed

import run_classification
from speech_emotion.errors import UserError

SECRETS = {"HF_TOKEN": "hf_PLANTED", "WANDB_API_KEY": "wandb_PLANTED", "COMET_API_KEY": "comet_PLANTED"}
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("COMET", "WANDB"))} | {
    "HF_HUB_OFFLINE": "1", "COMET_ERROR_TRACKING_ENABLE": "false", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def flags(tmp_path, tone_folder, architecture="audio-spectrogram-transformer", **changes):
    name = save_tiny(architecture, tmp_path / "model")
    settings = {
        "config_name": name, "feature_extractor_name": name, "dataset_name": "audio_folder", "data_dir": str(tone_folder),
        "group_pattern": GROUPS, "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"),
        "num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "bf16": "false", "seed": 1,
        "audit": "false", "robustness": "false", "report": "false",  # each has tests of its own
    } | changes  # fmt: skip
    return [token for key, value in settings.items() if value is not None for token in (f"--{key}", *str(value).split())]


def command(argv, *launcher):
    return [*(launcher or (sys.executable,)), str(ROOT / "run_classification.py"), *argv]


def run(argv, *launcher, environment=None, **kwargs):
    return subprocess.run(command(argv, *launcher), cwd=ROOT, env=ENVIRONMENT | (environment or {}), capture_output=True,
                          text=True, timeout=300, **kwargs)  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], err_msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def test_a_run_leaves_everything_a_reader_needs_and_its_recipe_repeats_it(tone_folder, tmp_path):
    out = tmp_path / "out"
    whole = {"audit": None, "robustness": None, "report": None}
    results = run_classification.main(flags(tmp_path, tone_folder, num_train_epochs=20, learning_rate=1e-2, **whole))
    written = json.loads((out / "test_results.json").read_text())
    for key in ("test_uar", "test_accuracy", "test_f1_macro", "test_recall_high", "test_recall_low"):
        assert results[key] == written[key]
        low, high = written[f"{key}_ci95"]
        assert low <= written[key] <= high
    assert results["test_uar"] > 0.9  # tones of 220 and 880 Hz are told apart
    assert {"eval_uar", "eval_uar_ci95"} <= json.loads((out / "eval_results.json").read_text()).keys()
    for name in ("train_results.json", "all_results.json", "recipe.json", "run.json", "splits.csv", "history.csv",
                 "confusion_matrix.png", "training_curves.png", "config.json", "preprocessor_config.json", "report.html",
                 "audit.json", "audit.png", "robustness.json", "robustness.png", "groups.csv", "per_class.png",
                 "calibration.png"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name

    splits, predictions = pd.read_csv(out / "splits.csv"), pd.read_csv(out / "predictions.csv")
    tested = splits[splits["split"] == "test"]
    assert set(predictions["clip"]) == set(tested["path"]) and len(predictions) == len(tested)
    served = pipeline("audio-classification", model=str(out), device="cpu", top_k=None)
    for _, row in predictions.iterrows():
        waveform, _ = soundfile.read(tone_folder / row["clip"], dtype="float32")
        scores = {entry["label"]: entry["score"] for entry in served(waveform)}
        assert scores["high"] == pytest.approx(row["probability_high"], abs=1e-4)
        assert max(scores, key=scores.get) == row["prediction"]

    run_classification.main([str(out / "recipe.json"), "--output_dir", str(tmp_path / "again")])
    assert_same_weights(out, tmp_path / "again")
    pd.testing.assert_frame_equal(predictions, pd.read_csv(tmp_path / "again" / "predictions.csv"))


def test_the_best_epoch_by_validation_is_what_is_saved_and_tested(tone_folder, tmp_path):
    results = run_classification.main(flags(tmp_path, tone_folder, num_train_epochs=5, learning_rate=1e-2))
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert results["eval_uar"] == pytest.approx(history["eval_uar"].max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_is_the_best_checkpoint_whole(architecture, tone_folder, tmp_path):
    # The best is made to be the first, so that a part of the last one would show.
    run_classification.main(
        flags(tmp_path, tone_folder, architecture, num_train_epochs=2, metric_for_best_model="loss", greater_is_better="true",
              learning_rate=1e-2)
    )  # fmt: skip
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    states = [json.loads((path / "trainer_state.json").read_text()) for path in checkpoints]
    assert Path(states[-1]["best_model_checkpoint"]) == checkpoints[0]
    assert_same_weights(tmp_path / "out", checkpoints[0])


def test_too_little_memory_to_examine_costs_the_examination_only(tone_folder, tmp_path, monkeypatch):
    import torch

    from speech_emotion import outcome

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(outcome, "examine", fail)
    results = run_classification.main(flags(tmp_path, tone_folder, num_train_epochs=1, audit=None, report=None))
    assert 0 <= results["test_uar"] <= 1
    for name in ("all_results.json", "predictions.csv", "report.html", "groups.csv"):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "audit.json").exists()


RECIPES = {
    "thorsten_wav2vec2": "wav2vec2", "thorsten_hubert": "hubert", "thorsten_wavlm": "wavlm", "thorsten_wavlm_probe": "wavlm",
    "thorsten_whisper": "whisper",
    "thorsten_xlsr": "wav2vec2", "thorsten_ast": "audio-spectrogram-transformer", "audio_folder": "wavlm", "manifest": "wavlm",
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains_a_tiny_model_of_its_class(recipe, thorsten, tone_folder, tmp_path):
    set_seed(0)
    layer_norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True} if recipe == "thorsten_xlsr" else {}
    longer = {"whisper": {"max_source_positions": 500}, "audio-spectrogram-transformer": {"max_length": 1024}}
    config = tiny_config(RECIPES[recipe], **layer_norm, **longer.get(RECIPES[recipe], {}))
    AutoModelForAudioClassification.from_config(config).save_pretrained(tmp_path / "model")
    extractor = tiny_extractor(RECIPES[recipe])
    if recipe == "thorsten_whisper":
        extractor = type(extractor)(feature_size=16, chunk_length=10)
    if recipe == "thorsten_ast":
        extractor.max_length = 1024
    extractor.save_pretrained(tmp_path / "model")
    argv = [f"recipes/{recipe}.json", "--model_name_or_path", str(tmp_path / "model"), "--max_steps", "2",
            "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]  # fmt: skip
    if recipe == "manifest":
        rows = [{"audio": path, "label": path.parent.name, "speaker_id": path.stem[:4]} for path in tone_folder.rglob("*.wav")]
        pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
        argv += ["--data_files", str(tmp_path / "m.csv")]
    else:
        argv += ["--data_dir", str(tone_folder if recipe == "audio_folder" else thorsten)]
    results = run_classification.main(argv)
    assert 0 <= results["test_uar"] <= 1 and results["train_loss"] > 0
    num_classes = 2 if recipe in ("audio_folder", "manifest") else 8
    assert len(AutoModelForAudioClassification.from_pretrained(tmp_path / "out").config.id2label) == num_classes


@pytest.mark.parametrize("optim, schedule", [("sgd", "step"), ("adam", "cosine"), ("rmsprop", "exponential")])
def test_other_optimizers_and_schedules_train(optim, schedule, tone_folder, tmp_path):
    kwargs = {"exponential": '{"gamma":0.5}', "step": '{"step_size":1,"gamma":0.5}'}.get(schedule)
    results = run_classification.main(
        flags(tmp_path, tone_folder, optim=optim, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs, num_train_epochs=2,
              class_weights="balanced", label_smoothing_factor=0.1, early_stopping_patience=1)
    )  # fmt: skip
    assert np.isfinite(results["train_loss"])
    logged = pd.read_csv(tmp_path / "out" / "history.csv")
    assert "eval_uar" in logged


def test_splits_that_come_as_folders_are_trained_and_tested_on(tone_folder, tmp_path):
    for path in tone_folder.rglob("*.wav"):
        split = {"3": "validation", "4": "test"}.get(path.stem[3], "train")
        target = tmp_path / "given" / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    results = run_classification.main(flags(tmp_path, tmp_path / "given"))
    assert results["test_num_clips"] == 6
    splits = pd.read_csv(tmp_path / "out" / "splits.csv")
    assert splits["split"].value_counts().to_dict() == {"train": 18, "validation": 6, "test": 6}
    assert all(path.startswith(split) for path, split in zip(splits["path"], splits["split"], strict=True))


def test_augmented_and_cropped_training_runs(tone_folder, tmp_path):
    results = run_classification.main(
        flags(tmp_path, tone_folder, "wav2vec2", augment_speed=0.1, augment_gain_db=6, augment_time_mask_seconds=0.1,
              max_length_seconds=0.32)
    )  # fmt: skip
    assert results["test_num_clips"] == 6


def test_eight_clips_at_once_and_one_by_one_train_the_same(tone_folder, tmp_path):
    common = {"num_train_epochs": 1, "config_overrides": "hidden_dropout_prob=0,attention_probs_dropout_prob=0"}
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 1, 8)):
        run_classification.main(
            flags(tmp_path, tone_folder, output_dir=tmp_path / name, per_device_train_batch_size=batch,
                  gradient_accumulation_steps=accumulation, **common)
        )  # fmt: skip
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["wav2vec2", "audio-spectrogram-transformer"])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(architecture, tone_folder, tmp_path):
    # Dropout, SpecAugment, random crops and augmentation all draw random numbers that resuming has to restore.
    overrides = "apply_spec_augment=true,mask_time_prob=0.3" if architecture == "wav2vec2" else "hidden_dropout_prob=0.1"
    argv = flags(tmp_path, tone_folder, architecture, num_train_epochs=4, max_length_seconds=0.32, augment_gain_db=6,
                 config_overrides=overrides, load_best_model_at_end="false",
                 save_strategy="steps", save_steps=3, eval_strategy="no", save_total_limit=20)  # fmt: skip
    whole = [*argv, "--output_dir", str(tmp_path / "whole")]
    whole.remove(str(tmp_path / "out"))
    whole.remove("--output_dir")
    run_classification.main(whole)

    process = subprocess.Popen(command(argv), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    checkpoint = tmp_path / "out" / "checkpoint-9" / "trainer_state.json"
    while process.poll() is None and not checkpoint.exists():
        process.stdout.read(1)  # the progress bar; every character is a chance to look
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "out" / "test_results.json").exists()
    for later in (tmp_path / "out").glob("checkpoint-1[0-9]"):
        shutil.rmtree(later)
    run_classification.main([*argv, "--resume_from_checkpoint", "last"])
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_resuming_with_another_recipe_is_refused_by_its_differences(tone_folder, tmp_path):
    argv = flags(tmp_path, tone_folder, num_train_epochs=1)
    run_classification.main(argv)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        run_classification.main([token if token != "1" or argv[i - 1] != "--seed" else "2" for i, token in enumerate(argv)]
                                + ["--resume_from_checkpoint"])  # fmt: skip
    with pytest.raises(UserError, match="already holds a run"):
        run_classification.main(argv)
    run_classification.main([*argv, "--overwrite_output_dir"])
    with pytest.raises(UserError, match="is not a checkpoint"):
        run_classification.main([*argv, "--resume_from_checkpoint", str(tmp_path)])


def test_two_processes_train_and_measure_what_one_does(tone_folder, tmp_path):
    common = {"num_train_epochs": 2, "config_overrides": "hidden_dropout_prob=0,attention_probs_dropout_prob=0"}
    one = run_classification.main(
        flags(tmp_path, tone_folder, output_dir=tmp_path / "one", per_device_train_batch_size=8, **common)
    )
    done = run(
        flags(tmp_path, tone_folder, output_dir=tmp_path / "two", per_device_train_batch_size=4,
              cache_dir=tmp_path / "other_cache", **common),
        str(Path(sys.executable).with_name("accelerate")), "launch",
        "--config_file", "accelerate_configs/cpu_2_processes.yaml", "--main_process_port", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 x cpu" in done.stdout and done.stdout.count("Test results on") == 1
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    for key in ("test_uar", "test_accuracy", "test_f1_macro", "eval_uar"):
        assert two[key] == pytest.approx(one[key], abs=1e-4), key
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=0, atol=1e-5)
    probabilities = [pd.read_csv(tmp_path / name / "predictions.csv")["probability_high"] for name in ("one", "two")]
    np.testing.assert_allclose(*probabilities, atol=1e-4)


def test_comet_offline_holds_what_is_promised_and_no_secret(tone_folder, tmp_path, caplog):
    done = run(flags(tmp_path, tone_folder, report_to="comet_ml tensorboard", tags="first second", num_train_epochs=1,
                     audit=None, robustness=None, report=None),
               environment=SECRETS | {"COMET_MODE": "offline"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "comet upload" in done.stdout
    (archive,) = (tmp_path / "out" / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        content = {name: opened.read(name) for name in opened.namelist()}
    everything = b"".join(content.values())
    for secret in SECRETS.values():
        assert secret.encode() not in everything
        assert secret not in done.stdout + done.stderr
        for path in (tmp_path / "out").rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    for promised in (b"first", b"second", b"recipe/learning_rate", b"confusion-matrix", b"class_distribution.csv",
                     b"splits.csv", b"training_curves", b"eval/uar", b"test_uar", b"report.html", b"predictions.csv",
                     b"robustness/noise at 0 dB", b"audit/loudness, logistic regression", b"calibration"):  # fmt: skip
        assert promised in everything, promised
    # Clips hang on the cells of the confusion matrix, and the worst are there to be heard.
    matrix = json.loads(next(data for name, data in content.items() if b"confusionMatrix" in data or b'"rowLabel"' in data))
    assert matrix["type"] == "image"
    messages = [json.loads(line) for line in content["messages.json"].splitlines()]
    sounds = [m["payload"] for m in messages if m["type"] == "file_upload" and m["payload"]["upload_type"] == "audio"]
    assert any("worst/" in str(sound) and "probability" in str(sound) for sound in sounds)
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


def test_a_tracker_out_of_reach_warns_and_training_goes_on(tone_folder, tmp_path):
    done = run(flags(tmp_path, tone_folder, report_to="comet_ml", num_train_epochs=1),
               environment={"COMET_API_KEY": "x" * 25, "COMET_URL_OVERRIDE": "http://127.0.0.1:9/clientlib/",
                            "COMET_TIMEOUT_HTTP": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Comet cannot be reached" in done.stdout and "Test results on" in done.stdout
    assert list((tmp_path / "out" / "comet").glob("*.zip"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "key 'learning_rat': there is no such key. Did you mean 'learning_rate'?"),
        ({"hub_token": "hf_PLANTED"}, "HF_TOKEN"),
        ({"data_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"output_dir": "/proc/nothing"}, "/proc/nothing cannot be written"),
        ({"report_to": "nothing"}, "key 'report_to'"),
    ],
    ids=str,
)
def test_a_users_mistake_is_one_message_and_exit_code_2(change, message, tone_folder, tmp_path):
    done = run(flags(tmp_path, tone_folder, **change))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert "hf_PLANTED" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


def test_unusable_clips_end_a_run_before_training_and_can_be_skipped(tmp_path):
    root = tmp_path / "corpus"
    for label, frequency in (("a", 220), ("b", 880)):
        for i in range(8):
            write_tone(root / label / f"{i}.wav", frequency=frequency, seed=i, sampling_rate=[8000, 44100, 48000, 16000][i % 4])
    num_bad = len(bad_files(root / "b")) - 1
    argv = flags(tmp_path, root, group_pattern=None, num_train_epochs=1)
    with pytest.raises(UserError, match=f"{num_bad} of {16 + num_bad} clips cannot be used"):
        run_classification.main(argv)
    results = run_classification.main([*argv, "--on_bad_audio", "skip", "--overwrite_output_dir"])
    assert f"{num_bad} clips could not be used and are left out." in results["test_notes"]
    splits = pd.read_csv(tmp_path / "out" / "splits.csv")
    assert (splits["split"] == "unusable").sum() == num_bad


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small disk")
def test_a_full_disk_is_said_and_loses_nothing(tone_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        done = run(flags(tmp_path, tone_folder, output_dir=disk / "out"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
