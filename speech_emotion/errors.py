"""What a user sees when something is wrong: one message, no traceback, and an exit code that a script can read."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, the shell's convention
MAX_OFFENDERS_SHOWN = 20
DISK_FULL_SIGNS = ("No space left on device", "os error 28", "iostream error", "PytorchStreamWriter failed writing")
SECONDS_FOR_THE_MAIN_PROCESS = 5.0


class UserError(Exception):
    """Something that the user can put right: the message names the file, key or clip, what is wrong and what to do."""


def list_offenders(offenders: Iterable[str]) -> str:
    """Returns the offenders one to a line, the first 20 of them, then how many more there are."""
    offenders = list(offenders)
    lines = [f"  - {offender}" for offender in offenders[:MAX_OFFENDERS_SHOWN]]
    if len(offenders) > MAX_OFFENDERS_SHOWN:
        lines.append(f"  ... and {len(offenders) - MAX_OFFENDERS_SHOWN} more")
    return "\n".join(lines)


def _explain_disk_error(error: BaseException) -> str | None:
    """Returns what to say of a disk that is full or cannot be written, or None for any other error.

    torch and safetensors report it as errors of their own, with the reason in the text.
    """
    full = "No space left on device: free some space or choose another --output_dir; finished checkpoints are kept, and "
    full += "--resume_from_checkpoint last goes on from there."
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) == errno.ENOSPC or any(sign in str(cause) for sign in DISK_FULL_SIGNS):
            return full
        if isinstance(cause, PermissionError) or getattr(cause, "errno", None) == errno.EROFS:
            return f"{cause.filename}: {cause.strerror}. Choose another folder, or mend its permissions."
        cause = cause.__cause__ or cause.__context__
    return None


TRAINING_INTERRUPTED = (
    "interrupted. Finished epochs are kept in the output folder: the same command with "
    "--resume_from_checkpoint last goes on from there."
)


def run_as_command(main: Callable[[], object], interrupted: str = TRAINING_INTERRUPTED) -> None:
    """Runs a script's `main` and turns what a user can put right into a message and an exit code.

    Args:
        main: of the script.
        interrupted: what to say after Ctrl-C.

    Exits with 2 for a `UserError`, for a full disk and for a folder that cannot be written; 130 for Ctrl-C. Any
    other exception is a defect of ours and keeps its traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except UserError as error:
        message, exit_code = str(error), USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        message, exit_code = interrupted, INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        raise
    except Exception as error:
        message, exit_code = _explain_disk_error(error), USER_ERROR_EXIT_CODE
        if message is None:
            raise
    else:
        return
    if rank != 0:
        # Mostly the main process says the same, and the launcher then ends this one; if not, it has to be said here.
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS)
        message = f"process {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
