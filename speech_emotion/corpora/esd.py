"""ESD, the Emotional Speech Database: 10 Mandarin and 10 English speakers, 350 sentences each, 5 emotions, 35,000 clips.

K. Zhou, B. Sisman, R. Liu, H. Li: "Emotional voice conversion: Theory, databases and ESD", Speech Communication 137,
2022. For research; the licence form and the download are at https://github.com/HLTSingapore/Emotional-Speech-Data.
`0011/Angry/train/0011_000351.wav` (in some copies without `train`, `evaluation` and `test`): speaker 0011, clip 351.
Each emotion has 350 clips in the order of the same sentences. Its own folders keep sentences apart but share all
speakers, so they are not taken for splits.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings
from speech_emotion.errors import UserError

FACTS = CorpusFacts(
    title="ESD",
    language=("en", "zh"),
    nature="acted",
    speakers="20 speakers (10 English, 10 Mandarin)",
    license="for research, after a form",
    url="https://github.com/HLTSingapore/Emotional-Speech-Data",
    citation="K. Zhou, B. Sisman, R. Liu, H. Li: Emotional voice conversion: Theory, databases and ESD. Speech "
    "Communication 137, 2022.",
)
EMOTIONS = ["Angry", "Happy", "Neutral", "Sad", "Surprise"]
FILE_NAME = re.compile(
    rf"(?P<folder>00\d{{2}})/(?P<emotion>{'|'.join(EMOTIONS)})/(?:(?:train|evaluation|test)/)?(?P<speaker>00\d{{2}})_(?P<number>\d{{6}})\.wav"
)
NUM_SENTENCES = 350
LAST_MANDARIN_SPEAKER = 10
LANGUAGES = ("english", "mandarin")
NUM_CLIPS = 35_000


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`; `dataset_config_name` "english" or "mandarin" takes one language.

    Raises:
        UserError: no such folder or configuration, or a folder without the recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    wanted = data.dataset_config_name
    if wanted is not None and wanted not in LANGUAGES:
        raise UserError(f"key 'dataset_config_name': esd has no '{wanted}', but {' and '.join(LANGUAGES)}; without it, both.")
    clips = []
    example = "0011/Angry/train/0011_000351.wav"
    for path, name in find_named_recordings(root, FILE_NAME, "ESD", example, NUM_CLIPS):
        language = "mandarin" if int(name["speaker"]) <= LAST_MANDARIN_SPEAKER else "english"
        if wanted in (None, language):
            sentence = f"{language}_{(int(name['number']) - 1) % NUM_SENTENCES + 1:03d}"
            clips.append(
                Clip(path=str(path), label=name["emotion"].lower(), speaker_id=name["speaker"], sentence_id=sentence, split=None)
            )
    if not clips:
        raise UserError(f"key 'dataset_config_name': {root} holds no {wanted} speakers.")
    return build_table(clips)
