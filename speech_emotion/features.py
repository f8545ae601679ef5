"""Map-based feature extraction: every clip is decoded once, and what the model eats lies in Arrow files from then on.

The files are memory-mapped, so that memory does not grow with the corpus, and are found again by a fingerprint of the
clips, the feature extractor and the parameters below: neither another split nor another seed decodes anything again.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as ArraySequence
from transformers import PreTrainedModel, SequenceFeatureExtractor, Wav2Vec2FeatureExtractor

from speech_emotion.audio import BadAudioError, count_samples, decode
from speech_emotion.corpora.table import SPLITS
from speech_emotion.errors import UserError, list_offenders
from speech_emotion.modeling import min_num_samples
from speech_emotion.splits import Split, check_labels_are_learnable, clip_names

logger = logging.getLogger(__name__)

# Part of the fingerprint: raise it when a change to this module changes what is stored.
FORMAT_VERSION = 2
INDEX_FILE = "index.json"  # written last: a folder without it is a preparation that broke off
MAX_PROCESSES = 8
CLIPS_PER_WRITE = 16
NORMALIZATION_EPSILON = 1e-7  # of transformers' Wav2Vec2FeatureExtractor
MIN_CLIPS_PER_PROCESS = 256  # below, starting a process takes longer than its share of the work


@dataclass(frozen=True)
class Extraction:
    """What is done to each clip.

    Attributes:
        feature_extractor: of the model.
        window_samples: longest stretch that the model takes at once, or None for any length.
        min_samples: shorter clips are padded with silence up to it.
    """

    feature_extractor: SequenceFeatureExtractor
    window_samples: int | None
    min_samples: int
    _lengths: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the model expects."""
        return self.feature_extractor.sampling_rate

    @property
    def input_name(self) -> str:
        """The model's argument for the features, `input_values` or `input_features`."""
        return self.feature_extractor.model_input_names[0]

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        """Turns one stretch of at most `window_samples` samples into features.

        Args:
            waveform: float32, (num_samples,).

        Returns:
            float32: (num_samples,) for models that read the waveform, else a spectrogram of the extractor's own
            layout ((mel bins, frames) for Whisper, (frames, bins) for AST and wav2vec2-bert).
        """
        if len(waveform) < self.min_samples:
            waveform = np.pad(waveform, (0, self.min_samples - len(waveform)))
        if type(self.feature_extractor) is Wav2Vec2FeatureExtractor:
            return _normalize(waveform) if self.feature_extractor.do_normalize else np.asarray(waveform, dtype=np.float32)
        batch = self.feature_extractor(waveform, sampling_rate=self.sampling_rate, return_tensors="np")
        features = np.asarray(batch[self.input_name][0], dtype=np.float32)
        if features.ndim == 2 and "attention_mask" in batch and len(batch["attention_mask"][0]) == len(features):
            features = features[: int(batch["attention_mask"][0].sum())]  # wav2vec2-bert's pads to whole pairs of frames
        return features

    def length(self, num_samples: int) -> int:
        """Returns the first dimension of the features of so many samples, without computing them."""
        if self.window_samples is not None:
            num_samples = min(num_samples, self.window_samples)
        num_samples = max(num_samples, self.min_samples)
        if self.input_name == "input_values" and getattr(self.feature_extractor, "max_length", None) is None:
            return num_samples
        if num_samples not in self._lengths:
            self._lengths[num_samples] = len(self(np.zeros(num_samples, dtype=np.float32)))
        return self._lengths[num_samples]

    def count_windows(self, num_samples: int) -> int:
        """Returns how many windows cover so many samples."""
        return 1 if self.window_samples is None else max(1, -(-num_samples // self.window_samples))

    def windows(self, waveform: np.ndarray) -> list[np.ndarray]:
        """Covers a clip with as few windows as possible, evenly spaced; a clip that fits is its only window."""
        num_samples = len(waveform)
        num_windows = self.count_windows(num_samples)
        if num_windows == 1:
            return [waveform]
        starts = np.linspace(0, num_samples - self.window_samples, num_windows).round().astype(int)
        return [waveform[start : start + self.window_samples] for start in starts]


def _normalize(waveform: np.ndarray) -> np.ndarray:
    """Returns the waveform with zero mean and unit variance, (num_samples,): what wav2vec2's extractor gives, bit for bit.

    The extractor itself goes over the samples twice as often, and pads and wraps a batch of one: three times the time.
    """
    centred = waveform - waveform.mean()
    variance = np.multiply(centred, centred).sum() / np.float32(len(centred))
    centred /= np.sqrt(variance + np.float32(NORMALIZATION_EPSILON))
    return centred


def build_extraction(
    model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor, window_seconds: float | None
) -> Extraction:
    """Builds what a clip goes through for this model."""
    window_samples = round(window_seconds * feature_extractor.sampling_rate) if window_seconds else None
    min_samples = min_num_samples(model)
    if window_samples is not None and window_samples < min_samples:
        raise UserError(
            f"key 'max_length_seconds': {window_seconds} s is too short for this model, which needs at least "
            f"{min_samples / feature_extractor.sampling_rate:.3f} s."
        )
    return Extraction(feature_extractor, window_samples, min_samples)


@dataclass
class PreparedSplits:
    """What the model is trained and measured on.

    Each table is in numpy format, with the columns `labels`, `clip` (row of `split.clips`), `length` (samples or
    frames) and the model's input. The training table has `waveform` instead where something random happens to the clip
    before its features are extracted. Validation and test are sorted by length, and have several rows for a clip longer
    than the window. `features` has the rows of all splits in the corpus's order, and `cache` is the folder that holds
    them (None where nothing was prepared).
    """

    split: Split
    train: Dataset
    validation: Dataset
    test: Dataset
    num_bad_clips: int
    features: Dataset
    cache: Path | None


def prepare_splits(
    split: Split,
    extraction: Extraction,
    random_training: bool,
    on_bad_audio: str,
    cache_dir: str | None = None,
    num_workers: int | None = None,
    overwrite_cache: bool = False,
) -> PreparedSplits:
    """Decodes and extracts all clips of a split, or finds that done.

    Args:
        split: clips with their splits.
        extraction: what is done to each clip.
        random_training: keep the training clips as waveforms, for augmentation.
        on_bad_audio: "error" or "skip".
        cache_dir: where the Arrow files go; by default the cache of `datasets`.
        num_workers: processes; by default one a core.
        overwrite_cache: prepare again what is there.

    Raises:
        UserError: clips that cannot be used, all of them listed, unless they are skipped.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "speech_emotion"
    prepare = functools.partial(
        prepare_table, split.clips, extraction, folder=folder, num_workers=num_workers, overwrite=overwrite_cache
    )
    features, cache = prepare(keep_waveform=False)
    split, num_bad = set_bad_clips_apart(split, features, on_bad_audio)
    has_long_clips = len(features) > len(split.clips)  # more windows than clips
    train_source = prepare(keep_waveform=True)[0] if random_training or has_long_clips else features
    return select_splits(split, features, train_source, num_bad, cache)


def plan_splits(split: Split, extraction: Extraction, random_training: bool) -> PreparedSplits:
    """Returns the same tables as `prepare_splits`, row for row, but without features: nothing is decoded.

    The column `window` says which of the clip's windows a row is (-1: all of the clip, to be cropped or augmented), for a
    Dataset that extracts in its `__getitem__`.
    """
    audio = split.clips["audio"][:]
    num_samples = [count_samples(a, extraction.sampling_rate) for a in audio]

    def plan(whole_clips: bool) -> Dataset:
        columns: dict[str, list[Any]] = {"clip": [], "length": [], "window": [], "error": []}
        for clip, count in enumerate(num_samples):
            for window in range(1 if whole_clips else extraction.count_windows(count)):
                columns["clip"].append(clip)
                columns["length"].append(count if whole_clips else extraction.length(count))
                columns["window"].append(-1 if whole_clips else window)
                columns["error"].append("")
        return Dataset.from_dict(columns)

    features = plan(whole_clips=False)
    is_random = random_training or len(features) > len(split.clips)
    return select_splits(split, features, plan(whole_clips=True) if is_random else features, 0, None)


def select_splits(split: Split, features: Dataset, train_source: Dataset, num_bad: int, cache: Path | None) -> PreparedSplits:
    """Returns each split's rows of `features` (of `train_source`, for training), with their labels."""
    labels = np.asarray(split.clips["label"][:])
    tables = {}
    for name in SPLITS:
        source = train_source if name == "train" else features
        clip = np.asarray(source["clip"][:])
        wanted = np.concatenate([split.indices(part) for part in (split.trained if name == "train" else [name])])
        rows = np.flatnonzero(np.isin(clip, wanted))
        if name != "train":
            rows = rows[np.argsort(np.asarray(source["length"][:])[rows], kind="stable")]
        # Labels first: a column added to selected rows would have `datasets` copy all features of theirs.
        labelled = source.remove_columns("error").add_column("labels", labels[clip])
        tables[name] = labelled.select(rows).with_format("numpy")
    return PreparedSplits(split, tables["train"], tables["validation"], tables["test"], num_bad, features, cache)


def set_bad_clips_apart(split: Split, features: Dataset, on_bad_audio: str) -> tuple[Split, int]:
    """Returns the split with unusable clips moved out of train, validation and test, and how many they are.

    Raises:
        UserError: there are some, and `on_bad_audio` is "error"; or what is left cannot be learnt.
    """
    errors = features["error"][:]
    bad = {clip: error for clip, error in zip(features["clip"][:], errors, strict=True) if error}
    if not bad:
        return split, 0
    names = clip_names(split.clips)
    listed = list_offenders(f"{names[clip]}: {error}" for clip, error in bad.items())
    message = f"{len(bad)} of {len(split.clips)} clips cannot be used:\n{listed}"
    if on_bad_audio == "error":
        raise UserError(f"{message}\nMend or remove them, or go on without them: --on_bad_audio skip.")
    logger.warning(message)
    splits = ["unusable" if row in bad else name for row, name in enumerate(split.clips["split"][:])]
    clips = split.clips.remove_columns("split").add_column("split", splits)
    notes = [*split.notes, f"{len(bad)} clips could not be used and are left out."]
    left = replace(split, clips=clips, notes=notes)
    check_labels_are_learnable(left)
    return left, len(bad)


def prepare_table(
    clips: Dataset,
    extraction: Extraction,
    keep_waveform: bool,
    folder: Path,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> tuple[Dataset, Path]:
    """Maps clips to features (or to decoded waveforms), or memory-maps the result of an earlier run.

    Returns:
        One row a window (a clip, for waveforms), in the clips' order, with the columns `clip` (row of `clips`),
        `length`, `error` (empty, or why the clip cannot be used) and the features, or `waveform`; and the folder that
        holds them.
    """
    cache = folder / f"features-{fingerprint(clips, extraction, keep_waveform)}"
    processes = num_workers or min(os.cpu_count() or 1, MAX_PROCESSES, max(1, len(clips) // MIN_CLIPS_PER_PROCESS))
    features = _features(extraction, keep_waveform)
    prepare = functools.partial(_prepare_batch, extraction=extraction, keep_waveform=keep_waveform, features=features)
    table = map_once(
        clips.select_columns(["audio"]).add_column("clip", np.arange(len(clips))),
        functools.partial(prepare, is_worker=processes > 1),
        features,
        cache,
        processes,
        CLIPS_PER_WRITE,
        "Decoding" if keep_waveform else "Extracting features",
        overwrite,
    )
    return table, cache


def map_once(
    rows: Dataset,
    function: Callable[[dict[str, list[Any]]], pa.Table],
    features: Features,
    cache: Path,
    num_processes: int,
    batch_size: int,
    description: str,
    overwrite: bool = False,
) -> Dataset:
    """Maps batches of rows into Arrow files in the folder `cache`, unless they lie there already, and memory-maps them.

    Args:
        rows: what is mapped; none of its columns stays by itself.
        function: from the columns of a batch to those of `features`.
        features: of the result.
        cache: whose name says all that the result depends on.
        num_processes: that map.
        batch_size: rows that the function gets at once, and that are written at once.
        description: of the progress bar.
        overwrite: map again.
    """
    if overwrite and cache.is_dir():
        shutil.rmtree(cache)
    if not (cache / INDEX_FILE).is_file():
        _map_to_arrow(rows, function, features, cache, num_processes, batch_size, description)
    files = json.loads((cache / INDEX_FILE).read_text(encoding="utf-8"))
    return concatenate_datasets([Dataset.from_file(str(cache / name)) for name in files])


def _map_to_arrow(
    rows: Dataset, function: Callable[..., Any], features: Features, cache: Path, processes: int, batch_size: int, desc: str
) -> None:
    # In a folder of this process's own, moved into place when whole: two runs may prepare the same at once.
    work = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    datasets.enable_progress_bars()
    try:
        mapped = rows.map(
            function,
            batched=True,
            batch_size=batch_size,
            writer_batch_size=batch_size,
            remove_columns=rows.column_names,
            features=features,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(work / "part.arrow"),
            new_fingerprint=cache.name,  # ours already says all that matters, and hashing code would add more
            load_from_cache_file=False,
            desc=desc,
        )
        files = [Path(file["filename"]).name for file in mapped.cache_files]
        del mapped
        (work / INDEX_FILE).write_text(json.dumps(files), encoding="utf-8")
        if cache.is_dir() and not (cache / INDEX_FILE).is_file():
            shutil.rmtree(cache)
        if not cache.is_dir():
            work.replace(cache)
    finally:
        datasets.disable_progress_bars()
        shutil.rmtree(work, ignore_errors=True)


def _features(extraction: Extraction, keep_waveform: bool) -> Features:
    columns = {"clip": Value("int64"), "length": Value("int64"), "error": Value("string")}
    # What a bad clip's row holds, too: the features of a stretch of silence.
    example = extraction(np.zeros(extraction.min_samples, dtype=np.float32))
    if keep_waveform:
        return Features({**columns, "waveform": ArraySequence(Value("float32"))})
    if example.ndim == 1:
        return Features({**columns, extraction.input_name: ArraySequence(Value("float32"))})
    fixed = (
        extraction.window_samples is not None
        and example.shape == extraction(np.zeros(extraction.window_samples, dtype=np.float32)).shape
    )
    shape = example.shape if fixed else (None, example.shape[1])
    return Features({**columns, extraction.input_name: Array2D(shape, "float32")})


def _prepare_batch(
    batch: dict[str, list[Any]], extraction: Extraction, keep_waveform: bool, is_worker: bool, features: Features
) -> pa.Table:
    if is_worker:
        # A forked process inherits OpenMP's locks but not its threads: a parallel region in it would wait for ever.
        torch.set_num_threads(1)
    column = "waveform" if keep_waveform else extraction.input_name
    rows: dict[str, list[Any]] = {"clip": [], "length": [], "error": [], column: []}
    for clip, audio in zip(batch["clip"], batch["audio"], strict=True):
        try:
            waveform, error = decode(audio, extraction.sampling_rate), ""
        except BadAudioError as problem:
            waveform, error = np.zeros(extraction.min_samples, dtype=np.float32), str(problem)
        pieces = [waveform] if keep_waveform else [extraction(window) for window in extraction.windows(waveform)]
        for piece in pieces:
            rows["clip"].append(clip)
            rows["length"].append(len(piece))
            rows["error"].append(error)
            rows[column].append(piece)
    return build_arrow_table(rows, features)


def build_arrow_table(rows: dict[str, list[Any]], features: Features) -> pa.Table:
    """Returns rows as an Arrow table, copying each array once: `datasets` itself copies them three times.

    Args:
        rows: the columns; arrays are (num_values,) for a `Sequence` and (first, second) for an `Array2D`.
        features: of the columns.
    """
    schema, columns = features.arrow_schema, []
    for field_ in schema:
        values = rows[field_.name]
        if not isinstance(values[0], np.ndarray):
            columns.append(pa.array(values, type=field_.type))
            continue
        column = pa.array(np.concatenate([value.ravel() for value in values]))
        if values[0].ndim == 2:
            width = values[0].shape[1]
            num_lists = len(column) // width
            column = pa.ListArray.from_arrays(pa.array(np.arange(num_lists + 1) * width, pa.int32()), column)
        offsets = np.cumsum([0, *(len(value) for value in values)])
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
        if isinstance(field_.type, pa.ExtensionType):
            column = pa.ExtensionArray.from_storage(field_.type, column.cast(field_.type.storage_type))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def fingerprint(clips: Dataset, extraction: Extraction, keep_waveform: bool) -> str:
    """Returns 32 hex digits that change with the clips' files, the extractor and the parameters, and nothing else.

    A file counts as the same while its path, size and time of modification are; bytes from a Hub data set are hashed.
    """
    digest = hashlib.blake2b(digest_size=16)
    # Without a format: concatenated splits carry one that names the columns as they were before.
    flat = clips.select_columns(["audio"]).with_format(None).flatten()
    for row in flat.select_columns(["audio.path", "audio.bytes"]).iter(batch_size=1000):
        for path, content in zip(row["audio.path"], row["audio.bytes"], strict=True):
            if content is not None:
                digest.update(hashlib.blake2b(content).digest())
            elif os.path.isfile(path):
                status = os.stat(path)
                digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            else:
                digest.update(f"{path}\0missing\0".encode())
    settings = {
        "format": FORMAT_VERSION,
        "keep_waveform": keep_waveform,
        "sampling_rate": extraction.sampling_rate,
        "min_samples": extraction.min_samples,
    }
    if not keep_waveform:  # a waveform is the same for every model of its rate
        settings["window_samples"] = extraction.window_samples
        settings["feature_extractor"] = extraction.feature_extractor.to_dict()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()
