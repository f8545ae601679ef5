#!/usr/bin/env python
"""Says which emotion recordings hold, with a trained model.

    python predict.py runs/demo clip.wav more_clips/
    python predict.py user/name recordings/ --output results.csv
    python predict.py runs/demo interview.flac --timeline
    find . -name '*.wav' | python predict.py runs/demo - --output results.jsonl

MODEL is a run's output folder or a model's Hub id. Recordings may be of any length and of any format that libsndfile
reads (others with torchcodec and FFmpeg); folders are searched through. Exit code 0: all recordings were read; 1: some were
not, and are listed; 2: the command is wrong.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

from speech_emotion.startup import COMET, PEFT, hide, quiet_transformers

if __name__ == "__main__":  # whoever imports this may need them
    hide(COMET, PEFT)

SOME_UNREADABLE_EXIT_CODE = 1
SUFFIXES = (".csv", ".jsonl")


def main(argv=None):
    arguments = read_arguments(argv)
    paths = find_recordings(arguments.recordings)
    check_output(arguments.output)

    from tqdm.auto import tqdm

    from speech_emotion.inference import load_classifier
    from speech_emotion.memory import keep_freed_memory

    quiet_transformers()
    classifier = load_classifier(arguments.model, arguments.device, arguments.max_length_seconds, arguments.bf16)
    if classifier.device.type == "cpu":
        keep_freed_memory()
    answer_all = answer_with_timelines if arguments.timeline else answer_with_labels
    failed = []
    with open_output(arguments.output, classifier.label_names, arguments.timeline) as write:
        for rows, error in tqdm(answer_all(classifier, paths, arguments), total=len(paths), unit="file", disable=None):
            if error is not None:
                failed.append((rows, error))
                continue
            for row in rows:
                write(row)
    if failed:
        print(f"{len(failed)} of {len(paths)} recordings could not be used:", file=sys.stderr)
        for path, error in failed:
            print(f"  - {path}: {error}", file=sys.stderr)
    if arguments.output:
        print(f"{len(paths) - len(failed)} of {len(paths)} recordings are in {arguments.output}.", file=sys.stderr)
    return SOME_UNREADABLE_EXIT_CODE if failed else 0


def read_arguments(argv):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="a run's output folder, or a model's Hub id")
    parser.add_argument("recordings", nargs="+", help="files and folders; - reads paths from the standard input, one a line")
    parser.add_argument("--output", type=Path, help="results.csv or results.jsonl instead of the screen")
    parser.add_argument("--timeline", action="store_true", help="the emotion over time, a row for each window")
    parser.add_argument("--window", type=float, help="seconds of a window of the timeline (by default 3, or the model's window)")
    parser.add_argument("--hop", type=float, default=1.0, help="seconds from one window to the next (by default 1)")
    parser.add_argument("--max_length_seconds", type=float, help="window in which long recordings are computed, and averaged")
    parser.add_argument("--device", help="cpu, cuda, mps; by default the fastest that there is")
    parser.add_argument("--bf16", action="store_true", help="bfloat16, where the device is fast at it")
    return parser.parse_args(argv)


def find_recordings(given):
    """Returns the paths of all recordings, folders searched through, - replaced by what the standard input lists."""
    from speech_emotion.audio import AUDIO_SUFFIXES, list_recordings
    from speech_emotion.errors import UserError

    paths = []
    for name in given:
        if name == "-":
            paths += [Path(line.strip()) for line in sys.stdin if line.strip()]
        elif Path(name).is_dir():
            inside = list_recordings(Path(name))
            if not inside:
                raise UserError(f"{name}: holds no recordings ({' '.join(AUDIO_SUFFIXES)}).")
            paths += inside
        else:
            paths.append(Path(name))  # one that is not there is listed with those that cannot be read
    if not paths:
        raise UserError("the standard input listed no recordings.")
    return paths


def check_output(path):
    """Raises `UserError` where the results could not be written."""
    from speech_emotion.errors import UserError

    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {path}: must end in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} is not there or cannot be written.")


def answer_with_labels(classifier, paths, arguments):
    """Yields ([row], None) or (path, error) for each recording, in their order."""
    waiting, next_index = {}, 0
    for answer in classifier.stream(paths):
        waiting[answer.index] = answer
        while next_index in waiting:
            answer = waiting.pop(next_index)
            next_index += 1
            if answer.error is not None:
                yield answer.path, answer.error
                continue
            yield [{"file": answer.path, "label": answer.label} | name_probabilities(classifier, answer.probabilities)], None


def answer_with_timelines(classifier, paths, arguments):
    """Yields (rows of all windows, None) or (path, error) for each recording."""
    from speech_emotion.audio import BadAudioError

    for path in paths:
        try:
            timeline = classifier.timeline(path, arguments.window, arguments.hop)
        except BadAudioError as error:
            yield str(path), str(error)
            continue
        spans = zip(timeline.starts, timeline.ends, timeline.labels, timeline.probabilities, strict=True)
        yield [{"file": str(path), "start": round(float(start), 3), "end": round(float(end), 3), "label": label}
               | name_probabilities(classifier, row) for start, end, label, row in spans], None  # fmt: skip


def name_probabilities(classifier, probabilities):
    """Returns {"probability_CLASS": ...}."""
    return {f"probability_{name}": round(float(p), 6) for name, p in zip(classifier.label_names, probabilities, strict=True)}


class open_output:
    """Opens the file, or the screen, and gives a function that writes one row at once: a stopped job keeps what it has."""

    def __init__(self, path, label_names, timeline):
        self.path = path
        spans = ["start", "end"] if timeline else []
        self.columns = ["file", *spans, "label", *(f"probability_{name}" for name in label_names)]

    def __enter__(self):
        self.file = open(self.path, "w", encoding="utf-8", newline="") if self.path else sys.stdout
        if self.path is None:
            return self._show
        if self.path.suffix.lower() == ".jsonl":
            return self._write_json
        self.writer = csv.DictWriter(self.file, self.columns)
        self.writer.writeheader()
        return self._write_csv

    def __exit__(self, *error):
        if self.path is not None:
            self.file.close()

    def _show(self, row):
        span = f"{row['start']:8.2f} to {row['end']:8.2f} s  " if "start" in row else ""
        print(f"{row['file']}  {span}{row['label']}  {row['probability_' + row['label']]:.3f}", flush=True)

    def _write_json(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def _write_csv(self, row):
        self.writer.writerow(row)
        self.file.flush()


if __name__ == "__main__":
    from speech_emotion.errors import run_as_command

    try:
        run_as_command(lambda: sys.exit(main()), interrupted="interrupted. What was answered so far is written.")
    except BrokenPipeError:  # whoever read the screen has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
