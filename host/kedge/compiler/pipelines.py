"""A compilation's pipeline: settled by the model, used to read folders of raw data, measured by examples."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kedge.compiler import cascades
from kedge.compiler.cascades import CascadeJob
from kedge.compiler.validation import ValidatedRequest
from kedge.evaluation import pipeline_examples
from kedge.evaluation.dataset import Data, Dataset
from kedge.evaluation.model import Model
from kedge.evaluation.worker_messages import ReferenceAnswer
from kedge.importing import iterables
from kedge.importing.data_folders import columns, converting, kinds
from kedge.importing.data_folders.converting import Converted, read_text
from kedge.search import trial
from kedge.search.options import CompileOptions
from kedge.search.results import Compiled
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_protocol.errors import ConfigError, KedgeError
from kedge_targets.pipeline import boxes, settling
from kedge_targets.pipeline.execution import Runner
from kedge_targets.pipeline.others import Neighbour, names
from kedge_targets.worker import Worker

DEFAULT_CALIBRATION = 512
"""The default number of a folder's items for calibration."""
_EXAMPLES = 6
"""The number of raw items from which a bundle's examples are chosen."""
_TOKENIZER = "tokenizer.json"
_SETTLED_BY = 64
"""The number of the float model's answers that decide the unit of boxes."""

ProgressCallback = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class PipelineJob:
    """The pipeline of one compilation.

    Attributes:
        pipeline: the settled pipeline, or None if there is none.
        names: the model's class names, if the user or the export gives them.
        files: the files that the pipeline names, by title.
        raws: the folder of raw items for the examples.
        releases: release folders of the models to which the pipeline goes on.
        iterables: data sets that are not paths, by role.
        warnings: warnings for the report.
    """

    pipeline: Pipeline | None
    names: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)
    raws: str | None = None
    releases: tuple[str, ...] = ()
    iterables: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _cascade: CascadeJob | None = None

    @classmethod
    def of(cls, asked: ValidatedRequest, model: Model) -> PipelineJob:
        """Settle the requested pipeline, or the one that the export's metadata states.

        Raises:
            ConfigError: the pipeline does not fit the model.
        """
        metadata, options = model.metadata, asked.options
        labels = asked.labels or settling.names_of(metadata)
        declared = asked.pipeline or settling.from_metadata(metadata)
        if declared is None:
            return cls(pipeline=None, names=asked.labels)
        where = "--pipeline" if options.pipeline else "--task" if options.task else "the model's metadata"
        pipeline = settling.settled(declared, model.inputs, model.outputs, where=where, metadata=metadata)
        if pipeline.cascade is not None:
            larger = cascades.settled(pipeline.cascade, model.inputs, where)
            pipeline = replace(pipeline, cascade=larger)
        files = {}
        if pipeline.text is not None:
            path = Path(pipeline.text.tokenizer)
            beside = Path(asked.model).parent / path.name
            files[_TOKENIZER] = (path if path.is_file() else beside).absolute()
            if not files[_TOKENIZER].is_file():
                raise ConfigError(
                    f"{path.name} is not there",
                    where=where,
                    remedy="Put the model's tokenizer.json beside it, or name it in [text]",
                )
        releases: tuple[str, ...] = ()
        if pipeline.then is not None:
            releases = pipeline.then.releases
            pipeline = replace(pipeline, then=replace(pipeline.then, releases=()))
        return cls(pipeline=pipeline, names=labels, files=files, releases=releases)

    @property
    def whole(self) -> Pipeline | None:
        """The pipeline with the user's files in place of titles."""
        if self.pipeline is None or self.pipeline.text is None:
            return self.pipeline
        return replace(self.pipeline, text=replace(self.pipeline.text, tokenizer=str(self.files[_TOKENIZER])))

    def normalizing(self, options: CompileOptions) -> CompileOptions:
        """Return the options with the pipeline's normalization as ``--preprocess``, unless that is already given."""
        pipeline = self.pipeline
        section = None if pipeline is None else pipeline.picture or pipeline.sound
        if options.preprocess or pipeline is None or pipeline.normalize is None or section is None:
            return options
        how = pipeline.normalize
        steps = (("scale", how.scale), ("mean", how.mean), ("std", how.std))
        text = ",".join(f"{name}={':'.join(map(repr, values))}" for name, values in steps)
        return replace(options, preprocess=(f"{section.input}:{text}",))

    def dataset(
        self,
        worker: Worker,
        asked: ValidatedRequest,
        model: Model | None,
        role: str,
        scratch: Path,
        on_progress: ProgressCallback,
    ) -> Dataset:
        """Return a data set: arrays as they are, a folder of raw data through the pipeline.

        Raises:
            ConfigError: the data is raw and there is no pipeline.
            DatasetError: see :mod:`kedge.importing.data_folders`.
        """
        options = asked.options
        evaluated = role == "evaluation"
        path, limit = _place(options, role)
        annotations = options.annotations if evaluated else None
        if model is not None and role in self.iterables:
            how = None if self.whole is None else converting.of_one_size(self.whole)
            runner = None if how is None else Runner(how, model.inputs, (), read_text)
            source = self.iterables[role]
            written = iterables.write(source, model.inputs, scratch, where=f"{role} {path}", runner=runner, most=limit)
            return Dataset(path, scratch, role=role, annotations=annotations, files=written)
        if (table := asked.columns_file(role)) is not None:
            return Dataset(
                path, scratch, role=role, annotations=annotations, columns=columns.read(table, where=f"{role} {path}")
            )
        if model is None or not kinds.is_raw(path):
            return Dataset(path, scratch, role=role, annotations=annotations)
        if self.whole is None:
            raise _no_pipeline(path, role, annotations)
        # Boxes must follow their pictures into the letterbox; other labels are one for each sample.
        own = annotations is not None and (annotations.suffix.lower() == ".json" or annotations.is_dir())
        made = worker.call(
            converting.TASK,
            converting.ConvertRequest(
                path=str(path.absolute()),
                role=role,
                annotations=str(annotations.absolute()) if own and annotations is not None else None,
                pipeline=self.whole,
                inputs=model.inputs,
                names=self.names,
                most=limit,
                folder=str(scratch.absolute()),
                examples=_EXAMPLES if evaluated else 0,
                beside=self._beside(options, "calibration" if evaluated else "evaluation"),
            ),
            Converted,
            deadline=options.deadline,
            on_progress=on_progress,
        )
        self._note(made, role)
        files = {name: Path(file) for name, file in made.arrays.items()}
        return Dataset(path, scratch, role=role, annotations=None if own else annotations, files=files)

    def _beside(self, options: CompileOptions, role: str) -> converting.Beside | None:
        path, most = _place(options, role)
        if self.whole is None or self.whole.text is None or role in self.iterables or not kinds.is_raw(path):
            return None
        return converting.Beside(path=str(path.absolute()), role=role, most=most)

    def _note(self, made: Converted, role: str) -> None:
        self.names = self.names or made.classes
        self.raws = made.examples or self.raws
        if made.left_out:
            self.warnings.append(f"{role}: pipelines do not read {made.left_out}; they are left out")
        if made.samples < made.found:
            self.warnings.append(f"{role}: {made.samples} of {made.found} items ({made.kind}), spread evenly")

    def settle(self, model: Model, reference: ReferenceAnswer) -> None:
        """Fill in what only the float model's answers reveal: the missing activation, the detector's head and its unit.

        Raises:
            InputError: the outputs are not a detector's.
        """
        if self.pipeline is None:
            return
        bounded = {seen.name: seen.bounded for seen in reference.choice.kinds}
        pipeline = settling.probable(self.pipeline, bounded, model.outputs[0].name)
        if pipeline.boxes is not None:
            from kedge.evaluation.npy_files import open_array

            arrays = {
                name: open_array(Path(path), name=name, where=path)[:_SETTLED_BY]
                for name, path in reference.outputs.items()
            }
            head = pipeline.boxes.head or boxes.head_of(arrays)
            shares = pipeline.boxes.shares
            if shares is None:
                shares = boxes.in_shares(arrays, head)
            pipeline = replace(pipeline, boxes=replace(pipeline.boxes, head=head, shares=shares))
        self.pipeline = pipeline

    @property
    def bundled(self) -> Pipeline | None:
        """The pipeline as stored in a bundle: normalization is stored with the input, files are named by their
        titles."""
        if self.pipeline is None:
            return None
        text = None if self.pipeline.text is None else replace(self.pipeline.text, tokenizer=_TOKENIZER)
        return replace(self.pipeline, normalize=None, text=text)

    def measured(self, worker: Worker, one: Compiled, data: Data, folder: Path, deadline: float) -> Compiled:
        """Return a compiled target with its examples, if there are raw items and a pipeline of one model, and with the
        gain of its larger model, if it has one.

        Raises:
            EndpointError, DatasetError: see :class:`kedge.compiler.cascades.CascadeJob`.
        """
        one = self._with_examples(worker, one, folder, deadline)
        pipeline = self.pipeline
        if pipeline is None or pipeline.cascade is None or pipeline.scores is None:
            return one
        if self._cascade is None:
            self._cascade = CascadeJob(how=pipeline.cascade, scores=pipeline.scores)
        return self._cascade.measured(worker, one, data, folder, deadline)

    def _others(self, target: str, folder: Path) -> dict[str, Neighbour]:
        """Unpack the bundles to which the pipeline goes on.

        Raises:
            ConfigError: none of the releases is one of a model that it names.
            BundleError: a release is damaged, or has no bundle for the target.
        """
        wanted = names(self.pipeline)
        found = {}
        for release in self.releases if wanted else ():
            layout = Layout(Path(release))
            bundle = layout.bundle(target)
            into = folder / bundle.config.name
            into.mkdir(parents=True)
            for title, layer in bundle.files.items():
                shutil.copyfile(layout.blob_path(layer.digest), into / title)
            (into / "config.json").write_bytes(bundle.config_raw)
            found[bundle.config.name] = Neighbour(
                folder=str(into.absolute()), config=str((into / "config.json").absolute()), digest=bundle.digest
            )
        if missing := [name for name in wanted if name not in found]:
            raise ConfigError(
                f"no release of {missing[0]!r} is named", where="[then] releases", remedy="Name its release folder too"
            )
        return found

    def _with_examples(self, worker: Worker, one: Compiled, folder: Path, deadline: float) -> Compiled:
        pipeline = self.bundled
        if pipeline is None or self.raws is None or (pipeline.then is not None and not self.releases):
            return one
        if one.alternatives:
            others = tuple(self._with_examples(worker, other, folder, deadline) for other in one.alternatives)
            one = replace(one, alternatives=others)
        place = f"{one.target.name}-{one.candidate.backend.name}"
        file = folder / f"examples-{place}.json"
        try:
            row = self._others(one.target.name, folder / f"{place}-others")
        except KedgeError as error:
            self.warnings.append(f"{one.target.name}: the bundle has no examples of its row of models: {error}")
            return one
        request = pipeline_examples.ExamplesRequest(
            program=trial.program(one.candidate.backend.name, one.lowered, folder / f"{place}-examples"),
            pipeline=pipeline,
            labels=self.names,
            raws=self.raws,
            file=str(file.absolute()),
            files={title: str(path) for title, path in self.files.items()},
            others=row,
        )
        try:
            answer = worker.call(pipeline_examples.TASK, request, pipeline_examples.ExamplesAnswer, deadline=deadline)
        except KedgeError as error:
            # The golden vectors hold: a bundle is not lost for examples that cannot be measured here.
            self.warnings.append(f"{one.target.name}: the bundle has no examples of its pipeline: {error}")
            return one
        return replace(one, examples=file) if answer.count else one


def _place(options: CompileOptions, role: str) -> tuple[Path, int | None]:
    """Return a data set's path, and how many of its items are read at most."""
    if role == "evaluation":
        return options.evaluation, options.evaluation_samples
    return options.calibration, options.calibration_samples or DEFAULT_CALIBRATION


def _no_pipeline(path: Path, role: str, annotations: Path | None) -> ConfigError:
    listing = kinds.listed(path, role, annotations=annotations)
    return ConfigError(
        f"holds {listing.kind}, and nothing says how they become the model's tensors",
        where=f"{role} {path}",
        remedy="Give --task (classification, detection, …) or --pipeline; see docs/pipelines.md",
    )
