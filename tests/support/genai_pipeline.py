"""openvino-genai in an environment of its own (in the zoo's folder), and greedy answers by it. Run as a script there:
``genai_pipeline.py FOLDER BACKEND COUNT TOKEN…`` prints the answer's tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def answer(folder: Path, prompt: Sequence[int], count: int, *, backend: str) -> list[int]:
    """Greedy tokens after a prompt, from a folder with ``openvino_model.xml``.

    Args:
        backend: SDPA, attention by the model's own states, or PA, by pages (the default).
    """
    command = [str(_python()), __file__, str(folder), backend, str(count), *map(str, prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-600:])
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _python() -> Path:
    """The environment's Python; made at the first need."""
    from tests.support import foreign

    folder = foreign.folder() / "openvino-genai"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
        packages = str(_ROOT / "constraints" / "openvino-genai.txt")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", packages], check=True, timeout=900)
        done.touch()
    return python


def _main(folder: str, backend: str, count: int, prompt: list[int]) -> None:
    import numpy as np
    import openvino
    import openvino_genai  # type: ignore[import-not-found]  # of the other environment

    properties = {"INFERENCE_PRECISION_HINT": "f32", "ATTENTION_BACKEND": backend}
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **properties)
    tokens = np.array([prompt], np.int64)
    how = openvino_genai.GenerationConfig()
    how.max_new_tokens, how.ignore_eos = count, True
    given = openvino_genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens)))
    print(json.dumps([int(one) for one in pipeline.generate(given, how).tokens[0]]))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(one) for one in sys.argv[4:]])
