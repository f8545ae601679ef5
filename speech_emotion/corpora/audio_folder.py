"""Recordings in folders: the folder's name is the label.

    data_dir/happy/a.wav          or      data_dir/train/happy/a.wav
    data_dir/sad/b.wav                    data_dir/test/sad/b.wav

`group_pattern` reads the speaker and the sentence out of each path.
"""

from pathlib import Path

from datasets import Dataset, DatasetDict

from speech_emotion.arguments import DataArguments
from speech_emotion.audio import AUDIO_SUFFIXES, list_recordings
from speech_emotion.corpora.table import (
    SPLIT_SPELLINGS,
    Clip,
    build_table,
    check_labels,
    compile_group_pattern,
    existing_folder,
)
from speech_emotion.errors import UserError, list_offenders


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset | DatasetDict:
    """Loads `data_dir`.

    Raises:
        UserError: no such folder, no recordings, recordings outside any class folder, fewer than two classes, or a
            pattern that some path does not match.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    pattern = compile_group_pattern(data.group_pattern)
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    has_splits = bool(folders) and all(folder.name.lower() in SPLIT_SPELLINGS for folder in folders)
    roots = {folder: SPLIT_SPELLINGS[folder.name.lower()] for folder in folders} if has_splits else {root: None}

    clips: list[Clip] = []
    outside, unmatched = [], []
    for split_root, split in roots.items():
        for path in list_recordings(split_root):
            name = path.relative_to(root).as_posix()
            inside = path.relative_to(split_root).parts
            if len(inside) < 2:
                outside.append(name)
                continue
            match = pattern.search(name) if pattern else None
            if pattern and not match:
                unmatched.append(name)
            groups = match.groupdict() if match else {}
            clips.append(
                Clip(path=str(path), label=inside[0], speaker_id=groups.get("speaker_id"),
                     sentence_id=groups.get("sentence_id"), split=split)
            )  # fmt: skip
    if outside:
        raise UserError(
            f"{root}: {len(outside)} recordings lie in no class folder, so they have no label:\n{list_offenders(outside)}"
        )
    if unmatched:
        raise UserError(
            f"key 'group_pattern': '{data.group_pattern}' does not match {len(unmatched)} of {len(clips)} paths below "
            f"{root}:\n{list_offenders(unmatched)}"
        )
    if not clips:
        kinds = " ".join(AUDIO_SUFFIXES)
        raise UserError(f"{root}: no recordings found. Expected {Path('CLASS') / 'NAME.wav'} below it ({kinds}).")
    check_labels((clip["label"] for clip in clips), str(root))
    return build_table(clips)
