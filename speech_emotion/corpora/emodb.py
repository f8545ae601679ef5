"""EmoDB, the Berlin Database of Emotional Speech: 10 German actors, 10 sentences, 7 emotions, 535 clips.

F. Burkhardt, A. Paeschke, M. Rolfes, W. Sendlmeier, B. Weiss: "A database of German emotional speech", Interspeech 2005.
Free to download at http://emodb.bilderbar.info/download/ (its page states no licence text; cite the paper).
`wav/03a01Fa.wav` is speaker 03, sentence a01, F for Freude (happiness), first version.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings

FACTS = CorpusFacts(
    title="EmoDB",
    language=("de",),
    nature="acted",
    speakers="10 actors (5 women, 5 men)",
    license="free to download; no licence text",
    url="http://emodb.bilderbar.info/",
    citation="F. Burkhardt, A. Paeschke, M. Rolfes, W. Sendlmeier, B. Weiss: A database of German emotional "
    "speech. Interspeech 2005.",
)
# Letters of the German words: Wut, Langeweile, Ekel, Angst, Freude, Trauer.
EMOTIONS = {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "N": "neutral", "T": "sadness"}
FILE_NAME = re.compile(r"(?P<speaker>\d{2})(?P<sentence>[ab]\d{2})(?P<emotion>[WLEAFNT])[a-z]\.wav")
NUM_CLIPS = 535


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`.

    Raises:
        UserError: no such folder, or one without its recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips = [
        Clip(
            path=str(path), label=EMOTIONS[name["emotion"]], speaker_id=name["speaker"], sentence_id=name["sentence"], split=None
        )
        for path, name in find_named_recordings(root, FILE_NAME, "EmoDB", "wav/03a01Fa.wav", NUM_CLIPS)
    ]
    return build_table(clips)
