"""Where recordings come from. Every loader returns the common table of `table.py`, whatever the corpus looks like.

A new corpus is one new file here and one line in `LOADERS`.
"""

from datasets import Dataset, DatasetDict

from speech_emotion.arguments import Arguments
from speech_emotion.corpora import (
    audio_folder,
    crema_d,
    emodb,
    emov_db,
    esd,
    hub,
    iemocap,
    manifest,
    meld,
    msp_podcast,
    polish,
    ravdess,
    savee,
    tess,
    thorsten,
)
from speech_emotion.corpora.table import keep_labels

LOADERS = {
    "demo": polish.load,
    "thorsten_emotional": thorsten.load,
    "audio_folder": audio_folder.load,
    "manifest": manifest.load,
    "emodb": emodb.load,
    "ravdess": ravdess.load,
    "crema_d": crema_d.load,
    "tess": tess.load,
    "savee": savee.load,
    "esd": esd.load,
    "iemocap": iemocap.load,
    "meld": meld.load,
    "emov_db": emov_db.load,
    "msp_podcast": msp_podcast.load,
}


FACTS = {
    "demo": polish.FACTS,
    "thorsten_emotional": thorsten.FACTS,
    "emodb": emodb.FACTS,
    "ravdess": ravdess.FACTS,
    "crema_d": crema_d.FACTS,
    "tess": tess.FACTS,
    "savee": savee.FACTS,
    "esd": esd.FACTS,
    "iemocap": iemocap.FACTS,
    "meld": meld.FACTS,
    "emov_db": emov_db.FACTS,
    "msp_podcast": msp_podcast.FACTS,
}


def load_corpus(arguments: Arguments) -> Dataset | DatasetDict:
    """Loads the corpus that the recipe names.

    Returns:
        The common table (columns `audio`, `label`, `speaker_id`, `sentence_id`, `session_id`, `duration`), as a
        `DatasetDict` where the corpus comes with its own splits.

    Raises:
        UserError: the corpus is not there, or does not look as its loader expects.
    """
    load = LOADERS.get(arguments.data.dataset_name, hub.load)
    corpus = load(arguments.data, arguments.model.cache_dir)
    return keep_labels(corpus, arguments.data.class_names) if arguments.data.class_names else corpus
