"""The page: a clip is dropped, the label is read; what cannot be answered is said; nothing is fetched from elsewhere."""

import os
import shutil

import pytest
from conftest import ROOT, write_tone
from test_inference import save_trained

import app
from speech_emotion.inference import load_classifier

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not looked at")


def test_a_clip_gets_probabilities_and_a_figure_and_limits_are_said(tmp_path):
    classifier = load_classifier(save_trained("wav2vec2", tmp_path / "m"), "cpu")
    path = write_tone(tmp_path / "a.wav", 4.0, 300)
    probabilities, figure = app.show(classifier, str(path), 60)
    (answer,) = classifier.classify([path])
    assert max(probabilities, key=probabilities.get) == answer.label and sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="lasts 4 s; 3 s are the limit"):
        app.show(classifier, str(path), 3)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="The clip cannot be used"):
        app.show(classifier, str(tmp_path / "b.wav"), 60)


def test_examples_are_a_few_of_what_ships():
    examples = app.find_examples(None)
    assert 3 <= len(examples) <= app.NUM_EXAMPLES and all(path.is_file() for path in examples)


@needs_chromium
def test_a_dropped_clip_is_answered_on_the_page(tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    classifier = load_classifier(save_trained("wav2vec2", tmp_path / "m"), "cpu")
    good, long = write_tone(tmp_path / "good.wav", 1.5, 300), write_tone(tmp_path / "long.wav", 6.0, 300)
    (answer,) = classifier.classify([good])
    page = app.build_page(classifier, "Emotion in speech", [], max_seconds=5)
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True, max_file_size="1mb",
                theme=app.build_theme())  # fmt: skip
    problems, hosts = [], set()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1200, "height": 950})
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
            tab.goto(page.local_url)
            tab.set_input_files("#clip input[type=file]", str(good))
            tab.wait_for_selector("#clip button[aria-label='Clear']")
            tab.click("#ask")
            tab.wait_for_selector("#label .output-class")
            assert tab.inner_text("#label .output-class").strip() == answer.label
            tab.wait_for_selector("#timeline img")
            assert tab.eval_on_selector("#timeline img", "image => image.complete && image.naturalWidth > 300")
            # Another clip, longer than is allowed: said, not answered.
            tab.click("#clip button[aria-label='Clear']")
            tab.set_input_files("#clip input[type=file]", str(long))
            tab.wait_for_selector("#clip button[aria-label='Clear']")
            tab.click("#ask")
            tab.wait_for_selector("text=5 s are the limit")
            browser.close()
    finally:
        page.close()
    assert problems == []
    assert {host.split(":")[0] for host in hosts} == {"127.0.0.1"}
    assert os.path.commonpath([ROOT, uploads]) != str(ROOT)
