"""Searches for better hyperparameters of a recipe with Optuna: each trial is a run, judged on validation alone.

    python -m speech_emotion.search recipes/demo.json --space space.json --trials 20
    python -m speech_emotion.search recipes/demo.json --space space.json --trials 40 --report_to comet_ml --seed 1

space.json says what is tried: ranges (of whole numbers, if both ends are) and lists of values.

    {"learning_rate": {"low": 1e-5, "high": 1e-3, "log": true},
     "num_train_epochs": {"low": 3, "high": 10},
     "freeze": ["none", "feature_encoder"]}

All trials are in OUTPUT_DIR/search.db: the same command goes on where it broke off, and with more --trials goes further. The best
recipe is written to OUTPUT_DIR/best_recipe.json. Trials also test, as every run does, but the search does not look at that: test
the best recipe once, on its own.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from speech_emotion.arguments import (
    DataArguments,
    ModelArguments,
    SpeechTrainingArguments,
    load_recipe,
    parse_arguments,
    resolve_recipe,
    suggest_key,
)
from speech_emotion.errors import USER_ERROR_EXIT_CODE, UserError, run_as_command
from speech_emotion.report import write_json

logger = logging.getLogger(__name__)

STORAGE_FILE, BEST_FILE, TRIALS_FILE = "search.db", "best_recipe.json", "trials.csv"
SCRIPT = Path(__file__).parents[1] / "run_classification.py"
LOG_FILE = "log.txt"
# What a trial does not need, unless it is asked for.
QUICK = {"audit": "false", "robustness": "false", "report": "false"}
LAST_LINES = 15


def read_space(path: Path) -> dict[str, Any]:
    """Reads and checks what is to be tried.

    Raises:
        UserError: no such file, no JSON, a key that recipes do not have, or a range that is none.
    """
    space = load_recipe(str(path))
    if not space:
        raise UserError(f"{path}: names no key to try.")
    known = {f.name for part in (ModelArguments, DataArguments, SpeechTrainingArguments) for f in fields(part) if f.init}
    for key, values in space.items():
        if key not in known:
            raise UserError(f"{path}, key '{key}': there is no such key in a recipe. {suggest_key(key, known)}")
        if isinstance(values, list):
            if len(values) < 2 or any(isinstance(value, dict | list) for value in values):
                raise UserError(f"{path}, key '{key}': a list holds two or more plain values to choose from.")
        elif isinstance(values, dict):
            extra = values.keys() - {"low", "high", "log", "step"}
            numbers = [values.get(end) for end in ("low", "high")]
            are_numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
            if extra or not are_numbers or numbers[0] >= numbers[1]:
                shape = '{"low": A, "high": B} with A < B, and "log": true or "step": C'
                raise UserError(f"{path}, key '{key}': a range is {shape}.")
            if values.get("log") and (numbers[0] <= 0 or "step" in values):
                raise UserError(f"{path}, key '{key}': a logarithmic range begins above 0 and has no step.")
        else:
            raise UserError(f"{path}, key '{key}': give a range or a list; one value belongs in the recipe.")
    return space


def suggest(trial: Any, space: dict[str, Any]) -> dict[str, Any]:
    """Draws a value for each key of the space."""
    drawn = {}
    for key, values in space.items():
        if isinstance(values, list):
            drawn[key] = trial.suggest_categorical(key, values)
            continue
        low, high, options = values["low"], values["high"], {k: values[k] for k in ("log", "step") if k in values}
        whole = isinstance(low, int) and isinstance(high, int)
        drawn[key] = (trial.suggest_int if whole else trial.suggest_float)(key, low, high, **options)
    return drawn


def search(
    recipe: str, space: dict[str, Any], num_trials: int, output_dir: Path, flags: list[str], seed: int = 0, launcher: str = ""
) -> dict[str, Any]:
    """Runs trials until there are so many finished ones, and writes the best recipe.

    Args:
        recipe: path of the recipe.
        space: of `read_space`.
        num_trials: finished ones, those of earlier calls counted in.
        output_dir: of the database, the trials' folders and the best recipe.
        flags: further flags for each trial.
        seed: of the search.
        launcher: what starts each trial, as in "accelerate launch --num_processes 2"; by default this Python.

    Returns:
        `best_trial`, `best_value` (validation), `metric`, `best` (the drawn values) and `num_finished`.

    Raises:
        UserError: a recipe, flag or value that cannot be, another space or recipe than that of the database.
    """
    import optuna

    twice = sorted(space.keys() & {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")})
    if twice:
        raise UserError(f"the command line, key '{twice[0]}': the space tries values of it. Leave it out in one of them.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    arguments = parse_arguments([recipe, *flags, "--output_dir", str(output_dir)])
    metric = f"eval_{str(arguments.training.metric_for_best_model).removeprefix('eval_')}"
    base = resolve_recipe(arguments)
    output_dir.mkdir(parents=True, exist_ok=True)
    direction = "minimize" if metric == "eval_loss" else "maximize"
    study = optuna.create_study(
        study_name="search", storage=f"sqlite:///{output_dir / STORAGE_FILE}", load_if_exists=True, direction=direction,
        sampler=optuna.samplers.TPESampler(seed=seed),
    )  # fmt: skip
    setting = {"space": space, "recipe": {key: value for key, value in base.items() if key != "output_dir"}}
    before = study.user_attrs.get("setting")
    if before is not None and before != setting:
        part = "space" if before["space"] != space else "recipe"
        raise UserError(
            f"{output_dir / STORAGE_FILE} was begun with another {part}. Choose another --output_dir, or that {part}."
        )
    study.set_user_attr("setting", setting)
    _take_up_broken_trials(study)

    def objective(trial: Any) -> float:
        values = suggest(trial, space)
        folder = output_dir / f"trial_{trial.user_attrs.get('continues', trial.number)}"
        value = _run_trial(recipe, flags, values, folder, trial.number, metric, launcher)
        logger.info(f"Trial {trial.number}: {metric} {value:.4f} with {json.dumps(values)}")
        return value

    while (left := num_trials - _count_finished(study)) > 0:
        logger.info(f"{left} of {num_trials} trials to go.")
        study.optimize(objective, n_trials=1, catch=(TrialError,))
        if _count_failed_in_a_row(study) >= 3:
            raise UserError(f"three trials in a row failed. The last one's end:\n{study.trials[-1].user_attrs.get('log', '')}")
    best = study.best_trial
    write_json(output_dir / BEST_FILE, {key: value for key, value in base.items() if key != "output_dir"} | best.params)
    table = study.trials_dataframe(attrs=("number", "value", "state", "params"))
    table.to_csv(output_dir / TRIALS_FILE, index=False)
    return {"best_trial": best.number, "best_value": best.value, "metric": metric, "best": best.params,
            "num_finished": _count_finished(study), "table": table}  # fmt: skip


class TrialError(Exception):
    """A trial that failed for a reason of its own, such as too little memory; the search goes on."""


def _count_finished(study: Any) -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.trials)


def _count_failed_in_a_row(study: Any) -> int:
    count = 0
    for trial in reversed(study.trials):
        if trial.state.name != "FAIL" or "broken" in trial.user_attrs:
            break
        count += 1
    return count


def _take_up_broken_trials(study: Any) -> None:
    """Queues again what was running when an earlier search was stopped, to go on in its folder."""
    for trial in study.trials:
        if trial.state.name == "RUNNING":
            folder = trial.user_attrs.get("continues", trial.number)
            study._storage.set_trial_user_attr(trial._trial_id, "broken", True)
            study.tell(trial.number, state=_state("FAIL"))
            if trial.params:
                study.enqueue_trial(trial.params, user_attrs={"continues": folder})


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _run_trial(
    recipe: str, flags: list[str], values: dict[str, Any], folder: Path, number: int, metric: str, launcher: str
) -> float:
    given = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}
    drawn = [token for key, value in values.items() for token in (f"--{key}", _write(value))]
    quick = [token for key, value in QUICK.items() if key not in given | values.keys() for token in (f"--{key}", value)]
    name = [] if "run_name" in given else ["--run_name", f"{folder.parent.name} {folder.name}"]
    command = [*(shlex.split(launcher) or [sys.executable]), str(SCRIPT), recipe, *flags, *drawn, *quick, *name,
               "--output_dir", str(folder)]  # fmt: skip
    if (folder / "all_results.json").is_file():
        return _read_value(folder, metric)  # it had ended, and only the database did not hear of it
    command += ["--resume_from_checkpoint", "last"] if folder.is_dir() else []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG_FILE, "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code == 0:
        return _read_value(folder, metric)
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    if code == USER_ERROR_EXIT_CODE:
        said = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        raise UserError(f"trial {number} with {json.dumps(values)}: " + "\n".join(lines[said[-1] :]).removeprefix("error: "))
    end = "\n".join(lines[-LAST_LINES:])
    logger.warning(f"Trial {number} failed with exit code {code} ({folder / LOG_FILE}); the search goes on.")
    raise TrialError(end)


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_value(folder: Path, metric: str) -> float:
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    if metric in results:
        return float(results[metric])
    # Trainer's loss is not among the final results: that of the best checkpoint is in the history.
    history = pd.read_csv(folder / "history.csv")
    column = history[metric].dropna()
    return float(column.min() if metric == "eval_loss" else column.max())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, searches, and prints the best trial."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_emotion.search",
        description="Searches for better hyperparameters, judged on validation. Further --key value go to each trial.",
    )
    parser.add_argument("recipe", help="the recipe to start from")
    parser.add_argument("--space", type=Path, required=True, help="JSON file: ranges and lists of values to try")
    parser.add_argument("--trials", type=int, required=True, help="finished trials there shall be, earlier ones counted in")
    parser.add_argument("--output_dir", type=Path, help="by default runs/search_RECIPE")
    parser.add_argument("--search_seed", type=int, default=0, help="of the draws")
    parser.add_argument("--launcher", default="", help="what starts each trial, as in 'accelerate launch --num_processes 2'")
    arguments, flags = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("speech_emotion").setLevel(logging.INFO)
    if arguments.trials < 1:
        raise UserError("--trials must be at least 1.")
    output_dir = arguments.output_dir or Path("runs") / f"search_{Path(arguments.recipe).stem}"
    space = read_space(arguments.space)
    result = search(arguments.recipe, space, arguments.trials, output_dir, flags, arguments.search_seed, arguments.launcher)
    print(
        f"\nBest of {result['num_finished']} trials: number {result['best_trial']}, {result['metric']} {result['best_value']:.4f}"
    )
    for key, value in result["best"].items():
        print(f"  {key}: {value}")
    print(f"\nIts recipe is {output_dir / BEST_FILE}; run it once to test it: run_classification.py {output_dir / BEST_FILE}")
    return result


if __name__ == "__main__":
    run_as_command(main, interrupted="interrupted. The same command goes on from here.")
