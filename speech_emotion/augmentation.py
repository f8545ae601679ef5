"""Random changes to training clips, made on the waveform before features are extracted; never in evaluation.

Noise, gain and the telephone are also what `robustness.py` tries a trained model on.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from speech_emotion.arguments import DataArguments
from speech_emotion.audio import SOUNDFILE_SUFFIXES, list_recordings, resample
from speech_emotion.errors import UserError

# Speeds are drawn in steps of 1 %, so that each needs its resampling kernel only once.
SPEED_STEPS = 100
# Power of synthetic noise falls with this power of the frequency: 0 is white noise, 1 pink, 2 as brown as a room's.
MAX_NOISE_SLOPE = 2.0
MASK_FFT_SAMPLES, MASK_HOP_SAMPLES = 512, 128
TELEPHONE_RATE, TELEPHONE_LOW_HZ, TELEPHONE_HIGH_HZ, TELEPHONE_LEVELS = 8000, 300.0, 3400.0, 256  # ITU-T G.711 and G.712


@dataclass(frozen=True)
class Augmentation:
    """How much is changed at most; all zero is no augmentation.

    Attributes:
        speed: share by which a clip plays faster or slower. Pitch and formants move along, as with another speaker's
            voice ("speed perturbation", Ko et al., Interspeech 2015).
        gain_db: decibels by which a clip is louder or softer.
        time_mask_seconds: length of the stretch that is silenced ("time masking", SpecAugment, arXiv 1904.08779).
        frequency_mask_hz: width of the band that is taken out ("frequency masking", as above).
        noise_snr_db: lowest and highest signal-to-noise ratio of added noise.
        noise_files: recordings of noise; without any, it is synthetic, between white and brown.
        probability: share of the clips that each of these is done to.
    """

    speed: float = 0.0
    gain_db: float = 0.0
    time_mask_seconds: float = 0.0
    frequency_mask_hz: float = 0.0
    noise_snr_db: tuple[float, float] | None = None
    noise_files: tuple[str, ...] = ()
    probability: float = 1.0

    def __bool__(self) -> bool:
        return any((self.speed, self.gain_db, self.time_mask_seconds, self.frequency_mask_hz, self.noise_snr_db))

    def describe(self) -> str:
        """Returns what is done to training clips, in words."""
        parts = [
            f"speed +-{self.speed:.0%}" if self.speed else "",
            f"noise at {self.noise_snr_db[0]:g} to {self.noise_snr_db[1]:g} dB" if self.noise_snr_db else "",
            f"gain +-{self.gain_db:g} dB" if self.gain_db else "",
            f"time masks up to {self.time_mask_seconds:g} s" if self.time_mask_seconds else "",
            f"frequency masks up to {self.frequency_mask_hz:g} Hz" if self.frequency_mask_hz else "",
        ]
        listed = ", ".join(filter(None, parts)) or "none"
        return listed + (f", each to {self.probability:.0%} of the clips" if self and self.probability < 1 else "")

    def _draws(self, amount: object, rng: np.random.Generator) -> bool:
        return bool(amount) and (self.probability == 1 or rng.random() < self.probability)

    def __call__(self, waveform: np.ndarray, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a changed copy: float32 (num_samples,) -> (other_num_samples,)."""
        if self._draws(self.speed, rng):
            steps = round(self.speed * SPEED_STEPS)
            speed = SPEED_STEPS + int(rng.integers(-steps, steps + 1))
            waveform = resample(waveform, speed, SPEED_STEPS)
        if self._draws(self.noise_snr_db, rng):
            noise = (
                read_noise(self.noise_files[int(rng.integers(len(self.noise_files)))], len(waveform), sampling_rate, rng)
                if self.noise_files
                else draw_noise(len(waveform), rng.uniform(0, MAX_NOISE_SLOPE), rng)
            )
            waveform = add_noise(waveform, noise, rng.uniform(*self.noise_snr_db))
        if self._draws(self.gain_db, rng):
            waveform = change_gain(waveform, rng.uniform(-self.gain_db, self.gain_db))
        if self._draws(self.frequency_mask_hz, rng):
            waveform = mask_frequencies(waveform, self.frequency_mask_hz, sampling_rate, rng)
        if self._draws(self.time_mask_seconds, rng):
            num_masked = int(rng.integers(0, round(self.time_mask_seconds * sampling_rate) + 1))
            # Never more than half of the clip: a clip masked whole would have a label and no sound.
            num_masked = min(num_masked, len(waveform) // 2)
            start = int(rng.integers(0, len(waveform) - num_masked + 1))
            waveform = waveform.copy()
            waveform[start : start + num_masked] = 0.0
        return waveform


def build_augmentation(data: DataArguments) -> Augmentation:
    """Builds what the recipe asks for.

    Raises:
        UserError: `augment_noise_dir` is no folder, or holds no recordings.
    """
    files: list[str] = []
    if data.augment_noise_dir is not None:
        folder = Path(data.augment_noise_dir).expanduser()
        files = [str(path) for path in list_recordings(folder, SOUNDFILE_SUFFIXES)]
        if not files:
            raise UserError(f"key 'augment_noise_dir': {folder} holds no recordings ({' '.join(SOUNDFILE_SUFFIXES)}).")
    return Augmentation(
        data.augment_speed,
        data.augment_gain_db,
        data.augment_time_mask_seconds,
        data.augment_frequency_mask_hz,
        tuple(data.augment_noise_snr_db) if data.augment_noise_snr_db is not None else None,
        tuple(files),
        data.augment_probability,
    )


def change_gain(waveform: np.ndarray, gain_db: float) -> np.ndarray:
    """Returns the waveform so many decibels louder, (num_samples,)."""
    return waveform * np.float32(10 ** (gain_db / 20))


def draw_noise(num_samples: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Returns Gaussian noise whose power falls with frequency ** -slope (0 white, 1 pink), float32 (num_samples,)."""
    spectrum = np.fft.rfft(rng.standard_normal(max(num_samples, 2)))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1) ** (-slope / 2)
    return np.fft.irfft(spectrum, max(num_samples, 2))[:num_samples].astype(np.float32)


def read_noise(path: str, num_samples: int, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random stretch of a recording, repeated if it is shorter, float32 (num_samples,).

    Raises:
        UserError: it cannot be read, or holds nothing.
    """
    try:
        with soundfile.SoundFile(path) as file:
            wanted = -(-num_samples * file.samplerate // sampling_rate) + 1
            file.seek(int(rng.integers(0, max(1, file.frames - wanted + 1))))
            noise = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
            noise = resample(noise, file.samplerate, sampling_rate) if len(noise) else noise
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{path}: this noise recording cannot be read ({error}). Remove it from augment_noise_dir.") from error
    if not noise.any():
        return draw_noise(num_samples, 1.0, rng)  # a silent stretch has no level to be scaled from
    return np.resize(noise, num_samples)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Returns the sum, the noise scaled to a signal-to-noise ratio of the whole clips' powers, (num_samples,)."""
    from torchaudio.functional import add_noise as mix  # here, since few runs need torchaudio

    return mix(torch.from_numpy(waveform), torch.from_numpy(noise), torch.tensor(float(snr_db))).numpy()


def mask_frequencies(waveform: np.ndarray, width_hz: float, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the waveform without a random band of at most this width, (num_samples,)."""
    from torchaudio.functional import inverse_spectrogram, spectrogram

    width = rng.uniform(0, width_hz)
    low = rng.uniform(0, max(sampling_rate / 2 - width, 0))
    window = torch.hann_window(MASK_FFT_SAMPLES)
    shape = {"pad": 0, "window": window, "n_fft": MASK_FFT_SAMPLES, "hop_length": MASK_HOP_SAMPLES,
             "win_length": MASK_FFT_SAMPLES, "normalized": False}  # fmt: skip
    padded = torch.from_numpy(np.pad(waveform, (0, max(0, MASK_FFT_SAMPLES - len(waveform)))))
    spectrum = spectrogram(padded, power=None, **shape)
    hertz = torch.linspace(0, sampling_rate / 2, len(spectrum))
    spectrum[(hertz >= low) & (hertz <= low + width)] = 0
    return inverse_spectrogram(spectrum, length=len(padded), **shape)[: len(waveform)].numpy()


def pass_telephone(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Returns what is left behind a telephone line: 300 to 3,400 Hz, 8 kHz, 8 bits of mu-law; (num_samples,)."""
    from torchaudio.functional import highpass_biquad, lowpass_biquad, mu_law_decoding, mu_law_encoding

    narrow = torch.from_numpy(resample(waveform, sampling_rate, TELEPHONE_RATE))
    narrow = lowpass_biquad(highpass_biquad(narrow, TELEPHONE_RATE, TELEPHONE_LOW_HZ), TELEPHONE_RATE, TELEPHONE_HIGH_HZ)
    peak = narrow.abs().max().clamp(min=1e-9)  # a line's level is set so that it does not clip
    coded = mu_law_decoding(mu_law_encoding(narrow / peak, TELEPHONE_LEVELS), TELEPHONE_LEVELS) * peak
    return np.resize(resample(coded.float().numpy(), TELEPHONE_RATE, sampling_rate), len(waveform))
