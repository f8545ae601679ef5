"""The hand-written loop and Trainer train the same, step by step; so do its processes, nodes and ways of extracting."""

import json
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT
from test_runs import ENVIRONMENT, assert_same_weights, flags
from transformers import AutoModelForAudioClassification, pipeline

import run_classification
import run_classification_no_trainer
from speech_emotion.errors import UserError

NO_DROPOUT = {
    "wav2vec2": "hidden_dropout=0,attention_dropout=0,activation_dropout=0,feat_proj_dropout=0,layerdrop=0",
    "whisper": "dropout=0,attention_dropout=0,activation_dropout=0",
    "audio-spectrogram-transformer": "hidden_dropout_prob=0,attention_probs_dropout_prob=0",
}
STEPS = 20


def loop_flags(tmp_path, tone_folder, architecture="wav2vec2", out="out", **changes):
    return flags(
        tmp_path, tone_folder, architecture, output_dir=tmp_path / out, max_steps=STEPS, logging_steps=1,
        config_overrides=NO_DROPOUT[architecture], weight_decay=0.1, warmup_steps=0.2, lr_scheduler_type="cosine",
        max_grad_norm=0.5, head_learning_rate=3e-3, **changes,
    )  # fmt: skip


def history(folder):
    frame = pd.read_csv(folder / "history.csv")
    return frame.dropna(subset=["loss"]).set_index("step")[["loss", "learning_rate", "grad_norm"]]


@pytest.mark.parametrize("architecture", list(NO_DROPOUT))
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 3)])
def test_both_loops_give_the_same_steps_and_metrics(architecture, batch, accumulation, tone_folder, tmp_path):
    both = {}
    for name, script in (("trainer", run_classification), ("by_hand", run_classification_no_trainer)):
        argv = loop_flags(tmp_path, tone_folder, architecture, name, per_device_train_batch_size=batch,
                          gradient_accumulation_steps=accumulation, class_weights="balanced",
                          label_smoothing_factor=0.1)  # fmt: skip
        both[name] = script.main(argv)
    steps = history(tmp_path / "trainer") - history(tmp_path / "by_hand")
    assert len(steps) == STEPS and steps.notna().all(axis=None)
    assert steps.abs().max(axis=None) < 1e-5
    assert steps.mean().abs().max() < 1e-6  # a small steady drift would show here
    evaluated = [pd.read_csv(tmp_path / name / "history.csv").dropna(subset=["eval_loss"]) for name in both]
    for column in ("eval_loss", "eval_uar", "eval_accuracy", "eval_f1_macro"):
        np.testing.assert_allclose(evaluated[0][column], evaluated[1][column], atol=1e-5, err_msg=column)
    for key in ("eval_uar", "test_uar", "test_accuracy", "test_f1_macro"):
        assert both["trainer"][key] == pytest.approx(both["by_hand"][key], abs=1e-5), key
    if accumulation == 1:
        # Under accumulation AdamW turns the rounding of gradients that nearly vanish (attention keys, at the start) into
        # whole steps of those weights, which the loss does not feel.
        assert_same_weights(tmp_path / "trainer", tmp_path / "by_hand", rtol=0, atol=1e-5)


@pytest.mark.parametrize(("optim", "schedule", "kwargs"), [
    ("sgd", "step", '{"step_size":1}'), ("adam", "multi_step", '{"milestones":[1,3],"gamma":0.5}'),
    ("rmsprop", "exponential", '{"gamma":0.5}'), ("adamw_torch", "one_cycle", None), ("adamw_torch", "linear", None),
])  # fmt: skip
def test_every_optimizer_and_schedule_agrees(optim, schedule, kwargs, tone_folder, tmp_path):
    for name, script in (("trainer", run_classification), ("by_hand", run_classification_no_trainer)):
        argv = flags(tmp_path, tone_folder, output_dir=tmp_path / name, logging_steps=1, optim=optim, lr_scheduler_type=schedule,
                     lr_scheduler_kwargs=kwargs, config_overrides=NO_DROPOUT["audio-spectrogram-transformer"])  # fmt: skip
        script.main(argv)
    steps = history(tmp_path / "trainer") - history(tmp_path / "by_hand")
    assert len(steps) == 10 and steps.abs().max(axis=None) < 1e-5


@pytest.mark.parametrize("architecture", list(NO_DROPOUT))
@pytest.mark.parametrize("window", [None, 0.32])
def test_extraction_on_the_fly_gives_the_same_batches(architecture, window, tone_folder, tmp_path):
    window = {"whisper": 1.0, "audio-spectrogram-transformer": 0.4}.get(architecture) if window else None
    window = 0.32 if window is None and architecture == "wav2vec2" else window
    for name in ("map", "on_the_fly"):
        run_classification_no_trainer.main(
            loop_flags(tmp_path, tone_folder, architecture, name, feature_extraction=name, max_length_seconds=window,
                       dataloader_num_workers=2 if name == "on_the_fly" else 0)
        )  # fmt: skip
    assert_same_weights(tmp_path / "map", tmp_path / "on_the_fly")
    predictions = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("map", "on_the_fly")]
    pd.testing.assert_frame_equal(*predictions)
    splits = [pd.read_csv(tmp_path / name / "splits.csv") for name in ("map", "on_the_fly")]
    pd.testing.assert_frame_equal(*splits)


def torchrun(argv, *launcher):
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "run_classification_no_trainer.py"), *argv]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def assert_trains_as_one_process(tmp_path, tone_folder, processes):
    outputs = []
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
        outputs.append(output)
    assert "".join(outputs).count("on 2 x cpu") == "".join(outputs).count("Test results on") == 1
    one = run_classification_no_trainer.main(parallel_flags(tmp_path, tone_folder, "one", 4))
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    steps = history(tmp_path / "one") - history(tmp_path / "two")
    assert len(steps) == STEPS and steps.abs().max(axis=None) < 1e-5
    for key in ("eval_uar", "test_uar", "test_accuracy", "test_f1_macro"):
        assert two[key] == pytest.approx(one[key], abs=1e-4)
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=0, atol=1e-5)


def parallel_flags(tmp_path, tone_folder, out, batch, **changes):
    # Layer norm, so that a clip's logits do not depend on what it is padded to: with group norm they do, and dividing a
    # batch among processes changes the padding.
    argv = loop_flags(tmp_path, tone_folder, out=out, per_device_train_batch_size=batch, **changes)
    return [f"{token},feat_extract_norm=layer" if token == NO_DROPOUT["wav2vec2"] else token for token in argv]


def test_two_processes_give_the_losses_of_one(tone_folder, tmp_path):
    argv = parallel_flags(tmp_path, tone_folder, "two", 2, parallel="ddp")
    process = torchrun(argv, "--nproc_per_node", "2", "--master_port", str(free_port()))
    assert_trains_as_one_process(tmp_path, tone_folder, [process])


def test_two_nodes_give_the_losses_of_one_process(tone_folder, tmp_path):
    port = str(free_port())
    argv = parallel_flags(tmp_path, tone_folder, "two", 2, parallel="ddp")
    nodes = [torchrun(argv, "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
                      "--master_addr", "127.0.0.1", "--master_port", port) for rank in (0, 1)]  # fmt: skip
    assert_trains_as_one_process(tmp_path, tone_folder, nodes)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_data_parallel_saves_without_the_wrapper(tone_folder, tmp_path):
    for name in ("none", "dp"):
        run_classification_no_trainer.main(loop_flags(tmp_path, tone_folder, out=name, parallel=name))
    assert_same_weights(tmp_path / "none", tmp_path / "dp")
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "dp").config.id2label == {0: "high", 1: "low"}


def test_the_loop_resumes_to_the_same_weights(tone_folder, tmp_path):
    # With dropout and augmentation, so that random states matter; stopped after two of four epochs.
    def argv(out, **changes):
        return flags(tmp_path, tone_folder, "wav2vec2", output_dir=tmp_path / out, num_train_epochs=4, augment_gain_db=6,
                     save_total_limit=9, **changes)  # fmt: skip

    run_classification_no_trainer.main(argv("whole"))
    stopped = argv("stopped")
    process = subprocess.Popen([sys.executable, str(ROOT / "run_classification_no_trainer.py"), *stopped], cwd=ROOT,
                               env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    checkpoint = tmp_path / "stopped" / "checkpoint-10" / "trainer_state.json"
    while process.poll() is None and not checkpoint.exists():
        process.stdout.read(1)
    process.kill()
    process.wait()
    for path in (tmp_path / "stopped").glob("*.json"):
        if path.name.endswith("results.json"):
            path.unlink()
    for step in (15, 20):
        if (tmp_path / "stopped" / f"checkpoint-{step}" / "trainer_state.json").exists():
            (tmp_path / "stopped" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    run_classification_no_trainer.main([*stopped, "--resume_from_checkpoint", "last"])
    assert_same_weights(tmp_path / "whole" / "checkpoint-20", tmp_path / "stopped" / "checkpoint-20")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    both = [pd.read_csv(tmp_path / name / "history.csv")["eval_loss"] for name in ("whole", "stopped")]
    np.testing.assert_array_equal(*both)


def test_balance_focal_loss_and_augmentation_are_the_same_in_both(tone_folder, tmp_path):
    for name, script in (("trainer", run_classification), ("by_hand", run_classification_no_trainer)):
        argv = loop_flags(tmp_path, tone_folder, "audio-spectrogram-transformer", name, class_balanced_sampling="true",
                          loss="focal", augment_noise_snr_db="5 20", augment_frequency_mask_hz=800, augment_gain_db=6,
                          augment_probability=0.7)  # fmt: skip
        script.main(argv)
    steps = history(tmp_path / "trainer") - history(tmp_path / "by_hand")
    assert len(steps) == STEPS and steps.abs().max(axis=None) < 1e-5
    assert_same_weights(tmp_path / "trainer", tmp_path / "by_hand", rtol=0, atol=1e-5)


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
@pytest.mark.parametrize(("architecture", "freeze"), [("audio-spectrogram-transformer", "none"), ("wav2vec2", "backbone")])
def test_the_fitted_temperature_is_in_the_saved_model(architecture, freeze, script, tone_folder, tmp_path):
    for name in ("plain", "scaled"):
        results = script.main(
            flags(tmp_path, tone_folder, architecture, output_dir=tmp_path / name, learning_rate=1e-2, freeze=freeze,
                  temperature_scaling="true" if name == "scaled" else None, report=None)
        )  # fmt: skip
    plain, scaled = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("plain", "scaled"))
    assert list(plain["prediction"]) == list(scaled["prediction"])
    logit = np.log(scaled["probability_high"] / scaled["probability_low"]) * results["temperature"]
    np.testing.assert_allclose(1 / (1 + np.exp(-logit)), plain["probability_high"], atol=1e-3)
    served = pipeline("audio-classification", model=str(tmp_path / "scaled"), device="cpu", top_k=None)
    waveform, _ = soundfile.read(tone_folder / scaled["clip"][0], dtype="float32")
    scores = {entry["label"]: entry["score"] for entry in served(waveform)}
    assert scores["high"] == pytest.approx(scaled["probability_high"][0], abs=1e-3)
    assert "divided by a temperature of" in (tmp_path / "scaled" / "report.html").read_text(encoding="utf-8")


def test_the_loop_tells_comet_by_hand(tone_folder, tmp_path):
    argv = loop_flags(tmp_path, tone_folder, report_to="comet_ml", tags="by_hand")
    done = subprocess.run([sys.executable, str(ROOT / "run_classification_no_trainer.py"), *argv], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = (tmp_path / "out" / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        everything = b"".join(opened.read(name) for name in opened.namelist())
    for promised in (b"by_hand", b"recipe/learning_rate", b"confusion-matrix", b"eval_loss", b"eval_accuracy", b"eval_uar"):
        assert promised in everything, promised
    assert everything.count(b'"grad_norm"') >= STEPS  # each step


def test_recomputed_activations_change_nothing(tone_folder, tmp_path):
    for name in ("true", "false"):
        run_classification_no_trainer.main(loop_flags(tmp_path, tone_folder, out=name, activation_checkpointing=name))
    assert_same_weights(tmp_path / "true", tmp_path / "false", rtol=0, atol=1e-5)


def test_early_stopping_stops(tone_folder, tmp_path):
    results = run_classification_no_trainer.main(
        flags(tmp_path, tone_folder, num_train_epochs=30, learning_rate=1e-9, early_stopping_patience=2)
    )
    assert results["epoch"] == 3


def test_what_the_loop_does_not_know_is_refused(tone_folder, tmp_path):
    for change, message in (
        ({"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}, "key 'eval_strategy': the hand-written loop"),
        ({"report_to": "tensorboard"}, "key 'report_to'"),
        ({"hub_strategy": "every_save"}, "key 'hub_strategy': the hand-written loop"),
        ({"parallel": "ddp"}, "key 'parallel': ddp needs several processes"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_classification_no_trainer.main(flags(tmp_path, tone_folder, **change))
    with pytest.raises(UserError, match="key 'parallel': there is no such key"):
        run_classification.main(flags(tmp_path, tone_folder, parallel="dp"))


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
def test_compiled_layers_train_the_same_and_are_saved_plain(script, tone_folder, tmp_path):
    for name, backend in (("plain", None), ("compiled", "aot_eager")):
        argv = loop_flags(tmp_path, tone_folder, out=name, freeze="feature_encoder", torch_compile_backend=backend)
        script.main([*argv, "--pad_to_seconds", "0.25"])
    steps = history(tmp_path / "plain") - history(tmp_path / "compiled")
    assert len(steps) == STEPS and steps.abs().max(axis=None) < 1e-4
    assert_same_weights(tmp_path / "plain", tmp_path / "compiled", rtol=0, atol=1e-3)
