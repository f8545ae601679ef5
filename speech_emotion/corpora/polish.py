"""The demo corpus: emotions in Polish speech, recorded, and shipped with this repository.

M. Mięsikowska and D. Świsulski, "Emotions in Polish speech recordings", Gdańsk University of Technology, 2020,
doi 10.34808/h46c-hb44, CC BY. 5 speakers x 6 words x 5 takes x anger, fear and neutral: 450 clips, 378 seconds.
`m1.a_nie_2.flac` is speaker m1, anger, the word "nie", second take.
"""

import re
from pathlib import Path

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table
from speech_emotion.errors import UserError

FACTS = CorpusFacts(
    title="Emotions in Polish speech recordings",
    language=("pl",),
    nature="acted",
    speakers="5 male speakers",
    license="CC BY 4.0",
    url="https://doi.org/10.34808/h46c-hb44",
    citation="M. Mięsikowska, D. Świsulski: Emotions in Polish speech recordings. Gdańsk University of Technology, 2020.",
)
FOLDER = Path(__file__).parents[2] / "assets" / "polish_emotions"
EMOTIONS = {"a": "anger", "s": "fear", "n": "neutral"}  # s: strach
FILE_NAME = re.compile(r"(?P<speaker>m\d)\.(?P<emotion>[asn])_(?P<word>[a-z]+)_(?P<take>\d)\.flac")
NUM_CLIPS = 450


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the demo corpus; `data_dir` may name another copy of it.

    Raises:
        UserError: the folder does not hold all 450 recordings.
    """
    folder = Path(data.data_dir).expanduser() if data.data_dir else FOLDER
    names = [(path, FILE_NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.flac"))]
    clips = [
        Clip(path=str(path), label=EMOTIONS[name["emotion"]], speaker_id=name["speaker"], sentence_id=name["word"], split=None)
        for path, name in names
        if name
    ]
    if len(clips) != NUM_CLIPS:
        raise UserError(f"{folder} holds {len(clips)} of the demo's {NUM_CLIPS} recordings: clone the repository again.")
    return build_table(clips, list(EMOTIONS.values()))
