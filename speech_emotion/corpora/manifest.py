"""Recordings listed in a table: CSV, TSV, JSON (a list of objects) or JSONL.

Columns `audio` (or `path`) and `label`, and where known `speaker_id`, `sentence_id`,
`session_id` (several speakers' dialogue) and `split`. Paths are relative to
the manifest, or to `data_dir` where it is given.
"""

import difflib
from pathlib import Path

import pandas as pd
from datasets import Dataset, DatasetDict

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, build_table, check_labels, read_split_name
from speech_emotion.errors import UserError, list_offenders

PATH_COLUMNS = ("path", "file", "file_name", "filename", "audio_path")


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset | DatasetDict:
    """Loads `data_files`: one or more manifests, each either `FILE` or `SPLIT=FILE`.

    Raises:
        UserError: no such file, not a table, a missing column, missing labels, or recordings that are not there.
    """
    if not data.data_files:
        raise UserError("key 'data_files' is missing: dataset_name 'manifest' needs a CSV, TSV, JSON or JSONL file.")
    clips: list[Clip] = []
    for entry in data.data_files:
        split, equals, name = entry.partition("=")
        clips += _load_file(Path(name if equals else entry).expanduser(), split if equals else None, data)
    missing = [clip["path"] for clip in clips if not Path(clip["path"]).is_file()]
    if missing and data.on_bad_audio == "error":
        raise UserError(
            f"{', '.join(data.data_files)}: {len(missing)} of {len(clips)} recordings are not there:\n"
            f"{list_offenders(missing)}\nPaths are relative to the manifest, or to data_dir; "
            "--on_bad_audio skip goes on without them."
        )
    unsplit = sum(clip["split"] is None for clip in clips)
    if 0 < unsplit < len(clips):
        raise UserError(
            f"{', '.join(data.data_files)}: {unsplit} of {len(clips)} clips have no split. Name a split for all of "
            "them, or for none."
        )
    check_labels((clip["label"] for clip in clips), ", ".join(data.data_files))
    return build_table(clips)


def _load_file(path: Path, split: str | None, data: DataArguments) -> list[Clip]:
    frame = _read_table(path)
    if data.audio_column_name not in frame.columns and data.audio_column_name == "audio":
        audio_column = next((name for name in PATH_COLUMNS if name in frame.columns), "audio")
    else:
        audio_column = data.audio_column_name
    for key, column in (("audio_column_name", audio_column), ("label_column_name", data.label_column_name)):
        if column not in frame.columns:
            near = difflib.get_close_matches(column, list(frame.columns), n=1)
            hint = f" Did you mean --{key} {near[0]}?" if near else f" Name the right one with --{key}."
            raise UserError(f"{path}: there is no column '{column}', but {', '.join(frame.columns)}.{hint}")
    if frame[data.label_column_name].isna().any():
        check_labels(frame[data.label_column_name].astype(object).where(frame[data.label_column_name].notna(), None), str(path))

    root = Path(data.data_dir).expanduser() if data.data_dir else path.parent

    def optional(column: str) -> list[str | None]:
        values = frame[column] if column in frame.columns else [None] * len(frame)
        return [None if pd.isna(value) else str(value) for value in values]

    splits = [split] * len(frame) if split else optional(data.split_column_name)
    return [
        Clip(path=str(root / str(audio)), label=str(label), speaker_id=speaker, sentence_id=sentence,
             split=read_split_name(name, str(path)), session_id=session)
        for audio, label, speaker, sentence, session, name in zip(
            frame[audio_column], frame[data.label_column_name], optional(data.speaker_column_name),
            optional(data.sentence_column_name), optional("session_id"), splits, strict=True,
        )
    ]  # fmt: skip


def _read_table(path: Path) -> pd.DataFrame:
    # As text, so that speaker "007" stays "007".
    readers = {
        ".csv": lambda: pd.read_csv(path, dtype=str, encoding="utf-8-sig"),
        ".tsv": lambda: pd.read_csv(path, dtype=str, sep="\t", encoding="utf-8-sig"),
        ".json": lambda: pd.read_json(path, dtype=False),
        ".jsonl": lambda: pd.read_json(path, lines=True, dtype=False),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"key 'data_files': {path} is none of {', '.join(readers)}.")
    if not path.is_file():
        raise UserError(f"key 'data_files': there is no file {path}.")
    try:
        frame = readers[path.suffix.lower()]()
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({str(error).splitlines()[0]}).") from error
    if frame.empty:
        raise UserError(f"{path}: lists no clips.")
    frame.columns = [str(column).strip() for column in frame.columns]
    return frame
