"""MELD, the Multimodal EmotionLines Dataset: about 13,700 utterances of the series Friends, 7 emotions, with given
splits.

S. Poria, D. Hazarika, N. Majumder, G. Naik, E. Cambria, R. Mihalcea: "MELD: A multimodal multi-party dataset for
emotion recognition in conversations", ACL 2019. https://github.com/declare-lab/MELD (GPL-3.0 for the annotations; the
recordings are the broadcaster's). `MELD.Raw` holds `train_sent_emo.csv` (in `train/` in some copies),
`dev_sent_emo.csv` and `test_sent_emo.csv`, and the clips as `train_splits/dia0_utt0.mp4`, `dev_splits_complete/` and
`output_repeated_splits_test/`. A WAV or FLAC of the same name, in a folder whose name begins alike, is preferred to
the MP4, which needs torchcodec and FFmpeg.

The splits keep dialogues apart, not speakers: the six main characters are in all of them, so that results are
speaker-dependent. Clips hold laughter of the audience and other voices. `dia125_utt3` of train and `dia110_utt7` of
dev are known to be missing or broken.
"""

from pathlib import Path

import pandas as pd
from datasets import DatasetDict

from speech_emotion.arguments import DataArguments
from speech_emotion.audio import AUDIO_SUFFIXES
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder
from speech_emotion.errors import UserError, list_offenders

FACTS = CorpusFacts(
    title="MELD",
    language=("en",),
    nature="acted in a television series, with laughter and music",
    speakers="the series' cast",
    license="annotations GPL-3.0; recordings of the broadcaster",
    url="https://github.com/declare-lab/MELD",
    citation="S. Poria et al.: MELD: A multimodal multi-party dataset for emotion recognition in conversations. ACL 2019.",
)
SPLITS = {
    "train": ("train_sent_emo.csv", "train_splits"),
    "validation": ("dev_sent_emo.csv", "dev_splits_complete"),
    "test": ("test_sent_emo.csv", "output_repeated_splits_test"),
}
COLUMNS = ("Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
EMOTIONS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
NEVER_PUBLISHED = {"train/dia125_utt3", "validation/dia110_utt7"}


def load(data: DataArguments, cache_dir: str | None = None) -> DatasetDict:
    """Loads the corpus from `data_dir`, the folder MELD.Raw, with its splits.

    Returns:
        The common table a split; the dialogue is `session_id`.

    Raises:
        UserError: no such folder, a list that is not there or has no such columns, or recordings that are not there.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips, missing = [], []
    for split, (list_name, folder_name) in SPLITS.items():
        lists = sorted(root.rglob(list_name))
        if not lists:
            raise UserError(f"key 'data_dir': {root} is not MELD: there is no {list_name} in it.")
        frame = pd.read_csv(lists[0], encoding="utf-8", encoding_errors="replace")
        absent = [column for column in COLUMNS if column not in frame.columns]
        if absent:
            raise UserError(f"{lists[0]}: has no column {absent[0]}, but {', '.join(frame.columns)}.")
        recordings = _find_recordings(root, folder_name)
        for speaker, emotion, dialogue, utterance in frame[list(COLUMNS)].itertuples(index=False):
            name = f"dia{dialogue}_utt{utterance}"
            if name not in recordings:
                if f"{split}/{name}" not in NEVER_PUBLISHED:
                    missing.append(f"{folder_name}/{name}")
                continue
            clips.append(
                Clip(path=str(recordings[name]), label=str(emotion).strip().lower(), speaker_id=str(speaker).strip(),
                     sentence_id=None, split=split, session_id=f"{split}_dia{dialogue}")
            )  # fmt: skip
    if missing and (data.on_bad_audio == "error" or not clips):
        raise UserError(
            f"{root}: {len(missing)} listed recordings are not there:\n{list_offenders(missing)}\n"
            "Extract the archives, or go on without them: --on_bad_audio skip."
        )
    return build_table(clips, EMOTIONS)


def _find_recordings(root: Path, folder_name: str) -> dict[str, Path]:
    """Returns the best file of each clip, by its stem: what soundfile reads before what needs FFmpeg."""
    found: dict[str, Path] = {}
    for folder in (path for path in root.rglob(f"{folder_name}*") if path.is_dir()):
        for path in folder.iterdir():
            suffix = path.suffix.lower()
            if suffix not in AUDIO_SUFFIXES or path.name.startswith("."):
                continue
            other = found.get(path.stem)
            if other is None or AUDIO_SUFFIXES.index(suffix) < AUDIO_SUFFIXES.index(other.suffix.lower()):
                found[path.stem] = path
    return found
