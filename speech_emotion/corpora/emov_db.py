"""EmoV-DB, the Emotional Voices Database: 4 English speakers, CMU Arctic sentences, 5 styles, about 6,900 clips.

A. Adigwe, N. Tits, K. El Haddad, S. Ostadabbas, T. Dutoit: "The emotional voices database: Towards controlling the
emotion dimension in voice generation systems", arXiv 1806.09514. https://www.openslr.org/115/ (archives such as
bea_Amused.tar.gz, free for non-commercial use). `bea_Amused/amused_1-15_0001.wav` (or `bea/amused/...`): speaker,
style, Arctic sentence 1. Josh has neither anger nor disgust. Amused speech holds laughter and sleepy speech yawns,
which tell the style without the voice.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder, find_named_recordings

FACTS = CorpusFacts(
    title="EmoV-DB",
    language=("en",),
    nature="acted",
    speakers="4 speakers (2 women, 2 men)",
    license="for non-commercial use",
    url="https://www.openslr.org/115/",
    citation="A. Adigwe et al.: The emotional voices database: Towards controlling the emotion dimension in voice "
    "generation systems. arXiv 1806.09514.",
)
# The beginning of the style's word, as it stands in folders (Amused, Angry) and files (amused, anger, disgust, sleepiness).
STYLES = {"amus": "amused", "ang": "angry", "disg": "disgusted", "neut": "neutral", "sleep": "sleepy"}
FILE_NAME = re.compile(
    r"(?P<speaker>bea|jenie|josh|sam)[_/](?P<style>amus|ang|disg|neut|sleep)\w*/[^/]*_(?P<sentence>\d{4})\.wav", re.I
)


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`, the folder into which the archives were extracted.

    Raises:
        UserError: no such folder, or one without its recordings.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    clips = [
        Clip(path=str(path), label=STYLES[name["style"].lower()], speaker_id=name["speaker"].lower(),
             sentence_id=name["sentence"], split=None)
        for path, name in find_named_recordings(root, FILE_NAME, "EmoV-DB", "bea_Amused/amused_1-15_0001.wav")
    ]  # fmt: skip
    return build_table(clips)
