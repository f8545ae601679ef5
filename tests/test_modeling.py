"""Every architecture loads, trains, saves and loads again; windows are cut without changing what is left."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, save_tiny, tiny_config, tiny_extractor, tone
from transformers import AutoModelForAudioClassification, WhisperModel, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from speech_emotion.arguments import ModelArguments
from speech_emotion.augmentation import Augmentation
from speech_emotion.batching import Collator
from speech_emotion.errors import UserError
from speech_emotion.features import build_extraction
from speech_emotion.modeling import (
    build_model,
    fit_window,
    freeze,
    load_config,
    load_model,
    load_trained,
    min_num_samples,
    wants_attention_mask,
)

NAMES = ["angry", "neutral", "sad"]


def scratch(architecture, folder, window=None, **changes):
    name = save_tiny(architecture, folder, **changes)
    arguments = ModelArguments(config_name=name, feature_extractor_name=name)
    model, extractor, seconds = build_model(arguments, NAMES, window, seed=0)
    return model.eval(), extractor, build_extraction(model, extractor, seconds)


def collate(model, extraction, waveforms):
    rows = [{"waveform": waveform, "labels": 0, "rng": None} for waveform in waveforms]
    batch = Collator(extraction, wants_attention_mask(model.config), Augmentation())(rows)
    batch.pop("labels")
    return batch


def test_all_architectures_with_a_head_are_covered():
    assert sorted(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES) == ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_trains_saves_and_serves_the_same_probabilities(architecture, tmp_path):
    model, extractor, extraction = scratch(architecture, tmp_path / "config")
    batch = collate(model, extraction, [tone(0.6, 200), tone(0.5, 400)])
    before = [parameter.clone() for parameter in model.parameters()]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 2])).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    model.eval().save_pretrained(tmp_path / "saved")
    extractor.save_pretrained(tmp_path / "saved")
    clip = tone(0.7, 300)
    with torch.no_grad():
        expected = model(**collate(model, extraction, [clip])).logits.softmax(-1)[0].numpy()
    served = pipeline("audio-classification", model=str(tmp_path / "saved"), top_k=None, device="cpu")(clip)
    scores = {entry["label"]: entry["score"] for entry in served}
    np.testing.assert_allclose([scores[name] for name in NAMES], expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_clip_gives_the_same_logits_alone_and_in_a_padded_batch(architecture, tmp_path):
    changes = (
        {"feat_extract_norm": "layer"}
        if architecture in ("hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm")
        else {}
    )
    model, _, extraction = scratch(architecture, tmp_path, **changes)
    short, long = tone(0.5, 300), tone(0.9, 500)
    with torch.no_grad():
        alone = model(**collate(model, extraction, [short])).logits[0]
        batched = model(**collate(model, extraction, [short, long])).logits[0]
    # Two architectures let padding through whatever the mask says: data2vec stacks five positional convolutions and
    # the conformer has a convolution in each layer, all of which look past the end of the clip.
    leaks = architecture in ("data2vec-audio", "wav2vec2-conformer")
    torch.testing.assert_close(alone, batched, atol=1e-3 if leaks else 1e-5, rtol=0)


def test_group_norm_gets_no_mask_and_bucketed_padding_moves_probabilities_little(tmp_path):
    # Group norm takes its statistics over the padding too, so that equality cannot be had; batches of similar lengths
    # keep the padding small. The tolerance stated in README.md: 0.02 at 5 % padding.
    model, _, extraction = scratch("wav2vec2", tmp_path, feat_extract_norm="group")
    short, long = tone(0.95, 300), tone(1.0, 500)
    batch = collate(model, extraction, [short, long])
    assert "attention_mask" not in batch
    with torch.no_grad():
        alone = model(**collate(model, extraction, [short])).logits.softmax(-1)[0]
        batched = model(**batch).logits.softmax(-1)[0]
    torch.testing.assert_close(alone, batched, atol=0.02, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shortest_clip_is_padded_to_what_training_takes(architecture, tmp_path):
    masks = architecture not in ("whisper", "audio-spectrogram-transformer")
    changes = {"apply_spec_augment": True, "mask_time_prob": 0.5} if masks else {}
    model, _, extraction = scratch(architecture, tmp_path, **changes)
    model.train()
    logits = model(**collate(model, extraction, [tone(0.002, 300)])).logits
    assert torch.isfinite(logits).all()
    if "conv_kernel" in model.config.to_dict():
        frames = model._get_feat_extract_output_lengths(torch.tensor(min_num_samples(model)))
        one_less = model._get_feat_extract_output_lengths(torch.tensor(min_num_samples(model) - 1))
        assert frames == one_less + 1 >= model.config.mask_time_length + 1


@pytest.mark.parametrize("architecture", ["whisper", "audio-spectrogram-transformer"])
def test_a_cut_window_leaves_the_logits_of_its_positions_unchanged(architecture, tmp_path):
    """The position table is sliced: what is left is the full table's beginning."""
    torch.manual_seed(0)
    full = AutoModelForAudioClassification.from_config(tiny_config(architecture)).eval()
    if architecture == "audio-spectrogram-transformer":
        torch.nn.init.normal_(full.audio_spectrogram_transformer.embeddings.position_embeddings)
        table = full.audio_spectrogram_transformer.embeddings.position_embeddings.data.clone()
        embeddings = full.audio_spectrogram_transformer.embeddings
        rows, columns = embeddings.get_shape(full.config)
    else:
        table = full.encoder.embed_positions.weight.data.clone()
    extractor = tiny_extractor(architecture)
    seconds = fit_window(full, extractor, 1.0)
    assert seconds == pytest.approx(1.0)
    features = extractor(tone(0.8, 300), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        assert full(**features).logits.shape == (1, 2)
    if architecture == "whisper":
        assert torch.equal(full.encoder.embed_positions.weight, table[:50])
        assert features["input_features"].shape == (1, 16, 100)
    else:
        new_rows, new_columns = embeddings.get_shape(full.config)
        kept = embeddings.position_embeddings.data[:, 2:].unflatten(1, (new_rows, new_columns))
        assert (new_rows, new_columns) == (rows, 12) and columns == 16
        assert torch.equal(kept, table[:, 2:].unflatten(1, (rows, columns))[:, :, :12])


def test_a_window_longer_than_the_model_has_is_refused(tmp_path):
    with pytest.raises(UserError, match="max_length_seconds.*2 s"):
        scratch("whisper", tmp_path, window=5.0)


def test_the_shipped_encoder_gets_a_fresh_head():
    arguments = ModelArguments(model_name_or_path="assets/whisper-tiny.en-encoder")
    model, extractor, seconds = build_model(arguments, NAMES, 2.0, seed=0)
    assert (seconds, extractor.n_samples, model.config.max_source_positions) == (2.0, 32000, 100)
    assert model.config.id2label == dict(enumerate(NAMES)) and model.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bare_encoder_gets_a_fresh_head(architecture, tmp_path):
    model = AutoModelForAudioClassification.from_config(tiny_config(architecture))
    bare = WhisperModel(model.config) if architecture == "whisper" else model.base_model
    bare.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    loaded = load_model(arguments, load_config(arguments, NAMES))
    expected = bare.state_dict()
    prefix = "" if architecture == "whisper" else loaded.base_model_prefix + "."
    shared = [key for key in expected if prefix + key in loaded.state_dict()]
    assert len(shared) > 10
    assert all(torch.equal(expected[key], loaded.state_dict()[prefix + key]) for key in shared)
    assert loaded.config.num_labels == 3


def test_a_checkpoint_of_another_shape_is_refused_by_its_weights(tmp_path):
    AutoModelForAudioClassification.from_config(tiny_config("wav2vec2")).save_pretrained(tmp_path / "a")
    tiny_config("wav2vec2", num_hidden_layers=3).save_pretrained(tmp_path / "b")
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "a"), config_name=str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"encoder\.layers\.2\."):
        load_model(arguments, load_config(arguments, NAMES))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_freezing_leaves_just_the_named_part_trainable(architecture, tmp_path):
    model, _, _ = scratch(architecture, tmp_path)
    if architecture in ("whisper", "audio-spectrogram-transformer", "wav2vec2-bert"):
        with pytest.raises(UserError, match=f"key 'freeze': {architecture} has no convolutional feature encoder"):
            freeze(model, "feature_encoder")
    else:
        freeze(model, "feature_encoder")
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen and all("feature_extractor" in name for name in frozen)
    freeze(model, "backbone")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= {"projector", "classifier"} and "classifier" in trained


def test_unknown_models_and_overrides_are_named(tmp_path):
    with pytest.raises(UserError, match="model_name_or_path.*no_such_folder"):
        load_config(ModelArguments(model_name_or_path="./no_such_folder"), NAMES)
    save_tiny("wav2vec2", tmp_path)
    with pytest.raises(UserError, match="config_overrides.*'hidden_dropuot'"):
        load_config(ModelArguments(config_name=str(tmp_path), config_overrides="hidden_dropuot=0"), NAMES)
    config = load_config(ModelArguments(config_name=str(tmp_path), config_overrides="hidden_dropout=0.3, layerdrop=0"), NAMES)
    assert (config.hidden_dropout, config.layerdrop) == (0.3, 0)


def test_a_misspelt_folder_is_told_the_nearest_one(tmp_path):
    save_tiny("wav2vec2", tmp_path / "demo")
    with pytest.raises(UserError, match=r"dmeo cannot be loaded\. .*Did you mean the folder .*demo\?"):
        load_config(ModelArguments(model_name_or_path=str(tmp_path / "dmeo")), NAMES)
    with pytest.raises(UserError, match=r"Did you mean the folder .*demo\?"):
        load_trained(str(tmp_path / "dmeo"))
