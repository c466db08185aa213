"""The command line ``kedge-agent``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kedge_protocol import __version__
from kedge_protocol.errors import KedgeError

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)


def _bundle_options(command: F) -> F:
    """Add the options that choose a bundle of a release, and say where installed models are."""
    for flag, metavar, kind, text in (
        (
            "--state",
            "DIRECTORY",
            _FILE,
            "Folder with the installed models [default: KEDGE_STATE, or a built-in one].",
        ),
        (
            "--backend",
            "NAME",
            str,
            "Which bundle, if the target has several [default: the faster one here].",
        ),
        ("--target", "NAME", str, "Which bundle, if the release is for several targets [default: the only one]."),
    ):
        command = click.option(flag, metavar=metavar, type=kind, help=text)(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kedge-agent")
def cli() -> None:
    """The Kedge device agent: pulls models, verifies them, serves them, and reports."""


@cli.command()
@click.option("--config", metavar="FILE", type=_FILE, required=True, help="agent.toml of this device.")
@click.option("-v", "--verbose", is_flag=True, help="Log more details.")
def run(config: Path, verbose: bool) -> None:
    """Run the agent until SIGTERM."""
    from kedge_agent.resident import become

    become(config, verbose=verbose)


@cli.command()
@click.option(
    "--state",
    metavar="DIRECTORY",
    type=_FILE,
    help="State folder [default: the one in --config, KEDGE_STATE, or a built-in one].",
)
@click.option("--config", metavar="FILE", type=_FILE, help="agent.toml of this device.")
def status(state: Path | None, config: Path | None) -> None:
    """Show each model: which version serves, and what failed."""
    from kedge_agent import config as configuration
    from kedge_agent.slots import default_state
    from kedge_agent.status import read_status

    if state is None:
        state = configuration.read(config).state if config is not None else default_state()
    click.echo(read_status(state))


@cli.command()
@click.argument("releases", metavar="RELEASE...", nargs=-1, required=True)
@_bundle_options
@click.option(
    "--listen",
    multiple=True,
    default=("127.0.0.1:8080",),
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at, HOST:PORT or unix:PATH. Repeat for several.",
)
@click.option("--grpc", metavar="HOST:PORT", help="Serve gRPC at this address too; needs the extra 'grpc'.")
@click.option("--token-file", metavar="FILE", help="File whose first word clients send as 'Authorization: Bearer'.")
@click.option("--tls-cert", metavar="FILE", help="PEM file with the server's certificate chain.")
@click.option("--tls-key", metavar="FILE", help="PEM file with the certificate's private key.")
@click.option("--tls-client-ca", metavar="FILE", help="PEM file with the CA that signed the clients' certificates.")
@click.option("--cors-origin", metavar="URL", multiple=True, help="Origin whose pages may call. Repeat for several.")
@click.option(
    "--allowed-host",
    metavar="NAME",
    multiple=True,
    help="Name under which clients may call, besides localhost and IP addresses. Repeat for several.",
)
@click.option(
    "--cache-mib", type=click.IntRange(min=0), default=0, help="Memory for answers that are kept and given again."
)
@click.option(
    "--body-mib", type=click.IntRange(min=1), default=32, show_default=True, help="Largest body of one request."
)
@click.option(
    "--call-seconds",
    type=click.FloatRange(0.1, 3600),
    default=30.0,
    show_default=True,
    help="A call that takes longer is answered with 503, and counts as hung.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine and ask clients for nothing.")
@click.option("--no-proof", is_flag=True, help="Begin at once: prove nothing here, and measure nothing.")
def serve(
    releases: tuple[str, ...],
    target: str | None,
    backend: str | None,
    listen: tuple[str, ...],
    state: Path | None,
    grpc: str | None,
    token_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    cors_origin: tuple[str, ...],
    allowed_host: tuple[str, ...],
    cache_mib: int,
    body_mib: int,
    call_seconds: float,
    insecure: bool,
    no_proof: bool,
) -> None:
    """Serve releases over HTTP without a fleet.

    A RELEASE is a folder that `kedge compile -o` wrote, a reference of an OCI registry (host/name:tag), or the name
    of an installed model. Several of one name serve side by side; a request that names no version gets the newest.
    The protocol is the Open Inference Protocol v2.

    When a release is served on this machine for the first time, its golden vectors run, and ways of running its calls
    are compared, for some seconds; what was found is kept.
    """
    import logging

    from kedge_agent.serving.settings import ServerSettings
    from kedge_agent.serving.standalone import serve as serve_releases

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        cors_origins=cors_origin,
        allowed_hosts=allowed_host,
        grpc_listen=grpc,
        cache_bytes=cache_mib << 20,
        max_body_bytes=body_mib << 20,
        call_seconds=call_seconds,
    )
    serve_releases(
        releases,
        target=target,
        backend=backend,
        listen=listen,
        settings=settings,
        insecure=insecure,
        proof=not no_proof,
        state=state,
        announce=lambda line: click.echo(line),
        on_progress=lambda line: click.echo(line, err=True),
    )


@cli.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    help="[INPUT=]FILE: .npy, or a picture, sound or text for a pipeline; - for standard input (also numbers in JSON).",
)
@_bundle_options
@click.option("--output", metavar="FILE", type=_FILE, help="Write the result to this .npz file instead of JSON.")
def infer(
    name: str,
    inputs: tuple[str, ...],
    target: str | None,
    backend: str | None,
    state: Path | None,
    output: Path | None,
) -> None:
    """Run one inference in this process and print the result as JSON.

    NAME is an installed model, or a release folder.
    """
    from kedge_agent.infer_command import infer as infer_once

    click.echo(infer_once(name, inputs, target=target, backend=backend, state=state, output=output), nl=False)


@cli.command()
@click.argument("name", metavar="NAME")
@click.option("--source", required=True, help="Folder of pictures, video file, /dev/video0, or rtsp://HOST/PATH.")
@_bundle_options
@click.option(
    "--out",
    type=click.Choice(["jsonl", "mqtt"]),
    default="jsonl",
    show_default=True,
    help="Where records go: a line each to the standard output, or to the broker.",
)
@click.option(
    "--fps", type=float, help="Frames a second of a folder or file; 0 answers each [default: the video's own]."
)
@click.option("--follow", is_flag=True, help="Wait for more pictures in the folder.")
@click.option("--config", metavar="FILE", type=_FILE, help="agent.toml of this device, for its broker.")
@click.option("--broker", metavar="URL", help="Broker, mqtt://HOST or mqtts://HOST, instead of the one in --config.")
@click.option("--ca", metavar="FILE", type=_FILE, help="PEM file with the CA that signed the broker's certificate.")
@click.option("--username", help="User name for the broker.")
@click.option("--password-file", metavar="FILE", type=_FILE, help="File with the password on its first line.")
@click.option("--topic", help="MQTT topic of the records [default: kedge-watch/NAME].")
def watch(
    name: str,
    source: str,
    target: str | None,
    backend: str | None,
    state: Path | None,
    out: str,
    fps: float | None,
    follow: bool,
    config: Path | None,
    broker: str | None,
    ca: Path | None,
    username: str | None,
    password_file: Path | None,
    topic: str | None,
) -> None:
    """Run a model's pipeline over frames; one JSON record for each.

    NAME is an installed model, or a release folder. Frames that come while the model still computes are dropped, and
    each record says how many.
    """
    import logging

    from kedge_agent.watching import command

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    link = command.chosen_broker(out, config, broker, ca=ca, username=username, password_file=password_file)
    summary = command.run(
        name, source, target=target, backend=backend, state=state, broker=link, topic=topic, fps=fps, follow=follow
    )
    click.echo(summary, err=True)


@cli.command()
@click.argument("release", metavar="RELEASE")
@_bundle_options
@click.option("--system", help="The system message that each conversation begins with.")
@click.option("--max-tokens", default=200, show_default=True, help="Largest number of tokens of one answer.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="Randomness of answers; 0 takes the most likely token."
)
@click.option("--seed", type=int, help="Seed of the random numbers; equal seeds give equal answers.")
def chat(
    release: str,
    target: str | None,
    backend: str | None,
    state: Path | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
) -> None:
    """Talk with a language model.

    A RELEASE is a folder that `kedge compile -o` wrote, a reference of an OCI registry (host/name:tag), or the name
    of an installed model. Each line is a message; the end of input ends the chat. Answers go to standard output,
    all else to standard error.
    """
    from kedge_agent.generation import chat_command

    def note(text: str) -> None:
        click.echo(text, err=True)

    with chat_command.opened(release, target, state, backend) as model:
        chat_command.talk(
            model,
            chat_command.lines(model, note),
            lambda text: click.echo(text, nl=False),
            note,
            {"max_tokens": max_tokens, "temperature": temperature, "seed": seed},
            system=system,
        )


def main() -> None:
    """Entry point of the console script: one of Kedge's errors becomes one line and exit status 1; Ctrl-C gives 130."""
    try:
        status = cli.main(prog_name="kedge-agent", standalone_mode=False)
    except KedgeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
