"""Random changes to training clips, made on the waveform before features are extracted; never in evaluation."""

from dataclasses import dataclass

import numpy as np

from speech_emotion.audio import resample

# Speeds are drawn in steps of 1 %, so that each needs its resampling kernel only once.
SPEED_STEPS = 100


@dataclass(frozen=True)
class Augmentation:
    """How much is changed at most; all zero is no augmentation.

    Attributes:
        speed: share by which a clip plays faster or slower. Pitch and formants move along, as with another speaker's
            voice ("speed perturbation", Ko et al., Interspeech 2015).
        gain_db: decibels by which a clip is louder or softer.
        time_mask_seconds: length of the stretch that is silenced ("time masking", SpecAugment, arXiv 1904.08779).
    """

    speed: float = 0.0
    gain_db: float = 0.0
    time_mask_seconds: float = 0.0

    def __bool__(self) -> bool:
        return any((self.speed, self.gain_db, self.time_mask_seconds))

    def __call__(self, waveform: np.ndarray, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a changed copy: float32 (num_samples,) -> (other_num_samples,)."""
        if self.speed:
            steps = round(self.speed * SPEED_STEPS)
            speed = SPEED_STEPS + int(rng.integers(-steps, steps + 1))
            waveform = resample(waveform, speed, SPEED_STEPS)
        if self.gain_db:
            gain_db = rng.uniform(-self.gain_db, self.gain_db)
            waveform = waveform * np.float32(10 ** (gain_db / 20))
        if self.time_mask_seconds:
            num_masked = int(rng.integers(0, round(self.time_mask_seconds * sampling_rate) + 1))
            # Never more than half of the clip: a clip masked whole would have a label and no sound.
            num_masked = min(num_masked, len(waveform) // 2)
            start = int(rng.integers(0, len(waveform) - num_masked + 1))
            waveform = waveform.copy()
            waveform[start : start + num_masked] = 0.0
        return waveform
