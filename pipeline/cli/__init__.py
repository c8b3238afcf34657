"""`python -m pipeline COMMAND`: a table of strings, so that help imports nothing.

Every command is a module with `run(args) -> exit status`, which may live outside this package. What it takes is in the
`options` module beside it, `NAME_options(parser)`, so that help and mistakes on the command line need nothing heavy.
Exit status: 0 passed, 1 refused by a gate, 2 bad input, 3 a stage failed, 4 regression, 130 interrupted. Any exception
with a `status` is a message for the user; everything else is a fault of ours, kept in a file and answered with 3.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

COMMANDS = {
    "build": ("pipeline.cli.build", "run the line for a target: search, train, compress, validate, export, bundle"),
    "ci": ("pipeline.cli.ci", "build, compare with a baseline record, fail on a regression"),
    "plan": ("pipeline.cli.plan", "what would run, what is reused and why not, what is missing"),
    "list": ("stages.catalog", "methods, data sets and targets on offer"),
    "init": ("stages.init", "look at your data and write a commented spec"),
    "audit": ("stages.audit", "clean, attacked and certified accuracy of any ONNX classifier"),
    "report": ("pipeline.cli.report", "render a record as HTML, Markdown or JUnit XML"),
    "verify": ("targets.runtime.verify", "check every digest of a bundle and reproduce its probe outputs"),
    "serve": ("targets.runtime.serve", "serve a bundle over HTTP"),
    "finish": ("targets.runtime.finish", "on the device: build the engine, measure, settle the limits owed"),
    "verify-spec": ("stages.verify_spec", "is a network unsafe in the sense of a VNN-LIB file: sat, unsat or unknown"),
    "doctor": ("pipeline.cli.doctor", "what this machine can do, and how to get the rest"),
    "clean": ("pipeline.cli.clean", "drop what no kept record reaches; --verify rehashes the store"),
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    try:
        _streams()
        status = _dispatch(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("temper: interrupted; the same command carries on where this one stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`); point stdout elsewhere so that the interpreter's flush is silent.
        deaf()
        return 0
    except OSError as error:
        deaf()
        what = f"{error.filename or 'the output'}: {error.strerror or error}"
        print(f"temper: cannot write {what}; make room, then run the same command again", file=sys.stderr)
        return 2
    return status


def deaf() -> None:
    """From here on nobody reads standard output, and nobody minds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _streams() -> None:
    """Streams that were closed swallow what is said; a letter that the terminal cannot show becomes a mark."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  no import; open to the end
        elif getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="replace")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from pipeline import __version__

        print(f"temper {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "`python -m pipeline --help` lists them"
        print(f'temper: no command "{argv[0]}"; {hint}', file=sys.stderr)
        return 2
    import signal

    told: list[int] = []

    def stop(number: int, _: object) -> None:
        told.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        # In tests and under other programs the signal is somebody else's, and so it stays.
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop)
        return _run(argv[0], argv[1:])
    except BrokenPipeError:
        raise
    except Exception as error:
        if told:  # libraries turn an interrupt into errors of their own while they are imported
            raise KeyboardInterrupt from None
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        status = getattr(error, "status", None)
        if not isinstance(status, int):
            print(f"temper: {_fault(error)}", file=sys.stderr)
            return 3
        print(f"temper: {error}", file=sys.stderr)
        return status
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)


def console() -> None:
    """The entry point `temper`."""
    sys.exit(main(sys.argv[1:]))


def _run(name: str, argv: list[str]) -> int:
    from pipeline.cli._parser import Parser

    module, summary = COMMANDS[name]
    try:
        options: Any = importlib.import_module(f"{module.rpartition('.')[0]}.options")
        parser = Parser(prog=f"python -m pipeline {name}", description=summary)
        getattr(options, f"{name.replace('-', '_')}_options")(parser)
        args = parser.parse_args(argv)
        command: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("pipeline", "stages", "targets"):
            raise
        if missing == "tomllib":
            print(f"temper {name}: needs Python 3.11 or newer; bundles alone run on 3.10", file=sys.stderr)
            return 2
        print(f'temper {name}: needs "{missing}"; `pip install "temper-edge[build,cpu]"`', file=sys.stderr)
        return 2
    status: int = command.run(args)
    return status


def _help() -> str:
    rows = "\n".join(f"  {name:<13}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "Temper: a compiler for small vision models that stay right under attack.\n\n"
        "usage: python -m pipeline COMMAND [--help]\n\n"
        f"{rows}\n\n"
        "start:  python -m pipeline build --target jetson\n"
        "exit:   0 passed, 1 refused by a gate, 2 bad input, 3 a stage failed, 4 regression"
    )


def _fault(error: BaseException) -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix="temper-fault-", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"internal fault: {type(error).__name__}: {error}; the details are in {file.name}, please report them"
