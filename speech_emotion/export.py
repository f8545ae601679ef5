"""Writes a trained model for devices without Python's torch: ONNX, optionally in 8 bits, or TorchScript.

    python -m speech_emotion.export runs/demo --format onnx
    python -m speech_emotion.export runs/demo --format onnx --quantize int8
    python -m speech_emotion.export runs/demo --format torchscript

The file takes what the feature extractor gives (features of one or more clips of one length, and any length for models that read
the waveform) and returns logits. It is compared with PyTorch on the run's test clips, in one run: probabilities, labels, size and
speed; `export.json` beside it holds that, and what a program needs to know to use it.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from speech_emotion.arguments import RECIPE_FILE, ModelArguments, parse_arguments
from speech_emotion.corpora import load_corpus
from speech_emotion.corpora.table import read_waveforms
from speech_emotion.errors import UserError, run_as_command
from speech_emotion.features import Extraction, build_extraction
from speech_emotion.metrics import softmax
from speech_emotion.modeling import FIXED_WINDOW_TYPES, find_window_seconds, load_feature_extractor, load_trained
from speech_emotion.report import write_json
from speech_emotion.splits import split_corpus
from speech_emotion.startup import quiet_transformers

logger = logging.getLogger(__name__)

FORMATS = {"onnx": "model.onnx", "torchscript": "model.pt"}
INT8_FILE = "model_int8.onnx"
TOLERANCE = 1e-4  # of probabilities, against PyTorch
LEAST_AGREEMENT = 0.97  # of labels, for 8 bits
MAX_CLIPS = 200
NUM_SYNTHETIC_CLIPS = 20
QUANTIZED_OPERATORS = ("MatMul", "Gemm")  # convolutions in 8 bits cost more accuracy than they save


class _Logits(nn.Module):
    """The model with features in and logits out, and nothing else."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, ...) -> (batch, num_labels)."""
        return self.model(features).logits


@dataclass
class Comparison:
    """An exported file beside PyTorch, on the same clips in the same run; times are medians of one clip."""

    num_clips: int
    largest_difference: float
    label_agreement: float
    num_bytes: int
    torch_num_bytes: int
    milliseconds: float
    torch_milliseconds: float


def export_onnx(model: PreTrainedModel, example: torch.Tensor, path: Path) -> None:
    """Writes the model as ONNX.

    Args:
        model: in evaluation mode, on the CPU.
        example: features of one clip, (1, ...).
        path: of the file.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shape = {0: dynamic} if model.config.model_type in FIXED_WINDOW_TYPES else {0: dynamic, 1: dynamic}
    pair = torch.cat([example, example])  # with one clip, the number of clips would be taken for fixed
    with _quiet():
        program = torch.onnx.export(
            _Logits(model), (pair,), dynamo=True, dynamic_shapes=(shape,), input_names=["features"], output_names=["logits"],
            verbose=False,
        )  # fmt: skip
        program.save(path)


def quantize_onnx(source: Path, path: Path) -> None:
    """Writes an ONNX file's matrix products with weights of 8 bits, a scale for each column; activations stay dynamic."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source, path, op_types_to_quantize=list(QUANTIZED_OPERATORS), per_channel=True, weight_type=QuantType.QInt8
        )


def export_torchscript(model: PreTrainedModel, example: torch.Tensor, path: Path) -> None:
    """Writes the model as TorchScript, traced; see `export_onnx` for the arguments."""
    with _quiet():
        traced = torch.jit.trace(_Logits(model), (torch.cat([example, example]),), check_trace=False)
        torch.jit.save(traced, path)


@contextlib.contextmanager
def _quiet() -> Any:
    # Tracing warns of each number that becomes a constant; what is wrong with the result, the comparison says.
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir", "root", "torch")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def load_exported(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from features, float32 (batch, ...), to logits, float32 (batch, num_labels)."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch has beside it
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda features: session.run(None, {name: features})[0]
    module = torch.jit.load(path)

    def run(features: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(features)).numpy()

    return run


def compare(path: Path, model: PreTrainedModel, windows: list[np.ndarray]) -> Comparison:
    """Compares an exported file with PyTorch, window by window and in turns.

    Args:
        path: of the file.
        model: that it was made of.
        windows: features of each, (...).
    """
    exported = load_exported(path)

    def plain(features: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(features)).logits.numpy()

    for run in (plain, exported):
        run(windows[0][None])  # what is done once only
    probabilities: list[list[np.ndarray]] = [[], []]
    seconds: list[list[float]] = [[], []]
    for features in windows:
        for side, run in enumerate((plain, exported)):
            start = time.perf_counter()
            logits = run(features[None])
            seconds[side].append(time.perf_counter() - start)
            probabilities[side].append(softmax(logits)[0])
    ours, theirs = (np.stack(side) for side in probabilities)
    return Comparison(
        len(windows),
        float(np.abs(ours - theirs).max()),
        float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),  # large weights lie beside, in PATH.data
        sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        1000 * float(np.median(seconds[1])),
        1000 * float(np.median(seconds[0])),
    )


def load_test_windows(folder: Path, extraction: Extraction) -> tuple[list[np.ndarray], str]:
    """Returns features of the run's test clips, or of noise where its corpus is not here, and in words which."""
    try:
        arguments = parse_arguments([str(folder / RECIPE_FILE)])
        split = split_corpus(load_corpus(arguments), arguments.data, arguments.split_seed)
        rows = split.indices("test")[:MAX_CLIPS]
        found = [waveform for _, waveform in read_waveforms(split.clips, rows, extraction.sampling_rate)]
        if found:
            return [extraction(window) for waveform in found for window in extraction.windows(waveform)], "test clips of the run"
    except UserError as error:
        logger.warning(f"The run's test clips are not here ({str(error).splitlines()[0]}): comparing on noise instead.")
    rng = np.random.default_rng(0)
    sizes = rng.integers(extraction.sampling_rate, 4 * extraction.sampling_rate, NUM_SYNTHETIC_CLIPS)
    noise = [(0.1 * rng.standard_normal(size)).astype(np.float32) for size in sizes]
    return [extraction(window) for waveform in noise for window in extraction.windows(waveform)], "clips of noise"


def export(folder: Path, format_: str, quantize: str | None, output: Path) -> dict[str, Any]:
    """Exports a run's model and compares it with PyTorch.

    Args:
        folder: the run's output folder.
        format_: "onnx" or "torchscript".
        quantize: "int8" or None.
        output: where the files go.

    Returns:
        What export.json holds: `files` (a comparison each), `compared_on`, `labels`, `sampling_rate`, `input_name`,
        `window_samples` (None: any length), `min_samples`.

    Raises:
        UserError: no trained model, int8 for TorchScript, or a result that is not the model's.
    """
    if quantize and format_ != "onnx":
        raise UserError("--quantize int8 is for --format onnx.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no model. Name the output folder of a finished run.")
    model = load_trained(str(folder)).eval()
    feature_extractor = load_feature_extractor(ModelArguments(model_name_or_path=str(folder)))
    recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")) if (folder / RECIPE_FILE).is_file() else {}
    window_seconds = find_window_seconds(model, feature_extractor) or recipe.get("max_length_seconds")
    extraction = build_extraction(model, feature_extractor, window_seconds)
    windows, compared_on = load_test_windows(folder, extraction)
    output.mkdir(parents=True, exist_ok=True)
    path = output / FORMATS[format_]
    (export_onnx if format_ == "onnx" else export_torchscript)(model, torch.from_numpy(windows[0][None]), path)
    files = {path.name: compare(path, model, windows)}
    if files[path.name].largest_difference > TOLERANCE:
        raise UserError(
            f"{path}: its probabilities differ from PyTorch's by up to {files[path.name].largest_difference:.2g}, more than "
            f"{TOLERANCE:g}. Do not use it; please report the architecture ({model.config.model_type})."
        )
    if quantize:
        quantize_onnx(path, output / INT8_FILE)
        files[INT8_FILE] = compare(output / INT8_FILE, model, windows)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, output / name)
    result = {
        "files": {name: vars(comparison) for name, comparison in files.items()},
        "compared_on": compared_on,
        "labels": [model.config.id2label[i] for i in range(model.config.num_labels)],
        "sampling_rate": extraction.sampling_rate,
        "input_name": "features" if format_ == "onnx" else None,
        "window_samples": extraction.window_samples,
        "min_samples": extraction.min_samples,
    }
    write_json(output / "export.json", result)
    return result


def format_export(result: dict[str, Any], output: Path) -> str:
    """Returns the table for the screen."""
    lines = [f"Compared with PyTorch on {result['compared_on']}, {torch.get_num_threads()} threads:", ""]
    lines.append(f"  {'':18} {'size':>10} {'ms a clip':>10} {'x as fast':>10} {'same label':>11} {'largest difference':>19}")
    first = next(iter(result["files"].values()))
    lines.append(f"  {'PyTorch':18} {first['torch_num_bytes'] / 1e6:7.1f} MB {first['torch_milliseconds']:10.2f}")
    for name, c in result["files"].items():
        lines.append(
            f"  {name:18} {c['num_bytes'] / 1e6:7.1f} MB {c['milliseconds']:10.2f} "
            f"{c['torch_milliseconds'] / c['milliseconds']:10.2f} {c['label_agreement']:11.1%} {c['largest_difference']:19.2g}"
        )
    int8 = result["files"].get(INT8_FILE)
    if int8 and int8["label_agreement"] < LEAST_AGREEMENT:
        lines += [
            "",
            f"Warning: in 8 bits, fewer than {LEAST_AGREEMENT:.0%} of the clips keep their label. Use {FORMATS['onnx']}.",
        ]
    return "\n".join([*lines, "", f"All of it is in {output}."])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, exports, and prints the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_emotion.export",
        description="Writes a trained model as ONNX or TorchScript, compared with PyTorch.",
    )
    parser.add_argument("output_dir", type=Path, help="output folder of a run")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--quantize", choices=["int8"], help="weights of 8 bits as well, for onnx")
    parser.add_argument("--output", type=Path, help="folder of the files; by default OUTPUT_DIR/FORMAT")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("speech_emotion").setLevel(logging.WARNING)
    quiet_transformers()
    output = arguments.output or arguments.output_dir / arguments.format
    result = export(arguments.output_dir, arguments.format, arguments.quantize, output)
    print(format_export(result, output))
    return result


if __name__ == "__main__":
    run_as_command(main)
