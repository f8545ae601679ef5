"""What could stand for the label without being heard as emotion: a clip's length, its loudness, its bandwidth, its room.

A corpus whose classes were recorded in different sessions can be classified by the microphone. So each run asks how far a
logistic regression gets from such cues alone, and how far the model gets on the parts of the test clips where nobody
speaks. (Recording conditions that tell the class: arXiv 2409.12170.)
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from speech_emotion.corpora.table import read_waveforms
from speech_emotion.inference import Classifier
from speech_emotion.metrics import Evaluation, choose_clusters, score_uar
from speech_emotion.splits import Split

logger = logging.getLogger(__name__)

FRAME_SECONDS, HOP_SECONDS = 0.025, 0.010
# A frame is speech where it is louder than the clip's floor by this share of the distance from floor to peak, in dB ...
SPEECH_LEVEL = 0.35
FLOOR_PERCENTILE, PEAK_PERCENTILE = 5, 95
MIN_RANGE_DB = 15.0  # ... and in a clip whose loudness varies less, all frames are, since nothing else can be told
MARGIN_SECONDS = 0.05  # on either side of speech, which begins and ends softly
MIN_NON_SPEECH_SECONDS = 0.1
NUM_BANDS = 24  # of the non-speech spectrum
ROLL_OFFS = (0.5, 0.85, 0.95, 0.99)  # shares of the energy below a frequency
QUIETEST_DB = -100.0

NON_SPEECH = "parts without speech"
MAX_CLIPS = 4000  # to fit a logistic regression on some twenty numbers, and to test it on
REGRESSION_C, REGRESSION_ITERATIONS = 1.0, 500
EXPLAINED_SHARE = 0.5  # of what the model is above chance, from which on a shortcut is warned of


@dataclass
class Cues:
    """What is measured of one clip, each (num_values,); `non_speech` is None where hardly any of it is without speech.

    `silent` are the samples without speech, (num_samples,).
    """

    duration: np.ndarray
    loudness: np.ndarray
    bandwidth: np.ndarray
    non_speech: np.ndarray | None
    silent: np.ndarray


def find_speech(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Returns which samples are speech, or within 50 ms of it, bool (num_samples,), by their loudness within the clip."""
    hop = round(HOP_SECONDS * sampling_rate)
    levels = _compute_levels(_cut_frames(waveform, sampling_rate))
    floor, peak = np.percentile(levels, [FLOOR_PERCENTILE, PEAK_PERCENTILE])
    if peak - floor < MIN_RANGE_DB:
        return np.ones(len(waveform), dtype=bool)
    is_speech = levels > floor + SPEECH_LEVEL * (peak - floor)
    samples = np.repeat(is_speech, hop)[: len(waveform)]
    samples = np.pad(samples, (0, len(waveform) - len(samples)), mode="edge")
    # Speech reaches a frame and the margin further on either side.
    reach = round((MARGIN_SECONDS + FRAME_SECONDS) * sampling_rate)
    near = np.cumsum(np.concatenate([np.zeros(reach + 1), samples, np.zeros(reach)]))
    return near[2 * reach + 1 :] - near[: -2 * reach - 1] > 0


def cut_non_speech(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Returns the stretches without speech, joined, (num_samples,); empty where they last less than 0.1 s together."""
    silent = waveform[~find_speech(waveform, sampling_rate)]
    return silent if len(silent) >= MIN_NON_SPEECH_SECONDS * sampling_rate else silent[:0]


def measure_cues(waveform: np.ndarray, sampling_rate: int) -> Cues:
    """Returns the cues of a clip, (num_samples,): its length (log seconds); its root mean square and peak (dB); the
    frequencies below which 50, 85, 95 and 99 % of its energy lie (log Hz); and of the parts without speech the mean spectrum
    (dB in 24 bands of equal width on the mel scale).
    """
    rms = 10 * np.log10(np.mean(waveform.astype(np.float64) ** 2) + 1e-10)
    peak = 20 * np.log10(np.abs(waveform).max() + 1e-5)
    power = _compute_power(_cut_frames(waveform, sampling_rate))
    hertz = np.linspace(0, sampling_rate / 2, len(power))
    shares = np.cumsum(power) / max(power.sum(), 1e-20)
    roll_offs = hertz[np.minimum([np.searchsorted(shares, share) for share in ROLL_OFFS], len(hertz) - 1)]
    silent = cut_non_speech(waveform, sampling_rate)
    bands = None
    if len(silent):
        edges = np.linspace(0, _to_mel(sampling_rate / 2), NUM_BANDS + 1)
        band_of_bin = np.clip(np.digitize(_to_mel(hertz), edges) - 1, 0, NUM_BANDS - 1)
        power = _compute_power(_cut_frames(silent, sampling_rate))
        sums = np.bincount(band_of_bin, power, NUM_BANDS) / np.maximum(np.bincount(band_of_bin, minlength=NUM_BANDS), 1)
        bands = np.maximum(10 * np.log10(sums + 1e-20), QUIETEST_DB)
    return Cues(
        np.array([np.log(len(waveform) / sampling_rate)]),
        np.array([rms, peak]),
        np.log(np.maximum(roll_offs, 1.0)),
        bands,
        silent,
    )


def _cut_frames(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """(num_samples,) -> (frames, samples of a frame)."""
    size, hop = round(FRAME_SECONDS * sampling_rate), round(HOP_SECONDS * sampling_rate)
    padded = np.pad(waveform, (0, max(0, size - len(waveform))))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]


def _compute_levels(frames: np.ndarray) -> np.ndarray:
    return np.maximum(10 * np.log10(np.mean(frames.astype(np.float64) ** 2, axis=1) + 1e-20), QUIETEST_DB)


def _compute_power(frames: np.ndarray) -> np.ndarray:
    """(frames, samples) -> mean power of each frequency, (bins,)."""
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(frames.shape[1]), axis=1)) ** 2
    return spectrum.mean(axis=0) / frames.shape[1]


def _to_mel(hertz: np.ndarray | float) -> np.ndarray | float:
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def audit_shortcuts(split: Split, test: Evaluation, classifier: Classifier, seed: int) -> dict[str, Any]:
    """Measures how much of a result cues other than emotion can explain.

    Args:
        split: clips with their splits.
        test: the model's answers on the test clips.
        classifier: the trained model.
        seed: of the draw of clips, where there are more than 4,000 to train or to test on.

    Returns:
        `model` and `chance` (UAR of either, the model's with `uar_ci95`), `shortcuts` (a dictionary each with `cue`, `uar`,
        `uar_ci95`, `num_clips` and `explains`, the share of the model's distance from chance) and `warnings`, as sentences. A
        regression is fitted on training clips and tested on test clips.
    """
    clips, rate = split.clips, classifier.extraction.sampling_rate
    labels = np.asarray(clips["label"][:])
    train_rows = _draw(np.concatenate([split.indices(name) for name in split.trained]), seed)
    train = _Measured.of(clips, train_rows, rate, keep_silent=False)
    tested = _Measured.of(clips, _draw(test.clips, seed), rate, keep_silent=True)
    tested_at = {row: i for i, row in enumerate(test.clips)}
    clusters = choose_clusters(clips.select(test.clips))[1]
    chance = 1 / len(set(test.references))

    def score(predictions: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        places = np.array([tested_at[row] for row in rows])
        return score_uar(test.references[places], predictions, clusters[places], len(test.label_names))

    model = score(test.predictions, test.clips)
    shortcuts = []
    for cue, names in (
        ("duration", ("duration",)),
        ("loudness", ("loudness",)),
        ("bandwidth", ("bandwidth",)),
        ("duration, loudness and bandwidth", ("duration", "loudness", "bandwidth")),
        (NON_SPEECH, ("non_speech",)),
    ):
        (train_rows_, train_values), (test_rows, test_values) = train.select(names), tested.select(names)
        if len(set(labels[train_rows_])) < 2 or len(set(labels[test_rows])) < 2:
            continue
        predictions = _regress(train_values, labels[train_rows_], test_values)
        shortcuts.append({"cue": cue, "by": "logistic regression"} | score(predictions, test_rows))
    # The model itself, where nobody speaks.
    silent = [(row, cues.silent) for row, cues in zip(tested.rows, tested.cues, strict=True) if len(cues.silent)]
    if len({labels[row] for row, _ in silent}) >= 2:
        answers = classifier.classify([{"array": part, "sampling_rate": rate} for _, part in silent])
        predictions = np.array([int(answer.probabilities.argmax()) for answer in answers])
        rows = np.array([row for row, _ in silent])
        shortcuts.append({"cue": NON_SPEECH, "by": "the model"} | score(predictions, rows))
    for entry in shortcuts:
        distance = model["uar"] - chance
        entry["explains"] = float(np.clip((entry["uar"] - chance) / distance, 0, 1)) if distance > 0 else 0.0
    warnings = [_warn(entry, model["uar"]) for entry in shortcuts if _is_shortcut(entry, chance)]
    return {"model": model, "chance": chance, "shortcuts": shortcuts, "warnings": warnings}


def _draw(rows: np.ndarray, seed: int) -> np.ndarray:
    """Returns at most `MAX_CLIPS` of the rows, in their order."""
    return rows if len(rows) <= MAX_CLIPS else np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_CLIPS])


def _is_shortcut(entry: dict[str, Any], chance: float) -> bool:
    return entry["uar_ci95"][0] > chance and entry["explains"] >= EXPLAINED_SHARE


def _warn(entry: dict[str, Any], model_uar: float) -> str:
    who = "the model itself gets" if entry["by"] == "the model" else "a logistic regression gets"
    meaning = (
        "The recording, not the voice, tells the classes apart."
        if entry["cue"] == NON_SPEECH
        else "It may belong to the emotion (anger is loud) or to the recording, but the model may have learnt no more than it."
    )
    return (
        f"SHORTCUT: from {entry['cue']} alone {who} {entry['uar']:.3f} UAR, {entry['explains']:.0%} of what separates "
        f"the model's {model_uar:.3f} from chance. {meaning}"
    )


@dataclass
class _Measured:
    """Cues of some clips; `rows` are those of the corpus table."""

    rows: np.ndarray
    cues: list[Cues]

    @classmethod
    def of(cls, clips: Dataset, rows: np.ndarray, sampling_rate: int, keep_silent: bool) -> "_Measured":
        used, measured = [], []
        for row, waveform in read_waveforms(clips, rows, sampling_rate):
            cues = measure_cues(waveform, sampling_rate)
            # What nobody listens to is not kept in memory.
            measured.append(cues if keep_silent else replace(cues, silent=cues.silent[:0]))
            used.append(row)
        return cls(np.array(used), measured)

    def select(self, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows that have these cues, and the cues, (num_rows, num_values)."""
        values = [[getattr(cues, name) for name in names] for cues in self.cues]
        has_all = [i for i, parts in enumerate(values) if all(part is not None for part in parts)]
        matrix = np.array([np.concatenate(values[i]) for i in has_all]) if has_all else np.zeros((0, 1))
        return self.rows[has_all], matrix


def _regress(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns the classes that a logistic regression, fitted on `train`, gives `test`, (num_clips,)."""
    from sklearn.linear_model import LogisticRegression  # here, since only a run's end needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=REGRESSION_C, max_iter=REGRESSION_ITERATIONS, class_weight="balanced")
    return make_pipeline(StandardScaler(), regression).fit(train, labels).predict(test)
