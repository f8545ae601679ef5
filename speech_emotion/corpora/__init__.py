"""Where recordings come from. Every loader returns the common table of `table.py`, whatever the corpus looks like.

A new corpus is one new file here and one line in `LOADERS`.
"""

from datasets import Dataset, DatasetDict

from speech_emotion.arguments import Arguments
from speech_emotion.corpora import audio_folder, hub, manifest, polish, thorsten
from speech_emotion.corpora.table import keep_labels

LOADERS = {
    "demo": polish.load,
    "thorsten_emotional": thorsten.load,
    "audio_folder": audio_folder.load,
    "manifest": manifest.load,
}


def load_corpus(arguments: Arguments) -> Dataset | DatasetDict:
    """Loads the corpus that the recipe names.

    Returns:
        The common table (columns `audio`, `label`, `speaker_id`, `sentence_id`, `duration`), as a `DatasetDict` where
        the corpus comes with its own splits.

    Raises:
        UserError: the corpus is not there, or does not look as its loader expects.
    """
    load = LOADERS.get(arguments.data.dataset_name, hub.load)
    corpus = load(arguments.data, arguments.model.cache_dir)
    return keep_labels(corpus, arguments.data.class_names) if arguments.data.class_names else corpus
