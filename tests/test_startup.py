"""A script answers --help at once, and imports nothing that its run does not use."""

import subprocess
import sys

import pytest
from conftest import ROOT
from test_runs import ENVIRONMENT, flags, run

from speech_emotion import startup


@pytest.mark.parametrize(("script", "own_key"), [("run_classification.py", "--freeze"),
                                                 ("run_classification_no_trainer.py", "--parallel")])  # fmt: skip
def test_help_is_answered_without_the_heavy_libraries(script, own_key):
    done = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and own_key in done.stdout and "--learning_rate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "speech_emotion.arguments" in imported and "torch" in imported
    for name in ("speech_emotion.session", "datasets", "evaluate", "comet_ml", "matplotlib", "torchaudio", "sklearn"):
        assert name not in imported, name


def test_a_run_without_comet_does_not_import_it(tone_folder, tmp_path):
    done = run(
        flags(tmp_path, tone_folder, num_train_epochs=1, report_to="tensorboard", report=None), sys.executable, "-X", "importtime"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line]
    # The failed import is listed too: what counts is that nothing of the package was read.
    assert not any(name.startswith("comet_ml.") for name in imported) and "IPython" not in imported and "sklearn" not in imported
    # Figures are the last thing of all.
    assert imported.index("matplotlib") > imported.index("speech_emotion.session")


@pytest.mark.parametrize(("argv", "wanted"), [
    (["recipes/demo.json"], False), (["recipes/demo.json", "--report_to", "comet_ml"], True), (["--report_to=comet_ml"], True),
    (["recipes/demo.json", "--report_to", "all"], True), (["RECIPE"], True), (["nowhere.json"], False), ([], False),
], ids=str)  # fmt: skip
def test_comet_is_there_for_runs_that_name_it(argv, wanted, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"report_to": ["comet_ml"]}')
    assert startup._names_comet([str(recipe) if token == "RECIPE" else token for token in argv]) is wanted
