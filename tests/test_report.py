"""The report is one page that needs nothing else, shows what was measured, and lets no name break out of it."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, write_tone
from test_runs import flags

import run_classification
from speech_emotion.analysis import compute_group_results, find_confused_pairs, find_worst_clips
from speech_emotion.arguments import strip_local_paths
from speech_emotion.corpora.table import Clip, build_table
from speech_emotion.html_report import build_chart, describe_results, render
from speech_emotion.metrics import Evaluation, summarize

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the report is not looked at")
HOSTILE = """<img src=x onerror=alert(1)>"><script>alert('x')</script>'{{ 7 * 7 }}&amp;"""
HOSTILE_FILE = "<svg onload=alert(2)> '\"{{ 7*7 }}"


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run on a corpus whose classes, speakers and files have names that a page must not believe."""
    root = tmp_path_factory.mktemp("hostile")
    rows = []
    for i, (label, frequency) in enumerate(((HOSTILE, 880), ("low", 220))):
        for speaker in range(5):
            for take in range(2):
                path = write_tone(root / f"{HOSTILE_FILE} {i}{speaker}{take}.wav", 0.4, frequency, seed=10 * speaker + take)
                rows.append({"path": path.name, "label": label, "speaker_id": f"<b>s{speaker}</b>"})
    pd.DataFrame(rows).to_csv(root / "manifest.csv", index=False)
    whole = {"audit": None, "robustness": None, "report": None}
    out = root / "out"
    argv = flags(root, root, dataset_name="manifest", data_files=root / "manifest.csv", data_dir=None, group_pattern=None,
                 output_dir=out, test_fraction=0.4, **whole)  # fmt: skip
    argv += ["--run_name", HOSTILE]
    run_classification.main(argv)
    return out


def test_hostile_names_stay_text(hostile_run):
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<svg onload" not in page and "<b>s" not in page and "onerror=alert(1)>" not in page
    assert "&lt;script&gt;" in page and "&lt;svg onload=alert(2)&gt;" in page
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", page)[0]  # templates in names are not run
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)(?!fold_|seed_|fraction_)", page)


def test_no_folder_of_this_machine_is_told(hostile_run):
    page = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert str(hostile_run.parent) not in page and str(ROOT) not in page and "/tmp" not in page
    recipe = {"output_dir": "/home/me/runs/x", "data_dir": "/home/me/corpus", "model_name_or_path": "facebook/wav2vec2-base",
              "test_on": ["emodb=/data/emodb", "recipes/x.json"], "data_files": ["../m.csv"], "seed": 1}  # fmt: skip
    assert strip_local_paths(recipe) == {"data_dir": "corpus", "model_name_or_path": "facebook/wav2vec2-base",
                                         "test_on": ["emodb", "recipes/x.json"], "data_files": ["m.csv"], "seed": 1}  # fmt: skip


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_whole_in_a_browser(width, scheme, hostile_run):
    from playwright.sync_api import sync_playwright

    problems, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{hostile_run / 'report.html'}")
        assert page.inner_text("h1") == HOSTILE
        images = page.eval_on_selector_all("img", "list => list.map(i => i.complete && i.naturalWidth > 0)")
        assert len(images) >= 4 and all(images)
        # Each clip can be played to its end.
        played = page.evaluate(
            """async () => Promise.all([...document.querySelectorAll('audio')].map(async audio => {
                audio.muted = true; audio.playbackRate = 4; await audio.play();
                await new Promise(done => audio.addEventListener('ended', done)); return audio.duration; }))"""
        )
        assert len(played) == len(images) and all(0.35 < seconds < 0.45 for seconds in played)
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out of a phone
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in re.findall(r"\d+", background)[:3]) / 3
        assert light > 200 if scheme == "light" else light < 60
        browser.close()
    assert problems == []
    assert all(url.startswith(("file://", "data:")) for url in requests)


def test_a_report_needs_no_audio_where_it_must_not_be_passed_on(tone_folder, tmp_path):
    run_classification.main(flags(tmp_path, tone_folder, num_train_epochs=1, report=None, report_audio="false"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<audio" not in page and "data:image" not in page and "Clips with the highest loss" in page


def small_corpus(tmp_path):
    clips = []
    for i in range(12):
        path = write_tone(tmp_path / f"{i}.wav", 0.1 + 0.05 * i, 300, seed=i)
        clips.append(Clip(path=str(path), label="abc"[i % 3], speaker_id=f"s{i // 6}", sentence_id=None, split=None))
    table = build_table(clips)
    references = np.array([i % 3 for i in range(12)])
    logits = 4.0 * np.eye(3)[references]
    logits[3] = [0.0, 9.0, 0.0]  # an "a" that is surely heard as "b"
    logits[6] = [1.0, 2.0, 0.0]
    return table, Evaluation(np.arange(12), references, logits, list("abc"))


def test_groups_pairs_and_worst_clips(tmp_path):
    table, evaluation = small_corpus(tmp_path)
    groups = compute_group_results(evaluation, table)
    assert [row["by"] for row in groups].count("speaker") == 2 and [row["by"] for row in groups].count("duration") == 4
    first = next(row for row in groups if row["group"] == "s0")
    assert first == {"by": "speaker", "group": "s0", "num_clips": 6, "accuracy": 5 / 6, "uar": pytest.approx((0.5 + 1 + 1) / 3)}
    assert sum(row["num_clips"] for row in groups if row["by"] == "duration") == 12
    assert find_confused_pairs(evaluation) == [{"label": "a", "prediction": "b", "num_clips": 2, "share": 0.5}]
    worst = find_worst_clips(evaluation, table)
    assert [entry["row"] for entry in worst[:2]] == [3, 6] and worst[0]["clip"] == "3.wav"
    assert worst[0]["loss"] == pytest.approx(9.0, abs=0.01) and worst[0]["speaker_id"] == "s0"


def test_a_report_shows_the_figures_that_were_computed(tmp_path):
    table, evaluation = small_corpus(tmp_path)
    results = summarize(evaluation, table, "test")
    page = render(describe_results(results, "test") | {"title": "t", "subtitle": "s", "recipe": "", "environment": ""})
    for key in ("test_uar", "test_accuracy", "test_f1_macro", "test_log_loss", "test_ece", "test_recall_a", "test_precision_b"):
        assert f"{results[key]:.3f}" in page, key
    assert "Could it be" not in page and "Training</h2>" not in page  # what was not measured is not there


def test_charts_stay_in_their_frame_whatever_the_values():
    for points in ([(0.0, 0.0)], [(1.0, 5.0), (2.0, 1e4)], [(0.0, -3.0), (1e-3, 2.0)], [(3.0, 0.5)] * 3):
        chart = build_chart("t", "x", {"y": points})
        for x, y, _ in chart["series"][0]["dots"]:
            assert 40 <= x <= 355 and 5 <= y <= 170
        assert 2 <= len(chart["x_ticks"]) <= 9 and 2 <= len(chart["y_ticks"]) <= 9
