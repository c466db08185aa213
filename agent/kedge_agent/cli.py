"""The command line ``kedge-agent``."""

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


@cli.command()
@click.argument("releases", metavar="RELEASE...", nargs=-1, required=True)
@click.option("--target", help="Which bundle of the release [default: its only one].")
@click.option("--backend", help="Which of the target's bundles, if there are several [default: the faster one here].")
@click.option(
    "--listen",
    multiple=True,
    default=("127.0.0.1:8080",),
    show_default=True,
    help="HOST:PORT or unix:PATH; may be given several times.",
)
@click.option("--state", type=click.Path(path_type=Path), help="State folder with the installed models.")
@click.option("--grpc", metavar="HOST:PORT", help="Serve gRPC there too; needs the extra 'grpc'.")
@click.option("--token-file", help="Clients send its first word as 'Authorization: Bearer'.")
@click.option("--tls-cert", help="Certificate chain, PEM.")
@click.option("--tls-key", help="Its private key, PEM.")
@click.option("--tls-client-ca", help="Clients need a certificate of this CA, PEM.")
@click.option("--cors-origin", multiple=True, help="Web pages of this origin may call; may be given several times.")
@click.option(
    "--allowed-host",
    multiple=True,
    help="Clients may call under this name, besides localhost and IP addresses; may be given several times.",
)
@click.option(
    "--cache-mib", type=click.IntRange(min=0), default=0, help="Memory for answers that are kept and given again."
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
@click.option("--target", help="NAME is a release folder: which of its bundles [default: its only one].")
@click.option("--backend", help="Which of several bundles for the target [default: the faster one here].")
@click.option("--state", type=click.Path(path_type=Path), help="State folder [default: the built-in one].")
@click.option("--output", type=click.Path(path_type=Path), help="Write the result as .npz instead of JSON.")
def infer(
    name: str,
    inputs: tuple[str, ...],
    target: str | None,
    backend: str | None,
    state: Path | None,
    output: Path | None,
) -> None:
    """Run one inference in this process and print the result as JSON."""
    from kedge_agent.infer_command import infer as infer_once

    click.echo(infer_once(name, inputs, target=target, backend=backend, state=state, output=output), nl=False)


@cli.command()
@click.argument("name", metavar="NAME")
@click.option("--source", required=True, help="Folder of pictures, video file, /dev/video0, or rtsp://HOST/PATH.")
@click.option("--target", help="NAME is a release folder: which of its bundles [default: its only one].")
@click.option("--backend", help="Which of several bundles for the target [default: the faster one here].")
@click.option("--state", type=click.Path(path_type=Path), help="State folder [default: the built-in one].")
@click.option("--out", type=click.Choice(["jsonl", "mqtt"]), default="jsonl", show_default=True)
@click.option("--fps", type=float, help="Pace of a folder or file; 0 answers every frame [default: the video's own].")
@click.option("--follow", is_flag=True, help="Wait for more pictures in the folder.")
@click.option("--config", type=click.Path(path_type=Path), help="agent.toml of this device, for its broker.")
@click.option("--broker", help="mqtt://HOST or mqtts://HOST, instead of the one in --config.")
@click.option("--ca", type=click.Path(path_type=Path), help="PEM file of the broker's authority.")
@click.option("--username", help="For --broker.")
@click.option("--password-file", type=click.Path(path_type=Path), help="File whose first line is the password.")
@click.option("--topic", help="MQTT topic [default: kedge-watch/NAME].")
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

    Frames that come while the model still computes are dropped, and each record says how many.
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
@click.option("--target", help="Which bundle of the release [default: its only one].")
@click.option("--backend", help="Which of several bundles for the target [default: the faster one here].")
@click.option("--state", type=click.Path(path_type=Path), help="State folder [default: the built-in one].")
@click.option("--system", help="The system message that a conversation begins with.")
@click.option("--max-tokens", default=200, show_default=True, help="Tokens of one answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=int, help="Equal seeds give equal answers.")
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
    """Entry point of the console script: one of Kedge's errors becomes one line and exit status 1."""
    try:
        cli()
    except KedgeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
