"""Several runs of one recipe: cross-validation, repetition over seeds, less and less data.

    run_classification.py recipes/demo.json --cross_validation loso
    run_classification.py recipes/demo.json --cross_validation 5 --seeds 1 2 3
    run_classification.py recipes/thorsten_wavlm.json --train_fractions 0.05 0.1 0.25 1

Each is a full run in a folder of its own. The same command goes on where it broke off: finished runs are read, a broken
one is resumed.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, concatenate_datasets

from speech_emotion.analysis import compute_group_results, find_confused_pairs
from speech_emotion.arguments import (
    MIN_FOLDS,
    RECIPE_FILE,
    RUN_FILE,
    Arguments,
    derive_arguments,
    describe_environment,
    resolve_recipe,
    strip_local_paths,
)
from speech_emotion.corpora import load_corpus
from speech_emotion.corpora.table import GROUP_COLUMNS
from speech_emotion.errors import UserError
from speech_emotion.html_report import build_chart, describe_groups, describe_results, dump, render
from speech_emotion.metrics import SCORES, Evaluation, summarize
from speech_emotion.outcome import describe_model
from speech_emotion.report import REPORT_FILE, TITLES, draw_lines, draw_results, format_results, write_json, write_text
from speech_emotion.session import describe_changes, set_up_logging
from speech_emotion.splits import NUM_DRAWS, choose_split_by

logger = logging.getLogger(__name__)

PROTOCOL_KEYS = ("cross_validation", "seeds", "train_fractions")
SUMMARY_FILE = "summary.json"


@dataclass
class PlannedRun:
    """One run: the name of its folder, what of the recipe it changes, and its place on each axis, for the table."""

    name: str
    changes: dict[str, Any]
    place: dict[str, Any]


def run_protocol(arguments: Arguments, train: Callable[[Arguments], dict[str, Any]]) -> dict[str, Any]:
    """Trains once, or, if the recipe asks for several runs, each of them, and summarizes them.

    Args:
        arguments: of the recipe.
        train: does one run and returns its results.

    Returns:
        The results of the run; of several, what summary.json holds (on the main process).

    Raises:
        UserError: a protocol that the corpus does not allow, or a folder with runs of another recipe.
    """
    data, training = arguments.data, arguments.training
    if not (data.cross_validation or training.seeds or data.train_fractions):
        return train(arguments)
    set_up_logging(arguments)
    if training.push_to_hub:
        raise UserError("key 'push_to_hub': several runs give several models. Publish one of them afterwards.")
    with training.main_process_first(desc="loading the corpus"):
        corpus = load_corpus(arguments)
    runs = plan_runs(arguments, corpus)
    folder = Path(training.output_dir)
    if training.process_index == 0:
        _open_folder(folder, arguments)
    results = []
    for number, run in enumerate(runs, start=1):
        logger.info(f"\nRun {number} of {len(runs)}: {run.name}")
        results.append(_run_once(run, folder, arguments, train))
    if training.process_index != 0:
        return {}  # the main process alone examines and summarizes
    summary = summarize_runs(runs, results, folder)
    write_summary(summary, arguments, folder)
    return summary


def plan_runs(arguments: Arguments, corpus: Dataset | DatasetDict) -> list[PlannedRun]:
    """Returns the runs: each fold with each seed and each share of the training data."""
    data, training = arguments.data, arguments.training
    axes: list[list[PlannedRun]] = []
    if data.cross_validation:
        axes.append(plan_folds(corpus, data.cross_validation, data.split_by, arguments.split_seed))
    if training.seeds:
        # The split stays: what varies is the training.
        axes.append([PlannedRun(f"seed_{seed}", {"seed": seed, "split_seed": arguments.split_seed}, {"seed": seed})
                     for seed in training.seeds])  # fmt: skip
    if data.train_fractions:
        axes.append([PlannedRun(f"fraction_{share:g}", {"train_fraction": share}, {"train_fraction": share})
                     for share in data.train_fractions])  # fmt: skip
    runs = []
    for parts in itertools.product(*axes):
        changes, place = {}, {}
        for part in parts:
            changes |= part.changes
            place |= part.place
        runs.append(PlannedRun("_".join(part.name for part in parts), changes, place))
    return runs


def plan_folds(corpus: Dataset | DatasetDict, protocol: str, split_by: list[str] | None, seed: int) -> list[PlannedRun]:
    """Divides the groups into folds; each is the test once, and the next one validation.

    Args:
        corpus: the common table; splits that it comes with are put together.
        protocol: "loso" (each session, or without sessions each speaker, is a fold) or a number of folds.
        split_by: column of the groups, if not the first that the corpus knows.
        seed: of the draw of groups into folds, of which the best stratified is taken.

    Raises:
        UserError: fewer than 3 groups or folds, more folds than groups, or a column that is not known for every clip.
    """
    clips = concatenate_datasets(list(corpus.values())) if isinstance(corpus, DatasetDict) else corpus
    columns = choose_split_by(clips, split_by)
    if protocol == "loso" and split_by is None:
        columns = [name for name in columns if name != "sentence_id"]
    if len(columns) != 1:
        raise UserError(
            f"key 'cross_validation': '{protocol}' needs one column of groups that every clip has, and at least {MIN_FOLDS} "
            "groups: speakers for 'loso'; for a number also sentences. Name them with split_by, group_pattern or a column."
        )
    column = columns[0]
    groups = np.asarray(clips[column][:])
    names, group_of_clip = np.unique(groups, return_inverse=True)
    num_folds = len(names) if protocol == "loso" else int(protocol)
    if num_folds > len(names) or len(names) < MIN_FOLDS:
        raise UserError(f"key 'cross_validation': {len(names)} groups ({column}) cannot make {max(num_folds, MIN_FOLDS)} folds.")
    counts = np.zeros((len(names), clips.features["label"].num_classes))
    np.add.at(counts, (group_of_clip, np.asarray(clips["label"][:])), 1)
    fold_of_group = np.arange(len(names)) if num_folds == len(names) else _draw_folds(counts, num_folds, seed)
    folds = [sorted(names[fold_of_group == fold].tolist()) for fold in range(num_folds)]
    planned = []
    for number, members in enumerate(folds):
        title = members[0] if protocol == "loso" else str(number + 1)
        planned.append(
            PlannedRun(
                f"fold_{re.sub(r'[^A-Za-z0-9.-]', '_', title)}",
                {"split_by": [column], "test_groups": members, "validation_groups": folds[(number + 1) % num_folds],
                 "ignore_splits": isinstance(corpus, DatasetDict) or None},
                {"fold": title},
            )
        )  # fmt: skip
    return planned


def _draw_folds(counts: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """(groups, labels) -> each group's fold, (groups,): of many draws the one whose folds resemble one another most."""
    rng = np.random.default_rng(seed)
    best, best_cost = None, np.inf
    for _ in range(NUM_DRAWS):
        folds = rng.permutation(np.arange(len(counts)) % num_folds)
        sums = np.stack([counts[folds == fold].sum(axis=0) for fold in range(num_folds)])
        cost = float(np.abs(sums - sums.mean(axis=0)).sum())
        if cost < best_cost:
            best, best_cost = folds, cost
    return best


def _open_folder(folder: Path, arguments: Arguments) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"key 'output_dir': {folder} cannot be written ({error.strerror}). Choose another folder.") from error
    if (folder / "all_results.json").exists():
        raise UserError(f"key 'output_dir': {folder} holds a single run. Choose another --output_dir.")
    write_json(folder / RECIPE_FILE, resolve_recipe(arguments))
    write_json(folder / RUN_FILE, describe_environment(arguments))


def _run_once(
    run: PlannedRun, folder: Path, arguments: Arguments, train: Callable[[Arguments], dict[str, Any]]
) -> dict[str, Any]:
    own = folder / run.name
    changes = {**dict.fromkeys(PROTOCOL_KEYS), **run.changes, "output_dir": str(own)}
    done = own / "all_results.json"
    if arguments.training.overwrite_output_dir:
        changes["overwrite_output_dir"] = True
    elif any(own.glob("checkpoint-*")):
        changes["resume_from_checkpoint"] = "last"
    derived = derive_arguments(arguments, changes)
    if done.is_file() and not arguments.training.overwrite_output_dir:
        changes = describe_changes(own / RECIPE_FILE, resolve_recipe(derived))
        if changes:
            raise UserError(
                f"{own} holds a run of another recipe: {changes}. Choose another --output_dir, or start over with "
                "--overwrite_output_dir."
            )
        logger.info("It is done already.")
        return json.loads(done.read_text(encoding="utf-8"))
    return train(derived)


def summarize_runs(runs: list[PlannedRun], results: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Returns the table of runs, mean and spread of each score, and the pooled answers' results.

    Args:
        runs: as planned.
        results: of each.
        folder: that holds their folders.

    Returns:
        `runs`; `mean`, `sd` (between runs, n - 1), `min` and `max` of accuracy, uar and f1_macro; `pooled`, as
        `metrics.summarize` gives it with the prefix "test", on the answers of all runs together; `groups`; `confused_pairs`;
        with shares of the data, `curve`, and everything else on the largest share only; and `protocol`, a sentence.
    """
    table = [
        {"run": run.name, **run.place, **{name: result[f"test_{name}"] for name in SCORES}, "num_clips": result["test_num_clips"],
         "best epoch's validation UAR": result.get("eval_uar")}
        for run, result in zip(runs, results, strict=True)
    ]  # fmt: skip
    largest = max(run.place.get("train_fraction", 1.0) for run in runs)
    taken = [i for i, run in enumerate(runs) if run.place.get("train_fraction", 1.0) == largest]
    scores = {name: np.array([table[i][name] for i in taken]) for name in SCORES}
    evaluation, clips = _pool([folder / runs[i].name for i in taken], results[taken[0]]["test_labels"])
    summary: dict[str, Any] = {
        "protocol": _describe_protocol(runs, taken, results[taken[0]]),
        "speaker_dependence": results[taken[0]]["test_speaker_dependence"],
        "runs": table,
        "mean": {name: float(values.mean()) for name, values in scores.items()},
        "sd": {name: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for name, values in scores.items()},
        "min": {name: float(values.min()) for name, values in scores.items()},
        "max": {name: float(values.max()) for name, values in scores.items()},
        "pooled_runs": [runs[i].name for i in taken],
        "pooled": summarize(evaluation, clips, "test"),
        "confused_pairs": find_confused_pairs(evaluation),
        "groups": compute_group_results(evaluation, clips),
    }
    shares = sorted({run.place["train_fraction"] for run in runs if "train_fraction" in run.place})
    if shares:
        by_share = {share: [row["uar"] for row in table if row["train_fraction"] == share] for share in shares}
        summary["curve"] = [
            {"train_fraction": share, "uar": float(np.mean(values)), "min": min(values), "max": max(values)}
            for share, values in by_share.items()
        ]
    return summary


def _describe_protocol(runs: list[PlannedRun], taken: list[int], result: dict[str, Any]) -> str:
    kinds = {key: len({run.place[key] for run in runs}) for key in ("fold", "seed", "train_fraction") if key in runs[0].place}
    words = {"fold": "folds", "seed": "seeds", "train_fraction": "shares of the training data"}
    text = " x ".join(f"{number} {words[key]}" for key, number in kinds.items())
    if len(taken) < len(runs):
        text += f"; mean, spread and matrix are of the {len(taken)} with the largest share"
    return text


def _pool(folders: list[Path], label_names: list[str]) -> tuple[Evaluation, Dataset]:
    """Returns the answers of several runs as one evaluation, and a table of their clips, one row an answer."""
    frames = [pd.read_csv(folder / "predictions.csv", dtype=dict.fromkeys(GROUP_COLUMNS, str)) for folder in folders]
    frame = pd.concat(frames, keys=[folder.name for folder in folders], names=["run"]).reset_index(level="run")
    probabilities = frame[[f"probability_{name}" for name in label_names]].to_numpy()
    references = np.array([label_names.index(name) for name in frame["label"]])
    logits = np.log(np.maximum(probabilities, 1e-7))  # they are written with six digits
    # The written label is kept where rounding made two classes equal.
    chosen = np.array([label_names.index(name) for name in frame["prediction"]])
    logits[np.arange(len(frame)), chosen] = np.maximum(logits.max(axis=1) + 1e-9, logits[np.arange(len(frame)), chosen])
    columns: dict[str, list[Any]] = {
        column: [None if pd.isna(value) else value for value in frame[column]] if column in frame else [None] * len(frame)
        for column in GROUP_COLUMNS
    }
    clips = Dataset.from_dict(
        {**columns, "clip": frame["clip"].tolist(), "run": frame["run"].tolist(), "duration": [float("nan")] * len(frame)}
    )
    return Evaluation(np.arange(len(frame)), references, logits, label_names), clips


def write_summary(summary: dict[str, Any], arguments: Arguments, folder: Path) -> None:
    """Writes summary.json, runs.csv, the pooled predictions.csv, figures and report.html, and shows the table."""
    write_json(folder / SUMMARY_FILE, summary)
    pd.DataFrame(summary["runs"]).to_csv(folder / "runs.csv", index=False)
    taken = summary["pooled_runs"]
    pooled = pd.concat([pd.read_csv(folder / name / "predictions.csv", dtype=str).assign(run=name) for name in taken])
    pooled.to_csv(folder / "predictions.csv", index=False)
    context = describe_results(summary["pooled"], "test") | {
        "title": arguments.training.run_name or folder.name,
        "subtitle": f"{describe_model(arguments)} on {Path(arguments.data.dataset_name).name}",
        "badges": [{"text": summary["speaker_dependence"], "bad": summary["speaker_dependence"] != "speaker-independent"},
                   {"text": summary["protocol"], "bad": False}],
        "runs": summary["runs"],
        "runs_note": "Each is a full training with its own report. " + _tell_spread(summary) + " Above and below: the answers of "
        "all of them together.",
        "pairs": summary["confused_pairs"],
        "groups": describe_groups(summary["groups"]),
        "training_rows": [("Protocol", summary["protocol"])],
        "recipe": dump(strip_local_paths(resolve_recipe(arguments))),
        "environment": dump(
            {key: value for key, value in describe_environment(arguments).items() if key not in ("overrides", "recipe")}
        ),
    }  # fmt: skip
    if arguments.training.report:
        draw_results(summary["pooled"], "test", folder)
        if "curve" in summary:
            points = [(row["train_fraction"], row["uar"]) for row in summary["curve"]]
            draw_lines(folder / "data_efficiency.png", "How much data is enough", "share of the training groups", "test UAR",
                       {"mean": points})  # fmt: skip
            context["efficiency"] = {
                "note": "Mean test UAR over the share of the training groups; the test clips are the same.",
                "chart": build_chart("data efficiency", "share of the training groups", {"test UAR": points}, (0, 1), (0, 1)),
            }
        write_text(folder / REPORT_FILE, render(context))
    lines = [f"\n{summary['protocol']}", ""]
    for row in summary["runs"]:
        lines.append(f"  {row['run']:24} " + "  ".join(f"{TITLES[name]} {row[name]:.3f}" for name in SCORES))
    lines += ["", f"  {_tell_spread(summary)}", "", "All answers together:"]
    logger.info("\n".join(lines))
    logger.info(format_results(summary["pooled"], "test", [f"The results are {summary['speaker_dependence']}."]))
    logger.info(f"\nAll runs and their summary are in {folder}.")


def _tell_spread(summary: dict[str, Any]) -> str:
    return ", ".join(
        f"{TITLES[name]} {summary['mean'][name]:.3f} +- {summary['sd'][name]:.3f} ({summary['min'][name]:.3f} to "
        f"{summary['max'][name]:.3f})"
        for name in ("uar", "accuracy", "f1_macro")
    ) + ": mean, standard deviation and range of the runs."  # fmt: skip
