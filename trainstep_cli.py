"""The command line. A module outside the package, so that `trainstep --help` need not import TensorFlow."""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training strategies for Keras on TensorFlow: what there are, what they do, how they compare.",
)

SYNTAX = "NAME, NAME:OPTION=VALUE,OPTION=VALUE, and several joined by +, such as gradient_clipping:global_clipnorm=0.5"


class SpecError(typer.BadParameter):
    """A strategy is not written as `SYNTAX` says."""


def parse_spec(text: str) -> dict[str, dict[str, Any]]:
    """Return strategies with their options by name, from text such as `adversarial:epsilon=0.1+gradient_clipping`.

    A value is read as JSON (0.1, true, null, [0, 1], "text") or as Python writes it (.1, inf, True), else as it stands.

    Raises:
        SpecError: the text does not keep to the syntax; the message says where.
    """
    spec: dict[str, dict[str, Any]] = {}
    for part in _split(text, "+"):
        name, colon, options = (piece.strip() for piece in part.partition(":"))
        if not name:
            raise SpecError(f"A strategy is missing in {text!r}. Written: {SYNTAX}.")
        if "=" in name:
            raise SpecError(f"{name!r} in {text!r} has no name before its options. Written: {SYNTAX}.")
        if name in spec:
            raise SpecError(f"{name!r} is there twice in {text!r}. A strategy acts once per step.")
        if colon and not options:
            raise SpecError(f"There are no options after {name + ':'!r} in {text!r}. Leave out the colon for defaults.")
        spec[name] = _parse_options(name, options) if options else {}
    return spec


def _parse_options(name: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in _split(text, ","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            if "(" in text:
                raise SpecError(f"Write lists in the options of {name!r} with brackets: [0, 1], not (0, 1).")
            raise SpecError(f"{part.strip()!r} in the options of {name!r} is not OPTION=VALUE. Written: {SYNTAX}.")
        if key in options:
            raise SpecError(f"The option {key!r} of {name!r} is there twice.")
        options[key] = _parse_value(key, name, value)
    return options


def _parse_value(key: str, name: str, value: str) -> Any:
    try:
        return json.loads(_PYTHON_AS_JSON.get(value, value))
    except json.JSONDecodeError:
        if value[0] in "[{\"'":
            raise SpecError(f"The value of {key!r} of {name!r} is not valid JSON: {value}") from None
        if value[0] == "(":
            raise SpecError(f"Write the value of {key!r} of {name!r} with brackets: [0, 1], not (0, 1).") from None
    try:
        return float(value)  # Such as .1 and inf.
    except ValueError:
        return value


_PYTHON_AS_JSON = {"True": "true", "False": "false", "None": "null"}


def _split(text: str, separator: str) -> list[str]:
    """Split at each `separator` outside of brackets and quotes; a plus that belongs to a number does not count."""
    parts, depth, quoted, begin = [], 0, False, 0
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == separator and depth == 0 and not _in_number(text, index):
            parts.append(text[begin:index])
            begin = index + 1
    if quoted or depth:
        raise SpecError(f"A {'quotation mark' if quoted else 'bracket'} in {text!r} has no counterpart.")
    return [*parts, text[begin:]]


def _in_number(text: str, index: int) -> bool:
    exponent = re.search(r"[=,\[\s][-+]?[\d.]+[eE]$", text[:index]) and re.match(r"\+\d", text[index:])
    sign = re.search(r"=\s*$", text[:index])
    return text[index] == "+" and bool(exponent or sign)


# --- TensorFlow, quietly --------------------------------------------------------------------------


def _trainstep() -> Any:
    """Import the package, and hold back what TensorFlow has to say while it starts."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silenced_start():
        import tensorflow as tf  # noqa: PLC0415  Takes seconds, and `--help` does without.

        import trainstep  # noqa: PLC0415

        tf.config.list_physical_devices()  # Looks for accelerators now, and complains of those missing now.
    return trainstep


@contextlib.contextmanager
def _silenced_start() -> Iterator[None]:
    """Send what native code writes to file descriptor 2 elsewhere, and show it after all if an error escapes."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the package refuses into one message and exit code 2."""
    from trainstep.errors import TrainstepError  # noqa: PLC0415

    try:
        yield
    except TrainstepError as error:
        typer.echo(f"trainstep: {error}", err=True)
        raise typer.Exit(2) from None


# --- Commands -------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trainstep {importlib.metadata.version('trainstep')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version


@app.command("list")
def list_strategies() -> None:
    """List the strategies, and the workloads they can be compared on."""
    package = _trainstep()
    from trainstep.benchmarks import workload  # noqa: PLC0415

    width = max(len(name) for name in [*package.names(), *workload.names()])
    typer.echo("Strategies")
    for name in package.names():
        typer.echo(f"  {name:{width}}  {package.get(name).declaration.summary}")
    typer.echo("\nWorkloads")
    for name in workload.names():
        typer.echo(f"  {name:{width}}  {workload.get(name).summary}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a strategy, see `trainstep list`.")]) -> None:
    """Show one strategy: formula, options with defaults, cost, reference."""
    package = _trainstep()
    with _explained():
        typer.echo(str(package.describe(name)))


@app.command()
def plan(spec: Annotated[str, typer.Argument(help=f"Strategies: {SYNTAX}.")]) -> None:
    """Show what a training step will do, in order, and what it costs."""
    parsed = parse_spec(spec)
    package = _trainstep()
    with _explained():
        typer.echo(str(package.plan(parsed)))


@app.command()
def compare(  # noqa: PLR0917  Each is an option of the command line, none is positional.
    workload: Annotated[str, typer.Option("--workload", "-w", help="Model and data, see `trainstep list`.")],
    strategy: Annotated[list[str], typer.Option("--strategy", "-s", help=f"Repeat for each. {SYNTAX}.")],
    seeds: Annotated[int, typer.Option(min=1, help="How often each is trained, each time from other weights.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data. [default: the workload's]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step. [default: the workload's]")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for results.jsonl and report.html.")
    ] = None,
) -> None:
    """Train one model by several strategies and compare accuracy, robustness and cost with `standard`."""
    strategies: dict[str, Any] = {}
    for text in strategy:
        label = text.strip()
        if label in strategies:
            raise SpecError(f"{label!r} is given twice. Leave one out, or give it other options.")
        strategies[label] = parse_spec(text)
    package = _trainstep()
    from rich.console import Console  # noqa: PLC0415

    from trainstep.benchmarks import report  # noqa: PLC0415

    with _explained():
        result = package.compare(
            workload=workload, strategies=strategies, seeds=seeds, epochs=epochs, batch_size=batch_size, output=output
        )
    console = Console()
    console.print(report.table(result.cells, result.control, console.width))
    if result.output is not None:
        typer.echo(f"Results: {result.output / 'results.jsonl'}\nReport:  {result.output / 'report.html'}")
    if any(cell.failure for cell in result.cells):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()
