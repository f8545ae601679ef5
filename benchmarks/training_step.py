"""One training step: `python -m benchmarks.training_step [--quick]`.

Padding on the lengths of the Thorsten corpus; clips a second against the other side's step; how near the step comes to the
machine's matrix rate, with where the rest goes; the share of time spent waiting for data; torch.compile.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForAudioClassification, set_seed

from benchmarks.device_speed import matrix_rate, synchronize
from benchmarks.measuring import (
    Row,
    compare,
    in_turn,
    make_clips,
    run_as_benchmark,
    save_model,
    thorsten_lengths,
    work_folder,
)
from speech_emotion.arguments import has_fast_bfloat16
from speech_emotion.batching import LengthBucketSampler, padding_share
from speech_emotion.dropout import use_cpu_dropout
from speech_emotion.memory import keep_freed_memory
from speech_emotion.modeling import compile_layers, start_behind_convolutions

BATCH = 8
CLIP_SECONDS = 4
FRAMES_PER_SECOND = 50
CONV_CHANNELS = 512
STEPS = 3
# A step's profile: what torch calls belong to which stage; the rest is "other".
STAGES = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "convolution", "flash_attention"),
    "dropout": ("_Drop", "addcmul"),
    "casts and copies": ("copy_", "_to_copy", "cat"),
    "norms, softmax and GELU": ("layer_norm", "group_norm", "softmax", "gelu"),
    "optimizer and clipping": ("adam", "linalg_vector_norm", "foreach", "clamp"),
}


def build(
    folder: str, ours: bool, bf16: bool = False, device: str = "cpu", dropout: bool = True
) -> tuple[Any, Callable[..., Any]]:
    """Returns a model and the function that trains it one step on a batch and labels.

    Args:
        folder: of the model.
        ours: take cached frames for a batch, with our dropout and optimizer; else waveforms, as the other side.
        bf16: autocast.
        device: to train on.
        dropout: our dropout on a CPU (false: torch's own, to compile).
    """
    set_seed(0)
    # Each step is of all layers, so that its operations can be counted.
    model = AutoModelForAudioClassification.from_pretrained(folder, layerdrop=0.0).train()
    model.freeze_feature_encoder()
    if ours:
        start_behind_convolutions(model)
        if device == "cpu":
            keep_freed_memory()
            if dropout:
                use_cpu_dropout(model)
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(batch: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def make_batches(
    lengths: np.ndarray, order: np.ndarray, ours: bool, batch_size: int = BATCH, device: str = "cpu"
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yields padded batches of noise in an order of clips: cached frames and their mask, or waveforms."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(order), batch_size):
        seconds = lengths[order[first : first + batch_size]]
        labels = torch.zeros(len(seconds), dtype=torch.long, device=device)
        if ours:
            frames = torch.tensor((seconds * FRAMES_PER_SECOND).astype(int) - 1)
            values = torch.randn(len(seconds), int(frames.max()), CONV_CHANNELS, generator=generator)
            mask = (torch.arange(values.shape[1]) < frames[:, None]).long()
            yield {"input_values": values.half().to(device), "attention_mask": mask.to(device)}, labels
        else:
            values = torch.randn(len(seconds), int(seconds.max() * 16000), generator=generator)
            yield {"input_values": values.to(device)}, labels


def time_step(step: Callable[..., Any], batches: list[Any], device: str = "cpu") -> float:
    """Returns the seconds that all batches take."""
    synchronize(torch.device(device))
    start = time.perf_counter()
    for batch, labels in batches:
        step(batch, labels)
    synchronize(torch.device(device))
    return time.perf_counter() - start


def measure_padding() -> list[Row]:
    """Returns the share of padding in batches of 8 on Thorsten's lengths, bucketed and random."""
    samples = (thorsten_lengths() * 16000).astype(int)
    shares = {bucket: np.mean([padding_share(LengthBucketSampler(samples, 4 * BATCH, seed, bucket), BATCH) for seed in range(5)])
              for bucket in (False, True)}  # fmt: skip
    return [Row("padding, Thorsten's lengths, batches of 8", f"{shares[False]:.1%}", f"{shares[True]:.1%}",
                f"{shares[False] / shares[True]:.1f}x", "< 5 %", bool(shares[True] < 0.05))]  # fmt: skip


def measure_rate(folder: str, bf16: bool, rounds: int, batch_size: int, device: str = "cpu", seconds: int = CLIP_SECONDS) -> Row:
    """Returns the step's rate as a share of the device's matrix rate at the same precision, and prints a profile by stage."""
    precision = "bfloat16" if bf16 else "float32"
    _, step = build(folder, ours=True, bf16=bf16, device=device)
    lengths = np.full(batch_size, float(seconds))
    batches = list(make_batches(lengths, np.arange(batch_size), True, batch_size, device))
    step(*batches[0])
    with FlopCounterMode(display=False) as counter:
        step(*batches[0])
    flops = counter.get_total_flops()
    step(*batches[0])
    medians = in_turn({"matrix": lambda: matrix_rate(torch.device(device), precision),
                       "step": lambda: flops * STEPS / time_step(step, batches * STEPS, device)}, rounds)  # fmt: skip
    with warnings_off(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(*batches[0])
    events = [(event.key, event.self_cpu_time_total) for event in profiled.key_averages()]
    total = sum(duration for _, duration in events)
    shares = {stage: sum(d for key, d in events if any(part in key for part in parts)) / total for stage, parts in STAGES.items()}
    shares["other"] = 1 - sum(shares.values())
    listed = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
    print(f"A {precision} step of {flops / 1e9:,.0f} GFLOP, batch {batch_size} x {seconds} s, by stage: {listed}.", flush=True)
    share = medians["step"] / medians["matrix"]
    other, ours = (f"{medians[side] / 1e9:,.0f} GFLOP/s" for side in ("matrix", "step"))
    what = f"step against matrix rate, {precision}, batch {batch_size} x {seconds} s"
    return Row(what, other, ours, f"{share:.0%}", ">= 55 %", share >= 0.55)


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Silences the profiler's warnings."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure_steps(folder: str, rounds: int, num_batches: int) -> Row:
    """Returns clips a second of both sides' steps on the same clips of 2 to 8 s, each with its own batches."""
    lengths = np.random.default_rng(0).uniform(2, 8, 240)
    bf16 = has_fast_bfloat16(use_cpu=True)
    orders = {False: np.random.default_rng(1).permutation(240),
              True: np.array(list(LengthBucketSampler(lengths * 16000, BATCH, 0))) % 240}  # fmt: skip
    sides = {}
    for ours in (False, True):
        batches = list(make_batches(lengths, orders[ours], ours))[:num_batches]
        _, step = build(folder, ours, bf16 and ours)
        step(*next(make_batches(lengths, orders[ours][:1], ours)))
        seconds_of_audio = lengths[orders[ours][: num_batches * BATCH]].sum()
        sides[ours] = lambda step=step, batches=batches, audio=seconds_of_audio: audio / time_step(step, batches)
    # By seconds of audio, since the few batches that are timed need not hold clips of the same length on both sides.
    rates = in_turn(sides, rounds)
    precision = "bfloat16" if bf16 else "float32"
    return compare(f"training step, wav2vec2-base shape, {precision}", rates[False], rates[True], "s of audio/s", 2.0)


def measure_waiting(quick: bool) -> list[Row]:
    """Returns the share of training time spent waiting for batches, with a base-sized model and with a tiny one."""
    from transformers import TrainerCallback

    import run_classification

    waited: dict[str, float] = {}

    class Clock(TrainerCallback):
        """Adds up the time between the end of a step and the beginning of the next: what fetching a batch takes."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            waited.update(data=0.0, start=time.perf_counter(), last=0.0, steps=0)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if waited["last"]:
                waited["data"] += time.perf_counter() - waited["last"]
            waited["steps"] += 1

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            waited["last"] = time.perf_counter()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            waited["last"] = 0.0

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            waited["total"] = time.perf_counter() - waited["start"]

    work = work_folder()
    clips = make_clips(work / "few_clips", 40) if quick else make_clips(work / "clips", 240)
    before, run_classification.ProgressSentences = run_classification.ProgressSentences, Clock
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_classification.main(
                ["--dataset_name", "audio_folder", "--data_dir", str(clips), "--model_name_or_path",
                 str(save_model(work / "wav2vec2-base")), "--freeze", "feature_encoder", "--output_dir", str(work / "waiting"),
                 "--overwrite_output_dir", "--max_steps", "4" if quick else "16", "--eval_strategy", "no",
                 "--save_strategy", "no",
                 "--load_best_model_at_end", "false", "--max_eval_samples", "8", "--max_predict_samples", "8",
                 "--logging_steps", "1000", "--cache_dir", str(work / "cache")]
            )  # fmt: skip
    finally:
        run_classification.ProgressSentences = before
    share = waited["data"] / waited["total"]
    each = waited["data"] / max(waited["steps"] - 1, 1)
    return [
        Row(
            "waiting for data, wav2vec2-base shape, no workers",
            "",
            f"{share:.2%} ({1000 * each:.1f} ms a batch)",
            "",
            "< 2 %",
            share < 0.02,
        )
    ]


def measure_dropout(folder: str, rounds: int) -> Row:
    """Returns clips a second of our eager step with torch's dropout, and with ours."""
    bf16 = has_fast_bfloat16(use_cpu=True)
    batches = list(make_batches(np.full(BATCH, float(CLIP_SECONDS)), np.arange(BATCH), True))
    sides = {}
    for name, dropout in (("other", False), ("ours", True)):
        _, step = build(folder, True, bf16, dropout=dropout)
        step(*batches[0])
        sides[name] = lambda step=step: BATCH * STEPS / time_step(step, batches * STEPS)
    rates = in_turn(sides, rounds)
    row = compare("dropout on a CPU, ours against torch's, a whole step", rates["other"], rates["ours"], "clips/s", 1.0)
    row.goal = "> 1x"
    return row


def measure_compiled(folder: str, rounds: int) -> Row:
    """Returns clips a second with compiled layers against our eager step, after compilation."""
    bf16 = has_fast_bfloat16(use_cpu=True)
    lengths = np.full(BATCH, float(CLIP_SECONDS))
    batches = list(make_batches(lengths, np.arange(BATCH), True))
    _, eager = build(folder, True, bf16)
    model, compiled = build(folder, True, bf16, dropout=False)
    compile_layers(model, None, None)
    start = time.perf_counter()
    for step in (compiled, eager, compiled):
        step(*batches[0])
    print(f"Compiling one length took {time.perf_counter() - start:.0f} s.", flush=True)
    rates = in_turn({"eager": lambda: BATCH * STEPS / time_step(eager, batches * STEPS),
                     "compiled": lambda: BATCH * STEPS / time_step(compiled, batches * STEPS)}, rounds)  # fmt: skip
    row = compare("torch.compile against our eager step", rates["eager"], rates["compiled"], "clips/s", 1.0)
    row.goal, row.met = "off where below 1x", True
    return row


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of items 2, 6 and 8."""
    folder = str(save_model(work_folder() / "wav2vec2-base"))
    rounds = 1 if quick else 3
    rows = measure_padding()
    rows.append(measure_steps(folder, 1 if quick else 2, 1 if quick else 4))
    rows += measure_waiting(quick)
    fast = has_fast_bfloat16(use_cpu=True)
    if fast:
        rows += [measure_rate(folder, True, rounds, batch_size) for batch_size in ((2 * BATCH,) if quick else (BATCH, 2 * BATCH))]
    if not (fast and quick):
        rows.append(measure_rate(folder, False, rounds, BATCH))
    if not quick:
        rows += [measure_dropout(folder, rounds), measure_compiled(folder, rounds)]
    return rows


if __name__ == "__main__":
    run_as_benchmark(measure)
