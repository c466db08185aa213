"""Olive's own way: static int8 by a workflow, with its evaluation of accuracy and latency; prints spans as JSON.

Run in Olive's environment as ``python olive_static.py MODEL CALIBRATION.npz EVALUATION.npz FOLDER``; imports nothing of
Kedge.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    model, calibration, evaluation, folder = (Path(argument) for argument in sys.argv[1:5])
    start = time.perf_counter()
    import numpy as np
    import olive
    from olive.data.registry import Registry

    imported = time.perf_counter() - start

    class Samples:
        def __init__(self, path: str, name: str) -> None:
            with np.load(path) as arrays:
                self.inputs = arrays["input"].astype(np.float32)
                self.labels = arrays["label"] if "label" in arrays else np.zeros(len(self.inputs), np.int64)
            self.name = name

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index: int) -> tuple[dict, int]:
            return {self.name: self.inputs[index]}, int(self.labels[index])

    @Registry.register_dataset("npz")
    def npz(path: str, name: str, **_: object) -> Samples:
        return Samples(path, name)

    @Registry.register_post_process("largest")
    def largest(answers: object, **_: object) -> object:
        answers = getattr(answers, "logits", answers)
        if isinstance(answers, (list, tuple)):
            answers = answers[0]
        if isinstance(answers, dict):
            answers = next(iter(answers.values()))
        return answers.argmax(-1)

    import onnx

    name = onnx.load(str(model)).graph.input[0].name

    def data(which: str, path: Path, batch: int) -> dict:
        return {
            "name": which,
            "load_dataset_config": {"type": "npz", "params": {"path": str(path), "name": name}},
            "post_process_data_config": {"type": "largest"},
            "pre_process_data_config": {"type": "skip_pre_process"},
            "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": batch}},
        }

    with np.load(evaluation) as arrays:
        classes = int(arrays["label"].max()) + 1
    start = time.perf_counter()
    olive.run(
        {
            "input_model": {"type": "OnnxModel", "model_path": str(model)},
            "data_configs": [data("calibration", calibration, 1), data("evaluation", evaluation, 1)],
            "passes": {"int8": {"type": "OnnxStaticQuantization", "data_config": "calibration"}},
            "evaluators": {
                "both": {
                    "type": "OnnxEvaluator",  # without it Olive 0.13 stumbles over its own None
                    "metrics": [
                        {
                            "name": "top1",
                            "type": "accuracy",
                            "data_config": "evaluation",
                            "sub_types": [
                                {
                                    "name": "accuracy_score",
                                    "priority": 1,
                                    "metric_config": {"task": "multiclass", "num_classes": classes},
                                }
                            ],
                        },
                        {
                            "name": "latency",
                            "type": "latency",
                            "data_config": "evaluation",
                            "sub_types": [{"name": "p50", "priority": 2}],
                        },
                    ],
                }
            },
            "evaluator": "both",
            "output_dir": str(folder / "out"),
            "cache_dir": str(folder / "cache"),
            "log_severity_level": 3,
        }
    )
    ran = time.perf_counter() - start
    (made,) = (folder / "out").rglob("*.onnx")
    print(json.dumps({"import": imported, "run": ran, "model": str(made)}))


main()
