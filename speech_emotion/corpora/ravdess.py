"""RAVDESS: 24 professional actors, 2 English sentences, 8 emotions at two intensities, 1,440 spoken clips.

S. R. Livingstone, F. A. Russo: "The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS)", PLoS ONE 13(5), 2018.
CC BY-NC-SA 4.0, https://zenodo.org/records/1188976 (Audio_Speech_Actors_01-24.zip, without a form).
`Actor_12/03-01-06-01-02-01-12.wav`: modality (03 audio), channel (01 speech, 02 song), emotion, intensity, sentence, take, actor.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings
from speech_emotion.errors import UserError

FACTS = CorpusFacts(
    title="RAVDESS",
    language=("en",),
    nature="acted",
    speakers="24 actors (12 women, 12 men)",
    license="CC BY-NC-SA 4.0",
    url="https://zenodo.org/records/1188976",
    citation="S. R. Livingstone, F. A. Russo: The Ryerson Audio-Visual Database of Emotional Speech and Song "
    "(RAVDESS). PLoS ONE 13(5), 2018.",
)
EMOTIONS = {
    "01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fearful", "07": "disgust", "08": "surprised",
}  # fmt: skip
CHANNELS = {"speech": "01", "song": "02"}
NUM_CLIPS = {"speech": 1440, "song": 1012}
FILE_NAME = re.compile(r"03-(?P<channel>0[12])-(?P<emotion>0[1-8])-0[12]-(?P<sentence>0[12])-0[12]-(?P<actor>\d{2})\.wav")


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the spoken clips from `data_dir`, or, with `dataset_config_name` "song", the sung ones.

    Raises:
        UserError: no such folder or configuration, or a folder without the recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    configuration = data.dataset_config_name or "speech"
    if configuration not in CHANNELS:
        raise UserError(f"key 'dataset_config_name': ravdess has no '{configuration}', but speech and song.")
    pattern = re.compile(FILE_NAME.pattern.replace("0[12])", f"{CHANNELS[configuration]})", 1))
    example = f"Actor_12/03-{CHANNELS[configuration]}-06-01-02-01-12.wav"
    clips = [
        Clip(path=str(path), label=EMOTIONS[name["emotion"]], speaker_id=name["actor"], sentence_id=name["sentence"], split=None)
        for path, name in find_named_recordings(root, pattern, "RAVDESS", example, NUM_CLIPS[configuration])
    ]
    found = {clip["label"] for clip in clips}
    return build_table(clips, [label for label in EMOTIONS.values() if label in found])
