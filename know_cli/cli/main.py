"""The entry points, the list of commands, and how every run ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from know_cli import __version__
from know_cli.cli.bench import EPILOG as BENCH_EPILOG
from know_cli.cli.bench import bench
from know_cli.cli.choose import EPILOG as CHOOSE_EPILOG
from know_cli.cli.choose import choose
from know_cli.cli.collect import EPILOG as COLLECT_EPILOG
from know_cli.cli.collect import collect
from know_cli.cli.convert import EPILOG as CONVERT_EPILOG
from know_cli.cli.convert import convert
from know_cli.cli.demo import demo
from know_cli.cli.eval import EPILOG as EVAL_EPILOG
from know_cli.cli.eval import evaluate
from know_cli.cli.forget import EPILOG as FORGET_EPILOG
from know_cli.cli.forget import forget
from know_cli.cli.inspect import inspect
from know_cli.cli.plot import COMMANDS as PLOT_COMMANDS
from know_cli.cli.predict import EPILOG, predict
from know_cli.cli.train import EPILOG as TRAIN_EPILOG
from know_cli.cli.train import train
from know_cli.cli.verify import EPILOG as VERIFY_EPILOG
from know_cli.cli.verify import verify
from know_cli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    KnowError,
    printable,
    was_interrupted,
)

_DEBUG = "KNOW_DEBUG"
_MAX_MESSAGE = 4000
# How torch says it.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "failed to map",
    "out of memory",  # of a device
)
_INTERRUPTED = "interrupted; the output is left as it was"

# A new command is a new file in this folder and one line here: name, function, what it does in
# a few words, examples.
_Commands = tuple[tuple[str, Callable[..., None], str, str | None], ...]
_COMMANDS: _Commands = (
    ("predict", predict, "Predict the weights of more data from checkpoints.", EPILOG),
    ("verify", verify, "Check a prediction against its inputs.", VERIFY_EPILOG),
    ("choose", choose, "Choose the best start for your own task.", CHOOSE_EPILOG),
    ("inspect", inspect, "Show a trajectory before predicting.", None),
    ("demo", demo, "See all of it on real images.", None),
    ("forget", forget, "Record structured forgetting.", FORGET_EPILOG),
    ("collect", collect, "Record many small networks, for 'train'.", COLLECT_EPILOG),
    ("train", train, "Train a hyper-model of your own, or measure one.", TRAIN_EPILOG),
    ("eval", evaluate, "Measure what predictions are worth downstream.", EVAL_EPILOG),
    ("bench", bench, "Measure how fast the engine is on this machine.", BENCH_EPILOG),
    ("convert", convert, "Turn PyTorch pickles into safetensors.", CONVERT_EPILOG),
)
# Commands that have commands: name, what they do in a few words, their commands.
_GROUPS: tuple[tuple[str, str, _Commands], ...] = (
    ("plot", "Draw trajectories, landscapes and results.", PLOT_COMMANDS),
)
_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"know-predict {__version__}")
        raise typer.Exit


_Version = Annotated[
    bool,
    typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
]


def family_app() -> typer.Typer:
    """The command ``know`` with all its sub-commands."""
    app = _group("Predict the weights your model would have had with more data.", _COMMANDS)

    @app.callback()
    def _family(version: _Version = False) -> None:
        pass

    for name, summary, commands in _GROUPS:
        app.add_typer(_group(summary, commands), name=name)
    return app


def _group(text: str, commands: _Commands) -> typer.Typer:
    app = typer.Typer(
        help=text,
        context_settings=_SETTINGS,
        pretty_exceptions_enable=False,
        # Help by rich would take a tenth of a second to import.
        rich_markup_mode=None,
        add_completion=False,
        no_args_is_help=True,
    )
    for name, function, summary, epilog in commands:
        app.command(
            name,
            cls=_Command,
            help=_reflow(function.__doc__),
            short_help=summary,
            epilog=epilog,
        )(function)
    return app


def predict_app() -> typer.Typer:
    """The command ``know-predict``: exactly ``know predict``."""
    app = typer.Typer(
        context_settings=_SETTINGS,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
    )
    app.command("predict", cls=_Command, help=_reflow(predict.__doc__), epilog=EPILOG)(predict)
    return app


class _Command(TyperCommand):
    """A command whose help names values as people do, and not Python's types."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                # Its name in capitals says what it is.
                parameter.__dict__["display_type_rich"] = lambda ctx: None
            elif isinstance(parameter, TyperOption) and parameter.metavar is None:
                parameter.__dict__["display_type_rich"] = _without_list(parameter)


def _without_list(parameter: TyperOption) -> Callable[[Any], str | None]:
    """What stands for an option's value in the help: of a list, one element."""

    def display(ctx: Any) -> str | None:
        text = parameter.display_type(ctx)
        return text.replace("list[", "").replace("]>", ">") if text else text

    return display


def _reflow(docstring: str | None) -> str:
    """Paragraphs of one line each, so that the terminal's width decides where lines break."""
    paragraphs = cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def know() -> None:
    """Entry point of ``know`` and ``python -m know_cli``."""
    sys.exit(run(family_app(), "know", sys.argv[1:]))


def know_predict() -> None:
    """Entry point of ``know-predict``."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"know-predict {__version__}")
        sys.exit(EXIT_DONE)
    sys.exit(run(predict_app(), "know-predict", arguments))


def run(app: Callable[..., Any], name: str, arguments: list[str]) -> int:
    """Run a command line; every error becomes one line on stderr.

    Args:
        app: one of the apps above, or the command that Typer makes of it.
        name: what users call it.
        arguments: without the name.

    Returns:
        The exit code, as the README documents it.
    """
    # A closed stream is None in Python; what would go there has no reader.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  open to the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Signs that a terminal does not know are no reason to fail.
            stream.reconfigure(errors="replace")
    try:
        # A request to end is like Ctrl-C: what was begun is taken back, then we go.
        for wish in (signal.SIGTERM, signal.SIGHUP):
            # What was to be ignored stays so: nohup does that with SIGHUP.
            if signal.getsignal(wish) is not signal.SIG_IGN:
                signal.signal(wish, signal.default_int_handler)
        code = app(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        # The words before the message are the validating library's own.
        problem = error.format_message()
        if not problem or problem.startswith("Usage: "):
            # Help is the answer to a command without arguments; Typer may have shown it itself.
            print(problem, file=sys.stderr)
            return error.exit_code
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else name
        # Choices are listed line by line.
        problem = " ".join(problem.rstrip(".").replace(": Value error, ", ": ").split())
        return _fail(name, f"{problem}; see '{command} --help'", error.exit_code)
    except KnowError as error:
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        return error.exit_code if error.is_told else _fail(name, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        return _without_reader()
    except SystemExit as error:
        # Typer answers a broken pipe with this itself.
        if isinstance(error.__context__, BrokenPipeError):
            return _without_reader()
        raise
    except OSError as error:
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        where = error.filename or "standard output"
        _silence_stdout()
        return _fail(name, f"{where}: {error.strerror or error}", EXIT_OUTPUT)
    except Exception as error:
        if was_interrupted(error):
            return _fail(name, _INTERRUPTED, EXIT_INTERRUPTED)
        if (limit := _of_the_system(error)) is not None:
            return _fail(name, limit, EXIT_OUTPUT)
        if os.environ.get(_DEBUG):
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        return _fail(name, f"bug: {text}; please report it with the output of {_DEBUG}=1", EXIT_BUG)
    if code == EXIT_INTERRUPTED:  # Typer turns most interruptions into this number itself
        return _fail(name, _INTERRUPTED, EXIT_INTERRUPTED)
    return code if isinstance(code, int) else EXIT_DONE


def _of_the_system(error: Exception) -> str | None:
    """What an error says that comes of the system's limits; None for all others."""
    text = str(error)
    if isinstance(error, RuntimeError) and "start new thread" in text:
        return "the system gives no more threads; use fewer: --threads 1, or raise 'ulimit -u'"
    lacks = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError | OSError)
        and any(words in text for words in _NO_MEMORY)
    )
    if lacks:
        return (
            "the system gives no more memory; use less: --max-memory, --threads 1, fewer "
            "--processes, or raise 'ulimit -v'; the output is left as it was"
        )
    return None


def _without_reader() -> int:
    _silence_stdout()
    return EXIT_BROKEN_PIPE


def _silence_stdout() -> None:
    """The interpreter flushes stdout when it ends, and must not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(name: str, message: str, code: int) -> int:
    line = printable(message)
    if len(line) > _MAX_MESSAGE:  # a name can be as long as its author likes
        line = f"{line[: _MAX_MESSAGE // 2]} … {line[-_MAX_MESSAGE // 2 :]}"
    with suppress(OSError):
        print(f"{name}: error: {line}", file=sys.stderr)
    return code
