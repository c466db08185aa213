"""``kedge``: the group of all commands; each is imported when it is called, so that ``kedge --help`` is fast and a
controller works without the compiler."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from kedge.cli.groups import Group
from kedge_protocol import __version__
from kedge_protocol.errors import KedgeError, MissingDependencyError
from kedge_protocol.packages import pip_install

COMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("kedge.cli.compile:compile_command", "Compile a trained model for one or more targets."),
    "step": ("kedge.cli.step:step", "List the compression steps and their options."),
    "inspect": ("kedge.cli.inspect:inspect_command", "Show the contents of a release."),
    "target": ("kedge.cli.target:target", "List the supported targets."),
    "toolchain": ("kedge.cli.toolchain:toolchain", "Install vendor toolchains in isolated environments."),
    "controller": ("kedge.cli.controller:controller", "Run the fleet controller."),
    "device": ("kedge.cli.device:device", "Manage the devices of the fleet."),
    "publish": ("kedge.cli.release:publish", "Publish a release to the controller."),
    "release": ("kedge.cli.release:release", "Manage the published releases."),
    "rollout": ("kedge.cli.rollout:rollout", "Roll a release out to devices."),
    "simulate": ("kedge.cli.simulate:simulate_command", "Roll a release out to a simulated fleet."),
    "keys": ("kedge.cli.keys:keys", "Show and rotate the keys that sign releases and desired states."),
    "shadow": ("kedge.cli.shadow:shadow", "Run a release beside the one that serves, on live inputs."),
    "samples": ("kedge.cli.samples:samples", "Bring hard inputs home from devices that allow it."),
    "drift": ("kedge.cli.drift:drift", "Show how far live samples are from those that a model was compiled with."),
    "audit": ("kedge.cli.audit:audit", "Show and check the audit log of the fleet."),
}
"""Command → its import path and its line in ``kedge --help``."""

_EXTRAS = {"amqtt": "fleet", "rich": "host"}


class LazyGroup(Group):
    """A group that knows its commands by import path."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command.

        Raises:
            MissingDependencyError: a package that the command needs is not installed.
        """
        if cmd_name not in COMMANDS:
            return None
        path, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(path), attribute)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("kedge", "kedge_agent", "kedge_targets", "kedge_protocol", ""):
                raise
            raise MissingDependencyError(
                f"`kedge {cmd_name}` needs {missing}",
                remedy=f"Install it: {pip_install(_EXTRAS.get(missing, 'host'))}",
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for ``--help`` without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kedge")
def cli() -> None:
    """Compile trained models for a fleet of different edge devices, roll them out, and keep them running well."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: a Kedge error prints one line on standard error and gives exit status 1; Ctrl-C gives
    130."""
    try:
        status: Any = cli.main(args=arguments, prog_name="kedge", standalone_mode=False)
    except KedgeError as error:
        click.echo(f"error: {_one_line(error)}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _one_line(error: KedgeError) -> str:
    """Return the message; lines after the first (a worker's log) are indented below it."""
    first, *rest = str(error).splitlines() or [""]
    return "\n".join([first, *(f"  {line}" for line in rest)])


if __name__ == "__main__":
    main()
