#!/usr/bin/env python
"""A page on which to record or drop a clip and see the emotion that a trained model hears in it.

    python app.py runs/demo
    python app.py user/name --port 7860 --examples my_clips/

It answers on this machine only, unless --host says otherwise. Clips are limited in size and length, and deleted within minutes.
As a Hugging Face Space (python -m speech_emotion.publishing space ...) it shows the model that model.txt names.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from speech_emotion.startup import COMET, PEFT, hide, quiet_transformers

if __name__ == "__main__":  # whoever imports this may need them
    hide(COMET, PEFT)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

ROOT = Path(__file__).parent
MODEL_FILE = ROOT / "model.txt"
MAX_FILE_MEGABYTES = 50
MAX_SECONDS = 600
SECONDS_KEPT = 300
NUM_EXAMPLES = 6
WARNING = (
    "Emotion recognition is fallible, and acted emotion is not felt emotion. Do not decide about people with it; in the European "
    "Union it is prohibited at work and in schools (AI Act, article 5)."
)
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # nothing is fetched from elsewhere


def build_page(classifier, title, examples, max_seconds):
    """Returns the page as gradio Blocks."""
    import gradio as gr

    def answer(path):
        if path is None:
            raise gr.Error("Record or drop a clip first.")
        try:
            return show(classifier, path, max_seconds)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, SECONDS_KEPT)) as page:
        gr.Markdown(f"# {title}\n{', '.join(classifier.label_names)}. Record a clip, or drop one; at most {max_seconds:g} s.")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Clip", elem_id="clip", buttons=[])
                button = gr.Button("Which emotion is it?", variant="primary", elem_id="ask")
            label = gr.Label(label="Emotion", elem_id="label")
        plot = gr.Plot(label="Over time", elem_id="timeline")
        if examples:
            gr.Examples([[str(path)] for path in examples], inputs=audio)
        gr.Markdown(f"{WARNING} Clips are deleted within {SECONDS_KEPT // 60 + 1} minutes.")
        button.click(answer, audio, [label, plot])
        audio.change(lambda: (None, None), None, [label, plot], show_progress="hidden")
    return page


def build_theme():
    """Returns gradio's look with the fonts that this machine has."""
    import gradio as gr

    return gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))


def show(classifier, path, max_seconds):
    """Returns {class: probability} of a clip, and a figure of its waveform with the emotion over time under it.

    Raises:
        ValueError: too long, or it cannot be used; the text says why.
    """
    from speech_emotion.audio import BadAudioError, decode, read_duration
    from speech_emotion.errors import UserError

    seconds = read_duration({"path": path, "bytes": None})
    if seconds > max_seconds:
        raise ValueError(f"The clip lasts {seconds:.0f} s; {max_seconds:g} s are the limit.")
    rate = classifier.extraction.sampling_rate
    try:
        waveform = decode({"path": path, "bytes": None}, rate)
        if len(waveform) > max_seconds * rate:
            raise ValueError(f"The clip lasts {len(waveform) / rate:.0f} s; {max_seconds:g} s are the limit.")
        clip = {"array": waveform, "sampling_rate": rate}
        (whole,) = classifier.classify([clip])
        timeline = classifier.timeline(clip, hop_seconds=max(0.25, len(waveform) / rate / 200))
    except (BadAudioError, UserError) as error:
        raise ValueError(f"The clip cannot be used: {error}.") from error
    probabilities = dict(zip(classifier.label_names, map(float, whole.probabilities), strict=True))
    return probabilities, draw(waveform, rate, timeline)


def draw(waveform, rate, timeline):
    """Returns a figure: the waveform, and under it the probabilities of the windows around each moment."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    step = max(1, len(waveform) // 4000)  # more points than that are not told apart
    top.plot(np.arange(0, len(waveform), step) / rate, waveform[::step], linewidth=0.5)
    top.set_yticks([])
    middles = (timeline.starts + timeline.ends) / 2
    shown = timeline.probabilities
    # The first and the last window stand for the clip's beginning and end.
    middles = np.concatenate([[0], middles, [len(waveform) / rate]])
    shown = np.concatenate([shown[:1], shown, shown[-1:]])
    bottom.stackplot(middles, shown.T, labels=timeline.label_names, alpha=0.85)
    bottom.set(xlim=(0, len(waveform) / rate), ylim=(0, 1), xlabel="seconds", ylabel="probability")
    bottom.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def find_examples(folder):
    """Returns some clips to try: those of a folder, or for the demo's classes those that ship with the repository."""
    from speech_emotion.audio import list_recordings

    if folder is None:
        folder = ROOT / "assets" / "polish_emotions"
    clips = list_recordings(Path(folder))
    return clips[:: max(1, len(clips) // NUM_EXAMPLES)][:NUM_EXAMPLES]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="app.py", description=__doc__.split("\n\n")[0])
    default = MODEL_FILE.read_text(encoding="utf-8").strip() if MODEL_FILE.is_file() else None
    parser.add_argument("model", nargs="?" if default else None, default=default, help="a run's output folder or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (by default this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--examples", help="folder of clips to offer")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="longest clip")
    parser.add_argument("--max_megabytes", type=int, default=MAX_FILE_MEGABYTES, help="largest file")
    parser.add_argument("--device", help="cpu, cuda, mps; by default the fastest that there is")
    arguments = parser.parse_args(argv)

    from speech_emotion.inference import load_classifier

    quiet_transformers()
    classifier = load_classifier(arguments.model, arguments.device)
    title = f"Emotion in speech: {Path(arguments.model).name}"
    # Whatever is uploaded lies in a folder of this process's own, which goes when it ends, also by a service manager's signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="speech_emotion_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(classifier, title, find_examples(arguments.examples), arguments.max_seconds)
        host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0") if os.environ.get("SPACE_ID") else arguments.host
        page.launch(
            server_name=host, server_port=arguments.port, max_file_size=f"{arguments.max_megabytes}mb", theme=build_theme(),
            allowed_paths=[str(ROOT / "assets")], show_error=True,
        )  # fmt: skip


if __name__ == "__main__":
    from speech_emotion.errors import run_as_command

    run_as_command(main, interrupted="stopped; all clips are deleted.")
    sys.exit(0)
