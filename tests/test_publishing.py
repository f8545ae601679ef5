"""Publishing to a Hub on loopback: what arrives, what never does, and what a broken connection leaves."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hub import TOKEN, Hub, check_card
from huggingface_hub import HfApi, ModelCard
from loopback import serve
from test_runs import ENVIRONMENT, flags

import run_classification
import run_classification_no_trainer
from speech_emotion import publishing
from speech_emotion.card import build_card, describe_data, describe_purpose, find_base_model
from speech_emotion.corpora import FACTS, LOADERS
from speech_emotion.errors import UserError
from speech_emotion.publishing import Publisher, collect_files, publish_run, write_space


@pytest.fixture(scope="module")
def finished(tone_folder, tmp_path_factory):
    """The output folder of a run with everything in it."""
    root = tmp_path_factory.mktemp("finished")
    whole = {"audit": None, "robustness": None, "report": None, "cache_dir": root / "cache"}
    run_classification.main(flags(root, tone_folder, num_train_epochs=8, learning_rate=1e-2, **whole))
    return root / "out"


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and publishers that know it; waiting between attempts is noted instead of done."""
    import huggingface_hub.constants
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    server = Hub()
    server.waits = []
    monkeypatch.setattr(publishing, "_sleep", server.waits.append)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    with serve(server.handler()) as address:
        server.address = address
        monkeypatch.setattr(publishing, "HfApi", lambda: HfApi(endpoint=address, token=TOKEN))
        yield server


def test_everything_that_was_promised_arrives_in_one_commit(finished, hub):
    address = publish_run(finished, Publisher("user/name", private=True))
    assert address.startswith(f"{hub.address}/user/name/commit/")
    (commit,) = hub.repos["models/user/name"]["main"]
    assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "recipe.json", "run.json",
            "test_results.json", "eval_results.json", "train_results.json", "audit.json", "robustness.json",
            "confusion_matrix.png", "training_curves.png", "calibration.png"} <= commit.keys()  # fmt: skip
    assert commit["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert "models/user/name" in hub.private
    for name in ("training_args.bin", "predictions.csv", "splits.csv", "report.html", "all_results.json"):
        assert name not in commit
    assert not any(name.endswith((".wav", ".flac")) or name.startswith("checkpoint") for name in commit)


def test_no_secret_and_no_folder_of_this_machine_is_sent(finished, hub, monkeypatch, tone_folder):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTEDplantedPLANTED")
    publish_run(finished, Publisher("user/name"))
    for name, content in hub.files().items():
        for word in (str(finished.parent), str(tone_folder), str(ROOT), os.path.expanduser("~/"), "hf_PLANTED", TOKEN):
            assert word.encode() not in content, (name, word)
    # A recording in the page is sent only if it is asked for.
    assert "report.html" in collect_files(finished, "user/name", with_report=True)


def test_a_file_that_tells_a_secret_or_a_folder_stops_the_push(finished, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_PLANTEDplantedPLANTED")
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    for planted, message in (
        ("hf_PLANTEDplantedPLANTED", "audit.json holds one of your tokens"),
        (str(copy), "tells the folder"),
    ):
        content = json.loads((finished / "audit.json").read_text())
        (copy / "audit.json").write_text(json.dumps(content | {"note": planted}))
        with pytest.raises(UserError, match=message):
            publish_run(copy, Publisher("user/name"))
    assert hub.files() == {}


def test_the_card_is_valid_and_tells_what_was_measured(finished):
    card = build_card(finished, "user/name")
    assert check_card(str(card)) == []
    results = json.loads((finished / "test_results.json").read_text())
    metrics = {result.metric_name.partition(" (")[0]: result for result in card.data.eval_results}
    assert metrics["UAR"].metric_value == pytest.approx(results["test_uar"], abs=1e-4)
    low, high = results["test_uar_ci95"]
    assert f"95 % interval {low:.3f} to {high:.3f}, speaker-independent" in metrics["UAR"].metric_name
    assert card.data.pipeline_tag == "audio-classification" and "speech-emotion-recognition" in card.data.tags
    for promised in ("speaker-independent", "AI Act", "article 5(1)(f)", "confusion_matrix.png", 'model="user/name"',
                     "training time", "noise at 10 dB", "duration (logistic regression)", "## Citation",
                     "Do not decide about people"):  # fmt: skip
        assert promised in card.text, promised
    # Tables are whole: each row has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\|$\n?)+", card.text, re.M):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table


def test_the_demos_card_knows_its_corpus_and_its_base_model():
    recipe = {"model_name_or_path": "assets/whisper-tiny.en-encoder"}
    assert find_base_model(recipe) == "openai/whisper-tiny.en"
    assert find_base_model({"model_name_or_path": "facebook/wav2vec2-base"}) == "facebook/wav2vec2-base"
    facts = FACTS["demo"]
    purpose = " ".join(describe_purpose(facts, ["anger", "fear"], ["pl"]))
    assert "Polish" in purpose and "acted" in purpose
    data = " ".join(
        describe_data(facts, facts.title, {"split_by": ["speaker_id"]}, {"test_speaker_dependence": "speaker-dependent"})
    )
    assert "5 male speakers" in data and "new speakers will be recognized worse" in data
    assert FACTS.keys() == LOADERS.keys() - {"audio_folder", "manifest"}


def test_a_hostile_class_name_does_not_break_out_of_the_card(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    for name in ("test_results.json", "splits.csv"):
        (copy / name).write_text((finished / name).read_text().replace("high", "<img src=x onerror=alert(1)>"))
    card = build_card(copy, "user/name")
    assert "<img" not in card.text and check_card(str(card)) == []


FAULTS = {
    "the repository's making answers 500": ["POST", "/api/repos/create", 500, 2],
    "the card's check breaks": ["POST", "/api/validate-yaml", "reset", 1],
    "the card's check answers a page": ["POST", "/api/validate-yaml", 502, 1],
    "preupload is cut off": ["POST", "/preupload/", "half", 1],
    "the upload breaks": ["PUT", "/lfs/", "reset", 7],
    "the upload answers 503": ["PUT", "/lfs/", 503, 3],
    "the commit answers 500": ["POST", "/commit/", 500, 2],
    "the commit breaks": ["POST", "/commit/", "reset", 2],
    "somebody else commits": ["POST", "/commit/", 409, 1],
    "the commit's answer is lost": ["POST", "/commit/", "lost", 1],
    "the commit is slow": ["POST", "/commit/", "slow", 1],
    "the list of files is slow": ["POST", "/preupload/", "slow", 1],
    "too many requests": ["POST", "/commit/", 429, 1],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_waited_out(fault, finished, hub):
    hub.faults = [list(FAULTS[fault])]
    publish_run(finished, Publisher("user/name"))
    commits = hub.repos["models/user/name"]["main"]
    assert len(commits) == 1 and commits[0]["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert hub.waits == sorted(hub.waits)
    assert hub.faults[0][3] == 0


@pytest.mark.parametrize(("method", "pattern"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_push_that_breaks_off_changes_nothing_and_the_next_sends_the_rest(method, pattern, finished, hub):
    before = {"model.safetensors": b"older weights", "config.json": b"{}"}
    hub.repos["models/user/name"] = {"main": [before]}
    hub.faults = [[method, pattern, 500, 10_000]]
    with pytest.raises(UserError, match="cannot publish on the Hub: it answered 500"):
        publish_run(finished, Publisher("user/name"))
    assert hub.repos["models/user/name"]["main"] == [before]  # nobody loads half of it
    assert len(hub.waits) == 4
    hub.faults, hub.requests = [], []
    publish_run(finished, Publisher("user/name"))
    assert hub.files()["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    if pattern == "/commit/":  # the weights had arrived
        assert not any(request.startswith("PUT") for request in hub.requests)
    hub.requests = []
    publish_run(finished, Publisher("user/name"))  # nothing has changed: no commit, no upload
    assert len(hub.repos["models/user/name"]["main"]) == 2 and not any(r.startswith("PUT") for r in hub.requests)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Log in with `hf auth login`, or set HF_TOKEN"),
        (403, "you may not write to user/name"),
        (400, "it refused what was sent (400)"),
    ],
)
def test_a_refusal_is_said_at_once(status, message, finished, hub):
    hub.faults = [["POST", "/preupload/", status, 10_000]]
    with pytest.raises(UserError, match=re.escape(message)):
        publish_run(finished, Publisher("user/name"))
    assert hub.waits == [] and hub.files() == {}


def test_a_branch_is_made_and_main_stays(finished, hub):
    hub.repos["models/user/name"] = {"main": [{"config.json": b"{}"}]}
    publish_run(finished, Publisher("user/name", revision="v2"))
    assert hub.files(branch="main") == {"config.json": b"{}"} and "model.safetensors" in hub.files(branch="v2")


def test_a_folder_without_a_run_or_a_name_that_cannot_be_is_refused(tmp_path, finished, hub):
    with pytest.raises(UserError, match="holds no finished run"):
        publish_run(tmp_path, Publisher("user/name"))
    with pytest.raises(UserError, match="key 'hub_model_id'"):
        publish_run(finished, Publisher("user/na me/x"))


@pytest.mark.parametrize("script", [run_classification, run_classification_no_trainer])
def test_a_run_publishes_itself_and_keeps_everything_if_it_cannot(script, tone_folder, tmp_path, hub):
    argv = flags(tmp_path, tone_folder, num_train_epochs=1, push_to_hub="true", hub_model_id="user/name", report=None)
    script.main(argv)
    files = hub.files()
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    # The published recipe trains the same and publishes nowhere; the one that stays here repeats the run whole.
    published, kept = json.loads(files["recipe.json"]), json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert not {"push_to_hub", "hub_model_id"} & published.keys() and kept["hub_model_id"] == "user/name"
    assert published["learning_rate"] == kept["learning_rate"]
    hub.faults = [["POST", "/commit/", 500, 10_000]]
    with pytest.raises(
        UserError, match=r"publish it later:\n  python -m speech_emotion.publishing .*/second --repo_id user/name"
    ):
        script.main([str(tmp_path / "second") if argv[i - 1] == "--output_dir" else token for i, token in enumerate(argv)])
    for name in ("model.safetensors", "all_results.json", "report.html"):
        assert (tmp_path / "second" / name).is_file()


def test_offline_mode_is_said_at_once(finished, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        publish_run(finished, Publisher("user/name"))
    assert hub.waits == []


def test_without_a_token_a_run_ends_before_training(tone_folder, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", lambda: HfApi(endpoint=hub.address, token="hf_wrong"))
    with pytest.raises(UserError, match="it does not know you"):
        run_classification.main(flags(tmp_path, tone_folder, push_to_hub="true", hub_model_id="user/name"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_each_saved_checkpoint_is_published_where_that_is_asked_for(tone_folder, tmp_path, hub):
    run_classification.main(
        flags(tmp_path, tone_folder, num_train_epochs=2, push_to_hub="true", hub_model_id="user/name", hub_strategy="every_save")
    )
    commits = hub.repos["models/user/name"]["main"]
    assert len(commits) == 3 and all("model.safetensors" in commit for commit in commits)
    assert "README.md" not in commits[1] and "README.md" in commits[2]
    with pytest.raises(UserError, match="must be end or every_save"):
        run_classification.main(flags(tmp_path, tone_folder, push_to_hub="true", hub_strategy="all_checkpoints"))


LOAD = """
import sys, json, soundfile
from transformers import pipeline
served = pipeline("audio-classification", model="user/name", device="cpu", top_k=None)
print(json.dumps([{e["label"]: e["score"] for e in served(soundfile.read(path, dtype="float32")[0])} for path in sys.argv[1:]]))
"""


def test_pipeline_loads_from_the_hub_what_was_trained(finished, tone_folder, tmp_path):
    hub = Hub()
    with serve(hub.handler()) as address:
        environment = ENVIRONMENT | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
                                     "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        push = [sys.executable, "-m", "speech_emotion.publishing", str(finished), "--repo_id", "user/name", "--private"]
        done = subprocess.run(push, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        predictions = pd.read_csv(finished / "predictions.csv")
        paths = [str(tone_folder / clip) for clip in predictions["clip"]]
        done = subprocess.run([sys.executable, "-c", LOAD, *paths], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=240)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        # predict.py and a Space's app.py take the same name.
        own = subprocess.run([sys.executable, str(ROOT / "predict.py"), "user/name", *paths, "--output", str(tmp_path / "r.csv")],
                             cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)  # fmt: skip
        assert own.returncode == 0, own.stderr[-3000:]
        write_space("user/name", tmp_path / "space")
        command = [sys.executable, "-c", "import app; print(app.MODEL_FILE.read_text(), len(app.find_examples(None)))"]
        space = subprocess.run(command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True, timeout=240)
        assert space.stdout.split() == ["user/name", "0"], space.stderr[-3000:]
    assert list(pd.read_csv(tmp_path / "r.csv")["label"]) == list(predictions["prediction"])
    answers = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose([answer["high"] for answer in answers], predictions["probability_high"], atol=1e-4)
    assert any("/user/name/resolve/" in request for request in hub.requests)
    blob = next(content for content in hub.blobs.values() if content == (finished / "model.safetensors").read_bytes())
    assert len(blob) > 0
    assert ModelCard(hub.files()["README.md"].decode()).data.model_name == "name"


def test_a_space_holds_what_it_needs_and_no_more(tmp_path, hub):
    files = {path.relative_to(tmp_path / "space").as_posix() for path in write_space("user/name", tmp_path / "space")}
    assert {"app.py", "README.md", "requirements.txt", "model.txt", "speech_emotion/inference.py"} <= files
    assert not any("__pycache__" in name or name.startswith("tests") for name in files)
    front = (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    assert "sdk: gradio" in front and "- user/name" in front and (tmp_path / "space" / "model.txt").read_text() == "user/name\n"
    assert "gradio==" in (tmp_path / "space" / "requirements.txt").read_text()
    with pytest.raises(UserError, match="is not empty"):
        write_space("user/name", tmp_path / "space")
    with pytest.raises(UserError, match="is not a model on the Hub"):
        write_space("runs/demo/x", tmp_path / "other")
    publishing.main(["space", "user/name", str(tmp_path / "another"), "--repo_id", "user/page"])
    assert "app.py" in hub.files("spaces/user/page")
