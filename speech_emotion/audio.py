"""One recording becomes mono float32 samples at the model's sampling rate."""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

# What libsndfile reads by itself; any other container needs torchcodec and FFmpeg.
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64")
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp")
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + OTHER_SUFFIXES

# Of the resampler: phases multiplied together, the fewest worth a matrix, and what counts as no tap at all.
PHASES_PER_BLOCK, MIN_PHASES, NEGLIGIBLE_TAP = 32, 128, 1e-12

# Below the quantization step of 16-bit audio (2^-15) there is no sound at all.
SILENCE_PEAK = 2.0**-16


class BadAudioError(Exception):
    """A recording that cannot be used, with the reason."""


def list_recordings(folder: Path, suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[Path]:
    """Returns the files below a folder whose names end as recordings' do, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def read_duration(audio: dict[str, Any]) -> float:
    """Returns the seconds that a recording's header states, or nan where it cannot be read.

    Args:
        audio: `{"path": str or None, "bytes": bytes or None}`, as `datasets.Audio(decode=False)` gives it.
    """
    try:
        info = soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"])
        return info.frames / info.samplerate
    except (soundfile.LibsndfileError, OSError, ZeroDivisionError, TypeError):
        return float("nan")


def read_native(audio: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Returns a recording as it is, mono float32 (num_samples,), and its own sampling rate.

    Raises:
        BadAudioError: it cannot be decoded.
    """
    suffix = Path(audio["path"] or "").suffix.lower()
    waveform, rate = (_decode_with_torchcodec if suffix in OTHER_SUFFIXES else _decode_with_soundfile)(audio)
    return (waveform.mean(axis=1) if waveform.ndim == 2 else waveform), rate


def count_samples(audio: dict[str, Any], sampling_rate: int) -> int:
    """Returns how many samples `decode` gives at this rate, from the file's header alone (0 if it cannot be read)."""
    try:
        info = soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"])
    except (soundfile.LibsndfileError, OSError, TypeError):
        return 0
    return -(-info.frames * sampling_rate // info.samplerate)


def decode(audio: dict[str, Any], sampling_rate: int) -> np.ndarray:
    """Decodes one recording.

    Args:
        audio: `{"path": str or None, "bytes": bytes or None}`.
        sampling_rate: samples per second of the result.

    Returns:
        float32 array of shape (num_samples,): the mean of all channels, resampled.

    Raises:
        BadAudioError: missing, empty, corrupt, silent, or not finite.
    """
    if audio["bytes"] is None and not Path(audio["path"]).is_file():
        raise BadAudioError("no such file")
    num_bytes = len(audio["bytes"]) if audio["bytes"] is not None else Path(audio["path"]).stat().st_size
    if num_bytes == 0:
        raise BadAudioError("the file is empty (0 bytes)")
    suffix = Path(audio["path"] or "").suffix.lower()
    waveform, source_rate = (_decode_with_torchcodec if suffix in OTHER_SUFFIXES else _decode_with_soundfile)(audio)
    if waveform.shape[0] == 0:
        raise BadAudioError("holds 0 samples")
    waveform = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
    peak = max(waveform.max(), -waveform.min())  # not a number if any sample is none
    if not np.isfinite(peak):
        raise BadAudioError("holds samples that are not finite numbers")
    if peak < SILENCE_PEAK:
        raise BadAudioError("holds nothing but silence")
    return resample(waveform, source_rate, sampling_rate)


def _decode_with_soundfile(audio: dict[str, Any]) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]) as file:
            if file.subtype != "PCM_16":
                return file.read(dtype="float32"), file.samplerate
            # The same numbers, three times as fast as libsndfile converts them.
            return file.read(dtype="int16").astype(np.float32) * np.float32(2.0**-15), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).rpartition(": ")[2].rstrip(".") or type(error).__name__
        raise BadAudioError(f"cannot be decoded ({reason})") from error


def _decode_with_torchcodec(audio: dict[str, Any]) -> tuple[np.ndarray, int]:
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError) as error:
        suffix = Path(audio["path"] or "").suffix
        raise BadAudioError(f"{suffix} needs torchcodec and FFmpeg, which are not here; convert it to WAV or FLAC") from error
    try:
        samples = AudioDecoder(audio["bytes"] if audio["bytes"] is not None else audio["path"]).get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise BadAudioError(f"cannot be decoded ({str(error).splitlines()[0]})") from error
    return samples.data.numpy().T, samples.sample_rate  # (num_samples, channels)


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Returns the waveform at the target rate: (num_samples,) -> (ceil(num_samples * target / source),), float32."""
    if source_rate == target_rate:
        return waveform
    return build_resampler(source_rate, target_rate)(waveform)


@functools.cache
def build_resampler(source_rate: int, target_rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the band-limited resampler of `torchaudio.transforms.Resample`, without its multiplications by zero.

    The kernel is made once, where torchaudio's functional form makes it at each call. It has a row for each of the output's
    phases, each as long as a whole period of the input though nearly all of it is zero: from 22,050 to 16,000 Hz 459 taps,
    of which 17 count. Taking neighbouring phases together, only the taps that one of them needs are multiplied.

    Source: https://ccrma.stanford.edu/~jos/resample, by way of torchaudio's kernel.
    """
    from torchaudio.transforms import Resample  # here, since a run on the model's own rate never needs it

    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    transform = Resample(source_rate, target_rate)
    kernel, width = transform.kernel[:, 0], transform.width  # (target, taps)
    # Several periods at once where one is short, so that matrices are worth multiplying.
    periods = -(-MIN_PHASES // target)
    num_taps = kernel.shape[1]
    rows = torch.zeros(periods * target, (periods - 1) * source + num_taps)
    for period in range(periods):
        rows[period * target : (period + 1) * target, period * source : period * source + num_taps] = kernel
    step = periods * source
    blocks = []
    for first in range(0, len(rows), PHASES_PER_BLOCK):
        block = rows[first : first + PHASES_PER_BLOCK]
        used = torch.nonzero(block.abs().amax(dim=0) > NEGLIGIBLE_TAP).ravel()
        low, high = int(used[0]), int(used[-1]) + 1
        blocks.append((first, first + len(block), low, block[:, low:high].T.contiguous()))

    def apply(waveform: np.ndarray) -> np.ndarray:
        num_frames = len(waveform) // step + 1
        samples = np.zeros((num_frames - 1) * step + rows.shape[1] + width, dtype=np.float32)
        samples[width : width + len(waveform)] = waveform
        padded = torch.from_numpy(samples)
        result = torch.empty(num_frames, len(rows))
        for first, last, low, taps in blocks:
            frames = padded.as_strided((num_frames, len(taps)), (step, 1), low)
            torch.mm(frames, taps, out=result[:, first:last])
        return result.ravel()[: -(-len(waveform) * target // source)].numpy()

    return apply
