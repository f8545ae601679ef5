"""The other side: fine-tuning as the usual example scripts do it.

    python -m benchmarks.plain_trainer --data_dir FOLDER --model_name_or_path MODEL --output_dir FOLDER

`set_transform` decodes, resamples and extracts each time a clip is touched (with torchcodec where it loads, else with
soundfile and a resampling kernel made for each call, as transformers' own audio-classification pipeline does), batches
are random and padded by the feature extractor, everything is float32, the feature encoder is frozen, accuracy is all
that is measured. FOLDER holds train/ and validation/ with a folder for each class. Prints one JSON line of results.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
)

try:
    from torchcodec.decoders import AudioDecoder
except (ImportError, OSError, RuntimeError):
    AudioDecoder = None

DECODER = "torchcodec" if AudioDecoder else "soundfile + torchaudio.functional.resample"


def load_split(folder: Path) -> Dataset:
    """Returns the paths and labels of a folder with one folder a class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    paths = sorted(folder.rglob("*.wav"))
    rows = {"path": [str(path) for path in paths], "label": [names.index(path.parent.name) for path in paths]}
    return Dataset.from_dict(rows, features=Features({"path": Value("string"), "label": ClassLabel(names=names)}))


def load_audio(path: str, sampling_rate: int) -> np.ndarray:
    """Decodes and resamples one clip."""
    if AudioDecoder is not None:
        return AudioDecoder(path, sample_rate=sampling_rate, num_channels=1).get_all_samples().data[0].numpy()
    waveform, rate = soundfile.read(path, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(waveform), rate, sampling_rate).numpy()


def build_transform(feature_extractor: Any) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """Returns what `set_transform` applies to each batch of rows."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        waveforms = [load_audio(path, feature_extractor.sampling_rate) for path in batch["path"]]
        inputs = feature_extractor(waveforms, sampling_rate=feature_extractor.sampling_rate)
        return {"input_values": inputs["input_values"], "labels": list(batch["label"])}

    return transform


def build_collator(feature_extractor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Returns a collator that pads to the longest clip of the batch."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = feature_extractor.pad([{"input_values": row["input_values"]} for row in rows], padding=True, return_tensors="pt")
        return {"input_values": batch["input_values"], "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of clips classified rightly."""
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, validates after each epoch, and returns the results."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args(argv)

    feature_extractor = AutoFeatureExtractor.from_pretrained(given.model_name_or_path)
    splits = {name: load_split(given.data_dir / name) for name in ("train", "validation")}
    for split in splits.values():
        split.set_transform(build_transform(feature_extractor))
    model = AutoModelForAudioClassification.from_pretrained(given.model_name_or_path)
    model.freeze_feature_encoder()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=given.output_dir, per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=given.batch_size, num_train_epochs=given.epochs, learning_rate=given.learning_rate,
            warmup_steps=0.1, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="accuracy", remove_unused_columns=False, report_to="none", logging_steps=10, seed=0,
            bf16=given.bf16, disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=build_collator(feature_extractor),
        compute_metrics=compute_accuracy,
    )  # fmt: skip
    trained = trainer.train()
    trainer.save_model()
    feature_extractor.save_pretrained(given.output_dir)
    results = trainer.evaluate() | {
        "steps": trainer.state.global_step,
        "train_runtime": trained.metrics["train_runtime"],
        "seconds": time.perf_counter() - start,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "decoder": DECODER,
    }
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
