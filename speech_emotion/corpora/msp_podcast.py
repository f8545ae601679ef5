"""MSP-Podcast: natural English speech from podcasts, labelled by listeners, with given splits.

R. Lotfian, C. Busso: "Building naturalistic emotionally balanced speech corpus by retrieving emotional speech from
existing podcast recordings", IEEE Transactions on Affective Computing 10(4), 2019. After a licence form of the
University of Texas at Dallas: https://www.lab-msp.com/MSP/MSP-Podcast.html. `Audios/MSP-PODCAST_0001_0008.wav` (or
`Audio/`) and `Labels/labels_consensus.csv` with FileName, EmoClass, SpkrID and Split_Set (Train, Development, Test1,
Test2, Test3).

Classes O (other) and X (no agreement) are left out. Test1 is the test; `dataset_config_name` "test2" takes the second
(117 other podcasts, chosen at random), whose speakers are not identified. Test3's labels are not published.
"""

import pandas as pd
from datasets import DatasetDict

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder
from speech_emotion.errors import UserError, list_offenders

FACTS = CorpusFacts(
    title="MSP-Podcast",
    language=("en",),
    nature="natural, labelled by listeners",
    speakers="more than a thousand speakers of podcasts",
    license="for research, after a form",
    url="https://www.lab-msp.com/MSP/MSP-Podcast.html",
    citation="R. Lotfian, C. Busso: Building naturalistic emotionally balanced speech corpus by retrieving "
    "emotional speech from existing podcast recordings. IEEE Transactions on Affective Computing 10(4), "
    "2019.",
)
EMOTIONS = {
    "A": "anger",
    "C": "contempt",
    "D": "disgust",
    "F": "fear",
    "H": "happiness",
    "N": "neutral",
    "S": "sadness",
    "U": "surprise",
}
TESTS = ("test1", "test2")
COLUMNS = ("FileName", "EmoClass", "SpkrID", "Split_Set")
UNKNOWN_SPEAKERS = {"", "unknown", "nan"}


def load(data: DataArguments, cache_dir: str | None = None) -> DatasetDict:
    """Loads the corpus from `data_dir`, with its splits; the speaker is null where it is not identified.

    Raises:
        UserError: no such folder or configuration, no list of labels, or recordings that are not there.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    test = data.dataset_config_name or "test1"
    if test not in TESTS:
        raise UserError(f"key 'dataset_config_name': msp_podcast has no '{test}', but {' and '.join(TESTS)}.")
    lists = sorted(root.rglob("labels_consensus.csv"))
    if not lists:
        raise UserError(f"key 'data_dir': {root} is not MSP-Podcast: there is no Labels/labels_consensus.csv in it.")
    frame = pd.read_csv(lists[0], dtype=str, keep_default_na=False)
    absent = [column for column in COLUMNS if column not in frame.columns]
    if absent:
        raise UserError(f"{lists[0]}: has no column {absent[0]}, but {', '.join(frame.columns)}.")
    recordings = {path.name: path for path in root.rglob("MSP-PODCAST_*.wav")}
    splits = {"train": "train", "development": "validation", test: "test"}
    clips, missing = [], []
    for name, emotion, speaker, split in frame[list(COLUMNS)].itertuples(index=False):
        if emotion not in EMOTIONS or split.lower() not in splits:
            continue
        if name not in recordings:
            missing.append(name)
            continue
        clips.append(
            Clip(path=str(recordings[name]), label=EMOTIONS[emotion], sentence_id=None, split=splits[split.lower()],
                 speaker_id=None if speaker.strip().lower() in UNKNOWN_SPEAKERS else speaker.strip())
        )  # fmt: skip
    if missing and (data.on_bad_audio == "error" or not clips):
        raise UserError(
            f"{root}: {len(missing)} listed recordings are not there:\n{list_offenders(missing)}\n"
            "Extract the archives, or go on without them: --on_bad_audio skip."
        )
    return build_table(clips, list(EMOTIONS.values()))
