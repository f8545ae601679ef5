"""Shortcuts that are planted are found, and ones that are not there are not."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone

from speech_emotion.arguments import DataArguments
from speech_emotion.audit import audit_shortcuts, cut_non_speech, find_speech, measure_cues
from speech_emotion.corpora.table import Clip, build_table
from speech_emotion.inference import Answer
from speech_emotion.metrics import Evaluation
from speech_emotion.robustness import build_conditions, measure_robustness
from speech_emotion.splits import split_corpus

RATE = 16000


def speak(rng, lead=0.3, seconds=0.5, floor=1e-4):
    """Returns noise bursts between stretches of a quiet floor, float32, and which samples were spoken."""
    parts = [floor * rng.standard_normal(round(lead * RATE)), 0.1 * rng.standard_normal(round(seconds * RATE)),
             floor * rng.standard_normal(round(lead * RATE))]  # fmt: skip
    spoken = np.concatenate([np.full(len(part), i == 1) for i, part in enumerate(parts)])
    return np.concatenate(parts).astype(np.float32), spoken


def test_speech_is_found_with_its_margin_and_nothing_of_it_is_left_outside():
    waveform, spoken = speak(np.random.default_rng(0))
    found = find_speech(waveform, RATE)
    assert found[spoken].all()
    assert found.sum() - spoken.sum() < 2 * 0.12 * RATE
    silent = cut_non_speech(waveform, RATE)
    assert len(silent) == (~found).sum() and np.abs(silent).max() < 1e-3


def test_a_clip_without_pauses_has_no_part_without_speech():
    rng = np.random.default_rng(0)
    steady = (0.1 * rng.standard_normal(RATE)).astype(np.float32)
    assert find_speech(steady, RATE).all() and len(cut_non_speech(steady, RATE)) == 0
    assert measure_cues(steady, RATE).non_speech is None
    assert find_speech(steady[:100], RATE).shape == (100,)


def test_cues_are_what_they_are_called():
    waveform = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    cues = measure_cues(0.1 * waveform, RATE)
    assert np.exp(cues.duration[0]) == pytest.approx(1.0)
    np.testing.assert_allclose(cues.loudness, [20 * np.log10(0.1 / np.sqrt(2)), -20], atol=0.05)
    assert np.exp(cues.bandwidth[0]) == pytest.approx(1000, abs=50)


class Fixed:
    """Stands for a classifier: answers by a function of the waveform."""

    label_names = ["a", "b"]

    def __init__(self, decide):
        self.decide = decide
        self.extraction = type("Extraction", (), {"sampling_rate": RATE})
        self.device = torch.device("cpu")

    def stream(self, recordings):
        for index, recording in enumerate(recordings):
            probabilities = np.eye(2)[self.decide(recording["array"])] * 0.8 + 0.1
            yield Answer(index, None, probabilities, self.label_names[int(probabilities.argmax())])

    def classify(self, recordings):
        return list(self.stream(recordings))


def make_corpus(folder, change, num_speakers=10, clips_each=4):
    """Writes clips whose class is told by nothing but what `change` does to them; returns split and perfect answers."""
    rng = np.random.default_rng(0)
    clips = []
    for speaker in range(num_speakers):
        for number in range(clips_each):
            for label in ("a", "b"):
                waveform = change(rng, label)
                path = folder / f"{label}_{speaker}_{number}.wav"
                folder.mkdir(exist_ok=True)
                soundfile.write(path, waveform, RATE, subtype="FLOAT")
                clips.append(Clip(path=str(path), label=label, speaker_id=f"s{speaker}", sentence_id=None, split=None))
    split = split_corpus(build_table(clips), DataArguments(test_fraction=0.5), 0)
    rows = split.indices("test")
    references = np.asarray(split.clips["label"][:])[rows]
    return split, Evaluation(rows, references, np.log(np.eye(2)[references] * 0.8 + 0.1), ["a", "b"])


PLANTED = {
    "duration": lambda rng, label: speak(rng, seconds=0.5 if label == "a" else 0.8)[0],
    "loudness": lambda rng, label: speak(rng)[0] * np.float32(1.0 if label == "a" else 0.2),
    "parts without speech": lambda rng, label: speak(rng, floor=1e-4 if label == "a" else 1e-3)[0],
}


@pytest.mark.parametrize("cue", PLANTED)
def test_a_planted_shortcut_is_found_and_warned_of(cue, tmp_path):
    split, test = make_corpus(tmp_path / "clips", PLANTED[cue])
    audit = audit_shortcuts(split, test, Fixed(lambda waveform: 0), 0)
    by_cue = {entry["cue"]: entry for entry in audit["shortcuts"] if entry["by"] == "logistic regression"}
    assert by_cue[cue]["uar"] > 0.95 and by_cue[cue]["explains"] > 0.9
    assert any(f"from {cue} alone" in warning for warning in audit["warnings"])
    if cue == "duration":
        assert by_cue["bandwidth"]["uar"] < 0.8


def test_a_model_that_listens_to_the_room_is_warned_of(tmp_path):
    split, test = make_corpus(tmp_path / "clips", PLANTED["parts without speech"])
    listens = Fixed(lambda waveform: int(np.sort(np.abs(waveform))[len(waveform) // 4] > 1e-4))
    audit = audit_shortcuts(split, test, listens, 0)
    (own,) = (entry for entry in audit["shortcuts"] if entry["by"] == "the model")
    assert own["uar"] == 1.0 and own["num_clips"] == len(test.clips)
    assert any("alone the model itself gets 1.000 UAR" in warning for warning in audit["warnings"])


def test_without_a_shortcut_there_is_no_warning(tmp_path):
    split, test = make_corpus(tmp_path / "clips", lambda rng, label: speak(rng, lead=0.3, seconds=rng.uniform(0.4, 0.6))[0])
    audit = audit_shortcuts(split, test, Fixed(lambda waveform: 0), 0)
    assert audit["model"]["uar"] == 1.0 and audit["chance"] == 0.5 and audit["warnings"] == []
    assert all(entry["uar_ci95"][0] <= entry["uar"] <= entry["uar_ci95"][1] for entry in audit["shortcuts"])


def test_robustness_gives_every_condition_the_same_noise_each_time(tmp_path):
    def sing(rng, label):
        return tone(0.5, 300 if label == "a" else 1500, seed=int(rng.integers(99)))

    split, test = make_corpus(tmp_path / "clips", sing, clips_each=2)

    def pitch(waveform):
        return int(np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform) > 800)

    results = measure_robustness(test, split.clips, Fixed(pitch), 0)
    assert [row["condition"] for row in results] == ["clean", *build_conditions()]
    assert [row["condition"] for row in results][1:] == [
        "noise at 20 dB", "noise at 10 dB", "noise at 5 dB", "noise at 0 dB", "gain +-15 dB", "telephone",
    ]  # fmt: skip
    assert all(row["uar"] == 1.0 for row in results if "noise" not in row["condition"])
    assert results == measure_robustness(test, split.clips, Fixed(pitch), 0)


def test_the_conditions_do_what_they_say():
    rng = np.random.default_rng(0)
    waveform = tone(1.0, 400)
    conditions = build_conditions()
    for ratio in (20, 10, 5, 0):
        noise = conditions[f"noise at {ratio} dB"](waveform, RATE, rng) - waveform
        assert 10 * np.log10(np.mean(waveform**2) / np.mean(noise**2)) == pytest.approx(ratio, abs=0.01)
        power = np.abs(np.fft.rfft(noise)) ** 2
        assert power[100:200].mean() / power[1000:2000].mean() == pytest.approx(10, rel=0.5)  # pink falls by 10 dB a decade
    gains = [np.abs(conditions["gain +-15 dB"](waveform, RATE, rng)).max() / np.abs(waveform).max() for _ in range(50)]
    assert 10 ** (-15 / 20) <= min(gains) < 0.5 and 2 < max(gains) <= 10 ** (15 / 20)
