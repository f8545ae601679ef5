"""What is computed once: `python -m benchmarks.frozen_parts [--quick]`.

A training step from cached convolutions against one that computes them, an epoch of a head on a cached backbone against
one that runs the backbone, and Whisper's window cut to 8 s against its 30 s.
"""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Row, compare, in_turn, make_clips, run_as_benchmark, save_model, work_folder
from speech_emotion.arguments import ModelArguments, has_fast_bfloat16
from speech_emotion.modeling import build_model

BATCH = 8
PROBE_EPOCHS = 20


def run(*flags: str) -> dict[str, Any]:
    """Runs the training script with its output swallowed and returns its results."""
    import run_classification

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run_classification.main([*flags])


def epoch_seconds(clips: Path, cached: bool, epochs: int, *flags: str) -> float:
    """Returns the seconds of one epoch of training, without validation and saving."""
    work = work_folder()
    results = run(
        "--dataset_name", "audio_folder", "--data_dir", str(clips),
        "--model_name_or_path", str(save_model(work / "wav2vec2-base")),
        "--output_dir", str(work / "frozen"), "--overwrite_output_dir", "--num_train_epochs", str(epochs),
        "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false",
        "--cache_frozen", str(cached).lower(),
        "--max_eval_samples", "4", "--max_predict_samples", "4", "--logging_steps", "1000",
        "--per_device_train_batch_size", str(BATCH), "--cache_dir", str(work / "cache"), *flags,
    )  # fmt: skip
    return results["train_runtime"] / epochs


def measure_probe(clips: Path, rounds: int) -> Row:
    """Returns the seconds of an epoch with a frozen backbone: running it, and from its cached states."""
    flags = ("--freeze", "backbone", "--learning_rate", "1e-3")
    epoch_seconds(clips, True, 1, *flags)  # fills the cache
    seconds = in_turn({"other": lambda: epoch_seconds(clips, False, 1, *flags),
                       "ours": lambda: epoch_seconds(clips, True, PROBE_EPOCHS, *flags)}, rounds)  # fmt: skip
    what = "an epoch of a probe, wav2vec2-base shape, cached backbone"
    return compare(what, seconds["other"], seconds["ours"], "s", 50, higher_is_better=False)


def measure_prefix(clips: Path, rounds: int) -> Row:
    """Returns the seconds of an epoch that computes the frozen convolutions, and of one that has them cached."""
    flags = ("--freeze", "feature_encoder")
    epoch_seconds(clips, True, 1, *flags)
    seconds = in_turn({name: lambda cached=cached: epoch_seconds(clips, cached, 1, *flags)
                       for name, cached in (("other", False), ("ours", True))}, rounds)  # fmt: skip
    row = compare("an epoch, cached convolutions", seconds["other"], seconds["ours"], "s", 1.0, higher_is_better=False)
    row.goal = "> 1x"
    return row


def measure_windows(rounds: int) -> list[Row]:
    """Returns clips a second of a Whisper-base-shaped encoder in training, on 8 s clips: 30 s windows, and 8 s ones."""
    name = str(save_model(work_folder() / "whisper-base", "whisper"))
    labels = ["angry", "happy", "neutral", "sad"]
    waveforms = [wave.astype(np.float32) for wave in 0.1 * np.random.default_rng(0).standard_normal((BATCH, 8 * 16000))]
    bf16, sides, models = has_fast_bfloat16(use_cpu=True), {}, {}
    for side, window in (("other", None), ("ours", 8.0)):
        model, extractor, _ = build_model(ModelArguments(model_name_or_path=name), labels, window, seed=0)
        features = torch.from_numpy(extractor(waveforms, sampling_rate=16000, return_tensors="np").input_features)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        models[side] = model

        def train(model: Any = model, features: torch.Tensor = features, optimizer: Any = optimizer) -> float:
            model.train()
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = torch.nn.functional.cross_entropy(model(features).logits.float(), torch.zeros(BATCH, dtype=torch.long))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return BATCH / (time.perf_counter() - start)

        sides[side] = train
    # The cut model's logits, and those of the full table's first positions: the same weights, before any step.
    full, cut = models["other"].eval(), models["ours"].eval()
    positions = cut.config.max_source_positions
    features = torch.from_numpy(extractor(waveforms[:2], sampling_rate=16000, return_tensors="np").input_features)
    with torch.no_grad():
        ours = cut(features).logits
        full.encoder.max_source_positions = full.config.max_source_positions = positions
        whole_table = full.encoder.embed_positions
        full.encoder.embed_positions = torch.nn.Embedding.from_pretrained(whole_table.weight[:positions])
        difference = float((full(features).logits - ours).abs().max())
        full.encoder.embed_positions = whole_table
        full.encoder.max_source_positions = full.config.max_source_positions = len(whole_table.weight)
    for train in sides.values():
        train()
    rates = in_turn(sides, rounds)
    row = compare("Whisper-base encoder, 8 s clips, 8 s window against 30 s", rates["other"], rates["ours"], "clips/s", 3)
    same = Row("logits against the full table's first positions", "", f"{difference:.1e} apart", "", "< 1e-5", difference < 1e-5)
    return [row, same]


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of items 3, 4 and 5."""
    clips = make_clips(work_folder() / "few_clips", 40) if quick else make_clips(work_folder() / "clips", 240)
    rounds = 1 if quick else 2
    prefix = [] if quick else [measure_prefix(clips, rounds)]
    return [*prefix, measure_probe(clips, rounds), *measure_windows(rounds)]


if __name__ == "__main__":
    run_as_benchmark(measure)
