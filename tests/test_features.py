"""Clips are decoded once; what comes out is float32, bucketed and padded as the model wants it."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import GROUPS, tiny_extractor, tone, write_tone
from test_audio import bad_files
from transformers import Wav2Vec2FeatureExtractor

import speech_emotion.features as features_module
from speech_emotion.arguments import DataArguments, parse_arguments
from speech_emotion.augmentation import Augmentation, build_augmentation, pass_telephone
from speech_emotion.batching import Collator, LengthBucketSampler, TrainingRows, padding_share
from speech_emotion.corpora import audio_folder
from speech_emotion.corpora import thorsten as thorsten_loader
from speech_emotion.errors import UserError
from speech_emotion.features import Extraction, fingerprint, prepare_splits
from speech_emotion.splits import split_corpus


def extraction_for(architecture="wav2vec2", window=None, min_samples=400):
    return Extraction(tiny_extractor(architecture), window, min_samples)


def tone_split(folder, seed=0):
    return split_corpus(audio_folder.load(DataArguments(data_dir=str(folder), group_pattern=GROUPS)), DataArguments(), seed)


def prepare(split, extraction, tmp_path, random_training=False, on_bad_audio="error", **kwargs):
    return prepare_splits(split, extraction, random_training, on_bad_audio, str(tmp_path), **kwargs)


@pytest.mark.parametrize("architecture", ["wav2vec2", "whisper", "audio-spectrogram-transformer", "wav2vec2-bert"])
def test_features_are_float32_arrays_of_the_extractors_own_layout(architecture, tone_folder, tmp_path):
    window = {"whisper": 32000, "audio-spectrogram-transformer": 20480}.get(architecture)
    extraction = extraction_for(architecture, window)
    prepared = prepare(tone_split(tone_folder), extraction, tmp_path)
    row = prepared.train[0]
    values = row[extraction.input_name]
    assert isinstance(values, np.ndarray) and values.dtype == np.float32
    direct = extraction(features_module.decode(prepared.split.clips[int(row["clip"])]["audio"], 16000))
    np.testing.assert_allclose(values, direct, atol=1e-6)
    assert len(prepared.train) + len(prepared.validation) + len(prepared.test) == 30


def test_a_second_run_decodes_nothing_whatever_the_split_or_seed(tone_folder, tmp_path, monkeypatch):
    prepare(tone_split(tone_folder, seed=0), extraction_for(), tmp_path)

    def refuse(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(features_module, "decode", refuse)
    prepared = prepare(tone_split(tone_folder, seed=3), extraction_for(), tmp_path)
    assert len(prepared.train) == 18


def test_the_fingerprint_changes_with_clips_extractor_and_parameters_only(tmp_path):
    root = tmp_path / "corpus"
    for label in ("a", "b"):
        for i in range(4):
            write_tone(root / label / f"{i}.wav", seed=i)

    def load():
        return audio_folder.load(DataArguments(data_dir=str(root)))

    clips = load()
    first = fingerprint(clips, extraction_for(), False)
    assert fingerprint(load(), extraction_for(), False) == first
    assert fingerprint(clips.add_column("split", ["train"] * 8), extraction_for(), False) == first
    assert fingerprint(clips, extraction_for(window=8000), False) != first
    assert fingerprint(clips, extraction_for(min_samples=800), False) != first
    assert fingerprint(clips, extraction_for(), True) != first
    assert fingerprint(clips.select(range(7)), extraction_for(), False) != first
    other = extraction_for()
    other.feature_extractor.do_normalize = False
    assert fingerprint(clips, other, False) != first
    os.utime(root / "a" / "0.wav", ns=(1, 1))
    assert fingerprint(load(), extraction_for(), False) != first


def test_a_preparation_that_broke_off_is_done_again(tone_folder, tmp_path):
    split = tone_split(tone_folder)
    prepare(split, extraction_for(), tmp_path)
    (cache,) = (tmp_path / "speech_emotion").glob("features-*")
    files = json.loads((cache / "index.json").read_text())
    (cache / "index.json").unlink()
    (cache / files[0]).write_bytes(b"half")
    assert len(prepare(split, extraction_for(), tmp_path).train) == 18


def test_validation_clips_are_trained_on_when_asked_and_it_is_said(tone_folder, tmp_path):
    data = DataArguments(data_dir=str(tone_folder), group_pattern=GROUPS, train_on_validation=True)
    split = split_corpus(audio_folder.load(data), data, 0)
    prepared = prepare(split, extraction_for(), tmp_path)
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (24, 6, 6)
    assert not set(prepared.train["clip"][:].tolist()) & set(prepared.test["clip"][:].tolist())
    assert any("trained on as well" in note for note in split.notes)
    arguments = parse_arguments(["recipes/demo.json", "--output_dir", str(tmp_path), "--train_on_validation"])
    assert arguments.training.load_best_model_at_end is False


def test_several_processes_prepare_the_same(tone_folder, tmp_path):
    split = tone_split(tone_folder)
    one = prepare(split, extraction_for(), tmp_path / "one", num_workers=1).train
    two = prepare(split, extraction_for(), tmp_path / "two", num_workers=2).train
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["input_values"], b["input_values"])


def test_all_bad_clips_are_listed_at_once_or_skipped_and_counted(tmp_path):
    root = tmp_path / "corpus"
    for label in ("a", "b"):
        for i in range(6):
            write_tone(root / label / f"{i}.wav", seed=i)
    bad = bad_files(root / "a")
    bad.pop("gone.wav")
    split = split_corpus(audio_folder.load(DataArguments(data_dir=str(root))), DataArguments(), 0)
    with pytest.raises(UserError) as caught:
        prepare(split, extraction_for(), tmp_path)
    for name, reason in bad.items():
        assert f"a/{name}: " in str(caught.value) and reason in str(caught.value)
    prepared = prepare(split, extraction_for(), tmp_path, on_bad_audio="skip")
    assert prepared.num_bad_clips == len(bad) == 6
    assert len(prepared.train) + len(prepared.validation) + len(prepared.test) == 12
    assert any("6 clips could not be used" in note for note in prepared.split.notes)


def test_long_clips_are_covered_by_windows_in_evaluation_and_cropped_in_training(tmp_path):
    root = tmp_path / "corpus"
    for label in ("a", "b"):
        for i in range(6):
            write_tone(root / label / f"{i}.wav", seconds=0.5 + 0.3 * i, seed=i)
    split = split_corpus(audio_folder.load(DataArguments(data_dir=str(root))), DataArguments(), 0)
    extraction = extraction_for(window=8000)
    prepared = prepare(split, extraction, tmp_path)
    assert "waveform" in prepared.train.column_names and "waveform" not in prepared.test.column_names
    for table in (prepared.validation, prepared.test):
        for clip in set(table["clip"][:].tolist()):
            seconds = split.clips[int(clip)]["duration"]
            assert (np.asarray(table["clip"]) == clip).sum() == max(1, -(-round(seconds * 16000) // 8000))
    batch = Collator(extraction, False, Augmentation())(
        TrainingRows(prepared.train, 0).__getitems__(list(range(len(prepared.train))))
    )
    assert batch["input_values"].shape == (len(prepared.train), 8000)
    np.testing.assert_allclose(batch["input_values"].mean(dim=1), 0, atol=1e-4)  # normalised after the crop


def test_windows_cover_every_sample_evenly():
    extraction = extraction_for(window=1000)
    for num_samples in (1, 999, 1000, 1001, 2000, 2999, 12345):
        waveform = np.arange(num_samples, dtype=np.float32)
        windows = extraction.windows(waveform)
        assert len(windows) == -(-num_samples // 1000)
        assert set(np.concatenate(windows)) == set(waveform)
        assert len({len(window) for window in windows}) == 1


def test_the_order_depends_on_seed_and_epoch_and_buckets_by_length():
    lengths = np.random.default_rng(0).integers(1000, 9000, 403)
    sampler = LengthBucketSampler(lengths, 8, seed=1)
    first = list(sampler)
    assert (
        sorted(set(first)) == list(range(403))
        and len(first) == len(sampler) == 408
        and first == list(LengthBucketSampler(lengths, 8, seed=1))
    )
    sampler.set_epoch(1)
    assert list(sampler) != first
    shuffled = LengthBucketSampler(lengths, 8, seed=1, bucket=False)
    sampler.set_epoch(0)
    assert padding_share(sampler, 8) < 0.05 < 0.2 < padding_share(shuffled, 8)
    # Lengths do not fall within the epoch: the first and last quarter of the steps are alike.
    means = lengths[first].reshape(51, 8).mean(axis=1)
    assert abs(means[:12].mean() - means[-12:].mean()) < 2500


def test_dividing_a_step_among_batches_keeps_its_clips():
    lengths = np.random.default_rng(0).integers(1000, 9000, 64)
    whole = np.array(list(LengthBucketSampler(lengths, 8, seed=0))).reshape(-1, 8)
    assert [set(step) for step in whole] == [set(step) for step in whole.reshape(-1, 4, 2).reshape(-1, 8)]


def test_a_batch_is_padded_to_its_longest_clip_with_a_mask():
    rows = [{"input_values": tone(0.1, 200), "labels": 1}, {"input_values": tone(0.2, 200), "labels": 0}]
    batch = Collator(extraction_for(), True, Augmentation())(rows)
    assert batch["input_values"].shape == (2, 3200) and batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(dim=1).tolist() == [1600, 3200]
    assert (batch["input_values"][0, 1600:] == 0).all()


def test_augmentation_changes_what_it_says():
    rng = np.random.default_rng(0)
    waveform = tone(1.0, 400)
    assert not Augmentation()
    lengths = {len(Augmentation(speed=0.1)(waveform, 16000, rng)) for _ in range(50)}
    assert min(lengths) >= 16000 / 1.1 - 2 and max(lengths) <= 16000 / 0.9 + 2 and len(lengths) > 5
    louder = Augmentation(gain_db=6.0)(waveform, 16000, rng)
    assert 10 ** (-6 / 20) <= np.abs(louder).max() / np.abs(waveform).max() <= 10 ** (6 / 20)
    before = waveform.copy()
    masked = [int((Augmentation(time_mask_seconds=0.2)(waveform, 16000, rng) == 0).sum()) for _ in range(50)]
    assert 0 < max(masked) <= 3200
    np.testing.assert_array_equal(waveform, before)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_wav2vec2s_features_are_the_extractors_bit_for_bit(do_normalize):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=do_normalize)
    extraction = Extraction(extractor, None, 400)
    rng = np.random.default_rng(0)
    for size in (400, 401, 7777, 16000, 123457):
        waveform = (rng.standard_normal(size) * rng.uniform(1e-4, 1) + rng.uniform(-0.1, 0.1)).astype(np.float32)
        expected = extractor(waveform, sampling_rate=16000, return_tensors="np")["input_values"][0]
        before = waveform.copy()
        np.testing.assert_array_equal(extraction(waveform), expected)
        np.testing.assert_array_equal(waveform, before)
        assert extraction(waveform).dtype == np.float32


def snr_db(waveform, changed):
    return 10 * np.log10(np.mean(waveform**2) / np.mean((changed - waveform) ** 2))


def test_noise_has_the_ratio_that_was_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    waveform = tone(1.0, 400)
    ratios = [snr_db(waveform, Augmentation(noise_snr_db=(3.0, 12.0))(waveform, 16000, rng)) for _ in range(20)]
    assert min(ratios) > 2.9 and max(ratios) < 12.1 and np.ptp(ratios) > 3
    write_tone(tmp_path / "noise" / "hum.wav", 0.2, 50, sampling_rate=8000)  # shorter than the clip and of another rate
    recorded = build_augmentation(DataArguments(augment_noise_snr_db=[6.0, 6.0], augment_noise_dir=str(tmp_path / "noise")))
    changed = recorded(waveform, 16000, rng)
    assert snr_db(waveform, changed) == pytest.approx(6.0, abs=0.01)
    spectrum = np.abs(np.fft.rfft(changed - waveform))
    assert abs(int(spectrum.argmax()) - 50) <= 1
    with pytest.raises(UserError, match="augment_noise_dir"):
        build_augmentation(DataArguments(augment_noise_snr_db=[6.0, 6.0], augment_noise_dir=str(tmp_path / "nowhere")))


def test_frequency_masks_take_one_band_out_and_leave_the_rest():
    rng = np.random.default_rng(0)
    waveform = rng.standard_normal(16000).astype(np.float32)
    before = np.abs(np.fft.rfft(waveform)) ** 2
    widths = []
    for _ in range(20):
        changed = Augmentation(frequency_mask_hz=2000)(waveform, 16000, rng)
        assert changed.shape == waveform.shape
        ratio = (np.abs(np.fft.rfft(changed)) ** 2).reshape(-1, 1)[:8000].reshape(80, 100).sum(axis=1)
        gone = ratio < 0.05 * before[:8000].reshape(80, 100).sum(axis=1)  # bands of 100 Hz
        widths.append(100 * gone.sum())
        assert np.all(np.diff(np.flatnonzero(gone)) == 1)  # one band
    assert max(widths) <= 2000 and max(widths) > 1000


def test_the_telephone_passes_its_band_only():
    rng = np.random.default_rng(0)
    waveform = (0.1 * rng.standard_normal(16000)).astype(np.float32)
    power = np.abs(np.fft.rfft(pass_telephone(waveform, 16000))) ** 2  # a bin a hertz
    inside = power[500:3000].mean()
    assert power[4100:].mean() < 0.01 * inside and power[:150].mean() < 0.3 * inside


def test_augmentation_with_a_probability_leaves_that_share_alone():
    rng = np.random.default_rng(0)
    waveform = tone(0.1, 400)
    changed = [not np.array_equal(Augmentation(gain_db=6, probability=0.3)(waveform, 16000, rng), waveform) for _ in range(400)]
    assert 0.22 < np.mean(changed) < 0.38
    assert Augmentation(gain_db=6, noise_snr_db=(0, 10), probability=0.3).describe() == (
        "noise at 0 to 10 dB, gain +-6 dB, each to 30% of the clips"
    )


def test_balanced_sampling_hears_each_class_equally_often():
    labels = np.array([0] * 30 + [1] * 8 + [2] * 2)
    lengths = np.arange(1, 41)
    sampler = LengthBucketSampler(lengths, 4, seed=0, balanced_labels=labels)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices = np.array(list(sampler))
        assert len(indices) == len(sampler) == 40
        counts = np.bincount(labels[indices % 40])
        assert counts.min() >= 13 and counts.max() <= 14
        assert len(set(indices.tolist())) == 40  # a row that comes again draws anew
        assert set(indices[labels[indices % 40] == 2] % 40) == {38, 39}
    assert list(sampler) == list(sampler)


def test_what_is_random_about_a_row_depends_on_seed_epoch_and_row_alone(tone_folder, tmp_path):
    prepared = prepare(tone_split(tone_folder), extraction_for(), tmp_path, random_training=True)
    collate = Collator(extraction_for(), False, Augmentation(gain_db=10, time_mask_seconds=0.1))
    sampler = LengthBucketSampler(prepared.train["length"], 4, seed=0)
    rows = TrainingRows(prepared.train, seed=0)
    first = list(sampler)
    state = torch.get_rng_state()
    batches = [collate(rows.__getitems__(first[i : i + 4]))["input_values"] for i in range(0, len(first), 4)]
    again = [collate(rows.__getitems__(first[i : i + 4]))["input_values"] for i in reversed(range(0, len(first), 4))]
    assert all(torch.equal(a, b) for a, b in zip(batches, reversed(again), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    sampler.set_epoch(1)
    later = {index % len(rows): index for index in sampler}
    assert not torch.equal(collate([rows[first[0]]])["input_values"], collate([rows[later[first[0]]]])["input_values"])


def test_batches_are_padded_to_few_lengths_where_that_is_asked_for(tone_folder, tmp_path):
    prepared = prepare(tone_split(tone_folder), extraction_for(), tmp_path)
    rows = [prepared.train[row] | {"labels": 0} for row in range(4)]
    longest = max(len(row["input_values"]) for row in rows)
    batch = Collator(extraction_for(), True, Augmentation(), multiple=1000)(rows)
    assert batch["input_values"].shape[1] == -(-longest // 1000) * 1000 == batch["attention_mask"].shape[1]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row["input_values"]) for row in rows]


def test_thorsten_is_prepared_whole(thorsten, tmp_path):
    arguments = DataArguments(dataset_name="thorsten_emotional", data_dir=str(thorsten))

    split = split_corpus(thorsten_loader.load(arguments), arguments, 0)
    prepared = prepare(split, extraction_for(), tmp_path)
    assert len(split.clips) == 40 and split.split_by == ["sentence_id"]
    assert len(prepared.train) == 24
