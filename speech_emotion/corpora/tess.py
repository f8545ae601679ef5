"""TESS, the Toronto emotional speech set: 2 actresses, 200 words in "Say the word ...", 7 emotions, 2,800 clips.

M. K. Pichora-Fuller, K. Dupuis: "Toronto emotional speech set (TESS)", doi 10.5683/SP2/E8H2MF. CC BY-NC-ND 4.0,
downloaded there without a form. `OAF_angry/OAF_back_angry.wav`: actress (OAF the older, YAF the younger), word,
emotion. One file is misnamed `OA_bite_neutral.wav`. Two speakers are too few to keep apart, so the words are: what is
measured is speaker-dependent.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings

FACTS = CorpusFacts(
    title="TESS",
    language=("en",),
    nature="acted",
    speakers="2 actresses",
    license="CC BY-NC-ND 4.0",
    url="https://doi.org/10.5683/SP2/E8H2MF",
    citation="M. K. Pichora-Fuller, K. Dupuis: Toronto emotional speech set (TESS). Borealis, 2020.",
)
EMOTIONS = {
    "angry": "anger", "disgust": "disgust", "fear": "fear", "happy": "happiness", "neutral": "neutral",
    "ps": "pleasant_surprise", "sad": "sadness",
}  # fmt: skip
FILE_NAME = re.compile(r"(?P<speaker>OAF?|YAF)_(?P<word>[a-z]+)_(?P<emotion>angry|disgust|fear|happy|neutral|ps|sad)\.wav", re.I)
NUM_CLIPS = 2800


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`; a second copy of a recording, as some downloads hold, is left out.

    Raises:
        UserError: no such folder, or one without its recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips: dict[str, Clip] = {}
    for path, name in find_named_recordings(root, FILE_NAME, "TESS", "OAF_angry/OAF_back_angry.wav", NUM_CLIPS):
        speaker = "OAF" if name["speaker"].upper() == "OA" else name["speaker"].upper()
        clip = Clip(path=str(path), label=EMOTIONS[name["emotion"].lower()], speaker_id=speaker, sentence_id=name["word"].lower(),
                    split=None)  # fmt: skip
        clips.setdefault(path.name.lower(), clip)
    return build_table(list(clips.values()))
