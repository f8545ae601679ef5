"""What is frozen is computed once, and training from there is the same training."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import ARCHITECTURES, GROUPS, save_tiny, write_tone
from test_features import tone_split
from test_runs import assert_same_weights, flags
from transformers import AutoModelForAudioClassification, pipeline

import run_classification
import run_classification_no_trainer
from speech_emotion import frozen
from speech_emotion.arguments import ModelArguments, parse_arguments
from speech_emotion.augmentation import Augmentation
from speech_emotion.batching import Collator
from speech_emotion.errors import UserError
from speech_emotion.features import build_extraction, prepare_splits
from speech_emotion.frozen import cache_frozen
from speech_emotion.modeling import build_model, get_layers, wants_attention_mask

CONVOLUTIONAL = [name for name in ARCHITECTURES if name not in ("audio-spectrogram-transformer", "wav2vec2-bert", "whisper")]
LAYERED = [name for name in ARCHITECTURES if name not in ("sew", "sew-d")]
# With a norm after the last layer, the head of a cut model sees another thing than transformers' hidden states.
STABLE = ["hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"]
LAYER_CASES = [
    (architecture, stable, layer)
    for architecture in LAYERED
    for stable in ([False, True] if architecture in STABLE else [False])
    for layer in (None, "1", "2", *(["weighted"] if architecture != "audio-spectrogram-transformer" else []))
]
WINDOWS = {"whisper": 1.0, "audio-spectrogram-transformer": 0.6}


def cached(architecture, corpus, tmp_path, random_training=False, config=None, **model_arguments):
    """Builds the model twice with the same weights, and returns the plain one, and the one that starts at the cache."""
    name = save_tiny(architecture, tmp_path / "model", **(config or {}))
    arguments = ModelArguments(config_name=name, feature_extractor_name=name, **model_arguments)
    training = parse_arguments(
        ["recipes/demo.json", "--output_dir", str(tmp_path / "x"), "--bf16", "false", "--use_cpu"]
    ).training
    split = tone_split(corpus)
    labels = split.clips.features["label"].names
    window = WINDOWS.get(architecture)
    plain, extractor, seconds = build_model(arguments, labels, window, seed=0)
    other, _, _ = build_model(arguments, labels, window, seed=0)
    extraction = build_extraction(plain, extractor, seconds)
    prepared = prepare_splits(split, extraction, random_training, "error", str(tmp_path / "cache"))
    collate = Collator(extraction, wants_attention_mask(plain.config), Augmentation())
    once, collate_once, scores = cache_frozen(other, prepared, collate, arguments, training)
    return (plain.eval(), prepared, collate), (other.eval(), once, collate_once), scores


@torch.no_grad()
def logits(model, table, collate, rows):
    batch = collate([table[row] for row in rows])
    batch.pop("labels")
    return model(**batch).logits


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_frozen_convolutions_give_each_clips_own_logits_in_any_batch(architecture, tone_folder, tmp_path):
    before, after, _ = cached(architecture, tone_folder, tmp_path, freeze="feature_encoder")
    alone = torch.cat([logits(before[0], before[1].train, before[2], [row]) for row in range(3)])
    together = logits(after[0], after[1].train, after[2], range(3))
    assert after[1].train.features["frozen"].feature.dtype == "float16"
    # The conformer's and data2vec's own convolutions look past a clip's end, cached or not.
    tolerance = 1e-2 if architecture in ("wav2vec2-conformer", "data2vec-audio") else 2e-3
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("architecture", "stable", "layer"), LAYER_CASES)
def test_a_cached_backbone_gives_the_logits_of_the_cut_model(architecture, stable, layer, tone_folder, tmp_path):
    config = {"init_std": 0.2} if architecture == "whisper" else {}  # clips are told apart by more than rounding
    config |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer"} if stable else {}
    before, after, _ = cached(architecture, tone_folder, tmp_path, config=config, freeze="backbone", layer=layer)
    if layer in ("1", "2"):
        del get_layers(before[0])[int(layer) :]
        assert len(get_layers(after[0])) == int(layer) == after[0].config.num_hidden_layers
    for model in (before[0], after[0]):
        for parameter in model.classifier.parameters():
            parameter.data.mul_(100)  # a fresh head hardly tells clips apart
    alone = torch.cat([logits(before[0], before[1].train, before[2], [row]) for row in range(4)])
    together = logits(after[0], after[1].train, after[2], range(4))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-6)
    assert (alone.max(dim=0).values - alone.min(dim=0).values).max() > 3e-3  # else nothing was compared


@pytest.mark.parametrize("architecture", ["sew", "sew-d"])
def test_squeezed_backbones_are_cached_whole_and_refuse_a_layer(architecture, tone_folder, tmp_path):
    before, after, _ = cached(architecture, tone_folder, tmp_path / "a", freeze="backbone")
    alone = torch.cat([logits(before[0], before[1].train, before[2], [row]) for row in range(4)])
    torch.testing.assert_close(logits(after[0], after[1].train, after[2], range(4)), alone, atol=1e-5, rtol=0)
    for layer in ("1", "best", "weighted"):
        with pytest.raises(UserError, match=f"key 'layer': .*{architecture}"):
            cached(architecture, tone_folder, tmp_path / layer, freeze="backbone", layer=layer)


def history(folder, column):
    return pd.read_csv(folder / "history.csv").dropna(subset=[column])[column].to_numpy()


LAYER_NORM = "feat_extract_norm=layer,apply_spec_augment=true,mask_time_prob=0.2"


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
@pytest.mark.parametrize(
    ("freeze", "overrides", "tolerance"), [("feature_encoder", LAYER_NORM, 2e-3), ("backbone", "feat_extract_norm=layer", 1e-5)]
)
def test_cached_and_uncached_training_have_the_same_losses(script, freeze, overrides, tolerance, tone_folder, tmp_path):
    # With dropout, layer drop and SpecAugment in what is trained, padded batches, and weights and metrics compared too.
    results = {}
    for cache in ("true", "false"):
        results[cache] = script.main(
            flags(tmp_path, tone_folder, "wav2vec2", output_dir=tmp_path / cache, freeze=freeze, cache_frozen=cache,
                  config_overrides=overrides, logging_steps=1, num_train_epochs=4)
        )  # fmt: skip
    losses = [history(tmp_path / cache, "loss") for cache in ("true", "false")]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(*losses, atol=tolerance)
    np.testing.assert_allclose(*[history(tmp_path / cache, "eval_loss") for cache in ("true", "false")], atol=tolerance)
    probabilities = [pd.read_csv(tmp_path / cache / "predictions.csv")["probability_high"] for cache in ("true", "false")]
    np.testing.assert_allclose(*probabilities, atol=tolerance)
    frozen_part = "wav2vec2.feature_extractor." if freeze == "feature_encoder" else "wav2vec2."
    saved = [AutoModelForAudioClassification.from_pretrained(tmp_path / cache).state_dict() for cache in ("true", "false")]
    for name in saved[0]:
        if name.startswith(frozen_part):
            assert torch.equal(saved[0][name], saved[1][name]), name


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_batches_without_padding_have_the_same_losses_with_either_norm(norm, tmp_path):
    root = tmp_path / "even"
    for label, frequency in (("high", 880), ("low", 220)):
        for i in range(10):
            write_tone(root / label / f"spk{i}_s0.wav", 0.4, frequency + 5 * i, seed=i)
    for cache in ("true", "false"):
        run_classification.main(
            flags(tmp_path, root, "wav2vec2", output_dir=tmp_path / cache, freeze="feature_encoder", cache_frozen=cache,
                  config_overrides=f"feat_extract_norm={norm}", logging_steps=1, group_pattern=GROUPS)
        )  # fmt: skip
    np.testing.assert_allclose(*[history(tmp_path / cache, "loss") for cache in ("true", "false")], atol=2e-3)


@pytest.mark.parametrize(("freeze", "layer"), [("feature_encoder", None), ("backbone", "1"), ("backbone", "weighted")])
def test_what_is_saved_is_an_ordinary_model_with_the_measured_probabilities(freeze, layer, tone_folder, tmp_path):
    run_classification.main(flags(tmp_path, tone_folder, "wav2vec2", freeze=freeze, layer=layer, learning_rate=1e-2))
    served = pipeline("audio-classification", model=str(tmp_path / "out"), device="cpu", top_k=None)
    assert served.model.config.num_hidden_layers == (1 if layer == "1" else 2)
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert predictions["probability_high"].std() > 1e-3
    for _, row in predictions.iterrows():
        waveform, _ = soundfile.read(tone_folder / row["clip"], dtype="float32")
        scores = {entry["label"]: entry["score"] for entry in served(waveform)}
        assert scores["high"] == pytest.approx(row["probability_high"], abs=1e-3)


def test_the_best_layer_is_chosen_by_validation_and_drawn(tone_folder, tmp_path):
    results = run_classification.main(flags(tmp_path, tone_folder, "wav2vec2", freeze="backbone", layer="best", report=None))
    scores = json.loads((tmp_path / "out" / "train_results.json").read_text())["layer_uar"]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    assert results["layer"] == int(np.argmax(scores)) + 1
    saved = AutoModelForAudioClassification.from_pretrained(tmp_path / "out")
    assert len(get_layers(saved)) == results["layer"]
    assert (tmp_path / "out" / "layers.png").stat().st_size > 1000


def test_a_second_run_computes_nothing_frozen_again(tone_folder, tmp_path, monkeypatch):
    cached("wav2vec2", tone_folder, tmp_path, freeze="backbone")

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen, "_map_batch", refuse)
    cached("wav2vec2", tone_folder, tmp_path, freeze="backbone", layer="best")  # another layer, the same cache
    with pytest.raises(AssertionError, match="computed again"):
        cached("wav2vec2", tone_folder, tmp_path, freeze="backbone", config={"hidden_act": "relu", "initializer_range": 0.5})


def test_a_saved_model_is_cached_apart_from_one_of_other_weights(tone_folder, tmp_path):
    first = cached("wav2vec2", tone_folder, tmp_path, freeze="backbone")[1]
    second = cached("wav2vec2", tone_folder, tmp_path, freeze="backbone", config={"initializer_range": 0.5})[1]
    assert not np.allclose(first[1].train[0]["frozen"], second[1].train[0]["frozen"])


def test_disk_use_is_said_beforehand_and_right(tone_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="speech_emotion"):
        _, (_, once, _), _ = cached("wav2vec2", tone_folder, tmp_path, freeze="feature_encoder")
    stored = sum(once.features[row]["frozen"].__len__() for row in range(len(once.features))) * 2
    (sentence,) = [record.message for record in caplog.records if "will be computed once" in record.message]
    assert f"for 30 clips and take {stored / 1e6:.1f} MB in {tmp_path}" in sentence and "--cache_frozen false" in sentence


def test_too_small_a_disk_is_said_before_anything_is_computed(tone_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="too little for the frozen part's output"):
        cached("wav2vec2", tone_folder, tmp_path, freeze="backbone")
    assert not list((tmp_path / "cache").rglob("frozen-*"))


def test_random_changes_before_the_frozen_part_keep_it_in_the_loop(tone_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="speech_emotion"):
        before, after, _ = cached("wav2vec2", tone_folder, tmp_path, random_training=True, freeze="feature_encoder")
    assert after[1] is before[1] or "waveform" in after[1].train.column_names
    assert "runs in every epoch: training clips are augmented" in caplog.text
    with pytest.raises(UserError, match="key 'cache_frozen': .* augmented"):
        cached("wav2vec2", tone_folder, tmp_path, random_training=True, freeze="feature_encoder", cache_frozen=True)
    with pytest.raises(UserError, match="key 'layer': .* augmented"):
        cached("wav2vec2", tone_folder, tmp_path, random_training=True, freeze="backbone", layer="best")
    cut = cached("wav2vec2", tone_folder, tmp_path, random_training=True, freeze="backbone", layer="1")[1][0]
    assert len(get_layers(cut)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "0"}, "key 'layer': is '0'"),
        ({"layer": "last"}, "key 'layer': is 'last'"),
        ({"layer": "best"}, "key 'layer': 'best' compares the cached outputs"),
        ({"layer": "best", "freeze": "backbone", "cache_frozen": "false"}, "key 'layer': 'best'"),
        ({"layer": "3", "freeze": "backbone"}, "key 'layer': 3 is not a layer of this model, which has 1 to 2"),
        ({"layer": "3"}, "key 'layer': 3 is not a layer of this model, which has 1 to 2"),
        ({"cache_frozen": "true"}, "key 'cache_frozen': has nothing to cache"),
    ],
    ids=str,
)
def test_impossible_layers_and_caches_are_refused(change, message, tone_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        run_classification.main(flags(tmp_path, tone_folder, "wav2vec2", **change))


def test_a_layer_can_be_taken_while_everything_is_trained(tone_folder, tmp_path):
    run_classification.main(flags(tmp_path, tone_folder, "whisper", layer="1", num_train_epochs=1))
    assert len(get_layers(AutoModelForAudioClassification.from_pretrained(tmp_path / "out"))) == 1


def test_two_runs_of_a_probe_are_the_same(tone_folder, tmp_path):
    for name in ("first", "second"):
        run_classification.main(
            flags(tmp_path, tone_folder, "wav2vec2", output_dir=tmp_path / name, freeze="backbone", layer="best")
        )
    assert_same_weights(tmp_path / "first", tmp_path / "second")
