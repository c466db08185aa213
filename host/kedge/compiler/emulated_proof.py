"""Proves a compiled bundle for ARM on an emulated processor, where the toolchain ``aarch64`` is installed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.compiler import bundle_writer
from kedge.evaluation.samples import Samples
from kedge.search.results import Compiled, Failed, Job, ReleaseSource
from kedge_protocol import codec
from kedge_protocol.bundle.config import BundleConfig, Verified
from kedge_protocol.errors import KedgeError, VerificationError
from kedge_targets.emulation import proving
from kedge_targets.emulation.proving import EmulationAnswer, EmulationRequest

Array = npt.NDArray[Any]

SAMPLES = 50
_LEAST = 20.0
"""dB of an output against this machine's runtime, below which the kernels differ by more than rounding."""
_SAME = 200.0


def proved(compiled: Compiled, source: ReleaseSource, job: Job) -> Compiled | Failed:
    """Return what was compiled with what the proof showed; unchanged where nothing can be emulated.

    A bundle that an emulated device would refuse has failed: a real one would refuse it too. An alternative that would
    be refused is left out.
    """
    if compiled.alternatives:
        others = [proved(one, source, job) for one in compiled.alternatives]
        compiled = dataclasses.replace(compiled, alternatives=tuple(one for one in others if isinstance(one, Compiled)))
    cpu = proving.processor_of(compiled.target)
    if cpu is None or compiled.lowered.verified is not Verified.EXECUTED or not proving.installed():
        return compiled
    if not proving.runs(one.distribution for one in compiled.lowered.runtimes):
        return compiled
    job.on_progress(compiled.target.name, f"proof on an emulated {cpu}", 0, 1)
    folder = job.scratch / f"{compiled.target.name}-{compiled.candidate.backend.name}-emulated"
    folder.mkdir()
    try:
        answer, decibels = _proof(
            cpu, bundle_writer.configuration(compiled, source), compiled, Samples(job.evaluation), folder
        )
        if not answer.holds:
            raise VerificationError(
                f"the golden vectors do not hold on an emulated {cpu}: {answer.reason}",
                where=f"target {compiled.target.name}",
                remedy="Keep layers in float, or choose another backend",
            )
        if decibels is not None and decibels < _LEAST:
            raise VerificationError(
                f"{answer.samples} samples on an emulated {cpu} are at {decibels:.1f} dB of this machine's answers",
                where=f"target {compiled.target.name}",
                remedy="Keep layers in float, or choose another backend",
            )
    except KedgeError as error:
        return Failed(target=compiled.target, error=error, attempts=compiled.attempts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    note = _note(cpu, answer, decibels)
    lowered = dataclasses.replace(compiled.lowered, verified=Verified.EMULATED, notes=(*compiled.lowered.notes, note))
    return dataclasses.replace(compiled, lowered=lowered)


def _proof(
    cpu: str, config: BundleConfig, compiled: Compiled, samples: Samples, folder: Path
) -> tuple[EmulationAnswer, float | None]:
    """Return the proof, and the least dB of an output over the further samples; None if none could be compared."""
    files = folder / "bundle"
    files.mkdir()
    for title, path in (compiled.lowered.files | {bundle_writer.GOLDEN_FILE: compiled.golden_file}).items():
        shutil.copyfile(path, files / title)
    # Examples of a pipeline are the host's and the device's own; the emulated system has no reader of pictures.
    plain = dataclasses.replace(config, pipeline=None)
    (folder / "config.json").write_bytes(codec.encode(plain))
    wanted = {name: path for name, path in compiled.evaluation.files.items() if Path(path).is_file()}
    inputs: dict[str, str] = {}
    for name, array in samples.rows(*next(samples.parts(SAMPLES))).items():
        inputs[name] = str(folder / f"given-{len(inputs)}.npy")
        np.save(inputs[name], array)
    outputs = {name: str(folder / f"made-{number}.npy") for number, name in enumerate(wanted)}
    answer = proving.prove(
        cpu,
        EmulationRequest(folder=str(files), config=str(folder / "config.json"), inputs=inputs, outputs=outputs),
    )
    if not answer.samples:
        return answer, None
    found = [_decibels(np.load(wanted[name], mmap_mode="r"), np.load(path)) for name, path in outputs.items()]
    return answer, min((one for one in found if one is not None), default=None)


def _decibels(wanted: Array, got: Array) -> float | None:
    """Return the signal-to-noise ratio over the samples that ran; None if it means nothing."""
    reference = np.asarray(wanted[: len(got)], dtype=np.float64)
    if reference.shape != got.shape or not np.isfinite(reference).all():
        return None
    noise = float(((reference - got.astype(np.float64)) ** 2).sum())
    signal = float((reference**2).sum())
    if not noise:
        return _SAME
    return float(10 * np.log10(signal / noise)) if signal else None


def _note(cpu: str, answer: EmulationAnswer, decibels: float | None) -> str:
    text = (
        f"proved on an emulated {cpu} by {answer.runtime} {answer.runtime_version} for {answer.machine}: "
        f"{answer.vectors} golden vectors"
    )
    if not answer.samples:
        return text
    if decibels is None:
        return f"{text}, {answer.samples} samples"
    near = "" if decibels >= _SAME else f" at {decibels:.1f} dB"
    return f"{text}; {answer.samples} samples gave this machine's answers{near or ' exactly'}"
