"""Any data set of the Hugging Face Hub (or a local folder of the same form) with an audio and a label column."""

import contextlib
import difflib
import importlib.util
import sys
import types
from collections.abc import Iterator

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError

from speech_emotion.arguments import DataArguments
from speech_emotion.audio import read_duration
from speech_emotion.corpora.table import GROUP_COLUMNS, SPLIT_SPELLINGS, check_labels
from speech_emotion.errors import UserError

# Loaders of single corpora, whose names a misspelt dataset_name may have meant.
CORPORA = ("emodb", "ravdess", "crema_d", "tess", "savee", "esd", "iemocap", "meld", "emov_db", "msp_podcast")


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset | DatasetDict:
    """Loads `dataset_name`; the token of a private data set comes from HF_TOKEN or `hf auth login`.

    Raises:
        UserError: not found or not reachable, or without the audio or label column.
    """
    name = data.dataset_name
    try:
        with _encoding_without_torchcodec():
            loaded = load_dataset(
                name, data.dataset_config_name, data_dir=data.data_dir, data_files=data.data_files, cache_dir=cache_dir
            )
    except DatasetNotFoundError as error:
        known = ["demo", "thorsten_emotional", "audio_folder", "manifest", *CORPORA]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"It is none of {', '.join(known)}, and the Hub has no such id"
        raise UserError(f"key 'dataset_name': '{name}' is not found. {hint} (a private one needs HF_TOKEN).") from error
    except (ConnectionError, ValueError, FileNotFoundError) as error:
        raise UserError(f"key 'dataset_name': '{name}' cannot be loaded. {str(error).splitlines()[0]}") from error

    tables: dict[str, Dataset] = {}
    for split_name, part in loaded.items():
        split = SPLIT_SPELLINGS.get(split_name.lower())
        if split is None and len(loaded) > 1:
            raise UserError(
                f"{name}: its split '{split_name}' is none of train, validation and test. Load one split of it as a "
                "manifest, or name a configuration with --dataset_config_name."
            )
        tables[split or "all"] = _to_common_table(part, name, data)
    return next(iter(tables.values())) if len(tables) == 1 else DatasetDict(tables)


def _to_common_table(part: Dataset, name: str, data: DataArguments) -> Dataset:
    for key in ("audio_column_name", "label_column_name"):
        column = getattr(data, key)
        if column not in part.column_names:
            near = difflib.get_close_matches(column, part.column_names, n=1)
            hint = f" Did you mean --{key} {near[0]}?" if near else f" Name the right one with --{key}."
            raise UserError(f"{name}: there is no column '{column}', but {', '.join(part.column_names)}.{hint}")
    if not isinstance(part.features[data.audio_column_name], Audio):
        raise UserError(
            f"{name}: its column '{data.audio_column_name}' holds no audio. Name the right one with --audio_column_name."
        )

    audio = part.cast_column(data.audio_column_name, Audio(decode=False)).select_columns([data.audio_column_name])
    audio = audio.rename_column(data.audio_column_name, "audio") if data.audio_column_name != "audio" else audio
    durations = [read_duration(clip) for clip in audio["audio"]]
    labels, label_names = _read_labels(part, name, data.label_column_name)

    def optional(column: str) -> list[str | None]:
        values = part[column] if column in part.column_names else [None] * len(part)
        return [None if value is None else str(value) for value in values]

    table = audio.add_column("duration", durations, feature=Value("float32"))
    table = table.add_column("label", labels, feature=ClassLabel(names=label_names))
    groups = Dataset.from_dict(
        {
            "speaker_id": optional(data.speaker_column_name),
            "sentence_id": optional(data.sentence_column_name),
            "session_id": optional("session_id"),
        },
        features=Features(dict.fromkeys(GROUP_COLUMNS, Value("string"))),
    )
    for column in groups.column_names:
        table = table.add_column(column, groups.data.column(column).to_pylist(), feature=Value("string"))
    return table.select_columns(["audio", "label", "speaker_id", "sentence_id", "session_id", "duration"])


def _read_labels(part: Dataset, name: str, column: str) -> tuple[np.ndarray, list[str]]:
    feature, values = part.features[column], part[column][:]
    if isinstance(feature, ClassLabel):
        missing = [i for i, value in enumerate(values) if value is None or value < 0]
        if missing:
            raise UserError(f"{name}: {len(missing)} of {len(values)} clips have no label, row {missing[0] + 1} first.")
        return np.asarray(values), feature.names
    check_labels(values, name)
    names = sorted({str(value) for value in values})
    return np.array([names.index(str(value)) for value in values]), names


@contextlib.contextmanager
def _encoding_without_torchcodec() -> Iterator[None]:
    """Lets `datasets` store the paths of audio files where torchcodec cannot be imported.

    `Audio.encode_example` imports torchcodec before it looks at what it is given, although a path or bytes need no
    encoder. An empty stand-in satisfies that import while the data set is built; nothing of it is ever called.
    """
    if importlib.util.find_spec("torchcodec") is not None:
        yield
        return
    package, encoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.encoders")
    encoders.AudioEncoder = None
    sys.modules.update({"torchcodec": package, "torchcodec.encoders": encoders})
    try:
        yield
    finally:
        for module in ("torchcodec", "torchcodec.encoders"):
            sys.modules.pop(module, None)
