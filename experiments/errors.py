"""How an error is told to a person: in one line, or with its traceback where it is asked for or unforeseen."""

import os
import sys
import traceback

TRACEBACK = "DYNAMOE_TRACEBACK"
FORESEEN = (ValueError, OSError, ArithmeticError, ImportError, RuntimeError)


def tell(error: BaseException, note: str = "") -> None:
    """Write an error to standard error, with a note on what to do. Ctrl-C needs no words."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        text = ""
    elif isinstance(error, FORESEEN) and not os.environ.get(TRACEBACK):
        text = f"dynamoe: error: {error}\n"
    else:
        text = "".join(traceback.format_exception(error))
    if note:
        text += f"dynamoe: {note}\n"
    if text and not os.environ.get(TRACEBACK):
        text += f"({TRACEBACK}=1 shows where)\n"
    print(text, end="", file=sys.stderr, flush=True)


def status_of(error: BaseException) -> int:
    """The exit status that goes with an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1
