"""The model card of a run: what a stranger needs to know before using the model, from what the run left behind."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from speech_emotion.arguments import RECIPE_FILE, RUN_FILE, strip_local_paths
from speech_emotion.corpora import FACTS
from speech_emotion.corpora.table import SPLITS, CorpusFacts
from speech_emotion.errors import UserError
from speech_emotion.html_report import TEMPLATES
from speech_emotion.modeling import describe_trained
from speech_emotion.report import TITLES

LANGUAGES = {"de": "German", "en": "English", "pl": "Polish", "zh": "Mandarin", "fr": "French", "es": "Spanish", "it": "Italian"}
# What to cite for each architecture.
BACKBONES = {
    "audio-spectrogram-transformer": "Y. Gong, Y.-A. Chung, J. Glass: AST: Audio Spectrogram Transformer. arXiv 2104.01778.",
    "data2vec-audio": "A. Baevski et al.: data2vec. arXiv 2202.03555.",
    "hubert": "W.-N. Hsu et al.: HuBERT. arXiv 2106.07447.",
    "sew": "F. Wu et al.: Performance-Efficiency Trade-offs in Unsupervised Pre-training. arXiv 2109.06870.",
    "sew-d": "F. Wu et al.: Performance-Efficiency Trade-offs in Unsupervised Pre-training. arXiv 2109.06870.",
    "unispeech": "C. Wang et al.: UniSpeech. arXiv 2101.07597.",
    "unispeech-sat": "S. Chen et al.: UniSpeech-SAT. arXiv 2110.05752.",
    "wav2vec2": "A. Baevski et al.: wav2vec 2.0. arXiv 2006.11477.",
    "wav2vec2-bert": "Seamless Communication: Seamless. arXiv 2312.05187.",
    "wav2vec2-conformer": "C. Wang et al.: fairseq S2T. arXiv 2010.05171.",
    "wavlm": "S. Chen et al.: WavLM. arXiv 2110.13900.",
    "whisper": "A. Radford et al.: Robust Speech Recognition via Large-Scale Weak Supervision. arXiv 2212.04356.",
}
TAGS = ["audio-classification", "speech-emotion-recognition", "emotion"]
RESULT_FILES = ("test_results.json", "train_results.json", RECIPE_FILE, RUN_FILE, "config.json", "preprocessor_config.json")


def build_card(folder: Path, repo_id: str) -> ModelCard:
    """Builds the card of a finished run.

    Args:
        folder: its output folder.
        repo_id: "user/name" on the Hub.

    Raises:
        UserError: the folder holds no finished run.
    """
    missing = [name for name in RESULT_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: holds no finished run: {missing[0]} is not there. Name the output folder of a run.")
    test, train, recipe, run, config, extractor = (_read(folder / name) for name in RESULT_FILES)
    public = strip_local_paths(recipe)
    names = test["test_labels"]
    facts = FACTS.get(recipe["dataset_name"])
    is_hub_dataset = _is_hub_id(recipe["dataset_name"]) and facts is None
    language = recipe.get("card_language") or (list(facts.language) if facts else None)
    base_model = find_base_model(recipe)
    license_name = recipe.get("card_license")
    corpus = facts.title if facts else Path(recipe["dataset_name"]).name

    data = ModelCardData(
        language=language,
        # The Hub wants a licence or "other" with a name for it.
        license=license_name or "other",
        license_name=None if license_name else "terms-of-base-model-and-corpus",
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=TAGS,
        datasets=[recipe["dataset_name"]] if is_hub_dataset else None,
        base_model=base_model,
        metrics=["accuracy", "f1", "recall"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="audio-classification", task_name="Speech emotion recognition",
                dataset_type=recipe["dataset_name"] if is_hub_dataset or facts else "custom",
                dataset_name=corpus, dataset_split="test", dataset_config=recipe.get("dataset_config_name"),
                metric_type={"uar": "recall", "f1_macro": "f1"}.get(key, key), metric_value=round(test[f"test_{key}"], 4),
                metric_name=f"{title} (95 % interval {_interval(test[f'test_{key}_ci95'])}, {test['test_speaker_dependence']})",
                metric_args={"average": "macro"} if key != "accuracy" else None,
            )
            for key, title in TITLES.items()
        ],
    )  # fmt: skip
    audit, robustness, others = (_read(folder / f"{name}.json") for name in ("audit", "robustness", "cross_corpus"))
    context = {
        "title": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "has_figures": (folder / "confusion_matrix.png").is_file(),
        "names": names,
        "language_names": " and ".join(LANGUAGES.get(code, code) for code in language) if language else None,
        "base_model": base_model,
        "base_url": f"https://huggingface.co/{base_model}" if base_model and _is_hub_id(base_model) else None,
        "architecture": config["model_type"],
        "corpus": f"[{facts.title}]({facts.url})" if facts else corpus,
        "results": [_row(title, test[f"test_{key}"], test[f"test_{key}_ci95"]) for key, title in TITLES.items()]
        + [_row(f"Recall of {name}", test[f"test_recall_{name}"], test[f"test_recall_{name}_ci95"])
           for name in names if f"test_recall_{name}" in test]
        + [{"name": "Calibration error", "value": f"{test['test_ece']:.3f}", "interval": ""}],
        "num_clips": test["test_num_clips"],
        "dependence": test["test_speaker_dependence"] if test["test_speaker_dependence"] != "unknown" else "speakers unknown",
        "chance": f"{1 / sum(f'test_recall_{name}' in test for name in names):.3f}",
        "clustered_by": test["test_ci95_clustered_by"],
        "sampling_rate": extractor.get("sampling_rate", 16000),
        "purpose": describe_purpose(facts, names, language),
        "data": describe_data(facts, corpus, public, test),
        "splits": count_splits(folder / "splits.csv", names),
        "notes": test["test_notes"],
        "audit": [_row(f"{entry['cue']} ({entry['by']})", entry["uar"], entry["uar_ci95"]) for entry in audit["shortcuts"]]
        if audit else None,
        "audit_warnings": audit["warnings"] if audit else [],
        "robustness": [_row(entry["condition"], entry["uar"], entry["uar_ci95"]) for entry in robustness["conditions"]]
        if robustness else None,
        "cross_corpus": [_row("", entry["uar"], entry["uar_ci95"]) | {"corpus": entry["corpus"], "num_clips": entry["num_clips"],
                         "note": entry["mapped"] + (f" Left out: {entry['unmapped']}." if entry["unmapped"] else "")}
                         for entry in others["corpora"]] if others else None,
        "training": "Fine-tuned with speech-emotion-recipes.",
        "training_rows": describe_training(public, train, run, config),
        "license_text": describe_license(license_name, facts, base_model or config["model_type"]),
        "citations": ([facts.citation] if facts else []) + ([BACKBONES[config["model_type"]]] if config["model_type"] in BACKBONES
                                                             else []),
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_escape,
    )  # fmt: skip
    text = environment.get_template("card.md").render(context)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _escape(value: Any) -> Any:
    """Keeps names of classes, speakers and corpora from becoming HTML, table cells or new lines in Markdown."""
    if not isinstance(value, str):
        return "" if value is None else value
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("\n", " "), ("\r", " ")):
        value = value.replace(old, new)
    return value


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))


def find_base_model(recipe: dict[str, Any]) -> str | None:
    """Returns the Hub id of what was fine-tuned: the recipe's, or that which the card of a local folder names."""
    name = recipe.get("model_name_or_path")
    if name is None:
        return None
    if _is_hub_id(name):
        return name
    card = Path(name) / "README.md"
    base = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("base_model") if card.is_file() else None
    return base if isinstance(base, str) else None


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _row(name: str, value: float, bounds: list[float]) -> dict[str, str]:
    return {"name": name, "value": f"{value:.3f}", "interval": _interval(bounds)}


def describe_purpose(facts: CorpusFacts | None, names: list[str], language: list[str] | None) -> list[str]:
    """Returns what the model is for, as far as the corpus tells it."""
    spoken = " and ".join(LANGUAGES.get(code, code) for code in language) if language else "one corpus's language"
    lines = [f"For research and teaching on emotion in speech, on recordings like those it was trained on: {spoken}."]
    if facts is not None and "acted" in facts.nature:
        lines.append(
            "The emotions in training were acted, which is louder and clearer than felt emotion; on that it was not tested."
        )
    elif facts is None:
        lines.append("Whether the emotions in training were acted or felt, its author does not state.")
    lines.append(
        f"It always answers with one of {len(names)} classes, also for music, silence, several voices or another emotion."
    )
    lines.append("Not for decisions about people, and not for judging health, honesty or intentions.")
    return lines


def describe_data(facts: CorpusFacts | None, corpus: str, recipe: dict[str, Any], test: dict[str, Any]) -> list[str]:
    """Returns corpus and protocol, as sentences."""
    lines = []
    if facts is not None:
        lines.append(f"{facts.title}: {facts.nature}, {facts.speakers}. Licence of the recordings: {facts.license}.")
    else:
        lines.append(f"{corpus}: a corpus of the author's.")
    apart = recipe.get("split_by")
    kept = " and no ".join(column.removesuffix("_id") for column in apart) if apart else None
    lines.append(f"No {kept} is in more than one split." if kept else "The splits are described below.")
    meaning = {"speaker-independent": "no test speaker was heard in training",
               "speaker-dependent": "test speakers were heard in training, so that new speakers will be recognized worse",
               "unknown": "whether test speakers were heard in training is not known"}[
        test["test_speaker_dependence"]]  # fmt: skip
    lines.append(f"The test is {test['test_speaker_dependence']}: {meaning}.")
    return lines


def count_splits(path: Path, names: list[str]) -> list[dict[str, Any]]:
    """Returns the clips of each split and class."""
    if not path.is_file():
        return []
    frame = pd.read_csv(path, dtype=str)
    return [
        {"split": split, "num_clips": int((frame["split"] == split).sum()),
         "counts": [int(((frame["split"] == split) & (frame["label"] == name)).sum()) for name in names]}
        for split in SPLITS
    ]  # fmt: skip


def describe_training(recipe: dict[str, Any], train: dict[str, Any], run: dict[str, Any], config: dict[str, Any]) -> list[Any]:
    """Returns the rows of the table on training, environmental figures among them."""
    batch = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * run["num_processes"]
    rows = [
        ("architecture", config["model_type"]),
        ("trained", describe_trained(recipe["freeze"], recipe.get("lora_rank"))),
        ("epochs", f"{train.get('epoch', recipe['num_train_epochs']):g}"),
        ("optimizer", f"{recipe['optim']}, learning rate {recipe['learning_rate']:g}, {recipe['lr_scheduler_type']}"),
        ("clips a step", str(batch)),
        ("loss", recipe["loss"] + (f", class weights {recipe['class_weights']}" if recipe["class_weights"] != "none" else "")),
        ("window", f"{recipe['max_length_seconds']:g} s" if recipe.get("max_length_seconds") else "the whole clip"),
        ("seed", str(recipe["seed"])),
        ("training time", f"{train['train_runtime']:.0f} s"),
        ("hardware", f"{run['num_processes']} x {run['device']}, {run['num_cores']} cores"),
        ("software", ", ".join(f"{name} {version}" for name, version in run["libraries"].items())),
        ("carbon", "not measured: energy is the hardware's power times the training time"),
    ]  # fmt: skip
    if train.get("layer"):
        rows.insert(2, ("layer", str(train["layer"])))
    return rows


def describe_license(license_name: str | None, facts: CorpusFacts | None, base: str) -> str:
    """Returns what is known of the terms of use."""
    own = f"The weights: {license_name}." if license_name else "The author states no licence for the weights."
    corpus = f" The corpus: {facts.license} ({facts.url})." if facts else " The corpus has terms of its own."
    return f"{own} They derive from {base} and from the corpus, whose terms apply.{corpus}"
