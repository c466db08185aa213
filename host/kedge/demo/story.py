"""The steps of ``make demo``: train, compile, roll out to three devices, query them; a small update; a bad one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.demo import digits
from kedge.demo.processes import DemoError, command_of, run, say, wait_until
from kedge.demo.site import DEVICES, Agent, Site, classify, staged
from kedge.fleet.results import RolloutStatus
from kedge_protocol import digest
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.bundle.write import new_layout

MODEL = "digits"


@dataclass(frozen=True)
class Row:
    """One device's row of the table."""

    device: str
    target: str
    version: str
    digest: str
    accuracy: float
    float_accuracy: float
    p50_ms: float | None
    bytes_pulled: int


def show_demo(*, keep: bool) -> None:
    """Run the demo.

    Args:
        keep: leave everything running at the end and print how to inspect it.

    Raises:
        KedgeError: a step failed.
    """
    staged(_chapters, lambda folder, site: _say_how_to_look(site), keep=keep)


def _chapters(folder: Path, site: Site) -> None:
    data = digits.load()
    np.savez(folder / "calib.npz", image=data.calibration)
    np.savez(folder / "eval.npz", image=data.held_out, label=data.held_out_label)

    say("1. Train a network on scikit-learn's digits and compile it for three targets\n")
    network = digits.Classifier()
    network.fit(data.train / 16, data.train_label, epochs=20)
    network.export(folder / "digits-1.onnx")
    first = _compile(folder, "1.0")

    say("2. Start a broker, the controller and three agents; publish and roll out\n")
    site.start()
    site.command("publish", str(first))
    _must_be_done(site.rollout(f"{MODEL}:1.0"), site)
    rows = _ask_all(site, data, first, "1.0", {})
    _table(rows)
    pulled = {row.device: row.bytes_pulled for row in rows}

    say("3. Fine-tune the last layer, release version 2.0: what did not change is not sent again\n")
    network.fit(data.train / 16, data.train_label, epochs=10, last_layer_only=True)
    network.export(folder / "digits-2.onnx")
    second = _compile(folder, "2.0")
    site.command("publish", str(second))
    _must_be_done(site.rollout(f"{MODEL}:2.0"), site)
    rows = _ask_all(site, data, second, "2.0", pulled)
    _table(rows)
    for row in rows:
        share = row.bytes_pulled / pulled[row.device]
        say(f"   {row.device}: {row.bytes_pulled:,} bytes moved, {share:.1%} of version 1.0")
    say()

    say("4. Release a broken version 3.0: version 1's weights, packed by mistake with version 2's golden vectors\n")
    third = _broken(first, second, folder / "OUT-3.0")
    site.command("publish", str(third))
    _must_be_refused(site.rollout(f"{MODEL}:3.0"), second, site)
    after = _ask_all(site, data, second, "2.0", {})
    if [row.accuracy for row in after] != [row.accuracy for row in rows]:
        raise DemoError("the answers changed after the refused release")
    say("   All three go on serving version 2.0, with the same answers.\n")
    site.command("rollout", "revert")
    say("   (reverted: the fleet wants version 2.0 again)")


def _compile(folder: Path, version: str) -> Path:
    out = folder / f"OUT-{version}"
    targets = [part for target in DEVICES.values() for part in ("--target", target)]
    command = [command_of("kedge"), "compile", str(folder / f"digits-{version[0]}.onnx"), "--name", MODEL]
    command += ["--version", version, *targets, "--calibration", str(folder / "calib.npz")]
    command += ["--evaluation", str(folder / "eval.npz"), "--preprocess", "scale=0.0625", "-o", str(out)]
    say(run(command))
    report = json.loads((out / "report.json").read_text())
    if report["reference"]["value"] < 0.97:
        raise DemoError(f"the float model reached only {report['reference']['value']:.3f}")
    return out


def _ask_all(site: Site, data: digits.Digits, out: Path, version: str, pulled_before: dict[str, int]) -> list[Row]:
    """Send the held-out digits to each agent's inference endpoint and count the correct answers here."""
    reference = float(json.loads((out / "report.json").read_text())["reference"]["value"])
    images = data.held_out.reshape(len(data.held_out), -1).tolist()
    rows = []
    for agent in site.agents:
        scores = np.array(classify(agent, MODEL, images, list(data.held_out.shape[1:])))
        detail = site.device(agent.name)
        rows.append(
            Row(
                device=agent.name,
                target=agent.target,
                version=version,
                digest=_serving(site, agent),
                accuracy=_share_right(scores, data.held_out_label),
                float_accuracy=reference,
                p50_ms=_p50(site, agent),
                bytes_pulled=detail.bytes_served - pulled_before.get(agent.name, 0),
            )
        )
    return rows


def _share_right(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def _serving(site: Site, agent: Agent) -> str:
    reported = site.device(agent.name).device.reported
    return (reported.models[MODEL].digest or "") if reported is not None and MODEL in reported.models else ""


def _p50(site: Site, agent: Agent) -> float:
    """Return the latency that the device itself reported for the calls just made."""

    def latest() -> float | None:
        for message in reversed(site.device(agent.name).telemetry):
            model = message.models.get(MODEL)
            if model is not None and model.inferences and "p50" in model.latency_ms:
                return model.latency_ms["p50"]
        return None

    return wait_until(f"telemetry of {agent.name}", latest, seconds=20)


def _must_be_done(status: RolloutStatus, site: Site) -> None:
    if not status.done:
        reasons = "; ".join(f"{d.device}: {d.progress.value} {d.detail}" for d in status.devices)
        raise DemoError(f"the rollout of {status.version} did not end well: {reasons}", where=str(site.folder))
    say(site.command("rollout", "status"))


def _must_be_refused(status: RolloutStatus, still: Path, site: Site) -> None:
    bundles = Layout(still).release().bundles
    for device in status.devices:
        if device.progress.value != "failed" or device.serving != bundles[device.target].digest:
            raise DemoError(f"{device.device} did not refuse the broken bundle: {device.progress.value}")
        say(f"   {device.device} refused it: {device.detail}")
    say()


def _broken(weights: Path, vectors: Path, out: Path) -> Path:
    """Write a release with valid digests whose golden vectors fail: files of one release, golden vectors of the
    other."""
    files, proofs = Layout(weights), Layout(vectors)
    with new_layout(out) as writer:
        for target, descriptor in files.release().bundles.items():
            bundle, proof = files.read_bundle(descriptor), proofs.bundle(target)
            golden = proofs.blob_path(proof.config.golden.digest)
            config = replace(bundle.config, version="3.0", golden=proof.config.golden)
            model_files = {
                title: files.blob_path(layer.digest)
                for title, layer in bundle.files.items()
                if title != bundle.config.golden.file
            }
            writer.add_bundle(config, model_files, golden)
        writer.add_release(MODEL, "3.0")
    digest.checked(Layout(out).release().digest)
    return out


def _table(rows: list[Row]) -> None:
    head = f"   {'device':<12} {'target':<12} {'version':<8} {'digest':<14} {'on device':>9} {'float':>7} "
    head += f"{'p50 ms':>8} {'pulled':>12}"
    say(head)
    say("   " + "-" * (len(head) - 3))
    for row in rows:
        say(
            f"   {row.device:<12} {row.target:<12} {row.version:<8} {row.digest[7:19]:<14} {row.accuracy:>9.4f} "
            f"{row.float_accuracy:>7.4f} {row.p50_ms or 0.0:>8.3f} {row.bytes_pulled:>12,}"
        )
    say()


def _say_how_to_look(site: Site) -> None:
    say("\nAll is left running. To look at it:")
    say(f"   export KEDGE_FLEET_STATE={site.state}")
    say("   kedge device list; kedge device show kitchen-pi; kedge rollout status")
    for agent in site.agents:
        say(f"   curl {agent.endpoint}/v2/models/{MODEL}      # {agent.name}, log: {agent.process.log}")
    pids = " ".join(str(process.pid) for process in (*[a.process for a in site.agents], site.controller))
    say(f"To end it: kill {pids}")
