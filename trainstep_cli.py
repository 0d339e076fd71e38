"""The command line. A module outside the package, so that `trainstep --help` need not import TensorFlow."""

import contextlib
import importlib.metadata
import json
import os
import pickle
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


# --- TensorFlow, quietly --------------------------------------------------------------------------


def _trainstep() -> Any:
    """Import the package, and hold back what TensorFlow has to say while it starts."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silenced_start():
        import tensorflow as tf  # noqa: PLC0415  Takes seconds, and `--help` does without.

        import trainstep  # noqa: PLC0415

        tf.config.list_physical_devices()  # Looks for accelerators now, and complains of those missing now.
    return trainstep


def start_quietly(pickled: bytes, *arguments: Any) -> None:
    """Call the function that is pickled, with `arguments`, in a new process, with TensorFlow imported in silence.

    Here, as what is in the package imports TensorFlow before it can be called.
    """
    _trainstep()
    pickle.loads(pickled)(*arguments)


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
    package = _trainstep()
    from trainstep.benchmarks.spec import parse_spec  # noqa: PLC0415

    with _explained():
        typer.echo(str(package.plan(parse_spec(spec))))


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, for editors."""
    _trainstep()
    from trainstep.benchmarks.schema import json_schema  # noqa: PLC0415

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def compare(  # noqa: PLR0917  All but the first are options of the command line, none is positional.
    experiment: Annotated[
        str | None, typer.Argument(help="File .yaml or .toml, see docs/comparing.md. Options override what it says.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", help="Model and data, see `trainstep list`. Repeat for each."),
    ] = None,
    strategy: Annotated[list[str] | None, typer.Option("--strategy", "-s", help=f"Repeat for each. {SYNTAX}.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How often each is trained, each time from other weights. [default: 5]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data. [default: the workload's]")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="Instead: steps.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Instead: seconds of training.")] = None,
    target: Annotated[str | None, typer.Option(help="METRIC=VALUE waited for, such as accuracy=0.95.")] = None,
    noise: Annotated[float | None, typer.Option(min=0, max=1, help="Share of training labels made wrong.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step. [default: the workload's]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of Keras: NAME or NAME:OPTION=VALUE,...")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Of the optimizer.")] = None,
    loss: Annotated[str | None, typer.Option(help="Of Keras, by name.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Of Keras, by name. Repeat; verdicts are on the first.")
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(help="Behind the robust accuracy: OPTION=VALUE,... such as epsilon=0.1,steps=40; none."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Own model, package.module:function. It returns a new one.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Own data, package.module:function. It returns (train, validation).")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with data that are not to be downloaded.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for results.sqlite, report.html and report.md.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="SQLite file for the results, where it is another.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Store of an earlier comparison: say what changed, and end with code 3 if so.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that train; 1: this one. [default: one for each core]")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="Where they run: processes, or ray.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which a run is given up.")] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Do again what failed and is in the store.")
    ] = None,
    cost: Annotated[
        bool | None, typer.Option("--cost/--no-cost", help="Measure what a step costs. [default: cost]")
    ] = None,
    tensorboard: Annotated[str | None, typer.Option(help="Folder for TensorBoard's scalars and HParams.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="MLflow: an SQLite file, or the address of a server.")] = None,
) -> None:
    """Train one model by several strategies and compare quality, robustness and cost with `standard`."""
    flags = {
        name: value for name, value in locals().items() if name not in ("experiment", "strategy", "metric", "against")
    }
    flags["strategies"], flags["metrics"] = strategy or None, metric or None
    flags["workload"] = workload or None
    package = _trainstep()
    with _explained():
        earlier = None if against is None else package.Comparison.from_store(against)
        result = _compared(experiment, flags)
        _print(result, result.output)
        if earlier is not None:
            typer.echo(f"\nAgainst {against}:\n{result.against(earlier)}")
    if any(run.failure for run in result.runs):
        raise typer.Exit(1)
    if earlier is not None and result.changed(earlier):
        raise typer.Exit(3)


def _compared(experiment: str | None, flags: dict[str, Any]) -> Any:
    from trainstep.benchmarks import optimizers, request  # noqa: PLC0415
    from trainstep.benchmarks.compare import run_suite  # noqa: PLC0415
    from trainstep.benchmarks.spec import parse_options  # noqa: PLC0415

    if flags["optimizer"] is not None:
        flags["optimizer"] = optimizers.parse(flags["optimizer"])
    if flags["attack"] is not None:
        flags["attack"] = False if flags["attack"] == "none" else parse_options("attack", flags["attack"])
    wanted, running = request.merged(experiment, flags)
    return run_suite(request.suite_of(**wanted), **running)


def _print(comparison: Any, folder: Any) -> None:
    """Print the tables at the width of the terminal, and the files that are in `folder`, where there is one."""
    from rich.console import Console  # noqa: PLC0415

    Console().print(comparison.table())
    for name in ("results.sqlite", "report.html", "report.md"):
        if folder is not None and os.path.exists(path := os.path.join(folder, name)):
            typer.echo(path)


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="Store of a comparison, results.sqlite.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for report.html and report.md; none: only the table.")
    ] = None,
) -> None:
    """Show what is in a store, and write its report."""
    comparison_class = _trainstep().Comparison
    with _explained():
        comparison = comparison_class.from_store(store)
        if output is not None:
            comparison.write(output)
        _print(comparison, output)


def main() -> None:
    """Run the command line."""
    app()
