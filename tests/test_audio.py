"""Every usual recording becomes mono float32 at the model's rate; what cannot be used says why."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone, write_tone
from torchaudio.transforms import Resample

from speech_emotion.audio import BadAudioError, build_resampler, decode, read_duration, resample


def from_path(path):
    return {"path": str(path), "bytes": None}


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_any_rate_and_depth_becomes_the_same_tone(rate, subtype, tmp_path):
    path = write_tone(tmp_path / "Ärger ä ö ü 情感.wav", 0.5, 440, rate, subtype=subtype)
    waveform = decode(from_path(path), 16000)
    assert waveform.dtype == np.float32 and abs(len(waveform) - 8000) <= 1
    spectrum = np.abs(np.fft.rfft(waveform))
    assert abs(np.argmax(spectrum) * 16000 / len(waveform) - 440) < 4
    assert read_duration(from_path(path)) == pytest.approx(0.5, abs=1e-3)


def test_stereo_is_averaged(tmp_path):
    left, right = tone(0.2, 300), tone(0.2, 500, seed=1)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(decode(from_path(tmp_path / "s.wav"), 16000), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_compressed_formats_need_no_ffmpeg(name, tmp_path):
    path = write_tone(tmp_path / name, 0.4, 440)
    assert len(decode(from_path(path), 16000)) == pytest.approx(6400, abs=1200)  # mp3 pads


def test_bytes_are_decoded_like_a_file(tmp_path):
    path = write_tone(tmp_path / "a.wav")
    np.testing.assert_array_equal(decode({"path": "a.wav", "bytes": path.read_bytes()}, 16000), decode(from_path(path), 16000))


def bad_files(folder):
    folder.mkdir(exist_ok=True)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "corrupt.wav").write_bytes(b"RIFF" + bytes(100))
    soundfile.write(folder / "no_samples.wav", np.zeros(0, dtype=np.float32), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(8000, dtype=np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    (folder / "a.m4a").write_bytes(b"xxxx")
    return {
        "empty.wav": "0 bytes", "corrupt.wav": "cannot be decoded", "no_samples.wav": "0 samples",
        "silent.wav": "nothing but silence", "nan.wav": "not finite", "gone.wav": "no such file",
        "a.m4a": "torchcodec",
    }  # fmt: skip


def test_each_unusable_clip_says_why(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(BadAudioError, match=reason):
            decode(from_path(tmp_path / name), 16000)


@pytest.mark.parametrize("rates", [(22050, 16000), (44100, 16000), (48000, 16000), (8000, 16000), (11025, 16000), (93, 100)])
@pytest.mark.parametrize("num_samples", [1, 5, 441, 4000, 97_020])
def test_resampling_gives_torchaudios_samples(rates, num_samples):
    waveform = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    expected = Resample(*rates)(torch.from_numpy(waveform)).numpy()
    resampled = resample(waveform, *rates)
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, expected, atol=3e-6)


def test_a_resampling_kernel_is_made_once_per_rate():
    assert build_resampler(22050, 16000) is build_resampler(22050, 16000)
