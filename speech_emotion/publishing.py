"""Publishes a finished run on the Hugging Face Hub: model, feature extractor, card, recipe, results and figures.

    python -m speech_emotion.publishing runs/demo --repo_id user/name [--private] [--revision v2]
    python -m speech_emotion.publishing space user/name space_folder [--repo_id user/my-space]

All files go in one commit: a push that breaks off changes nothing on the Hub, and the same command again sends only what is
missing. No token, no folder of this machine and no recording is sent. The token comes from HF_TOKEN or `hf auth login`.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import TrainerCallback

from speech_emotion.arguments import RECIPE_FILE, RUN_FILE, SECRET_KEYS, SpeechTrainingArguments, strip_local_paths
from speech_emotion.card import build_card
from speech_emotion.errors import UserError, run_as_command

logger = logging.getLogger(__name__)

MODEL_PATTERNS = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter/*")
RESULT_PATTERNS = ("*_results.json", "audit.json", "robustness.json", "cross_corpus.json", "*.png")
REPORT_FILE = "report.html"
TEXT_SUFFIXES = (".json", ".md", ".txt", ".py", ".html", ".csv")
SENT_RUN_KEYS = ("git_commit", "python", "libraries", "device", "num_processes", "num_cores")

NUM_ATTEMPTS = 5
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0
# Nothing that another attempt would change.
FINAL_STATUSES = {400, 401, 403, 404, 413, 422}
SPACE_FILES = ("app.py",)
SPACE_REQUIREMENTS = ("torch", "torchaudio", "transformers", "datasets", "evaluate", "soundfile", "scipy", "scikit-learn",
                      "pandas", "jinja2", "matplotlib", "gradio", "tqdm", "numpy", "accelerate", "huggingface-hub")  # fmt: skip


def collect_files(folder: Path, repo_id: str, with_report: bool = False) -> dict[str, bytes | Path]:
    """Returns what is published of a run: names in the repository, and contents or files.

    Args:
        folder: the output folder of a finished run.
        repo_id: "user/name".
        with_report: report.html as well, which may hold recordings of the test.

    Raises:
        UserError: no finished run, or a file that would tell a secret or a folder of this machine.
    """
    files: dict[str, bytes | Path] = {"README.md": str(build_card(folder, repo_id)).encode()}
    for pattern in (*MODEL_PATTERNS, *RESULT_PATTERNS, *([REPORT_FILE] if with_report else [])):
        for path in sorted(folder.glob(pattern)):
            if path.name != "all_results.json":
                files[path.relative_to(folder).as_posix()] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder}: holds no model.safetensors. Name the output folder of a finished run.")
    recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Whoever runs the published recipe does not mean to publish here.
    own = {key for key in recipe if key.startswith(("hub_", "comet_"))} | {"push_to_hub", "report_to", "run_name"}
    files[RECIPE_FILE] = _dump(strip_local_paths({key: value for key, value in recipe.items() if key not in own}))
    files[RUN_FILE] = _dump({key: run.get(key) for key in SENT_RUN_KEYS})
    files["config.json"] = _dump({key: value for key, value in config.items() if key != "_name_or_path"})
    adapter = folder / "adapter" / "adapter_config.json"
    if adapter.is_file():
        files["adapter/adapter_config.json"] = _dump(strip_local_paths(json.loads(adapter.read_text(encoding="utf-8"))))
    check_public(files, folder)
    return files


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def check_public(files: dict[str, bytes | Path], folder: Path) -> None:
    """Raises `UserError` where a text would tell a secret, or a folder of this machine."""
    secrets = {value for key in {*SECRET_KEYS.values()} if (value := os.environ.get(key))} | {get_token() or ""} - {""}
    # Short paths such as / or /tmp stand in many texts; these say who and where.
    places = {str(place) for place in (Path.home(), Path.cwd(), folder.resolve()) if len(place.parts) > 2}
    for name, content in files.items():
        if not name.endswith(TEXT_SUFFIXES):
            continue
        text = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8", errors="replace")
        if any(secret in text for secret in secrets):
            raise UserError(f"{folder}: {name} holds one of your tokens. Remove it there; nothing was published.")
        for place in places:
            if place in text:
                raise UserError(f"{folder}: {name} tells the folder {place}. Remove it there; nothing was published.")


class Publisher:
    """A repository on the Hub, and how patiently it is written to.

    Args:
        repo_id: "user/name", or "name" alone for one's own.
        private: whether a new repository is private; None for the account's default.
        revision: branch, made where it is missing; None for main.
        repo_type: "model" or "space".
    """

    def __init__(self, repo_id: str, private: bool | None = None, revision: str | None = None, repo_type: str = "model") -> None:
        self.api = HfApi()
        self.repo_id = repo_id
        self.private = private
        self.revision = revision
        self.repo_type = repo_type
        self.is_open = False

    def open(self) -> None:
        """Makes repository and branch where they are missing.

        Raises:
            UserError: the Hub refuses, or cannot be reached.
        """
        if self.is_open:
            return
        sdk = "gradio" if self.repo_type == "space" else None

        def create() -> None:
            url = self.api.create_repo(self.repo_id, private=self.private, repo_type=self.repo_type, exist_ok=True, space_sdk=sdk)
            self.repo_id = url.repo_id
            if self.revision is not None:
                self.api.create_branch(self.repo_id, branch=self.revision, repo_type=self.repo_type, exist_ok=True)

        self._retry(create, "make the repository")
        self.is_open = True

    def publish(self, files: dict[str, bytes | Path], message: str) -> str:
        """Sends files in one commit, and returns the commit's address.

        What has arrived of large files in an earlier attempt is not sent again. Until the commit, which comes last and is
        whole or not at all, the repository stays as it was.

        Raises:
            UserError: the Hub refuses, or cannot be reached in five attempts.
        """
        self.open()
        logger.info(f"Publishing {len(files)} files to {self.api.endpoint}/{self.repo_id}.")

        def commit() -> str:
            operations = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in files.items()]
            info = self.api.create_commit(
                self.repo_id, operations, commit_message=message, repo_type=self.repo_type, revision=self.revision
            )
            return info.commit_url

        return self._retry(commit, "publish")

    def _retry(self, action: Callable[[], Any], what: str) -> Any:
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                return action()
            except HFValidationError as error:
                raise UserError(f"key 'hub_model_id': {str(error).splitlines()[0]}") from error
            except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
                problem = _explain(error, self.repo_id)
                if attempt == NUM_ATTEMPTS or _is_final(error):
                    raise UserError(f"cannot {what} on the Hub: {problem}") from error
                wait = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
                logger.warning(f"The Hub: {problem} Trying again in {wait:g} s ({attempt} of {NUM_ATTEMPTS}).")
                _sleep(wait)
        return None


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _status(error: BaseException) -> int | None:
    """Returns the status of the answer that an error stems from, if there was an answer."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "response", None) is not None:
            return cause.response.status_code
        cause = cause.__cause__
    return None


def _is_final(error: BaseException) -> bool:
    # A broken connection and most answers of servers may pass; a file that is not there, or a card that is refused, will not.
    if isinstance(error, OfflineModeIsEnabled):
        return True
    if _status(error) is not None or isinstance(error, httpx2.HTTPError):
        return _status(error) in FINAL_STATUSES
    # JSON that cannot be read is a proxy's page in place of the answer.
    return not isinstance(error, ConnectionError | TimeoutError | RuntimeError | json.JSONDecodeError)


def _explain(error: BaseException, repo_id: str) -> str:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to publish."
    if status == 401 or (isinstance(error, RepositoryNotFoundError) and not get_token()):
        return "it does not know you (401). Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    if status == 403:
        return f"you may not write to {repo_id} (403). Take a token with write access, or another --repo_id."
    if status == 409:
        return "somebody else changed the repository at the same time (409)."
    if status in (400, 422):
        return f"it refused what was sent ({status}): {' '.join(str(error).split())}"
    if status is not None:
        return f"it answered {status}."
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the connection broke ({first})." if isinstance(error, httpx2.HTTPError | ConnectionError) else first


def open_hub(training: SpeechTrainingArguments) -> Publisher | None:
    """Makes the repository before training, if the recipe publishes, so that a missing token is said in time.

    Trainer's own pushing is switched off: it would write a card with the folders of this machine. A Hub that is merely out
    of reach is warned of; it may be back when training has ended.

    Raises:
        UserError: the Hub refuses.
    """
    if not training.push_to_hub:
        return None
    training.push_to_hub = False
    publisher = Publisher(
        training.hub_model_id or Path(training.output_dir).name, training.hub_private_repo, training.hub_revision
    )
    if training.process_index == 0:
        try:
            publisher.open()
        except UserError as error:
            if "401" in str(error) or "403" in str(error) or "key '" in str(error):
                raise
            logger.warning(f"{error} Training goes on; the model is published when it has ended, if the Hub is back.")
    return publisher


class PublishCheckpoints(TrainerCallback):
    """Sends each saved checkpoint's weights, for `hub_strategy` every_save; failures are warned of."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publishes the checkpoint that was just saved."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files: dict[str, bytes | Path] = {
            path.name: path for pattern in MODEL_PATTERNS[:4] for path in folder.glob(pattern) if path.is_file()
        }
        try:
            self.publisher.publish(files, f"Training in progress, step {state.global_step}")
        except UserError as error:
            logger.warning(f"Step {state.global_step} is not on the Hub: {error}")


def publish_run(folder: Path, publisher: Publisher, with_report: bool = False) -> str:
    """Publishes a finished run and returns the commit's address.

    Raises:
        UserError: as `collect_files` and `Publisher.publish`.
    """
    publisher.open()
    files = collect_files(folder, publisher.repo_id, with_report)
    return publisher.publish(files, "Publish the trained model with its card, recipe and results")


def publish_or_explain(folder: Path, publisher: Publisher) -> None:
    """Publishes at a run's end.

    Raises:
        UserError: it could not be published; says that all is kept and how to publish it later.
    """
    try:
        logger.info(f"Published: {publish_run(folder, publisher)}")
    except UserError as error:
        revision = f" --revision {publisher.revision}" if publisher.revision else ""
        raise UserError(
            f"{error}\nThe run is complete and all of it is kept in {folder}. To publish it later:\n"
            f"  python -m speech_emotion.publishing {folder} --repo_id {publisher.repo_id}{revision}"
        ) from error


def write_space(model: str, folder: Path, title: str | None = None) -> list[Path]:
    """Writes the folder of a Hugging Face Space that shows a model with app.py, and returns its files.

    Args:
        model: Hub id of the model.
        folder: is made, or must be empty.
        title: of the Space.

    Raises:
        UserError: no Hub id, or a folder that holds something.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(
            f"'{model}' is not a model on the Hub. A Space loads it from there: publish it first, and name user/name."
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Name a new folder.")
    root = Path(__file__).parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPACE_FILES:
        shutil.copy(root / name, folder / name)
    shutil.copytree(Path(__file__).parent, folder / "speech_emotion", ignore=shutil.ignore_patterns("__pycache__"))
    pins = dict(
        line.split("==") for line in (root / "requirements.txt").read_text().splitlines() if "==" in line and line[0] != "#"
    )
    lines = [f"{name}=={pins[name]}" for name in SPACE_REQUIREMENTS if name in pins]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "model.txt").write_text(model + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        f"---\ntitle: {title or model.rpartition('/')[2]}\nemoji: 🎙️\nsdk: gradio\nsdk_version: {pins['gradio']}\n"
        f"app_file: app.py\nmodels:\n- {model}\n---\n\nHear emotion in speech with [{model}](https://huggingface.co/{model}). "
        "Emotion recognition is fallible: do not decide about people with it.\n",
        encoding="utf-8",
    )
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> str | None:
    """Reads the command line and publishes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("speech_emotion").setLevel(logging.INFO)
    if argv[:1] == ["space"]:
        parser = argparse.ArgumentParser(
            prog="python -m speech_emotion.publishing space", description="Makes a Space of a model."
        )
        parser.add_argument("model", help="the model on the Hub, user/name")
        parser.add_argument("folder", type=Path, help="where the Space's files are written")
        parser.add_argument("--title", help="of the page")
        parser.add_argument("--repo_id", help="publish it as this Space, user/name")
        parser.add_argument("--private", action="store_true", default=None, help="as a private one")
        arguments = parser.parse_args(argv[1:])
        files = write_space(arguments.model, arguments.folder, arguments.title)
        logger.info(f"{arguments.folder} holds the Space.")
        if arguments.repo_id is None:
            return None
        publisher = Publisher(arguments.repo_id, arguments.private, repo_type="space")
        contents: dict[str, bytes | Path] = {path.relative_to(arguments.folder).as_posix(): path for path in files}
        address = publisher.publish(contents, f"Show {arguments.model}")
    else:
        parser = argparse.ArgumentParser(
            prog="python -m speech_emotion.publishing",
            description="Publishes a finished run on the Hub. `... space MODEL FOLDER` makes a Space instead.",
        )
        parser.add_argument("output_dir", type=Path, help="output folder of the run")
        parser.add_argument("--repo_id", required=True, help="user/name, or name")
        parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
        parser.add_argument("--revision", help="branch; made where it is missing")
        parser.add_argument("--with_report", action="store_true", help="report.html too, which may hold recordings of the test")
        arguments = parser.parse_args(argv)
        publisher = Publisher(arguments.repo_id, arguments.private, arguments.revision)
        address = publish_run(arguments.output_dir, publisher, arguments.with_report)
    logger.info(f"Published: {address}")
    return address


if __name__ == "__main__":
    run_as_command(main)
