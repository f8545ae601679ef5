"""From files to what the model eats: `python -m benchmarks.data_road [--quick]`.

Clips a second on one core against the other side's `set_transform`, scaling with processes, a second run's preparation, and
memory that does not grow with the corpus.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measuring import (
    ROOT,
    SOURCE_RATE,
    Row,
    compare,
    in_turn,
    link_clips,
    make_clips,
    quiet_libraries,
    run_as_benchmark,
    work_folder,
)

CLIPS = 240
SOME_CLIPS = 720  # so that starting and ending count for little
BATCH = 8
SECOND_RUN_CLIPS, SECOND_RUN_SECONDS = 2400, 2.0
MEMORY_CLIPS = (2400, 24000)
MEMORY_TOLERANCE = 0.10


def prepare(folder: Path, cache: Path, num_workers: int) -> float:
    """Prepares a corpus's clips for wav2vec2 in the cache folder, and returns the seconds from listing files to the end."""
    from transformers import Wav2Vec2FeatureExtractor

    from speech_emotion.arguments import DataArguments
    from speech_emotion.audio import build_resampler
    from speech_emotion.corpora import audio_folder
    from speech_emotion.features import Extraction, prepare_splits
    from speech_emotion.splits import split_corpus

    extraction = Extraction(Wav2Vec2FeatureExtractor(), None, 400)
    build_resampler(SOURCE_RATE, extraction.sampling_rate)  # imports torchaudio
    start = time.perf_counter()
    data = DataArguments(data_dir=str(folder), group_pattern=r"(?P<speaker_id>spk\d+)_")
    split = split_corpus(audio_folder.load(data), data, 0)
    prepare_splits(split, extraction, False, "error", str(cache), num_workers=num_workers)
    return time.perf_counter() - start


def touch_all(folder: Path) -> float:
    """Touches each clip once through the other side's transform and collator, and returns the seconds."""
    from transformers import Wav2Vec2FeatureExtractor

    from benchmarks.plain_trainer import build_collator, build_transform, load_split

    extractor = Wav2Vec2FeatureExtractor()
    split, collate = load_split(folder), build_collator(extractor)
    split.set_transform(build_transform(extractor))
    start = time.perf_counter()
    for first in range(0, len(split), BATCH):
        batch = split[first : first + BATCH]
        collate([dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)])
    return time.perf_counter() - start


def on_one_core(name: str, *arguments: str) -> float:
    """Calls one of this module's functions in a process of its own that keeps to one core, and returns its result."""
    command = [sys.executable, "-m", "benchmarks.data_road", "--child", name, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def anonymous_memory(folder: Path, cache: Path) -> float:
    """Prepares a corpus, goes through an epoch of it, and returns the most memory that belonged to this process, in bytes.

    Pages of memory-mapped files, which the system takes back when it needs them, are not counted.
    """
    from transformers import Wav2Vec2FeatureExtractor

    from speech_emotion.arguments import DataArguments
    from speech_emotion.augmentation import Augmentation
    from speech_emotion.batching import Collator, LengthBucketSampler, TrainingRows
    from speech_emotion.corpora import audio_folder
    from speech_emotion.features import Extraction, prepare_splits
    from speech_emotion.splits import split_corpus

    def used() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    data = DataArguments(data_dir=str(folder), group_pattern=r"(?P<speaker_id>spk\d+)_")
    split = split_corpus(audio_folder.load(data), data, 0)
    extraction = Extraction(Wav2Vec2FeatureExtractor(), None, 400)
    most = used()
    prepared = prepare_splits(split, extraction, False, "error", str(cache), num_workers=1)
    rows, collate = TrainingRows(prepared.train, 0), Collator(extraction, False, Augmentation())
    order = list(LengthBucketSampler(prepared.train["length"], BATCH, 0))
    for number, first in enumerate(range(0, len(order), BATCH)):
        collate(rows.__getitems__(order[first : first + BATCH]))
        if number % 20 == 0:
            most = max(most, used())
    return float(most)


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of item 1: the quick ones, or all."""
    from benchmarks.plain_trainer import DECODER

    work = work_folder()
    clips = make_clips(work / "clips", CLIPS)
    some = make_clips(work / "clips_720", SOME_CLIPS)
    many = link_clips(clips, work / "clips_2400", SECOND_RUN_CLIPS // CLIPS)
    caches = [0]

    def ours(folder: Path, workers: int) -> float:
        caches[0] += 1
        cache = work / f"cache_{caches[0]}"
        try:
            return on_one_core("prepare", str(folder), str(cache), str(workers))
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    seconds = in_turn({"other": lambda: on_one_core("touch_all", str(clips)) / CLIPS,
                       "ours": lambda: ours(some, 1) / SOME_CLIPS}, 1 if quick else 7)  # fmt: skip
    rows = [compare(f"preparation, one core ({DECODER})", 1 / seconds["other"], 1 / seconds["ours"], "clips/s", 5)]

    cache = work / "cache_second"
    on_one_core("prepare", str(many), str(cache), "2")
    again = on_one_core("prepare", str(many), str(cache), "2")
    met = again < SECOND_RUN_SECONDS
    rows.append(Row("second run's preparation, 2,400 clips", "", f"{again:.2f} s", "", f"< {SECOND_RUN_SECONDS:g} s", met))
    shutil.rmtree(cache, ignore_errors=True)
    if quick:
        return rows

    # No clip twice: copies in several splits would be compared sample by sample, which is not what is measured here.
    distinct = make_clips(work / "distinct_2400", SECOND_RUN_CLIPS)
    scaling = in_turn({"one": lambda: ours(distinct, 1), "two": lambda: ours(distinct, 2)}, 5)
    rows.append(compare("preparation, 2 processes against 1", 2400 / scaling["one"], 2400 / scaling["two"], "clips/s", 1.6))
    short = make_clips(work / "short_clips", CLIPS, (0.8, 1.2))
    memory = []
    for number in MEMORY_CLIPS:
        folder = link_clips(short, work / f"short_{number}", number // CLIPS)
        memory.append(on_one_core("anonymous_memory", str(folder), str(cache)))
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(folder)
    growth = memory[1] / memory[0]
    rows.append(Row("memory, 24,000 clips against 2,400", f"{memory[0] / 2**20:.0f} MiB", f"{memory[1] / 2**20:.0f} MiB",
                    f"{growth:.2f}x", f"<= {1 + MEMORY_TOLERANCE:g}x", growth <= 1 + MEMORY_TOLERANCE))  # fmt: skip
    return rows


def run_child(name: str, arguments: list[str]) -> None:
    """Calls a function on one core (on all, where it starts processes of its own) and prints what it returns.

    Where clips a second are compared, it is called twice and the second call counts: neither side's imports and first
    touches of memory are what the row is about.
    """
    quiet_libraries()
    several = name == "prepare" and int(arguments[2]) > 1
    if hasattr(os, "sched_setaffinity") and not several:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    values = [Path(argument) if "/" in argument else int(argument) for argument in arguments]
    functions = {"prepare": prepare, "touch_all": touch_all, "anonymous_memory": anonymous_memory}
    if name == "touch_all":
        touch_all(*values)
    if name == "prepare":
        prepare(values[0], values[1] / "warm", values[2])
        shutil.rmtree(values[1] / "warm")
    print(functions[name](*values))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], sys.argv[3:])
    else:
        run_as_benchmark(measure)
