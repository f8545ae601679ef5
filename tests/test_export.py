"""Exported files answer as PyTorch does, for clips of any length, without Python's torch."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import tiny_config, tiny_extractor
from test_runs import flags
from transformers import AutoModelForAudioClassification, set_seed

import run_classification
from speech_emotion.errors import UserError
from speech_emotion.export import export, load_exported, main

CLASSES = ("wav2vec2", "hubert", "whisper", "audio-spectrogram-transformer")


def save_strong(architecture, folder, **changes):
    """Saves a random model whose probabilities differ from clip to clip."""
    set_seed(0)
    model = AutoModelForAudioClassification.from_config(tiny_config(architecture, num_labels=3, **changes))
    head = [module for module in model.classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight.normal_(std=10.0)
        if hasattr(model, "projector"):
            model.projector.weight.normal_(std=1.0)
    model.save_pretrained(folder)
    tiny_extractor(architecture).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("architecture", CLASSES)
def test_onnx_runtime_gives_the_same_probabilities_at_any_length(architecture, tmp_path):
    model = save_strong(architecture, tmp_path / "m")
    result = export(tmp_path / "m", "onnx", None, tmp_path / "onnx")
    compared = result["files"]["model.onnx"]
    assert compared["largest_difference"] < 1e-4 and compared["label_agreement"] == 1.0 and compared["num_clips"] >= 20
    assert compared["num_bytes"] > 0 and compared["milliseconds"] > 0 and compared["torch_milliseconds"] > 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    extractor, rng = tiny_extractor(architecture), np.random.default_rng(1)
    answers = []
    for seconds in (0.5, 1.1, 1.9):
        waveform = (0.1 * rng.standard_normal(round(seconds * 16000))).astype(np.float32)
        features = extractor(waveform, sampling_rate=16000, return_tensors="np")[extractor.model_input_names[0]]
        logits = session.run(None, {result["input_name"]: features.astype(np.float32)})[0]
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(torch.from_numpy(features)).logits, atol=1e-3, rtol=1e-3)
        answers.append(logits[0])
    assert np.ptp(np.stack(answers), axis=0).max() > 1e-3  # not the same answer to everything
    assert json.loads((tmp_path / "onnx" / "export.json").read_text())["labels"] == result["labels"]


@pytest.mark.parametrize("architecture", CLASSES)
def test_eight_bits_keep_the_label_and_save_space(architecture, tmp_path):
    # Wide enough for 8 bits to be worth it, as real models are.
    names = ("d_model", "encoder_ffn_dim") if architecture == "whisper" else ("hidden_size", "intermediate_size")
    save_strong(architecture, tmp_path / "m", **dict(zip(names, (128, 512), strict=True)))
    result = export(tmp_path / "m", "onnx", "int8", tmp_path / "onnx")
    whole, small = result["files"]["model.onnx"], result["files"]["model_int8.onnx"]
    assert small["label_agreement"] >= 0.97
    assert small["num_bytes"] < 0.6 * whole["num_bytes"]


@pytest.mark.parametrize("architecture", CLASSES)
def test_torchscript_gives_the_same_probabilities(architecture, tmp_path):
    save_strong(architecture, tmp_path / "m")
    result = export(tmp_path / "m", "torchscript", None, tmp_path / "ts")
    assert result["files"]["model.pt"]["largest_difference"] < 1e-4
    run = load_exported(tmp_path / "ts" / "model.pt")
    shape = {"whisper": (2, 16, 200), "audio-spectrogram-transformer": (2, 128, 16)}.get(architecture, (2, 12345))
    assert run(np.zeros(shape, dtype=np.float32)).shape == (2, 3)


def test_a_trained_run_is_compared_on_its_test_clips(tone_folder, tmp_path, capsys):
    run_classification.main(flags(tmp_path, tone_folder, "wav2vec2", num_train_epochs=2, max_length_seconds=0.35))
    result = main([str(tmp_path / "out"), "--format", "onnx", "--quantize", "int8"])
    assert result["compared_on"] == "test clips of the run" and result["files"]["model.onnx"]["num_clips"] >= 6
    assert result["window_samples"] == 5600
    shown = capsys.readouterr().out
    assert "x as fast" in shown and "model_int8.onnx" in shown
    assert (tmp_path / "out" / "onnx" / "preprocessor_config.json").is_file()


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        export(tmp_path, "onnx", None, tmp_path / "x")
    with pytest.raises(UserError, match="int8 is for --format onnx"):
        export(tmp_path, "torchscript", "int8", tmp_path / "x")
