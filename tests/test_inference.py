"""A trained model gives each recording what pipeline gives it, whatever stands beside it in the batch."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import ARCHITECTURES, tiny_config, tiny_extractor, tone, write_tone
from test_audio import bad_files
from transformers import AutoModelForAudioClassification, pipeline, set_seed

from speech_emotion import inference
from speech_emotion.errors import UserError
from speech_emotion.inference import load_classifier


def save_trained(architecture, folder, **changes):
    """Saves a model whose head tells clips apart, as a run leaves it."""
    set_seed(0)
    changes |= {"init_std": 0.2} if architecture == "whisper" else {}
    labels = {"num_labels": 3, "id2label": {0: "angry", 1: "neutral", 2: "sad"}, "label2id": {"angry": 0, "neutral": 1, "sad": 2}}
    model = AutoModelForAudioClassification.from_config(tiny_config(architecture, **labels, **changes)).eval()
    head = model.classifier.dense if architecture == "audio-spectrogram-transformer" else model.classifier
    head.weight.data.mul_(20)
    model.save_pretrained(folder)
    extractor = tiny_extractor(architecture)
    extractor.return_attention_mask = getattr(model.config, "feat_extract_norm", "layer") == "layer"
    extractor.save_pretrained(folder)
    return folder


def clips(folder, num_clips=7):
    return [write_tone(folder / f"{i}.wav", 0.3 + 0.07 * (i * 3 % 7), 150 * (i + 1), [16000, 22050][i % 2], seed=i)
            for i in range(num_clips)]  # fmt: skip


WITH_NORMS = [name for name in ARCHITECTURES if hasattr(tiny_config(name), "feat_extract_norm")]
CASES = [(name, norm) for name in ARCHITECTURES for norm in (("group", "layer") if name in WITH_NORMS else (None,))]


@pytest.mark.parametrize(("architecture", "norm"), CASES)
def test_batches_give_what_pipeline_gives_each_clip(architecture, norm, tmp_path):
    model = save_trained(architecture, tmp_path / "model", **({"feat_extract_norm": norm} if norm else {}))
    files = clips(tmp_path)
    served = pipeline("audio-classification", model=str(model), device="cpu", top_k=None)
    classifier = load_classifier(model, "cpu")
    answers = classifier.classify(files)
    assert [answer.index for answer in answers] == list(range(7)) and [answer.path for answer in answers] == list(map(str, files))
    spread = []
    for answer, path in zip(answers, files, strict=True):
        waveform, rate = soundfile.read(path, dtype="float32")
        scores = {entry["label"]: entry["score"] for entry in served({"array": waveform, "sampling_rate": rate})}
        expected = [scores[name] for name in classifier.label_names]
        np.testing.assert_allclose(answer.probabilities, expected, atol=1e-4)
        assert answer.label == max(scores, key=scores.get) and answer.error is None
        spread.append(expected)
    assert np.ptp(spread, axis=0).max() > 1e-4


def test_arrays_and_files_get_the_same_answers(tmp_path):
    classifier = load_classifier(save_trained("wav2vec2", tmp_path / "model"), "cpu")
    files = clips(tmp_path)
    arrays = [dict(zip(("array", "sampling_rate"), soundfile.read(path, dtype="float32"), strict=True)) for path in files]
    for a, b in zip(classifier.classify(files), classifier.classify(arrays), strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
        assert b.path is None


def test_unusable_recordings_are_answered_with_the_reason_and_the_others_as_ever(tmp_path):
    classifier = load_classifier(save_trained("wav2vec2", tmp_path / "model"), "cpu")
    good, bad = clips(tmp_path / "good"), list(bad_files(tmp_path / "bad"))
    missing = tmp_path / "missing.wav"
    mixed = [good[0], missing, *good[1:4], *[tmp_path / "bad" / name if isinstance(name, str) else name for name in bad]]
    answers = classifier.classify(mixed)
    assert answers[1].error == "no such file" and answers[1].probabilities is None and answers[1].label is None
    alone = classifier.classify([good[0]])[0]
    np.testing.assert_allclose(answers[0].probabilities, alone.probabilities, atol=1e-6)
    assert classifier.classify([{"array": np.zeros(0, dtype=np.float32), "sampling_rate": 16000}])[0].error == "holds 0 samples"
    assert classifier.classify([]) == []


def test_long_clips_are_averaged_over_windows(tmp_path):
    model = save_trained("wav2vec2", tmp_path / "model", feat_extract_norm="layer")
    classifier = load_classifier(model, "cpu", max_length_seconds=0.5)
    long = tone(1.2, 300)
    (answer,) = classifier.classify([{"array": long, "sampling_rate": 16000}])
    windows = [long[start : start + 8000] for start in (0, 5600, 11200)]
    logits = torch.tensor(classifier.compute_logits([classifier.extraction(window) for window in windows]))
    np.testing.assert_allclose(answer.probabilities, torch.softmax(logits.mean(dim=0), dim=0), atol=1e-5)
    whisper = save_trained("whisper", tmp_path / "whisper")
    assert load_classifier(whisper, "cpu").extraction.window_samples == 32000
    assert load_classifier(whisper, "cpu").classify([{"array": tone(5, 300), "sampling_rate": 16000}])[0].label
    with pytest.raises(UserError, match="the window of .* is 2 s"):
        load_classifier(whisper, "cpu", max_length_seconds=1.0)


def test_answers_come_as_they_are_computed_and_batches_stay_within_their_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "CLIPS_PER_SORT", 3)
    monkeypatch.setattr(inference, "MAX_WINDOWS_PER_BATCH", 2)
    classifier = load_classifier(save_trained("wav2vec2", tmp_path / "model"), "cpu")
    sizes, compute = [], classifier.compute_logits
    monkeypatch.setattr(classifier, "compute_logits", lambda features: sizes.append(len(features)) or compute(features))
    stream = classifier.stream(iter(clips(tmp_path)))
    first = next(stream)
    assert first.index < 3 and len(sizes) == 1
    assert sorted([first.index, *(answer.index for answer in stream)]) == list(range(7))
    assert max(sizes) == 2 and sum(sizes) == 7


def test_bfloat16_stays_near_and_is_off_unless_asked_for(tmp_path):
    model = save_trained("wav2vec2", tmp_path / "model")
    exact, rough = load_classifier(model, "cpu"), load_classifier(model, "cpu", bf16=True)
    assert exact.bf16 is False and rough.bf16 == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for a, b in zip(exact.classify(clips(tmp_path)), rough.classify(clips(tmp_path)), strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=0.05)


def test_what_is_no_trained_classifier_is_said(tmp_path):
    with pytest.raises(UserError, match="nowhere: no audio-classification model"):
        load_classifier(tmp_path / "nowhere")
    tiny_extractor("whisper").save_pretrained(tmp_path / "bare")
    model = AutoModelForAudioClassification.from_config(tiny_config("whisper"))
    model.encoder.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare: .* weights of a classifier are missing"):
        load_classifier(tmp_path / "bare")
