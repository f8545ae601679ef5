"""A trained model applied to recordings: batches of similar lengths, with each clip's own probabilities.

    from speech_emotion.inference import load_classifier
    classifier = load_classifier("runs/demo")
    for answer in classifier.classify(["a.wav", "b.flac"]):
        print(answer.path, answer.label, answer.probabilities)

A clip gets what `pipeline("audio-classification")` gives it alone, whatever stands beside it in the batch. Clips longer
than the window of the model (Whisper, AST) or than `max_length_seconds` are covered by several windows, whose logits
are averaged as in evaluation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from speech_emotion.arguments import ModelArguments, has_fast_bfloat16
from speech_emotion.audio import BadAudioError, count_samples, decode, resample
from speech_emotion.errors import UserError
from speech_emotion.features import Extraction, build_extraction
from speech_emotion.metrics import softmax
from speech_emotion.modeling import (
    FIXED_WINDOW_TYPES,
    KALDI_HOP_SAMPLES,
    find_window_seconds,
    get_backbone,
    load_feature_extractor,
    load_trained,
    start_behind_convolutions,
    wants_attention_mask,
)

# Of audio with its padding: what a CPU's cache likes (measured), and what fills a GPU and fits a small one.
SECONDS_PER_BATCH = {"cpu": 40.0, "cuda": 240.0, "mps": 120.0}
MAX_WINDOWS_PER_BATCH = 64
TIMELINE_WINDOW_SECONDS = 3.0  # about as long as the clips of most corpora
# Their convolutions between the layers look past a clip's end, into padding: only clips of one length go together.
LEAKY_TYPES = ("wav2vec2-conformer", "data2vec-audio")
CLIPS_PER_SORT = 512  # sorted by length together; so many waveforms are in memory at once
READER_THREADS = 2  # that decode while the model computes


@dataclass(frozen=True)
class Answer:
    """What the model says of one recording.

    Attributes:
        index: its place in what was asked.
        path: of the file, or None for an array.
        probabilities: of the classes, float32 (num_labels,), or None where the recording cannot be used.
        label: the most probable class, or None.
        error: why the recording cannot be used, or None.
    """

    index: int
    path: str | None
    probabilities: np.ndarray | None
    label: str | None
    error: str | None = None


@dataclass(frozen=True)
class Timeline:
    """What the model says of each window of one recording.

    Attributes:
        starts: of the windows, in seconds, (num_windows,).
        ends: of the windows, in seconds, (num_windows,).
        probabilities: (num_windows, num_labels).
        label_names: of the classes.
    """

    starts: np.ndarray
    ends: np.ndarray
    probabilities: np.ndarray
    label_names: list[str]

    @property
    def labels(self) -> list[str]:
        """Most probable class of each window."""
        return [self.label_names[i] for i in self.probabilities.argmax(axis=1)]


class Classifier:
    """A model, its feature extractor and its device; see `load_classifier`."""

    def __init__(self, model: PreTrainedModel, extraction: Extraction, device: torch.device, bf16: bool) -> None:
        self.model = model.to(device).eval()
        self.extraction = extraction
        self.device = device
        self.bf16 = bf16
        self.label_names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        self.masked = wants_attention_mask(model.config)
        # Group norm's statistics would take padding in: the convolutions run on each clip alone, and frames are padded
        # and masked behind them.
        self.convolutions = None
        if getattr(model.config, "feat_extract_norm", None) == "group":
            encoder = get_backbone(model).feature_extractor
            self.convolutions = type(encoder).forward.__get__(encoder)
            start_behind_convolutions(model)

    def classify(self, recordings: Sequence[str | Path | dict[str, Any]]) -> list[Answer]:
        """Returns an answer for each recording, in their order.

        Args:
            recordings: paths of files; or dictionaries with the file's `path` or `bytes`, or with an `array` (float,
                (num_samples,) and its `sampling_rate`).
        """
        answers = list(self.stream(recordings))
        return sorted(answers, key=lambda answer: answer.index)

    def stream(self, recordings: Iterable[str | Path | dict[str, Any]]) -> Iterator[Answer]:
        """Yields answers as they are computed, the clips of a few hundred recordings in the order of their lengths."""
        part: list[tuple[int, dict[str, Any]]] = []
        with ThreadPoolExecutor(READER_THREADS) as readers:
            for index, recording in enumerate(recordings):
                audio = recording if isinstance(recording, dict) else {"path": str(recording)}
                part.append((index, {"path": None, "bytes": None, "array": None} | audio))
                if len(part) == CLIPS_PER_SORT:
                    yield from self._classify_part(part, readers)
                    part = []
            yield from self._classify_part(part, readers)

    def _classify_part(self, part: list[tuple[int, dict[str, Any]]], readers: ThreadPoolExecutor) -> Iterator[Answer]:
        rate = self.extraction.sampling_rate
        # By the headers alone, so that decoding can go on beside the model.
        part = sorted(part, key=lambda item: -self._count_samples(item[1], rate))
        decoded = readers.map(self._decode, [audio for _, audio in part])
        rows: list[tuple[int, np.ndarray]] = []  # place in `part`, features of one window
        pending: dict[int, int] = {}
        logits: dict[int, list[np.ndarray]] = {}

        def run() -> Iterator[Answer]:
            clips, batch = [clip for clip, _ in rows], [features for _, features in rows]
            rows.clear()
            for clip, values in zip(clips, self.compute_logits(batch), strict=True):
                logits.setdefault(clip, []).append(values)
                pending[clip] -= 1
                if pending[clip] == 0:
                    yield self._answer(*part[clip], np.stack(logits.pop(clip)))

        for clip, (index, audio) in enumerate(part):
            result = next(decoded)
            if isinstance(result, str):
                yield Answer(index, audio["path"], None, None, result)
                continue
            pending[clip] = len(result)
            for features in result:
                if rows and self._is_full(rows, features):
                    yield from run()
                rows.append((clip, features))
        if rows:
            yield from run()

    def timeline(
        self, recording: str | Path | dict[str, Any], window_seconds: float | None = None, hop_seconds: float = 1.0
    ) -> Timeline:
        """Returns what the model says over time: an answer for each window, the last one reaching to the recording's end.

        Args:
            recording: as for `classify`.
            window_seconds: length of a window; by default 3 s, or the window of models that have one. Shorter windows tell
                more precisely when, and less surely what.
            hop_seconds: from one window's start to the next.

        Raises:
            BadAudioError: the recording cannot be used.
            UserError: a window or hop that cannot be.
        """
        rate = self.extraction.sampling_rate
        own = self.extraction.window_samples
        window = round(window_seconds * rate) if window_seconds else min(own or math.inf, round(TIMELINE_WINDOW_SECONDS * rate))
        hop = round(hop_seconds * rate)
        if own is not None and window > own:
            raise UserError(f"window: {window / rate:g} s is longer than the model's {own / rate:g} s. Take that or less.")
        if window < self.extraction.min_samples or hop < 1:
            least = self.extraction.min_samples / rate
            raise UserError(f"window and hop: must be at least {least:g} s and above 0 s.")
        audio = recording if isinstance(recording, dict) else {"path": str(recording)}
        waveform = self._read({"path": None, "bytes": None, "array": None} | audio)
        last = max(0, len(waveform) - window)
        starts = sorted({*range(0, last + 1, hop), last})
        logits = []
        per_batch = max(1, min(MAX_WINDOWS_PER_BATCH, int(self._seconds_per_batch() * rate / window)))
        for first in range(0, len(starts), per_batch):
            features = [self.extraction(waveform[start : start + window]) for start in starts[first : first + per_batch]]
            logits.append(self.compute_logits(features))
        ends = [min(start + window, len(waveform)) / rate for start in starts]
        return Timeline(np.array(starts) / rate, np.array(ends), softmax(np.concatenate(logits)), self.label_names)

    def _seconds_per_batch(self) -> float:
        return SECONDS_PER_BATCH.get(self.device.type, SECONDS_PER_BATCH["cpu"])

    def _is_full(self, rows: list[tuple[int, np.ndarray]], features: np.ndarray) -> bool:
        if self.model.config.model_type in LEAKY_TYPES and len(rows[0][1]) != len(features):
            return True
        # Spectrograms are those of a fixed window, or (wav2vec2-bert) have a frame for each 20 ms.
        samples = max(len(rows[0][1]), len(features)) * (1 if features.ndim == 1 else KALDI_HOP_SAMPLES * 2)
        samples = self.extraction.window_samples or samples
        limit = self._seconds_per_batch() * self.extraction.sampling_rate
        return len(rows) >= MAX_WINDOWS_PER_BATCH or (len(rows) + 1) * samples > limit

    def _count_samples(self, audio: dict[str, Any], rate: int) -> int:
        if audio["array"] is not None:
            return len(audio["array"]) * rate // audio["sampling_rate"]
        return count_samples(audio, rate)

    def _decode(self, audio: dict[str, Any]) -> list[np.ndarray] | str:
        """Returns the features of each of the clip's windows, or why there are none."""
        try:
            waveform = self._read(audio)
        except BadAudioError as error:
            return str(error)
        return [self.extraction(window) for window in self.extraction.windows(waveform)]

    def _read(self, audio: dict[str, Any]) -> np.ndarray:
        rate = self.extraction.sampling_rate
        if audio["array"] is None:
            return decode(audio, rate)
        if len(audio["array"]) == 0:
            raise BadAudioError("holds 0 samples")
        return resample(np.asarray(audio["array"], dtype=np.float32), audio["sampling_rate"], rate)

    @torch.inference_mode()
    def compute_logits(self, features: list[np.ndarray]) -> np.ndarray:
        """Returns the logits of one batch of windows, float32 (num_windows, num_labels).

        Args:
            features: of each window, as the run's `Extraction` gives them, of any lengths.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [torch.from_numpy(array).to(self.device) for array in features]
            if self.convolutions is not None:
                parts = [self.convolutions(part[None])[0].T for part in parts]  # (frames, channels)
            batch = torch.nn.utils.rnn.pad_sequence(
                parts, batch_first=True, padding_value=self.extraction.feature_extractor.padding_value
            )
            inputs = {self.extraction.input_name: batch}
            if self.masked or self.convolutions is not None:
                lengths = torch.tensor([len(part) for part in parts], device=self.device)
                inputs["attention_mask"] = (torch.arange(batch.shape[1], device=self.device) < lengths[:, None]).long()
            return self.model(**inputs).logits.float().cpu().numpy()

    def _answer(self, index: int, audio: dict[str, Any], window_logits: np.ndarray) -> Answer:
        probabilities = softmax(window_logits.mean(axis=0, keepdims=True))[0]
        return Answer(index, audio["path"], probabilities, self.label_names[int(probabilities.argmax())])


def load_classifier(
    model: str | Path, device: str | None = None, max_length_seconds: float | None = None, bf16: bool = False
) -> Classifier:
    """Loads a trained model for inference.

    Args:
        model: a run's output folder, or a Hub id.
        device: as torch names it; by default the accelerator if there is one, else the CPU.
        max_length_seconds: the window of models that take any length; by default a clip is taken whole.
        bf16: compute in bfloat16, where the device does that fast: quicker, and within about 0.01 of float32's
            probabilities rather than 0.0001.

    Raises:
        UserError: no such model, or one without an audio-classification head.
    """
    arguments = ModelArguments(model_name_or_path=str(model))
    loaded = load_trained(str(model))
    feature_extractor = load_feature_extractor(arguments)
    window_seconds = find_window_seconds(loaded, feature_extractor)
    if loaded.config.model_type in FIXED_WINDOW_TYPES and max_length_seconds is not None:
        raise UserError(f"max_length_seconds: the window of {model} is {window_seconds:g} s, and was set when it was trained.")
    extraction = build_extraction(loaded, feature_extractor, window_seconds or max_length_seconds)
    chosen = (
        torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    )
    return Classifier(loaded, extraction, chosen, bf16 and has_fast_bfloat16(use_cpu=chosen.type == "cpu"))
