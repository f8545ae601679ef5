"""The common table: what every corpus becomes, and all that later stages know of it."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

from speech_emotion.audio import BadAudioError, decode, list_recordings, read_duration
from speech_emotion.errors import UserError, list_offenders

logger = logging.getLogger(__name__)

# What may be kept apart between splits, the widest first: two speakers of one session hear and answer each other.
GROUP_COLUMNS = ("session_id", "speaker_id", "sentence_id")
SPLITS = ("train", "validation", "test")
SPLIT_SPELLINGS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

# `audio` is made as the plain structure that Audio stores and cast afterwards: encoding through Audio itself would
# import torchcodec, which needs FFmpeg.
COLUMNS = Features(
    {
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "speaker_id": Value("string"),
        "sentence_id": Value("string"),
        "session_id": Value("string"),
        "duration": Value("float32"),
    }
)


@dataclass(frozen=True)
class CorpusFacts:
    """What a model card tells of a corpus.

    Attributes:
        title: its name.
        language: ISO 639-1 codes.
        nature: "acted", or how else the emotions came about.
        speakers: who speaks, in words.
        license: of the recordings, in words.
        url: where it is described.
        citation: of the publication.
    """

    title: str
    language: tuple[str, ...]
    nature: str
    speakers: str
    license: str
    url: str
    citation: str


class Clip(TypedDict):
    """One recording, as a loader found it; `speaker_id`, `sentence_id` and `split` are None where unknown.

    `session_id` is the dialogue or recording session of several speakers, for corpora that have such.
    """

    path: str
    label: str
    speaker_id: str | None
    sentence_id: str | None
    split: str | None
    session_id: NotRequired[str | None]


def build_table(clips: list[Clip], label_names: list[str] | None = None) -> Dataset | DatasetDict:
    """Builds the common table.

    Args:
        clips: one entry a recording.
        label_names: the classes in their order; by default the clips' own, sorted.

    Returns:
        A `Dataset` with the columns audio, label, speaker_id, sentence_id, session_id and duration (seconds, from
        the file's header), or a `DatasetDict` of such where the clips name their splits.
    """
    label_names = label_names or sorted({clip["label"] for clip in clips})
    features = Features({**COLUMNS, "label": ClassLabel(names=label_names)})

    def build(part: list[Clip]) -> Dataset:
        audio = [{"path": clip["path"], "bytes": None} for clip in part]
        table = Dataset.from_dict(
            {
                "audio": audio,
                "label": [label_names.index(clip["label"]) for clip in part],
                "speaker_id": [clip["speaker_id"] for clip in part],
                "sentence_id": [clip["sentence_id"] for clip in part],
                "session_id": [clip.get("session_id") for clip in part],
                "duration": [read_duration(a) for a in audio],
            },
            features=features,
        )
        return table.cast_column("audio", Audio(decode=False))

    if not any(clip["split"] for clip in clips):
        return build(clips)
    parts = {split: [clip for clip in clips if clip["split"] == split] for split in SPLITS}
    return DatasetDict({split: build(part) for split, part in parts.items() if part})


def keep_labels(corpus: Dataset | DatasetDict, label_names: list[str]) -> Dataset | DatasetDict:
    """Returns the clips of these classes only, the classes in this order.

    Raises:
        UserError: the corpus has no such class.
    """
    if isinstance(corpus, DatasetDict):
        return DatasetDict({split: keep_labels(part, label_names) for split, part in corpus.items()})
    old_names = corpus.features["label"].names
    for name in label_names:
        if name not in old_names:
            near = difflib.get_close_matches(name, old_names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"key 'class_names': the corpus has no class '{name}', but {', '.join(old_names)}.{hint}")
    new_index = np.array([label_names.index(name) if name in label_names else -1 for name in old_names])
    labels = new_index[np.asarray(corpus["label"][:])]
    kept = np.flatnonzero(labels >= 0)
    # Added before rows are selected, and with its type: otherwise `datasets` would copy the clips, audio and all.
    label = ClassLabel(names=label_names)
    table = corpus.remove_columns("label").add_column("label", np.maximum(labels, 0), feature=label)
    return table.select_columns(corpus.column_names).select(kept)


def read_split_name(name: str | None, where: str) -> str | None:
    """Returns train, validation or test for any usual spelling, and None for no name at all.

    Raises:
        UserError: a name that is none of them.
    """
    if name is None or not str(name).strip():
        return None
    split = SPLIT_SPELLINGS.get(str(name).strip().lower())
    if split is None:
        raise UserError(f"{where}: '{name}' is not a split: use train, validation or test.")
    return split


def check_labels(labels: Iterable[str | None], where: str) -> None:
    """Raises `UserError` where labels are missing or fewer than two classes are left."""
    labels = list(labels)
    missing = [i for i, label in enumerate(labels) if label is None or not str(label).strip()]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(labels)} clips have no label:\n" + list_offenders(f"row {i + 1}" for i in missing)
        )
    classes = sorted({str(label) for label in labels})
    if len(classes) < 2:
        raise UserError(f"{where}: a classifier needs at least two classes; found {classes or 'no clips at all'}.")


def compile_group_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compiles `group_pattern`.

    Raises:
        UserError: not a regular expression, or without the groups speaker_id or sentence_id.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"key 'group_pattern': '{pattern}' is not a regular expression ({error}).") from error
    if not {"speaker_id", "sentence_id"} & set(compiled.groupindex):
        raise UserError(f"key 'group_pattern': '{pattern}' names neither group. Write it as in '(?P<speaker_id>spk\\d+)'.")
    return compiled


def existing_folder(path: str | None, dataset_name: str) -> Path:
    """Returns `data_dir` as a path.

    Raises:
        UserError: it is not given or not a folder.
    """
    if path is None:
        raise UserError(f"key 'data_dir' is missing: dataset_name '{dataset_name}' needs the folder of the recordings.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"key 'data_dir': {folder} is not a folder. Name the folder that holds the recordings.")
    return folder


def find_named_recordings(
    root: Path, pattern: re.Pattern[str], corpus: str, example: str, num_published: int | None = None
) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yields the recordings below a folder whose names are those of a corpus, in the order of their paths.

    Recordings of other names are told and left out, and so is it if there are fewer than were published.

    Args:
        root: folder to search.
        pattern: that the path below `root`, with forward slashes, must contain up to its end.
        corpus: its name, for messages.
        example: a path as the corpus has them.
        num_published: recordings of the published corpus.

    Raises:
        UserError: none has such a name.
    """
    paths = list_recordings(root)
    names = [path.relative_to(root).as_posix() for path in paths]
    matches = [re.search(rf"(?:^|/){pattern.pattern}$", name, pattern.flags) for name in names]
    found = sum(match is not None for match in matches)
    if not found:
        raise UserError(f"key 'data_dir': {root} is not {corpus}: expected recordings such as {example} in it.")
    others = [name for name, match in zip(names, matches, strict=True) if match is None]
    if others:
        logger.warning(
            f"{root}: {len(others)} recordings are not named as {corpus}'s are, and left out:\n{list_offenders(others)}"
        )
    if num_published is not None and found < num_published:
        logger.warning(f"{root}: {found} of the {num_published:,} recordings that {corpus} has.")
    yield from ((path, match) for path, match in zip(paths, matches, strict=True) if match is not None)


def read_waveforms(clips: Dataset, rows: Iterable[int], sampling_rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the rows of the corpus table whose recording can be used, and its samples, float32 (num_samples,)."""
    audio = clips.select_columns(["audio"]).with_format(None)
    for row in rows:
        try:
            yield int(row), decode(audio[int(row)]["audio"], sampling_rate)
        except BadAudioError:
            continue  # told of already, and left out of the splits
