"""``kedge-agent watch``."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from kedge_agent.opening import open_model
from kedge_agent.watching.frames import open_source
from kedge_agent.watching.outputs import JsonLines, Mqtt, Output
from kedge_agent.watching.watch import watch
from kedge_protocol.broker import Broker, parse_broker
from kedge_protocol.credentials import read_password
from kedge_protocol.errors import ConfigError


def run(
    name: str,
    source: str,
    *,
    target: str | None = None,
    backend: str | None = None,
    state: Path | None = None,
    broker: Broker | None = None,
    topic: str | None = None,
    fps: float | None = None,
    follow: bool = False,
) -> str:
    """Watch a source until it ends, or until SIGINT or SIGTERM; to be called in the main thread.

    Args:
        name, target, backend, state: see :func:`kedge_agent.opening.open_model`.
        source: see :func:`kedge_agent.watching.frames.open_source`.
        broker: where the records go; None for lines of JSON on standard output.
        topic: by default ``kedge-watch/NAME``, of the model.
        fps, follow: see :func:`kedge_agent.watching.watch.watch` and ``open_source``.

    Returns:
        A sentence with the numbers of answered and dropped frames.

    Raises:
        KedgeError: the model, the source or the broker cannot be used.
    """
    if fps is not None and not 0 <= fps <= 1000:
        raise ConfigError(f"{fps:g} frames a second is out of range", remedy="Use 0 (every frame) to 1000")
    frames = open_source(source, follow=follow)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with open_model(name, target=target, backend=backend, state=state) as model:
        output: Output = (
            JsonLines(_write_line) if broker is None else Mqtt(broker, topic or f"kedge-watch/{model.name}")
        )
        return f"{watch(model, frames, output, fps=fps, stop=stop)}"


def chosen_broker(
    out: str,
    config: Path | None,
    url: str | None,
    *,
    ca: Path | None = None,
    username: str | None = None,
    password_file: Path | None = None,
) -> Broker | None:
    """Return the broker that the options name: the one of ``agent.toml``, or a URL; None if records are printed.

    Raises:
        ConfigError: the options do not fit each other, or a file cannot be read.
    """
    if out != "mqtt":
        if url is not None:
            raise ConfigError("a broker is named, and records are printed", remedy="Add --out mqtt")
        return None
    if url is not None:
        password = None if password_file is None else read_password(password_file)
        return parse_broker(url, ca=ca, username=username, password=password)
    if config is None:
        raise ConfigError("no broker is named", remedy="Give --broker mqtt://HOST, or --config agent.toml")
    from kedge_agent import config as configuration

    return configuration.read(config).broker


def _write_line(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()
