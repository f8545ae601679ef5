"""What the benchmarks share: made clips and models, both sides in turn, one table."""

import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).parent.parent
SOURCE_RATE = 22050  # Thorsten's
CLASSES = ("angry", "happy", "neutral", "sad")
# Clips and minutes of each style of the Thorsten emotional corpus (OpenSLR 110), which give its mean lengths.
THORSTEN_MINUTES = {"neutral": 19, "disgusted": 23, "angry": 20, "amused": 18, "surprised": 18, "sleepy": 30, "drunk": 25,
                    "whisper": 22}  # fmt: skip
THORSTEN_CLIPS = 300
THORSTEN_CHARACTERS = (25, 115)  # of its sentences, shortest and longest


@dataclass
class Row:
    """One line of the table: two sides, the ratio (how many times better ours is) and the goal that it is held against."""

    what: str
    other: str
    ours: str
    ratio: str
    goal: str
    met: bool | None


def format_rows(rows: list[Row]) -> str:
    """Returns the table as text."""
    lines = [["what", "other side", "ours", "ratio", "goal", "met"]]
    lines += [[r.what, r.other, r.ours, r.ratio, r.goal, {True: "yes", False: "NO", None: ""}[r.met]] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def compare(what: str, other: float, ours: float, unit: str, goal: float, higher_is_better: bool = True) -> Row:
    """Returns the row of two rates (or durations), whose ratio is to be at least `goal`."""
    ratio = ours / other if higher_is_better else other / ours
    return Row(what, f"{other:.4g} {unit}", f"{ours:.4g} {unit}", f"{ratio:.2f}x", f">= {goal:g}x", ratio >= goal)


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measures each side `rounds` times and returns the medians; who goes first alternates, so that noise meets both."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            measured[name].append(sides[name]())
    return {name: statistics.median(values) for name, values in measured.items()}


def describe_machine() -> str:
    """Returns processor, cores and what it multiplies fast."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    fast = "fast bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no fast bfloat16"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores ({fast}){gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def thorsten_lengths(seed: int = 0) -> np.ndarray:
    """Returns lengths like those of Thorsten's 2,400 clips, in seconds: each style's mean, in proportion to the sentence."""
    rng = np.random.default_rng(seed)
    low, high = THORSTEN_CHARACTERS
    characters = low + (high - low) * rng.beta(2, 3, THORSTEN_CLIPS)
    shares = characters / characters.mean()
    return np.concatenate(
        [60 * minutes / THORSTEN_CLIPS * shares * rng.normal(1, 0.08, THORSTEN_CLIPS).clip(0.7, 1.3)
         for minutes in THORSTEN_MINUTES.values()]
    )  # fmt: skip


def make_clips(folder: Path, num_clips: int, seconds: tuple[float, float] = (2.0, 8.0), seed: int = 0) -> Path:
    """Writes CLASS/spkN_NNNN.wav at 22,050 Hz, a voice-like tone of the class's pitch in noise, and returns the folder."""
    if (folder / "complete").exists():
        return folder
    rng = np.random.default_rng(seed)
    for number in range(num_clips):
        label = number % len(CLASSES)
        time = np.arange(int(rng.uniform(*seconds) * SOURCE_RATE)) / SOURCE_RATE
        pitch = (110 + 60 * label) * rng.normal(1, 0.03)
        wave = sum(np.sin(2 * np.pi * pitch * harmonic * time) / harmonic for harmonic in range(1, 6))
        wave = 0.1 * wave * (1 + np.sin(2 * np.pi * 4 * time)) + 0.02 * rng.standard_normal(len(time))
        path = folder / CLASSES[label] / f"spk{number // len(CLASSES) % 10}_{number:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave.astype(np.float32), SOURCE_RATE, subtype="PCM_16")
    (folder / "complete").write_text("")
    return folder


def link_clips(source: Path, folder: Path, times: int) -> Path:
    """Makes a corpus `times` as large out of hard links, so that it takes no room, and returns its folder."""
    if (folder / "complete").exists():
        return folder
    for path in sorted(source.rglob("*.wav")):
        target = folder / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(times):
            if not (link := target / f"{path.stem}_{copy:03d}.wav").exists():
                os.link(path, link)
    (folder / "complete").write_text("")
    return folder


def split_into_folders(source: Path, folder: Path) -> Path:
    """Links clips into train/, validation/ and test/ by speaker (8, 1 and 1 of 10), and returns the folder."""
    for path in sorted(source.rglob("*.wav")):
        speaker = int(path.stem[3 : path.stem.index("_")])
        split = {8: "validation", 9: "test"}.get(speaker, "train")
        target = folder / split / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(path, target)
    return folder


def save_model(folder: Path, kind: str = "wav2vec2", **changes: Any) -> Path:
    """Saves a model with random weights and its feature extractor, and returns the folder.

    Args:
        folder: where to.
        kind: "wav2vec2" (the shape of wav2vec2-base), "whisper" (that of whisper-base's encoder).
        changes: to the configuration.
    """
    from transformers import (
        AutoConfig,
        AutoModelForAudioClassification,
        Wav2Vec2FeatureExtractor,
        WhisperFeatureExtractor,
        set_seed,
    )

    labels = {"num_labels": len(CLASSES), "id2label": dict(enumerate(CLASSES))}
    labels["label2id"] = {name: i for i, name in enumerate(CLASSES)}
    shapes = {"wav2vec2": {}, "whisper": {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
                                          "encoder_ffn_dim": 2048, "decoder_layers": 1}}  # fmt: skip
    extractor = {"wav2vec2": Wav2Vec2FeatureExtractor, "whisper": WhisperFeatureExtractor}[kind]()
    if not (folder / "model.safetensors").exists():
        set_seed(0)
        config = AutoConfig.for_model(kind, **shapes[kind] | labels | changes)
        AutoModelForAudioClassification.from_config(config).save_pretrained(folder)
        extractor.save_pretrained(folder)
    return folder


# A model so small that the road to it takes longer than the model itself.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "conv_dim": (32, 32, 32), "conv_kernel": (10, 8, 4), "conv_stride": (10, 8, 4), "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def work_folder() -> Path:
    """Returns the folder for clips, models and runs, below `runs/`."""
    folder = ROOT / "runs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quiet_libraries() -> None:
    """Shows neither progress bars nor warnings of the libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def run_as_benchmark(measure: Callable[..., list[Row]], **kwargs: Any) -> None:
    """Runs one benchmark whole, and prints the machine and the table."""
    quiet_libraries()
    print(describe_machine(), flush=True)
    print(format_rows(measure(quick="--quick" in sys.argv, **kwargs)))
