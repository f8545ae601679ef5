"""A trained model on other corpora than its own, whose classes are mapped to its classes.

    "test_on": ["emodb=/data/emodb", "my_corpus.json"],
    "label_map": {"emodb": {"happiness": "happy", "boredom": null}, "fearful": "fear"}

An entry of `test_on` is a corpus's name with its folder, or a recipe whose keys on data describe it. Classes of equal
names are the same; others are mapped by `label_map`, for one corpus or for all, and what is mapped to nothing is left
out and told.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from speech_emotion.arguments import Arguments, DataArguments, load_recipe
from speech_emotion.corpora import load_corpus
from speech_emotion.errors import UserError
from speech_emotion.inference import Classifier
from speech_emotion.metrics import Evaluation, choose_clusters, score_uar, summarize


@dataclass
class OtherCorpus:
    """Clips of another corpus; `labels` are the model's classes, (num_clips,), and the texts say which became which."""

    name: str
    clips: Dataset
    labels: np.ndarray
    mapped: str
    unmapped: str


def load_others(arguments: Arguments, label_names: list[str]) -> list[OtherCorpus]:
    """Loads the corpora of `test_on`, before any training, so that what is wrong with them is said in time.

    Raises:
        UserError: a corpus that cannot be loaded, none of whose classes the model has, or a `label_map` that names a
            class that is not there.
    """
    label_map = arguments.data.label_map or {}
    for theirs, ours in _flatten(label_map):
        if ours is not None and ours not in label_names:
            raise UserError(f"key 'label_map': '{theirs}' is mapped to '{ours}', but the model has {', '.join(label_names)}.")
    return [_load_other(entry, arguments, label_names, label_map) for entry in arguments.data.test_on or []]


def _flatten(label_map: dict[str, Any]) -> list[tuple[str, str | None]]:
    nested = [(key, value) for part in label_map.values() if isinstance(part, dict) for key, value in part.items()]
    return [(key, value) for key, value in label_map.items() if not isinstance(value, dict)] + nested


def _load_other(entry: str, arguments: Arguments, label_names: list[str], label_map: dict[str, Any]) -> OtherCorpus:
    if entry.endswith(".json"):
        known = {field.name for field in dataclasses.fields(DataArguments)}
        data = DataArguments(**{key: value for key, value in load_recipe(entry).items() if key in known})
        name = Path(entry).stem
    else:
        name, _, folder = entry.partition("=")
        data = DataArguments(dataset_name=name, data_dir=folder or None)
    data.on_bad_audio = arguments.data.on_bad_audio
    try:
        corpus = load_corpus(arguments._replace(data=data))
    except UserError as error:
        raise UserError(f"key 'test_on', '{entry}': {error}") from error
    if isinstance(corpus, DatasetDict):
        corpus = corpus["test"] if "test" in corpus else concatenate_datasets(list(corpus.values()))

    own_map = {key: value for key, value in label_map.items() if not isinstance(value, dict)}
    own_map |= label_map.get(name, {}) if isinstance(label_map.get(name, {}), dict) else {}
    theirs = corpus.features["label"].names
    target = {label: own_map.get(label, label if label in label_names else None) for label in theirs}
    if not any(target.values()):
        raise UserError(
            f"key 'test_on', '{entry}': none of its classes ({', '.join(theirs)}) is one of the model's "
            f"({', '.join(label_names)}). Say which is which with label_map."
        )
    labels = np.asarray(corpus["label"][:])
    new = np.array([label_names.index(target[label]) if target[label] is not None else -1 for label in theirs])[labels]
    kept = np.flatnonzero(new >= 0)
    if len(set(new[kept])) < 2:
        raise UserError(f"key 'test_on', '{entry}': only one of the model's classes has clips there; two are needed.")
    counts = np.bincount(labels, minlength=len(theirs))
    return OtherCorpus(
        name,
        corpus.select(kept),
        new[kept],
        "Classes: " + ", ".join(f"{label} as {target[label]}" for label in theirs if target[label] is not None) + ".",
        ", ".join(f"{label} ({counts[i]} clips)" for i, label in enumerate(theirs) if target[label] is None and counts[i]),
    )


def evaluate_on_others(others: list[OtherCorpus], classifier: Classifier) -> tuple[list[dict[str, Any]], list[Evaluation]]:
    """Returns the results on each corpus, and the answers.

    Returns:
        Dictionaries with `corpus`, the results of `summarize` without a prefix, `uar_shared` and its interval (the most probable
        of those classes that the corpus has is taken), `chance` (of the latter), `mapped`, `unmapped` and `num_unusable`; and
        the answers on the clips that could be read.
    """
    results, evaluations = [], []
    for other in others:
        answers = classifier.classify(list(other.clips.select_columns(["audio"]).with_format(None)["audio"]))
        usable = np.array([answer.index for answer in answers if answer.probabilities is not None], dtype=int)
        if not len(usable):
            raise UserError(f"key 'test_on': none of the recordings of {other.name} can be read; the first: {answers[0].error}.")
        logits = np.log(np.maximum(np.stack([answers[i].probabilities for i in usable]), np.finfo(np.float32).tiny))
        evaluation = Evaluation(usable, other.labels[usable], logits, classifier.label_names)
        present = np.isin(np.arange(logits.shape[1]), other.labels[usable])
        summary = summarize(evaluation, other.clips, "x")
        chosen = np.where(present, logits, -np.inf).argmax(axis=1)
        clusters = choose_clusters(other.clips.select(usable))[1]
        within = score_uar(evaluation.references, chosen, clusters, logits.shape[1])
        results.append(
            {"corpus": other.name}
            | {key.removeprefix("x_"): value for key, value in summary.items()}
            | {"uar_shared": within["uar"], "uar_shared_ci95": within["uar_ci95"], "chance": 1 / int(present.sum()),
               "mapped": other.mapped, "unmapped": other.unmapped, "num_unusable": len(answers) - len(usable)}
        )  # fmt: skip
        evaluations.append(evaluation)
    return results, evaluations
