"""The command line: names of the commands. Their work is imported inside them, so that help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from fbclip.commands.adapt import adapt
from fbclip.commands.bench import bench
from fbclip.commands.calibrate import calibrate
from fbclip.commands.command import Command, Commands
from fbclip.commands.data import data
from fbclip.commands.doctor import doctor
from fbclip.commands.eval import eval_
from fbclip.commands.export import export
from fbclip.commands.infer import infer
from fbclip.commands.score import score
from fbclip.commands.serve import serve
from fbclip.commands.train import train
from fbclip.main import main

HELP = """Find defects on objects never seen before: FB-CLIP, deployed.

A bundle is a folder NAME.fbclip with a model, ready to inspect; one is embedded, and any other is given with --bundle."""
EPILOG = (
    "Options may also be set in a file (--config line.toml) and by environment variables: FBCLIP_INFER_THRESHOLD for "
    "--threshold of infer; FBCLIP_BUNDLE, FBCLIP_CONFIG, FBCLIP_TOKEN, FBCLIP_MQTT, FBCLIP_WEBHOOK, FBCLIP_QUIET, "
    "FBCLIP_LOG_LEVEL and FBCLIP_LOG_FORMAT for every command that has the option. Secrets come from files: of each "
    "variable NAME, NAME_FILE names a file with the value. The command line wins, then the environment, then the file."
)

app = typer.Typer(
    name="fbclip",
    cls=Commands,
    help=HELP,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO)  # TensorRT's messages, among others
    if version:
        import fbclip

        typer.echo(f"fbclip {fbclip.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:  # no_args_is_help would leave out fbclip --debug, and fails in typer 0.16.0
        typer.echo(context.get_help())
        raise typer.Exit(2)


for command in (infer, serve, score, adapt, calibrate, export, train, eval_, data, bench, doctor):
    app.command(name=command.__name__.strip("_"), cls=Command)(command)


if __name__ == "__main__":
    main()
