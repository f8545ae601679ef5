"""The search draws, judges on validation, goes on where it broke off, and writes a recipe that runs."""

import json
import zipfile

import optuna
import pytest
from test_runs import flags

import run_classification
from speech_emotion import search as search_module
from speech_emotion.arguments import parse_arguments
from speech_emotion.errors import UserError
from speech_emotion.search import main, read_space, search

SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "class_weights": ["none", "balanced"]}


def write_recipe(tmp_path, tone_folder, **changes):
    argv = flags(tmp_path, tone_folder, num_train_epochs=1, learning_rate=None, output_dir=None, **changes)
    arguments = parse_arguments([*argv, "--output_dir", str(tmp_path / "unused")])
    recipe = {key: value for key, value in search_module.resolve_recipe(arguments).items() if key not in ("output_dir",)}
    recipe = {key: value for key, value in recipe.items() if key not in ("learning_rate", "class_weights", *search_module.QUICK)}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    return str(tmp_path / "recipe.json"), str(tmp_path / "space.json")


def test_trials_are_runs_and_the_best_recipe_runs(tone_folder, tmp_path):
    recipe, space = write_recipe(tmp_path, tone_folder)
    argv = [recipe, "--space", space, "--trials", "2", "--output_dir", str(tmp_path / "s"), "--report_to", "comet_ml"]
    result = main(argv)
    assert result["num_finished"] == 2 and result["metric"] == "eval_uar"
    values = []
    for number in range(2):
        folder = tmp_path / "s" / f"trial_{number}"
        results = json.loads((folder / "all_results.json").read_text())
        values.append(results["eval_uar"])
        own = json.loads((folder / "recipe.json").read_text())
        assert 1e-4 <= own["learning_rate"] <= 1e-2 and own["class_weights"] in ("none", "balanced")
        (archive,) = (folder / "comet").glob("*.zip")  # each trial is an experiment
        with zipfile.ZipFile(archive) as opened:
            assert f"trial_{number}".encode() in b"".join(opened.read(name) for name in opened.namelist())
        assert not (folder / "report.html").exists()
    assert result["best_value"] == max(values)
    best = json.loads((tmp_path / "s" / "best_recipe.json").read_text())
    own = json.loads((tmp_path / "s" / f"trial_{result['best_trial']}" / "recipe.json").read_text())
    assert best["learning_rate"] == own["learning_rate"] and "output_dir" not in best

    # One was running when the machine went down: it is taken up again, in its folder, and counts once.
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 's' / 'search.db'}")
    trial = study.ask()
    drawn = search_module.suggest(trial, SPACE)
    again = main([*argv[:4], "3", *argv[5:]])
    assert again["num_finished"] == 3
    own = json.loads((tmp_path / "s" / f"trial_{trial.number}" / "recipe.json").read_text())
    assert own["learning_rate"] == drawn["learning_rate"]
    assert not (tmp_path / "s" / "trial_3").exists()
    assert main([*argv[:4], "3", *argv[5:]])["num_finished"] == 3  # nothing is left to do

    with pytest.raises(UserError, match="was begun with another space"):
        search(recipe, {"learning_rate": [1e-3, 1e-2]}, 3, tmp_path / "s", ["--report_to", "comet_ml"])
    best.pop("report_to", None)
    best.pop("run_name", None)
    (tmp_path / "best.json").write_text(json.dumps(best))
    results = run_classification.main([str(tmp_path / "best.json"), "--output_dir", str(tmp_path / "final"), "--report", "false"])
    assert results["eval_uar"] == pytest.approx(result["best_value"]) or again["best_trial"] != result["best_trial"]


def test_a_trial_that_fails_does_not_end_the_search_and_a_mistake_does(tone_folder, tmp_path, monkeypatch):
    recipe, _ = write_recipe(tmp_path, tone_folder)
    calls = []

    def run(recipe, flags, values, folder, number, metric, launcher):
        calls.append(values)
        if number == 1:
            raise search_module.TrialError("out of memory")
        return 0.5

    monkeypatch.setattr(search_module, "_run_trial", run)
    assert search(recipe, SPACE, 3, tmp_path / "s", [])["num_finished"] == 3 and len(calls) == 4
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"trial 0 with .*: .*must be loso or a number"):
        search(recipe, {"cross_validation": ["1", "2"]}, 1, tmp_path / "t", [])
    with pytest.raises(UserError, match="the space tries values of it"):
        search(recipe, SPACE, 1, tmp_path / "u", ["--learning_rate", "1e-3"])


@pytest.mark.parametrize(
    ("space", "message"),
    [({"learning_rat": [1, 2]}, "Did you mean 'learning_rate'?"), ({"seed": 1}, "give a range or a list"),
     ({"seed": [1]}, "two or more"), ({"seed": {"low": 3, "high": 1}}, "a range is"), ({}, "names no key"),
     ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "begins above 0"),
     ({"seed": {"low": 1, "high": 3, "lag": True}}, "a range is")],
    ids=str,
)  # fmt: skip
def test_a_space_that_is_none_is_refused(space, message, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps(space))
    with pytest.raises(UserError) as caught:
        read_space(tmp_path / "space.json")
    assert message in str(caught.value)
