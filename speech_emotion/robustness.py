"""How a result holds when the recording gets worse: added noise, another loudness, a telephone line.

Acted corpora saturate; where two models are equal on clean clips, these curves tell them apart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from speech_emotion.augmentation import add_noise, change_gain, draw_noise, pass_telephone
from speech_emotion.corpora.table import read_waveforms
from speech_emotion.inference import Classifier
from speech_emotion.metrics import Evaluation, choose_clusters, score_uar

NOISE_RATIOS_DB = (20, 10, 5, 0)
NOISE_SLOPE = 1.0  # pink: between white noise, which few rooms have, and the brown of traffic
MAX_GAIN_DB = 15.0
MAX_CLIPS = 1000  # of the test; more tell hardly more, and each is computed six times

Change = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def build_conditions() -> dict[str, Change]:
    """Returns the name of each condition and what it does to a waveform of some sampling rate."""

    def make_noisy(ratio_db: float) -> Change:
        return lambda waveform, rate, rng: add_noise(waveform, draw_noise(len(waveform), NOISE_SLOPE, rng), ratio_db)

    conditions = {f"noise at {ratio} dB": make_noisy(ratio) for ratio in NOISE_RATIOS_DB}
    conditions[f"gain +-{MAX_GAIN_DB:g} dB"] = lambda waveform, rate, rng: change_gain(
        waveform, rng.uniform(-MAX_GAIN_DB, MAX_GAIN_DB)
    )
    conditions["telephone"] = lambda waveform, rate, rng: pass_telephone(waveform, rate)
    return conditions


def measure_robustness(test: Evaluation, clips: Dataset, classifier: Classifier, seed: int) -> list[dict[str, Any]]:
    """Returns the UAR in each condition, "clean" first.

    Args:
        test: the model's answers on the test clips.
        clips: the whole corpus table.
        classifier: the trained model.
        seed: of noise and gain, the same for each model, and of the clips where there are more than 1,000.

    Returns:
        Dictionaries with `condition`, `uar`, `uar_ci95` and `num_clips`. Noise is pink, its level relative to the whole
        clip; gain is drawn for each clip; the telephone passes 300 to 3,400 Hz in 8 bits of mu-law.
    """
    chosen = np.arange(len(test.clips))
    if len(chosen) > MAX_CLIPS:
        chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:MAX_CLIPS])
    rows, references = test.clips[chosen], test.references[chosen]
    clusters = choose_clusters(clips.select(test.clips))[1][chosen]

    def score(condition: str, predictions: np.ndarray) -> dict[str, Any]:
        return {"condition": condition} | score_uar(references, predictions, clusters, len(test.label_names))

    rate = classifier.extraction.sampling_rate
    results = [score("clean", test.predictions[chosen])]
    for number, (condition, change) in enumerate(build_conditions().items()):

        def changed(number: int = number, change: Change = change) -> Iterator[dict[str, Any]]:
            for row, waveform in read_waveforms(clips, rows, rate):
                rng = np.random.default_rng([seed, number, row])
                yield {"array": change(waveform, rate, rng), "sampling_rate": rate}

        answers = sorted(classifier.stream(changed()), key=lambda answer: answer.index)
        results.append(score(condition, np.array([int(answer.probabilities.argmax()) for answer in answers])))
    return results
