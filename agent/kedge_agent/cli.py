"""``kedge-agent``: run the agent, or look at what it did."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kedge_protocol import __version__
from kedge_protocol.errors import KedgeError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kedge-agent")
def cli() -> None:
    """The Kedge device agent: pulls models, verifies them, serves them, and reports."""


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="agent.toml of this device.")
@click.option("-v", "--verbose", is_flag=True, help="Log more details.")
def run(config: Path, verbose: bool) -> None:
    """Run the agent until SIGTERM."""
    from kedge_agent.resident import become

    become(config, verbose=verbose)


@cli.command()
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="State folder [default: the one in --config, or the built-in default].",
)
@click.option("--config", type=click.Path(path_type=Path), help="agent.toml of this device.")
def status(state: Path | None, config: Path | None) -> None:
    """Show each model: which version serves, and what failed."""
    from kedge_agent import config as configuration
    from kedge_agent.slots import default_state
    from kedge_agent.status import read_status

    if state is None:
        state = configuration.read(config).state if config is not None else default_state()
    click.echo(read_status(state))


def main() -> None:
    """The console script: an error of Kedge's is one line and exit status 1."""
    try:
        cli()
    except KedgeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
