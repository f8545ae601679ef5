"""Recipes and flags: what is right is typed, what is wrong is named in one line."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from speech_emotion.arguments import SECRET_KEYS, parse_arguments, resolve_recipe
from speech_emotion.errors import UserError

RECIPES = sorted((ROOT / "recipes").rglob("*.json"))
MINIMAL = {"model_name_or_path": "assets/whisper-tiny.en-encoder"}


def write(tmp_path, recipe):
    path = tmp_path / "r.json"
    path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe), encoding="utf-8")
    return str(path)


def test_there_are_recipes():
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path, tmp_path):
    arguments = parse_arguments([str(path), "--output_dir", str(tmp_path)])
    given = json.loads(path.read_text())
    resolved = resolve_recipe(arguments)
    for key, value in given.items():
        assert key == "report_to" or resolved[key] == value, key


def test_flags_override_the_recipe_in_either_spelling(tmp_path):
    path = write(tmp_path, MINIMAL | {"learning_rate": 1e-3, "split_by": ["speaker_id"], "seed": 3})
    arguments = parse_arguments([path, "--learning_rate", "2e-4", "--seed=5", "--split_by", "speaker_id", "sentence_id"])
    assert (arguments.training.learning_rate, arguments.training.seed) == (2e-4, 5)
    assert arguments.data.split_by == ["speaker_id", "sentence_id"]
    assert arguments.training.output_dir == "runs/r"


def test_flags_alone_are_enough():
    arguments = parse_arguments(["--model_name_or_path", "assets/whisper-tiny.en-encoder", "--bf16", "false"])
    assert arguments.data.dataset_name == "demo" and arguments.training.bf16 is False


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"learning_rat": 1}, "r.json, key 'learning_rat': there is no such key. Did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, "r.json, key 'learning_rate': invalid float value: 'fast'"),
        ({"num_train_epochs": True}, "r.json, key 'num_train_epochs'"),
        ({"seed": 1.5}, "r.json, key 'seed': invalid int value: '1.5'"),
        ({"freeze": "encoder"}, "r.json, key 'freeze'"),
        ({"load_best_model_at_end": "maybe"}, "r.json, key 'load_best_model_at_end'"),
        ({"split_by": []}, "r.json, key 'split_by': a list holds"),
        ({"seed": None}, "r.json, key 'seed': null"),
        ({"test_fraction": 1.5}, "key 'test_fraction': is 1.5"),
        ({"lr_scheduler_type": "linaer"}, "key 'lr_scheduler_type': there is no 'linaer'. Did you mean 'linear'?"),
        ({"optim": "adm"}, "key 'optim': there is no 'adm'. Did you mean 'adam'?"),
        ({"model_name_or_path": None}, "key 'model_name_or_path': is missing"),
        ('{"seed": 1, "seed": 2}', "key 'seed' stands there twice"),
        ('{"seed": 1,}', "r.json, line 1, column 1"),
        ("[1]", "a recipe is one JSON object"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused_in_one_line(recipe, message, tmp_path):
    recipe = recipe if isinstance(recipe, str) else MINIMAL | recipe
    with pytest.raises(UserError) as caught:
        parse_arguments([write(tmp_path, recipe)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes/dmeo.json"], "recipes/dmeo.json: there is no such recipe. Did you mean recipes/demo.json?"),
        (["recipes/demo.json", "--sed", "1"], "the command line, key 'sed': there is no such key. Did you mean 'seed'?"),
        (["recipes/demo.json", "--seed", "x"], "the command line, key 'seed': invalid int value: 'x'"),
        (["recipes/demo.json", "--seed", "1", "--seed", "2"], "key 'seed' stands there twice"),
        (["recipes/demo.json", "stray"], "'stray' is neither a recipe"),
        ([], "names no recipe"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", sorted(SECRET_KEYS))
def test_a_secret_is_refused_with_the_reason_and_not_repeated(key, tmp_path):
    for argv in ([write(tmp_path, MINIMAL | {key: "hf_planted"})], ["recipes/demo.json", f"--{key}", "hf_planted"]):
        with pytest.raises(UserError) as caught:
            parse_arguments(argv)
        assert f"environment variable {SECRET_KEYS[key]}" in str(caught.value)
        assert "hf_planted" not in str(caught.value)


def test_the_resolved_recipe_parses_to_itself(tmp_path):
    arguments = parse_arguments(["recipes/thorsten_wav2vec2.json", "--seed", "7", "--output_dir", str(tmp_path)])
    resolved = resolve_recipe(arguments)
    assert resolved["seed"] == 7 and "hub_token" not in resolved
    again = parse_arguments([write(tmp_path, resolved)])
    assert resolve_recipe(again) == resolved


def test_help_shows_our_fields_and_hides_what_few_need(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for field in ("--freeze", "--split_by", "--learning_rate", "--max_length_seconds", "--comet_project"):
        assert field in shown
    assert "--fsdp_config" not in shown and "TrainingArguments is accepted too" in shown


def test_own_schedules_survive_the_parser(tmp_path):
    arguments = parse_arguments(
        [write(tmp_path, MINIMAL | {"optim": "adam", "lr_scheduler_type": "step", "lr_scheduler_kwargs": {"step_size": 2}})]
    )
    assert (arguments.training.optim, arguments.training.lr_scheduler_type) == ("adam", "step")
    assert arguments.training.lr_scheduler_kwargs == {"step_size": 2}


def test_modules_import_only_what_stands_before_them():
    """Imports go one way, no module names Trainer, and nothing imports a script."""
    order = [
        "startup", "errors", "arguments", "audio", "corpora", "augmentation", "modeling", "lora", "dropout", "memory", "splits",
        "features", "batching", "optimization", "trainer_parts", "metrics", "frozen", "inference", "analysis", "audit",
        "robustness", "cross_corpus", "examination", "report", "html_report", "card", "publishing", "tracking", "session",
        "outcome", "protocols", "compare", "export", "search",
    ]  # fmt: skip
    files = [path for path in (ROOT / "speech_emotion").rglob("*.py") if path.stem != "__init__"]
    assert len(files) > 12
    for path in files:
        name = "corpora" if path.parent.name == "corpora" else path.stem
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bTrainer\b(?!['’])", re.sub(r'(?s)""".*?"""|#.*', "", text)), path
        assert "run_classification import" not in text
        for line in text.splitlines():
            if line.startswith("from speech_emotion."):
                imported = line.split()[1].split(".")[1]
                assert order.index(imported) <= order.index(name), f"{Path(path).name}: {line}"
