"""The commands ``hatify-convert`` and ``hatify convert | inspect | verify | forget | extract``.

Results go to standard output, as tables or, with ``--json``, as JSON and nothing else. Whatever is wrong with what the
user gave ends in one line on standard error and exit status 2; a failed verification in exit status 1.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hatify.cli.convert import convert
from hatify.cli.extract import extract
from hatify.cli.saved import forget, inspect, verify
from hatify.errors import HatError, HatWarning, IsolationError

FAILED, WRONG = 1, 2

app = typer.Typer(
    help="Convert networks into ones that learn task after task and forget nothing; look at them; deploy them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)
app.command()(inspect)
app.command()(verify)
app.command()(forget)
app.command()(extract)
convert_app.command()(convert)


def run(commands: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """Run a command line, and return its exit status: 0, 2 for what the user gave, 1 for a failed verification."""

    def complain(message: object) -> None:
        print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)

    # Modules that --factory names are looked for here too, after all others.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _unlogged(), warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", HatWarning)
        try:
            status = typer.main.get_command(commands).main(arguments, name, standalone_mode=False)
        except IsolationError as error:
            complain(error)
            return FAILED
        except (HatError, ValueError) as error:
            complain(error)
        except (KeyboardInterrupt, typer.Abort):
            complain("interrupted")
        except MemoryError:
            complain("out of memory")
        except OSError as error:
            complain(f"{error.filename or 'error'}: {error.strerror or error}")
        # Code of the user's own may raise anything.
        except Exception as error:
            format_message = getattr(error, "format_message", None)
            complain(format_message() if format_message else f"{type(error).__name__}: {error}")
        else:
            # What typer makes of Ctrl-C.
            if status != 130:
                for note in notes:
                    complain(f"note: {note.message}")
                return status or 0
            complain("interrupted")
    return WRONG


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without what libraries log: a line for every retry of a download, for one."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def main() -> None:
    """``hatify``"""
    sys.exit(run(app, "hatify"))


def main_convert() -> None:
    """``hatify-convert``"""
    sys.exit(run(convert_app, "hatify-convert"))
