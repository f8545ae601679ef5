"""CREMA-D: 91 actors, 12 English sentences, 6 emotions, 7,442 clips.

H. Cao, D. G. Cooper, M. K. Keutmann, R. C. Gur, A. Nenkova, R. Verma: "CREMA-D: Crowd-sourced Emotional Multimodal Actors
Dataset", IEEE Transactions on Affective Computing 5(4), 2014. Open Database License,
https://github.com/CheyneyComputerScience/CREMA-D (Git LFS, without a form).
`AudioWAV/1001_DFA_ANG_XX.wav`: actor, sentence, the emotion that was acted, its level. Listeners often heard another emotion;
the label here is the acted one. `1076_MTI_SAD_XX.wav` is known to hold no sound: `--on_bad_audio skip`.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings

FACTS = CorpusFacts(
    title="CREMA-D",
    language=("en",),
    nature="acted",
    speakers="91 actors",
    license="Open Database License",
    url="https://github.com/CheyneyComputerScience/CREMA-D",
    citation="H. Cao, D. G. Cooper, M. K. Keutmann, R. C. Gur, A. Nenkova, R. Verma: CREMA-D: Crowd-sourced "
    "Emotional Multimodal Actors Dataset. IEEE Transactions on Affective Computing 5(4), 2014.",
)
EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"}
FILE_NAME = re.compile(r"(?P<actor>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?:LO|MD|HI|XX?)\.wav")
NUM_CLIPS = 7442


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`.

    Raises:
        UserError: no such folder, or one without its recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips = [
        Clip(path=str(path), label=EMOTIONS[name["emotion"]], speaker_id=name["actor"], sentence_id=name["sentence"], split=None)
        for path, name in find_named_recordings(root, FILE_NAME, "CREMA-D", "AudioWAV/1001_DFA_ANG_XX.wav", NUM_CLIPS)
    ]
    return build_table(clips)
