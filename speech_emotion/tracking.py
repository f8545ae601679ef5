"""Tells Comet, and whatever else `report_to` names, about a run. A tracker that fails never ends the training.

Comet is online with COMET_API_KEY and offline without: the archive then lies in OUTPUT_DIR/comet for `comet upload`.
Secrets stay out: nothing that reads the command line or the environment by itself is switched on.
"""

import importlib.util
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from speech_emotion.arguments import SpeechTrainingArguments
from speech_emotion.audio import read_native
from speech_emotion.corpora.table import SPLITS
from speech_emotion.errors import UserError
from speech_emotion.examination import Findings
from speech_emotion.html_report import draw_spectrogram
from speech_emotion.metrics import Evaluation
from speech_emotion.report import REPORT_FILE
from speech_emotion.splits import Split, clip_names

logger = logging.getLogger(__name__)

COMET = "comet_ml"
COMET_FOLDER = "comet"
CLIPS_PER_CELL = 3  # of the confusion matrix; each is uploaded
# What each tracker needs installed, as far as requirements.txt leaves it out.
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard", "comet_ml": "comet_ml", "mlflow": "mlflow"}

EVENTS = [
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_step_end",
    "on_substep_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_init_end",
]


class GuardedCallback(TrainerCallback):
    """Passes Trainer's events on to a tracker until that fails; then warns once and leaves the tracker alone."""

    def __init__(self, name: str, build: Callable[[], TrainerCallback]) -> None:
        self.name = name
        self.callback: TrainerCallback | None = None
        self._guard(lambda: setattr(self, "callback", build()))

    def _guard(self, action: Callable[[], Any]) -> None:
        # A tracker is third-party code in front of a network: whatever it raises must not cost hours of training.
        try:
            action()
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning(f"{self.name} cannot be reached or used ({first}); training goes on without it.")
            self.callback = None


def _forward(event: str) -> Callable[..., None]:
    def handler(self: GuardedCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.callback is not None:
            self._guard(lambda: getattr(self.callback, event)(args, state, control, **kwargs))

    return handler


for _event in EVENTS:
    setattr(GuardedCallback, _event, _forward(_event))


class Tracker:
    """What is logged beside the scalars: recipe, splits, class distribution, confusion matrix, figures and tags.

    Without Comet, and on all processes but the main one, it does nothing.
    """

    def __init__(self, training: SpeechTrainingArguments) -> None:
        self.output_dir = Path(training.output_dir)
        self.experiment = None
        self.with_audio = training.report_audio
        self.callbacks = self._build_callbacks(training)
        uses_comet = COMET in training.report_to
        training.report_to = []  # else Trainer would build the same callbacks again, unguarded
        if uses_comet and training.process_index == 0:
            self._guard(lambda: self._start_comet(training))

    def _build_callbacks(self, training: SpeechTrainingArguments) -> list[TrainerCallback]:
        for name in training.report_to:
            if importlib.util.find_spec(PACKAGES.get(name, "transformers")) is None:
                raise UserError(f"key 'report_to': '{name}' is not installed: pip install {PACKAGES[name]}.")
        try:
            classes = get_reporting_integration_callbacks(training.report_to)
        except ValueError as error:
            raise UserError(f"key 'report_to': {error}") from error
        return [GuardedCallback(name, build) for name, build in zip(training.report_to, classes, strict=True)]

    def _start_comet(self, training: SpeechTrainingArguments) -> None:
        os.environ["COMET_ERROR_TRACKING_ENABLE"] = "false"  # else the offline SDK reaches for its error service
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        online = bool(os.environ.get("COMET_API_KEY")) and os.environ.get("COMET_MODE", "").lower() != "offline"
        # COMET_MODE=offline is what Comet's own documentation says, and transformers' callback would log nothing.
        if os.environ.get("COMET_MODE", "").lower() == "offline":
            del os.environ["COMET_MODE"]
        if online:
            try:
                self._open_experiment(training, online=True)
                if self.experiment.alive:
                    return
                problem = "no connection"
            except Exception as error:
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(f"Comet cannot be reached ({problem}); the experiment is kept offline.")
            os.environ["COMET_START_ONLINE"] = "0"
        self._open_experiment(training, online=False)

    def _open_experiment(self, training: SpeechTrainingArguments, online: bool) -> None:
        import comet_ml

        folder = self.output_dir / COMET_FOLDER
        if not online:
            folder.mkdir(parents=True, exist_ok=True)
        self.experiment = comet_ml.start(
            online=online,
            workspace=training.comet_workspace or os.environ.get("COMET_WORKSPACE"),
            project_name=training.comet_project or os.environ.get("COMET_PROJECT_NAME"),
            experiment_config=comet_ml.ExperimentConfig(
                name=training.run_name or self.output_dir.name,
                tags=training.tags or [],
                offline_directory=None if online else str(folder),
                parse_args=False,  # sends the command line, tokens and all
                log_code=False,
                log_graph=False,
                log_git_patch=False,
                log_env_details=False,  # sends the environment's and the machine's names and paths
                auto_output_logging=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_log_co2=False,
                display_summary_level=0,
            ),
        )
        logger.info(
            f"Comet experiment: {self.experiment.url}" if online else f"Comet is offline, without COMET_API_KEY: {folder}."
        )

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # see GuardedCallback
            logger.warning(f"Comet: {str(error).splitlines()[0] if str(error) else type(error).__name__}; going on without it.")

    def log_setup(self, recipe: dict[str, Any], split: Split) -> None:
        """Logs the recipe, the splits and how many clips of each class they hold."""
        if self.experiment is None:
            return
        names, labels = split.clips.features["label"].names, np.asarray(split.clips["label"][:])
        counts = {part: np.bincount(labels[split.indices(part)], minlength=len(names)) for part in SPLITS}
        self._guard(lambda: self.experiment.log_parameters({f"recipe/{key}": value for key, value in recipe.items()}))
        self._guard(lambda: self.experiment.log_asset_data(recipe, name="recipe.json"))
        for name in ("splits.csv", "run.json"):
            self._guard(lambda name=name: self.experiment.log_asset(str(self.output_dir / name), file_name=name))
        rows = [[name, *(int(counts[part][i]) for part in SPLITS)] for i, name in enumerate(names)]
        self._guard(lambda: self.experiment.log_table("class_distribution.csv", rows, headers=["class", *SPLITS]))
        self._guard(lambda: self.experiment.log_others({f"notes/{i}": note for i, note in enumerate(split.notes)}))

    def log_scalars(self, scalars: dict[str, float], step: int, epoch: float) -> None:
        """Logs numbers of one optimizer step or validation, as the hand-written loop does."""
        if self.experiment is not None:
            self._guard(lambda: self.experiment.log_metrics(scalars, step=step, epoch=epoch))

    def log_results(
        self, results: dict[str, Any], evaluation: Evaluation, clips: Dataset, figures: list[Path], findings: Findings
    ) -> None:
        """Logs the test's results, the confusion matrix with clips in its cells, the worst clips' audio, figures and report.

        Args:
            results: of the test.
            evaluation: of the test clips.
            clips: the whole corpus table.
            figures: paths of PNGs.
            findings: of the examination.
        """
        if self.experiment is None:
            return
        scalars = {key: value for key, value in results.items() if isinstance(value, int | float)}
        for entry in findings.robustness or []:
            scalars[f"robustness/{entry['condition']}"] = entry["uar"]
        for entry in findings.audit["shortcuts"] if findings.audit else []:
            scalars[f"audit/{entry['cue']}, {entry['by']}"] = entry["uar"]
        self._guard(lambda: self.experiment.log_metrics(scalars))
        self._guard(lambda: self._log_confusion_matrix(evaluation, clips))
        if self.with_audio:
            for entry in findings.worst_clips:
                self._guard(lambda entry=entry: self._log_clip(entry, clips))
        for path in figures:
            self._guard(lambda path=path: self.experiment.log_image(str(path), name=path.stem))
        for name in ("predictions.csv", "groups.csv", "history.csv", REPORT_FILE):
            if (self.output_dir / name).is_file():
                self._guard(lambda name=name: self.experiment.log_asset(str(self.output_dir / name), file_name=name))

    def _log_confusion_matrix(self, evaluation: Evaluation, clips: Dataset) -> None:
        names = clip_names(clips)

        def log_example(index: int) -> dict[str, str]:
            # Comet shows images in the matrix; the audio beside it has the same name.
            name, row = names[int(evaluation.clips[index])], int(evaluation.clips[index])
            samples, rate = read_native(clips[row]["audio"])
            self.experiment.log_audio(samples, sample_rate=rate, file_name=f"test/{name}")
            image = self.experiment.log_image(io.BytesIO(draw_spectrogram(samples)), name=f"test/{name}.png")
            return {"sample": name, "assetId": image["imageId"]}

        self.experiment.log_confusion_matrix(
            y_true=evaluation.references.tolist(),
            y_predicted=evaluation.predictions.tolist(),
            labels=evaluation.label_names,
            title="Test",
            max_examples_per_cell=CLIPS_PER_CELL,
            index_to_example_function=log_example if self.with_audio else lambda index: names[int(evaluation.clips[index])],
        )

    def _log_clip(self, entry: dict[str, Any], clips: Dataset) -> None:
        samples, rate = read_native(clips[entry["row"]]["audio"])
        metadata = {key: entry[key] for key in ("label", "prediction", "probability", "loss", "speaker_id", "sentence_id")}
        self.experiment.log_audio(
            samples, sample_rate=rate, file_name=f"worst/{entry['clip']}", metadata=metadata, copy_to_tmp=False
        )

    def end(self) -> None:
        """Closes the experiment and says how an offline one is sent."""
        if self.experiment is None:
            return
        self._guard(self.experiment.end)
        archives = sorted((self.output_dir / COMET_FOLDER).glob("*.zip"), key=os.path.getmtime)
        if archives:
            logger.info(f"To send the offline experiment to Comet: COMET_API_KEY=... comet upload {archives[-1]}")
        self.experiment = None
