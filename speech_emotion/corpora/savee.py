"""SAVEE, the Surrey Audio-Visual Expressed Emotion database: 4 male English speakers, 7 emotions, 480 clips.

S. Haq, P. J. B. Jackson: "Speaker-dependent audio-visual emotion recognition", AVSP 2009. For research, after a
registration at http://kahlan.eps.surrey.ac.uk/savee/. `AudioData/DC/sa03.wav` (or, in copies that are passed on,
`DC_sa03.wav`): speaker DC, sadness, sentence 3. Sentences 1 to 3 are the same in every emotion; 4 and 5 belong to the
emotion and the rest to the emotion's own list; which of them neutral repeats, the names do not tell.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings

FACTS = CorpusFacts(
    title="SAVEE",
    language=("en",),
    nature="acted",
    speakers="4 men",
    license="for research, after registration",
    url="http://kahlan.eps.surrey.ac.uk/savee/",
    citation="S. Haq, P. J. B. Jackson: Speaker-dependent audio-visual emotion recognition. AVSP 2009.",
)
EMOTIONS = {
    "a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "n": "neutral", "sa": "sadness", "su": "surprise",
}  # fmt: skip
FILE_NAME = re.compile(r"(?P<speaker>DC|JE|JK|KL)[/_](?P<emotion>a|d|f|h|n|sa|su)(?P<number>\d{2})\.wav")
NUM_CLIPS = 480
LAST_COMMON_SENTENCE = 3


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`.

    Raises:
        UserError: no such folder, or one without its recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips = []
    for path, name in find_named_recordings(root, FILE_NAME, "SAVEE", "AudioData/DC/sa03.wav", NUM_CLIPS):
        is_common = int(name["number"]) <= LAST_COMMON_SENTENCE
        sentence = f"common{name['number']}" if is_common else f"{name['emotion']}{name['number']}"
        clips.append(
            Clip(path=str(path), label=EMOTIONS[name["emotion"]], speaker_id=name["speaker"], sentence_id=sentence, split=None)
        )
    return build_table(clips)
