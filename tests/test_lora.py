"""Adapters learn, nothing else of the backbone does, and what is saved is the same model in both forms."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ARCHITECTURES, save_tiny, tiny_config, tiny_extractor
from peft import PeftModel
from safetensors.torch import load_file
from test_runs import assert_same_weights, flags
from transformers import AutoModelForAudioClassification, pipeline, set_seed

import run_classification
import run_classification_no_trainer
from speech_emotion.arguments import ModelArguments
from speech_emotion.errors import UserError
from speech_emotion.features import build_extraction
from speech_emotion.lora import add_adapters, merge_adapters
from speech_emotion.modeling import has_adapters, load_weights, save_checkpoint_model


def example(architecture, model):
    extraction = build_extraction(model, tiny_extractor(architecture), None)
    rng = np.random.default_rng(0)
    features = extraction(rng.standard_normal(16000).astype(np.float32) * 0.1)
    return {extraction.input_name: torch.from_numpy(features)[None]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapter_is_heard_and_merging_changes_nothing(architecture, tmp_path):
    set_seed(0)
    model = AutoModelForAudioClassification.from_config(tiny_config(architecture)).eval()
    inputs = example(architecture, model)
    with torch.no_grad():
        before = model(**inputs).logits
    arguments = ModelArguments(model_name_or_path="x", lora_rank=4)
    add_adapters(model, arguments)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before)  # a new adapter corrects nothing
    (model(**inputs).logits[0, 0] * 100).backward()
    adapters = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert len(adapters) >= 4
    silent = [name for name, parameter in adapters.items() if parameter.grad is None or not parameter.grad.any()]
    # The keys' gradient can vanish where all positions are alike, but no adapter is out of reach.
    assert [name for name in silent if model.get_parameter(name).grad is None] == []
    assert len(silent) <= len(adapters) // 3
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith(("projector", "classifier", "layer_weights")) for name in trained)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
        corrected = model(**inputs).logits
    assert not torch.allclose(corrected, before, atol=1e-7)

    save_checkpoint_model(model, tmp_path / "checkpoint")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    load_weights(model, tmp_path / "checkpoint")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    merge_adapters(model, arguments, tmp_path)
    assert not has_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, corrected, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, corrected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
def test_a_run_leaves_the_adapter_and_the_merged_model(script, tone_folder, tmp_path):
    base = save_tiny("wav2vec2", tmp_path / "base", feat_extract_norm="layer", do_stable_layer_norm=True)
    set_seed(0)
    model = AutoModelForAudioClassification.from_config(
        tiny_config("wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True, num_labels=2)
    )
    model.save_pretrained(base)
    results = script.main(
        flags(tmp_path, tone_folder, config_name=None, model_name_or_path=base, feature_extractor_name=base, lora_rank=4,
              freeze="feature_encoder", num_train_epochs=3, learning_rate=1e-2)
    )  # fmt: skip
    out = tmp_path / "out"
    assert 0 <= results["test_uar"] <= 1
    predictions = pd.read_csv(out / "predictions.csv")
    served = pipeline("audio-classification", model=str(out), device="cpu", top_k=None)
    adapted = PeftModel.from_pretrained(
        AutoModelForAudioClassification.from_pretrained(base, num_labels=2, dtype=torch.float32), out / "adapter"
    ).eval()
    for _, row in predictions.iterrows():
        waveform, _ = soundfile.read(tone_folder / row["clip"], dtype="float32")
        scores = {entry["label"]: entry["score"] for entry in served(waveform)}
        assert scores["high"] == pytest.approx(row["probability_high"], abs=1e-3)
        inputs = tiny_extractor("wav2vec2")(waveform, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            probability = torch.softmax(adapted(inputs["input_values"]).logits, dim=1)[0, 0].item()
        assert probability == pytest.approx(scores["high"], abs=1e-4)
    # The backbone's own weights have not moved: only what the adapters were merged into has.
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all("attention" in name or "feed_forward" in name or name.startswith(("projector", "classifier")) for name in moved)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) < sum(tensor.numel() for tensor in before.values())
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_both_loops_train_the_same_adapters_and_resume_them(tone_folder, tmp_path):
    common = {"lora_rank": 2, "num_train_epochs": 2, "learning_rate": 1e-2,
              "config_overrides": "hidden_dropout_prob=0,attention_probs_dropout_prob=0"}  # fmt: skip
    for name, script in (("trainer", run_classification), ("by_hand", run_classification_no_trainer)):
        script.main(flags(tmp_path, tone_folder, output_dir=tmp_path / name, **common))
    assert_same_weights(tmp_path / "trainer", tmp_path / "by_hand", rtol=0, atol=1e-5)
    # As if it had been killed after the first epoch.
    shutil.copytree(tmp_path / "trainer", tmp_path / "stopped")
    last = max((tmp_path / "stopped").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "stopped" / name).unlink()
    run_classification.main(
        flags(tmp_path, tone_folder, output_dir=tmp_path / "stopped", resume_from_checkpoint="last", **common)
    )
    assert_same_weights(tmp_path / "trainer", tmp_path / "stopped", rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora_rank": 0}, "must be at least 1"), ({"lora_rank": 4, "freeze": "backbone"}, "take freeze 'feature_encoder'"),
     ({"lora_alpha": 8}, "key 'lora_rank': is missing"), ({"lora_rank": 4, "lora_dropout": 1.5}, "below 1")],
    ids=str,
)  # fmt: skip
def test_adapters_that_cannot_be_are_refused(changes, message, tone_folder, tmp_path):
    with pytest.raises(UserError) as caught:
        run_classification.main(flags(tmp_path, tone_folder, **changes))
    assert message in str(caught.value)
