"""Train, validation and test that share no speaker, or no sentence, or neither.

A random split of clips leaks: the same sentence, or the same voice, stands on both sides, and the test measures how
well it is remembered.
"""

import hashlib
import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Dataset, DatasetDict, concatenate_datasets

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import GROUP_COLUMNS, SPLITS
from speech_emotion.errors import UserError, list_offenders

logger = logging.getLogger(__name__)

SPLITS_FILE = "splits.csv"
NUM_DRAWS = 200  # random assignments of groups, of which the best stratified is taken


@dataclass
class Split:
    """Clips with their split, and what is to be said of it.

    `clips` is the common table with the further column `split`, in the corpus's order; `split_by` the columns kept
    apart (empty where clips were drawn singly or the corpus gives its splits); `notes` are sentences for the results;
    `trained` the splits that are trained on; `overlaps` the rows of `compute_overlaps`.
    """

    clips: Dataset
    split_by: list[str]
    leaked: dict[str, int]
    notes: list[str]
    trained: tuple[str, ...] = ("train",)
    overlaps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def speaker_dependence(self) -> str:
        """Whether test speakers are heard in training: "speaker-dependent", "speaker-independent" or "unknown"."""
        speakers = np.asarray(self.clips["speaker_id"][:], dtype=object)
        test = speakers[self.indices("test")]
        train = speakers[np.concatenate([self.indices(name) for name in self.trained])]
        if set(test) & (set(train) - {None}):
            return "speaker-dependent"
        return "unknown" if None in set(test) | set(train) else "speaker-independent"

    def indices(self, split: str) -> np.ndarray:
        """Returns the rows of `clips` in this split, int64 of shape (num_clips,)."""
        return np.flatnonzero(np.asarray(self.clips["split"][:]) == split)


def split_corpus(corpus: Dataset | DatasetDict, data: DataArguments, seed: int) -> Split:
    """Splits a corpus, or takes the splits it comes with; missing ones are drawn from train.

    Args:
        corpus: the common table.
        data: `split_by`, fractions, named groups and limits.
        seed: the same seed gives the same split on any machine.

    Raises:
        UserError: too few groups, a column of groups that the corpus lacks, given splits that share groups, or labels
            that occur in validation or test only.
    """
    if isinstance(corpus, DatasetDict) and data.ignore_splits:
        corpus = concatenate_datasets([corpus[name] for name in SPLITS if name in corpus])
    given = isinstance(corpus, DatasetDict)
    clips = concatenate_datasets([corpus[name] for name in SPLITS if name in corpus]) if given else corpus
    splits = np.concatenate([np.full(len(corpus[name]), name) for name in SPLITS if name in corpus]).astype(object) \
        if given else np.full(len(clips), None, dtype=object)  # fmt: skip
    if given and "train" not in corpus:
        raise UserError(f"the corpus gives {' and '.join(corpus)} but no train split: there is nothing to train on.")
    if given and (data.test_groups or data.validation_groups):
        raise UserError(
            "keys 'test_groups' and 'validation_groups': the corpus comes with its own splits. Draw others with --ignore_splits."
        )

    split_by = choose_split_by(clips, data.split_by)
    notes: list[str] = []
    if not split_by:
        notes.append("Neither speakers nor sentences are known: the clips are split singly, so the same voice is on both sides.")
    missing = [name for name in SPLITS if name not in corpus] if given else list(SPLITS)
    # Where some speakers are known, those at least are held to be apart.
    leaked = count_shared_groups(clips, splits, split_by or ["speaker_id"]) if given else {}
    if leaked and not data.allow_group_leak:
        shares = ", ".join(f"{count} {_plural(column)}" for column, count in leaked.items())
        raise UserError(
            f"the given splits leak: {shares} in more than one of them. Mend the splits, name another split_by, or say "
            "--allow_group_leak, which the results then tell."
        )
    for column, count in leaked.items():
        notes.append(f"LEAK (allowed): {count} {_plural(column)} in more than one split.")

    if missing:
        pool = np.flatnonzero(splits == "train") if given else np.arange(len(clips))
        fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
        fractions = {name: share for name, share in fractions.items() if name in missing}
        named = {"validation": data.validation_groups, "test": data.test_groups}
        splits[pool] = draw_splits(clips.select(pool), split_by, fractions, named, seed)
        dropped = int((splits == "bridge").sum())
        if dropped:
            notes.append(
                f"{dropped} of {len(clips)} clips would bridge the splits (speaker of one, sentence of another) and are left out."
            )
    if data.train_fraction < 1:
        notes.append(keep_training_groups(clips, splits, split_by, data.train_fraction, seed))
    for split, limit in zip(SPLITS, (data.max_train_samples, data.max_eval_samples, data.max_predict_samples), strict=True):
        rows = np.flatnonzero(splits == split)
        if limit is not None and limit < len(rows):
            splits[np.random.default_rng(seed).permutation(rows)[limit:]] = "bridge"
    kept = np.flatnonzero((splits != "bridge") & (splits != "unused"))
    # Added before rows are selected: afterwards `datasets` would copy the clips, audio and all.
    clips = clips.add_column("split", [str(name) for name in splits]).select(kept)
    split = Split(clips, split_by, leaked, notes)
    if data.train_on_validation:
        split.trained = ("train", "validation")
        notes.append("The validation clips were trained on as well: validation figures measure nothing.")
    notes += describe_overlap(split)
    split.overlaps = compute_overlaps(split)
    same = next(row for row in split.overlaps if row["of"] == "identical audio")["test in train"]
    if same:
        notes.append(f"LEAK: {same} test clips are the very same audio as training clips.")
    check_labels_are_learnable(split)
    return split


def choose_split_by(clips: Dataset, wanted: list[str] | None) -> list[str]:
    """Returns the columns to keep apart: those wanted, else sessions, speakers or sentences, the first that has 3 groups.

    Raises:
        UserError: a wanted column that is not known for every clip.
    """
    known = {name: clips.unique(name) for name in GROUP_COLUMNS}
    for column in wanted or []:
        if None in known[column]:
            raise UserError(
                f"key 'split_by': {column} is not known for every clip. For folders give a group_pattern, for "
                "a manifest or Hub data set the column's name."
            )
    if wanted:
        return wanted
    return next(([name] for name, groups in known.items() if None not in groups and len(groups) >= len(SPLITS)), [])


def draw_splits(
    clips: Dataset,
    split_by: list[str],
    fractions: dict[str, float],
    named: dict[str, list[str] | None],
    seed: int,
) -> np.ndarray:
    """Assigns each clip to train or one of `fractions`' splits, by groups.

    Args:
        clips: the common table.
        split_by: none, one or both group columns.
        fractions: share of the groups for each split to draw, never fewer than one group.
        named: groups that are taken instead of drawing them.
        seed: of the draw.

    Returns:
        object array of shape (num_clips,): a split's name, or "bridge" where two columns disagree.
    """
    labels = np.asarray(clips["label"][:])
    num_labels = clips.features["label"].num_classes
    columns = split_by or [None]
    if any(named.values()) and len(columns) != 1:
        raise UserError("keys 'test_groups' and 'validation_groups' need one column in split_by, not two.")
    drawn = []
    for column in columns:
        groups = np.asarray(clips[column][:]) if column else np.arange(len(clips)).astype(str)
        drawn.append(_draw_by_one_column(groups, labels, num_labels, fractions, named, seed, column or "clip"))
    return np.where(np.all([d == drawn[0] for d in drawn], axis=0), drawn[0], "bridge").astype(object)


def _draw_by_one_column(
    groups: np.ndarray,
    labels: np.ndarray,
    num_labels: int,
    fractions: dict[str, float],
    named: dict[str, list[str] | None],
    seed: int,
    column: str,
) -> np.ndarray:
    names, group_of_clip = np.unique(groups, return_inverse=True)
    if len(names) < len(fractions) + 1:
        raise UserError(
            f"key 'split_by': {len(names)} {_plural(column)} cannot make {len(fractions) + 1} splits that share none. "
            "Name another column in split_by, or bring splits of your own."
        )
    counts = np.zeros((len(names), num_labels))  # (groups, labels)
    np.add.at(counts, (group_of_clip, labels), 1)

    fixed: dict[str, np.ndarray] = {}
    for split, wanted in named.items():
        unknown = sorted(set(wanted or []) - set(names))
        if unknown:
            shown = ", ".join(names[:20])
            raise UserError(f"key '{split}_groups': no {column} '{unknown[0]}' in the corpus, but {shown}.")
        if wanted and split in fractions:
            fixed[split] = np.flatnonzero(np.isin(names, wanted))
    both = set(named.get("test") or []) & set(named.get("validation") or [])
    if both:
        raise UserError(f"keys 'test_groups' and 'validation_groups' both name '{sorted(both)[0]}'.")

    taken = np.concatenate([*fixed.values(), np.array([], dtype=int)]).astype(int)
    free = np.setdiff1d(np.arange(len(names)), taken)
    sizes = {split: max(1, round(share * len(names))) for split, share in fractions.items() if split not in fixed}
    if sum(sizes.values()) >= len(free):
        raise UserError(f"key 'split_by': {len(free)} {_plural(column)} are left to draw from, too few for every split.")

    rng = np.random.default_rng(seed)
    overall = counts.sum(axis=0) / counts.sum()
    best, best_cost = None, np.inf
    for _ in range(NUM_DRAWS):
        order = rng.permutation(free)
        split_of_group = np.full(len(names), "train", dtype=object)
        for split, members in fixed.items():
            split_of_group[members] = split
        start = 0
        for split, size in sizes.items():
            split_of_group[order[start : start + size]] = split
            start += size
        cost = _stratification_cost(counts, split_of_group, overall, fractions)
        if cost < best_cost:
            best, best_cost = split_of_group, cost
    return best[group_of_clip]


def _stratification_cost(
    counts: np.ndarray, split_of_group: np.ndarray, overall: np.ndarray, fractions: dict[str, float]
) -> float:
    """Lower is better: labels without training clips first, then the distance of the label shares, then of the sizes."""
    cost = 0.0
    present = counts.sum(axis=0) > 0
    cost += 1000.0 * np.count_nonzero(present & (counts[split_of_group == "train"].sum(axis=0) == 0))
    for split, share in fractions.items():
        inside = counts[split_of_group == split].sum(axis=0)
        cost += np.abs(inside / max(inside.sum(), 1) - overall).sum()
        cost += 0.1 * abs(inside.sum() / counts.sum() - share)
    return cost


def count_shared_groups(clips: Dataset, splits: np.ndarray, columns: list[str]) -> dict[str, int]:
    """Returns, for each column, how many groups occur in more than one split; columns without any are left out."""
    shared = {}
    for column in columns:
        groups = np.asarray(clips[column][:], dtype=object)
        parts = [set(groups[splits == split]) - {None} for split in SPLITS]
        count = len((parts[0] & parts[1]) | (parts[0] & parts[2]) | (parts[1] & parts[2]))
        if count:
            shared[column] = count
    return shared


def describe_overlap(split: Split) -> list[str]:
    """Returns a sentence for each known column of groups on how many of the test's groups training has heard."""
    sentences = []
    for column in ("speaker_id", "sentence_id", "session_id"):
        groups = np.asarray(split.clips[column][:], dtype=object)
        train = set(groups[np.concatenate([split.indices(name) for name in split.trained])]) - {None}
        test = set(groups[split.indices("test")]) - {None}
        if not test:
            continue
        heard = len(train & test)
        sentences.append(
            f"Of the {len(test)} test {_plural(column, len(test))}, {heard or 'none'} "
            f"{'is' if heard <= 1 else 'are'} in training as well."
        )
    if split.speaker_dependence == "unknown":
        sentences.append("Not every clip's speaker is known, so whether the results are speaker-dependent cannot be said.")
    else:
        sentences.append(f"The results are {split.speaker_dependence}.")
    return sentences


def keep_training_groups(clips: Dataset, splits: np.ndarray, split_by: list[str], fraction: float, seed: int) -> str:
    """Moves all but a share of the training groups out of training, in place, and returns a sentence on it.

    A smaller share is a part of any larger one with the same seed, so that a curve over shares adds groups only. There are
    as many as it takes for each class to occur.

    Args:
        clips: the common table.
        splits: each clip's split, object (num_clips,); becomes "unused" where its group is not kept.
        split_by: the first column names the groups; without any, they are the clips.
        fraction: of the training groups.
        seed: of the draw.
    """
    rows = np.flatnonzero(splits == "train")
    column = split_by[0] if split_by else None
    groups = np.asarray(clips[column][:], dtype=object)[rows].astype(str) if column else rows.astype(str)
    labels = np.asarray(clips["label"][:])[rows]
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    num_kept = max(1, round(fraction * len(names)))
    while set(labels[np.isin(groups, names[:num_kept])]) < set(labels):
        num_kept += 1
    dropped = ~np.isin(groups, names[:num_kept])
    splits[rows[dropped]] = "unused"
    return (
        f"Trained on {num_kept} of {len(names)} {_plural(column or 'clip')} ({(~dropped).sum()} of {len(rows)} clips), "
        f"as train_fraction {fraction:g} asks."
    )


def compute_overlaps(split: Split) -> list[dict[str, Any]]:
    """Returns what the splits share: a row each for sessions, speakers, sentences and identical audio.

    Returns:
        Dictionaries with `of`; how many each split has (`train`, `validation`, `test`); and `test in train`, `validation in
        train`, `test in validation`: how many of the one's groups (or clips, for audio) the other has too. Columns that
        the corpus does not know are left out.
    """
    parts = {name: np.concatenate([split.indices(part) for part in (split.trained if name == "train" else [name])])
             for name in SPLITS}  # fmt: skip
    columns = {_plural(name): np.asarray(split.clips[name][:], dtype=object) for name in GROUP_COLUMNS}
    columns["identical audio"] = find_identical_audio(split.clips, np.asarray(split.clips["split"][:], dtype=object))
    rows = []
    for of, values in columns.items():
        if set(values) == {None}:
            continue
        inside = {name: values[indices] for name, indices in parts.items()}
        row: dict[str, Any] = {"of": of}
        row |= {name: len(set(found) - {None}) for name, found in inside.items()}
        for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
            shared = (set(inside[one]) & set(inside[other])) - {None}
            of_clips = int(np.isin(inside[one].astype(str), [str(value) for value in shared]).sum())
            row[f"{one} in {other}"] = of_clips if of == "identical audio" else len(shared)
        rows.append(row)
    return rows


def find_identical_audio(clips: Dataset, splits: np.ndarray) -> np.ndarray:
    """Returns a number for each clip's audio, object (num_clips,): equal where two clips have the very same samples.

    Only clips that last exactly as long as one of another split are read. Their samples are compared, not their files, so
    that another header, name or lossless format hides nothing.
    """
    durations = np.asarray(clips["duration"][:])
    audio_of_clip = np.arange(len(clips)).astype(object)
    known = np.flatnonzero(~np.isnan(durations))
    order = known[np.argsort(durations[known], kind="stable")]
    seen: dict[bytes, int] = {}
    for same in np.split(order, np.flatnonzero(np.diff(durations[order])) + 1):
        if len(set(splits[same]) & set(SPLITS)) < 2:
            continue
        for clip, audio in zip(same, clips.select(same).with_format(None)["audio"], strict=True):
            digest = _hash_samples(audio)
            if digest is not None:
                audio_of_clip[clip] = seen.setdefault(digest, int(clip))
    return audio_of_clip


def _hash_samples(audio: dict[str, Any]) -> bytes | None:
    try:
        samples, rate = soundfile.read(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"], dtype="int16")
    except (soundfile.LibsndfileError, RuntimeError, OSError):
        return None  # a clip that cannot be read is told of later, and is never trained on
    return hashlib.blake2b(samples.tobytes() + str(rate).encode(), digest_size=16).digest()


def check_labels_are_learnable(split: Split) -> None:
    """Raises `UserError` where a split is empty or a label of validation or test has no clip to learn from."""
    labels, names = np.asarray(split.clips["label"][:]), split.clips.features["label"].names
    present = {name: set(labels[split.indices(name)]) for name in SPLITS}
    for name in SPLITS:
        if not present[name]:
            raise UserError(f"the {name} split is empty: bring more clips or other fractions.")
    unseen = [
        f"{names[label]} ({', '.join(name for name in SPLITS[1:] if label in present[name])})"
        for label in sorted((present["validation"] | present["test"]) - present["train"])
    ]
    if unseen:
        raise UserError(
            "these classes have no training clip, so they cannot be learnt (the splits that have them in brackets):\n"
            f"{list_offenders(unseen)}\nMend the splits, or leave the classes out with class_names."
        )
    absent = [names[label] for label in sorted(present["train"] - present["test"])]
    if absent:
        split.notes.append(f"The test split has no clip of {', '.join(absent)}: nothing is measured on it.")


def write_splits(split: Split, path: Path) -> None:
    """Writes the CSV with the columns path, label, split, speaker_id, sentence_id and, where known, session_id."""
    names = split.clips.features["label"].names
    frame = split.clips.select_columns(["label", "split", "speaker_id", "sentence_id", "session_id"]).to_pandas()
    if frame["session_id"].isna().all():
        frame = frame.drop(columns="session_id")
    frame["label"] = [names[label] for label in frame["label"]]
    frame.insert(0, "path", clip_names(split.clips))
    frame.to_csv(path, index=False)


def clip_names(clips: Dataset) -> list[str]:
    """Returns each clip's path below the folder that all of them share, so that no local path is told."""
    paths = clips.select_columns(["audio"]).with_format(None).flatten()["audio.path"]  # without the bytes that a Hub data set has
    paths = [Path(path or f"clip_{row}") for row, path in enumerate(paths)]
    parents = [path.parent.parts for path in paths]
    depth = 0
    while all(len(parts) > depth and parts[depth] == parents[0][depth] for parts in parents):
        depth += 1
    return [Path(*path.parts[depth:]).as_posix() for path in paths]


def _plural(column: str, count: int = 2) -> str:
    name = column.removesuffix("_id")
    return name if count == 1 else f"{name}s"
