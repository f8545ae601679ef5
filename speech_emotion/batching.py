"""Batches: clips of similar length together, padded to the longest of the batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset as ArrowDataset
from torch.utils.data import Dataset, Sampler

from speech_emotion.audio import BadAudioError, decode
from speech_emotion.augmentation import Augmentation
from speech_emotion.errors import UserError
from speech_emotion.features import Extraction

# Batches are sorted by length within so many of them: enough that neighbours are alike, few enough that batches
# differ from epoch to epoch.
BATCHES_PER_SORT = 50
EPOCHS_APART = 1_000_003  # a row's second time in an epoch draws as if it were so many epochs later


class LengthBucketSampler(Sampler[int]):
    """Yields rows so that consecutive batches hold clips of similar length, in an order drawn for each epoch.

    What it yields is epoch * num_rows + row, which `TrainingRows` takes apart: whatever is random about a row can then
    be drawn from the epoch and the row, in any worker.

    The order depends on the seed and the epoch alone, not on torch's global generator: a resumed run, and every one of
    several processes, sees the same batches. All clips of one optimizer step are alike, however it is divided among
    processes and accumulated batches, so that these divisions train the same. For the same reason each step is whole:
    the epoch's last one is filled up with clips from its beginning, as torch's DistributedSampler does.

    Args:
        lengths: of each row, (num_rows,).
        clips_per_step: batch size x processes x accumulated batches.
        seed: of the order.
        bucket: without it, the order is a plain shuffle.
        balanced_labels: of each row, (num_rows,), where each class is to be heard equally often: an epoch is as long as
            ever, and rows of rare classes come several times in it, each time with a randomness of its own.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        clips_per_step: int,
        seed: int,
        bucket: bool = True,
        balanced_labels: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.balanced_labels = None if balanced_labels is None else np.asarray(balanced_labels)
        self.clips_per_step = clips_per_step
        self.seed = seed
        self.bucket = bucket
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch's order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.clips_per_step) * self.clips_per_step

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.balanced_labels is None:
            order = np.resize(rng.permutation(len(self.lengths)), len(self))  # repeats from the beginning
            draws = np.full(len(order), self.epoch)
        else:
            order, repeats = self._draw_balanced(rng)
            draws = self.epoch + EPOCHS_APART * repeats
        if self.bucket:
            sort_size = self.clips_per_step * BATCHES_PER_SORT
            parts = [order[start : start + sort_size] for start in range(0, len(order), sort_size)]
            places = np.concatenate(
                [start * sort_size + np.argsort(-self.lengths[part], kind="stable") for start, part in enumerate(parts)]
            )
            steps = places.reshape(-1, self.clips_per_step)
            places = steps[rng.permutation(len(steps))].ravel()  # so that lengths do not fall within an epoch
            order, draws = order[places], draws[places]
        return iter((order + draws * len(self.lengths)).tolist())

    def _draw_balanced(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows, (len(self),), and how often each has come before in them."""
        classes = rng.permutation(np.unique(self.balanced_labels))  # who is one short changes from epoch to epoch
        rows, repeats = [], []
        for i, label in enumerate(classes):
            own = np.flatnonzero(self.balanced_labels == label)
            size = len(self) // len(classes) + (i < len(self) % len(classes))
            rounds = [rng.permutation(own) for _ in range(-(-size // len(own)))]
            rows.append(np.concatenate(rounds)[:size])
            repeats.append(np.repeat(np.arange(len(rounds)), len(own))[:size])
        mixed = rng.permutation(len(self))
        return np.concatenate(rows)[mixed], np.concatenate(repeats)[mixed]


class TrainingRows(Dataset[dict[str, Any]]):
    """The training table with, in each row, a random generator of that row and epoch.

    Augmentation and cropping thus neither depend on torch's global generator nor move it: batches that are prepared
    ahead, by however many workers, are the same in a resumed run.

    Args:
        table: the prepared training split, in numpy format.
        seed: of the generators.
    """

    def __init__(self, table: ArrowDataset, seed: int) -> None:
        self.table = table
        self.seed = seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Returns the rows of one batch; torch's DataLoader prefers this to one call a row."""
        epochs_and_rows = [divmod(index, len(self.table)) for index in indices]
        rows = self.table.__getitems__([row for _, row in epochs_and_rows])
        return [
            {**values, "rng": np.random.default_rng([self.seed, epoch, row])}
            for values, (epoch, row) in zip(rows, epochs_and_rows, strict=True)
        ]


class ClipDataset(Dataset[dict[str, Any]]):
    """A Dataset as it is usually written: decode, resample and extract each time a clip is touched.

    Its rows are those of the cached table, and so are its batches; it needs no preparation and no disk.

    Args:
        clips: the common table.
        plan: one split's table of `plan_splits`.
        extraction: of the run.
        seed: of the rows' random generators.
    """

    def __init__(self, clips: ArrowDataset, plan: ArrowDataset, extraction: Extraction, seed: int) -> None:
        self.clips = clips
        self.plan = plan
        self.extraction = extraction
        self.seed = seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, row = divmod(index, len(self.plan))
        planned = self.plan[row]
        audio = self.clips[int(planned["clip"])]["audio"]
        try:
            waveform = decode(audio, self.extraction.sampling_rate)
        except BadAudioError as error:
            raise UserError(
                f"{audio['path']}: {error}. With --feature_extraction map all such clips are found beforehand, and "
                "--on_bad_audio skip leaves them out."
            ) from error
        if planned["window"] < 0:
            rng = np.random.default_rng([self.seed, epoch, row])
            return {"waveform": waveform, "rng": rng, "labels": planned["labels"]}
        window = self.extraction.windows(waveform)[int(planned["window"])]
        return {self.extraction.input_name: self.extraction(window), "labels": planned["labels"]}


class BatchShard:
    """The batches of one of several processes: each process takes its turn, as accelerate deals them out too.

    Args:
        sampler: yields the rows of all processes.
        batch_size: of one process.
        process_index: which process this is.
        num_processes: of how many.
    """

    def __init__(self, sampler: LengthBucketSampler, batch_size: int, process_index: int, num_processes: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.sampler) // (self.batch_size * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)
        starts = range(self.process_index * self.batch_size, len(rows), self.batch_size * self.num_processes)
        return (rows[start : start + self.batch_size] for start in starts)


@dataclass
class Collator:
    """Makes a batch of rows; crops and augments those that are waveforms still.

    Attributes:
        extraction: of the run.
        attention_mask: whether the architecture wants one.
        augmentation: of training clips.
        multiple: waveforms are padded to a multiple of so many samples, so that few lengths occur.
    """

    extraction: Extraction
    attention_mask: bool
    augmentation: Augmentation
    multiple: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `labels` (batch,), the model's input padded to the longest clip, and a mask if wanted and anything is padded.

        The input is (batch, num_samples), (batch, frames, bins) or, for Whisper, (batch, bins, frames); the mask is
        int64 of shape (batch, num_samples or frames).
        """
        arrays = [
            self.extraction(self._change(row["waveform"], row["rng"])) if "waveform" in row else row[self.extraction.input_name]
            for row in rows
        ]
        lengths = [len(array) for array in arrays]
        longest = round_up(max(lengths), self.multiple) if arrays[0].ndim == 1 else max(lengths)
        batch = np.full((len(arrays), longest, *arrays[0].shape[1:]), self.extraction.feature_extractor.padding_value,
                        dtype=np.float32)  # fmt: skip
        for i, array in enumerate(arrays):
            batch[i, : len(array)] = array
        inputs = {
            self.extraction.input_name: torch.from_numpy(batch),
            "labels": torch.tensor([int(row["labels"]) for row in rows]),
        }
        if self.attention_mask and min(lengths) < longest:
            inputs["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        return inputs

    def _change(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation:
            waveform = self.augmentation(waveform, self.extraction.sampling_rate, rng)
        window = self.extraction.window_samples
        if window is not None and len(waveform) > window:
            start = int(rng.integers(0, len(waveform) - window + 1))
            waveform = waveform[start : start + window]
        return waveform


def round_up(length: int, multiple: int) -> int:
    """Returns the smallest multiple that is at least this length."""
    return -(-length // multiple) * multiple


def padding_share(sampler: LengthBucketSampler, batch_size: int) -> float:
    """Returns the share of padding among all samples of one epoch's batches, between 0 and 1."""
    lengths = sampler.lengths[np.array(list(sampler)) % len(sampler.lengths)]
    padded = sum(lengths[start : start + batch_size].max() * len(lengths[start : start + batch_size])
                 for start in range(0, len(lengths), batch_size))  # fmt: skip
    return 1 - float(lengths.sum()) / float(padded)
