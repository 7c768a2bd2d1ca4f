"""The command line: finds the command by name, runs it, and turns an error that a user caused into one line.

Nothing here imports torch, so that ``vpt --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import vpt
from vpt.cli.warning_filters import hush
from vpt.errors import UnknownNameError, VPTError

# name -> (module of vpt.cli.commands, one line of help); `run(args)` of the module takes the command line from the
# command's name on, and raises a VPTError where the user's input is wrong
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("lightning_cli", "train a prompt or another delta from a config"),
    "validate": ("lightning_cli", "evaluate a checkpoint on the validation split"),
    "test": ("lightning_cli", "evaluate a checkpoint on the test split"),
    "predict": ("predict", "classify photos by --delta FILE, or a run's test images"),
    "tune": ("tune", "find and train the method for a folder of photos, within a time"),
    "embed": ("predict", "write the features of images"),
    "calibrate": ("predict", "keep temperature and thresholds in a delta file"),
    "robustness": ("robustness", "evaluate a delta in and out of distribution; model soups"),
    "attention": ("attention", "plot attention maps without and with prompts; t-SNE"),
    "data": ("data", "list, verify and prepare datasets; image cache; corruptions"),
    "export": ("export", "write a trained model as one file: onnx, torch, peft"),
    "push": ("export", "upload a run to the Hugging Face Hub, with a model card"),
    "sweep": ("experiments", "search on validation images, retrain with seeds, test once"),
    "fewshot": ("experiments", "the same for several numbers of training images per class"),
    "combine": ("experiments", "the same for all on/off combinations of deltas"),
    "scale": ("experiments", "the same recipe on several backbones"),
    "pretrain": ("experiments", "train one delta on several tasks, then each from it"),
    "transfer": ("experiments", "transfer the delta of each task to every other task"),
    "report": ("runs", "tables and figures of tested runs, and a page of them"),
    "profile": ("runs", "the cost of a method: parameters, file size, FLOPs, memory, time"),
    "prune": ("prune", "the run that starts again without the least important prompts"),
    "rerun": ("runs", "repeat a run, and check that its metrics are reproduced"),
    "backbones": ("backbones", "list timm's models: which take prompts, and their weights"),
    "deltas": ("deltas", "list what can be trained on a backbone, and its size there"),
    "configs": ("configs", "list the configs that come with the package, or copy them"),
    "runs": ("runs", "list the runs below a folder: accuracy, seed, files"),
}

_HELP = """usage: vpt COMMAND [options]

{about}

{commands}

  vpt COMMAND --help     options of one command
  vpt --version          version of this package

example: vpt fit -c configs/demo.yaml -c configs/method/vpt_deep.yaml"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command, with arguments after the program's name; ``None`` takes those of the process.

    Returns the exit status: 0 done, 1 the input was wrong (one line on stderr says what), 130 interrupted, 141 nobody
    reads the output any more, 143 terminated.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text in the screen's encoding
    try:
        status = _run(args)
        print(end="", flush=True)  # what is left: Python would complain at its end that nobody reads
    except BrokenPipeError:
        return _nobody_reads()
    return status


class _TerminatedError(SystemExit):
    """SIGTERM has come."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes SIGTERM an error, as Ctrl+C is: what was begun is cleared away, and what a run says of it is said."""
    came = []

    def stop(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # clearing away is not stopped
        raise _TerminatedError

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if came:
            raise _TerminatedError from None  # Ray makes a plain one of ours
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(args: list[str]) -> int:
    try:
        with _stoppable():
            _dispatch(args)
    except VPTError as error:
        print(f"vpt: error: {_message(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        return _status(stop)
    except BrokenPipeError:
        raise
    except OSError as error:  # what the system refuses is no fault of the program
        print(f"vpt: error: {' '.join(_refused(error).split())}", file=sys.stderr)
        return 1
    return 0


def _refused(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}."


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
        print(_HELP.format(about=vpt.__doc__.splitlines()[0], commands=commands))
    elif args[0] in ("-V", "--version"):
        print(f"vpt {vpt.__version__}")
    elif args[0] in COMMANDS:
        hush()
        import_module(f"vpt.cli.commands.{COMMANDS[args[0]][0]}").run(args)
    else:
        raise UnknownNameError("command", args[0], COMMANDS)


def _nobody_reads() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _status(stop: KeyboardInterrupt | SystemExit) -> int:
    if isinstance(stop.__context__, BrokenPipeError):  # rich's answer to it
        return _nobody_reads()
    # Once it has shut down, Lightning turns Ctrl+C into SystemExit(1) and SIGTERM into an empty subclass of SystemExit.
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        print("vpt: error: interrupted", file=sys.stderr)
        return 130
    if type(stop) is not SystemExit:
        print("vpt: error: terminated", file=sys.stderr)
        return 143
    return int(stop.code or 0)


def _message(error: VPTError) -> str:
    # A data loader's worker process hands the error over as a whole traceback that ends in "Class: message".
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return text
