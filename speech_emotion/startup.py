"""What a script does before the heavy libraries load; it imports nothing of them itself."""

import sys

HELP_FLAGS = {"-h", "--help"}
COMET = "comet_ml"


def answer_at_once(with_loop: bool = False) -> None:
    """Answers `--help` with the argument parser alone, and keeps Comet's SDK out of runs that do not report to it.

    transformers imports the SDK by itself wherever it is installed, which takes half a second, and brings matplotlib
    and IPython along. A run reports to Comet if its command line or its recipe names it.
    """
    argv = sys.argv[1:]
    if HELP_FLAGS & set(argv):
        from speech_emotion.arguments import parse_arguments

        parse_arguments(argv, with_loop)
    if not _names_comet(argv):
        sys.modules[COMET] = None  # makes the import fail as if it were not installed


def _names_comet(argv: list[str]) -> bool:
    words = " ".join(argv)
    if argv and not argv[0].startswith("--"):
        try:
            with open(argv[0], encoding="utf-8") as recipe:
                words += recipe.read()
        except (OSError, UnicodeDecodeError):
            pass  # said later, by the parser
    return COMET in words or '"all"' in words or "report_to all" in words or "report_to=all" in words
