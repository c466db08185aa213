"""Groups of commands whose help can be read whole."""

from __future__ import annotations

import click

from kedge_protocol.spelling import nearest

_WHOLE = 10_000


class Group(click.Group):
    """A group that lists each command with the whole first sentence of its help, and that names the command that was
    meant by a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; the error for an unknown one names the one that was meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if (meant := nearest(args[0], self.list_commands(ctx))) is None:
                raise
            raise click.UsageError(f"{error.message} Did you mean {meant!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for ``--help``."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_WHOLE)) for name, one in found if one is not None])
