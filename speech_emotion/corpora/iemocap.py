"""IEMOCAP: 5 sessions of an actor and an actress in scripted and improvised dialogues, in English.

C. Busso, M. Bulut, C.-C. Lee, A. Kazemzadeh, E. Mower, S. Kim, J. N. Chang, S. Lee, S. S. Narayanan: "IEMOCAP:
interactive emotional dyadic motion capture database", Language Resources and Evaluation 42, 2008. For research, after
a licence form at https://sail.usc.edu/iemocap/. Recordings
`Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav`; labels in
`Session1/dialog/EmoEvaluation/Ses01F_impro01.txt`, lines `[6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5,
2.5, 2.5]`.

The usual four classes are anger, happiness with excitement, neutral and sadness (5,531 utterances: 1,103, 1,636,
1,708, 1,084), tested session by session: `--cross_validation loso`. The two speakers of a session hear each other, so
the session is what splits keep apart.
"""

import re

from datasets import Dataset

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table, existing_folder
from speech_emotion.errors import UserError, list_offenders

FACTS = CorpusFacts(
    title="IEMOCAP",
    language=("en",),
    nature="acted in scripted and improvised dialogues",
    speakers="10 actors (5 women, 5 men)",
    license="for research, after a form",
    url="https://sail.usc.edu/iemocap/",
    citation="C. Busso et al.: IEMOCAP: interactive emotional dyadic motion capture database. Language Resources "
    "and Evaluation 42, 2008.",
)
CONFIGURATIONS = {
    "4_classes": {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"},
    "6_classes": {"ang": "angry", "hap": "happy", "exc": "excited", "neu": "neutral", "sad": "sad", "fru": "frustrated"},
}
LABEL_LINE = re.compile(
    r"^\[[\d.]+ - [\d.]+\]\t(?P<name>Ses(?P<session>\d{2})[FM]_\w+_(?P<speaker>[FM])\w*\d{3}\w*)\t(?P<label>\w{3})\t"
)


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir`, which holds Session1 to Session5 (or a folder that does).

    `dataset_config_name` is "4_classes" (the default) or "6_classes" (with excitement and frustration for themselves).

    Returns:
        The common table, with the sessions in `session_id` and no sentences: improvised ones have none.

    Raises:
        UserError: no such folder or configuration, no labels, or recordings that are not there.
    """
    root = existing_folder(data.data_dir, data.dataset_name)
    configuration = data.dataset_config_name or "4_classes"
    if configuration not in CONFIGURATIONS:
        raise UserError(f"key 'dataset_config_name': iemocap has no '{configuration}', but {' and '.join(CONFIGURATIONS)}.")
    labels = CONFIGURATIONS[configuration]
    files = sorted(path for path in root.rglob("Session?/dialog/EmoEvaluation/Ses*.txt") if not path.name.startswith("."))
    if not files:
        raise UserError(
            f"key 'data_dir': {root} is not IEMOCAP: expected labels such as "
            "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt in it."
        )
    clips, missing = [], []
    for file in files:
        session = file.parents[2]
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            match = LABEL_LINE.match(line)
            if match is None or match["label"] not in labels:
                continue
            path = session / "sentences" / "wav" / file.stem / f"{match['name']}.wav"
            if not path.is_file():
                missing.append(path.relative_to(root).as_posix())
                continue
            clips.append(
                Clip(path=str(path), label=labels[match["label"]], speaker_id=f"Ses{match['session']}{match['speaker']}",
                     sentence_id=None, split=None, session_id=session.name)
            )  # fmt: skip
    if missing and data.on_bad_audio == "error":
        raise UserError(
            f"{root}: {len(missing)} labelled recordings are not there:\n{list_offenders(missing)}\n"
            "Copy them, or go on without them: --on_bad_audio skip."
        )
    return build_table(clips, list(dict.fromkeys(labels.values())))
