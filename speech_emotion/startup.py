"""What a script does before the heavy libraries load; it imports nothing of them itself."""

import sys

HELP_FLAGS = {"-h", "--help"}
COMET, PEFT = "comet_ml", "peft"
LORA_KEY = "lora_rank"


def answer_at_once(with_loop: bool = False) -> None:
    """Answers `--help` with the argument parser alone, and keeps Comet's SDK and peft out of runs that do not use them.

    transformers imports both by itself wherever they are installed, which takes half a second and two seconds, and brings
    matplotlib, IPython and torchaudio along. A run reports to Comet if its command line or its recipe names it.
    """
    argv = sys.argv[1:]
    words = _read_words(argv)
    if LORA_KEY not in words:
        hide(PEFT)
    if HELP_FLAGS & set(argv):
        from speech_emotion.arguments import parse_arguments

        parse_arguments(argv, with_loop)
    if not _names_comet(argv):
        hide(COMET)


def hide(*packages: str) -> None:
    """Makes packages look as if they were not installed, to whoever asks from now on."""
    sys.modules.update(dict.fromkeys(packages))


def quiet_transformers() -> None:
    """Switches off what transformers says and draws of its own while it loads a model."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _read_words(argv: list[str]) -> str:
    """Returns the command line and the recipe that it names, as one text."""
    words = " ".join(argv)
    if argv and not argv[0].startswith("--"):
        try:
            with open(argv[0], encoding="utf-8") as recipe:
                words += recipe.read()
        except (OSError, UnicodeDecodeError):
            pass  # said later, by the parser
    return words


def _names_comet(argv: list[str]) -> bool:
    words = _read_words(argv)
    return COMET in words or '"all"' in words or "report_to all" in words or "report_to=all" in words
