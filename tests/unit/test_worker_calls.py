"""The worker with real children: answers, errors, limits, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.waiting import wait_for
from tests.support.worker_tasks import Ask, Told

from kedge_protocol import errors
from kedge_targets.worker import Worker

pytestmark = pytest.mark.device

ROOT = Path(__file__).resolve().parents[2]
TASKS = "tests.support.worker_tasks:"
Make = Callable[..., Worker]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Worker] = []

    def build(**options: object) -> Worker:
        worker = Worker(name="test", log_dir=tmp_path, env={"PYTHONPATH": str(ROOT)}, **options)  # type: ignore[arg-type]
        made.append(worker)
        return worker

    yield build
    for worker in made:
        worker.close()


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_where_memory_runs_out_a_worker_goes_before_its_parent(make: Make) -> None:
    theirs = make().call(TASKS + "first_to_go", Ask(), Told, deadline=60).number
    assert theirs > float(Path("/proc/self/oom_score_adj").read_text())


def test_request_and_answer_keep_their_types_and_progress_comes(make: Make) -> None:
    steps: list[tuple[str, int, int]] = []
    ask = Ask(text="größe\n", number=float("inf"), path=Path("x"), items={"a": [1, 2]})
    told = make().call(TASKS + "echo", ask, Told, deadline=60, on_progress=lambda *step: steps.append(step))
    assert (told.text, told.number, told.items) == (ask.text, ask.number, ask.items)
    assert steps[-1] == ("echoing", 3, 3)


def test_a_request_larger_than_a_pipe_goes_through(make: Make) -> None:
    text = "x" * 2_000_000
    assert make().call(TASKS + "echo", Ask(text=text), Told, deadline=60).text == text


def test_the_child_is_kept_for_several_calls(make: Make) -> None:
    worker = make()
    first, second = (worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid for _ in range(2))
    assert first == second != os.getpid()


def test_a_deadline_kills_the_whole_group(make: Make, tmp_path: Path) -> None:
    worker = make()
    worker.call(TASKS + "echo", Ask(), Told, deadline=60)  # its start is not under the short deadline
    with pytest.raises(errors.WorkerTimeoutError, match="deadline of 5 s"):
        worker.call(TASKS + "sleep", Ask(number=300, path=tmp_path / "pids"), Told, deadline=5)
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda pid=pid: not running(int(pid)))  # type: ignore[misc]


@pytest.mark.parametrize("task", ["eat", "eat_in_a_child"])
def test_a_memory_overrun_is_killed(make: Make, task: str) -> None:
    worker = make(memory_limit=200 << 20)
    with pytest.raises(errors.WorkerMemoryError, match="200 MiB are allowed"):
        worker.call(TASKS + task, Ask(number=600e6), Told, deadline=60)
    assert worker.call(TASKS + "echo", Ask(text="again"), Told, deadline=60).text == "again"


@pytest.mark.parametrize(
    ("task", "said"),
    [("crash", "SIGSEGV"), ("kill_itself", "SIGKILL"), ("leave", "status 7 without an answer")],
)
def test_a_crash_names_its_signal_keeps_the_log_and_the_next_call_starts_anew(make: Make, task: str, said: str) -> None:
    worker = make()
    before = worker.call(TASKS + "echo", Ask(text="first"), Told, deadline=60).pid
    with pytest.raises(errors.WorkerCrashedError, match=said) as caught:
        worker.call(TASKS + task, Ask(), Told, deadline=60)
    assert "echo of first" in str(caught.value)
    assert str(worker.log) in str(caught.value)
    assert worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid != before
    worker.close()
    assert worker.log is not None
    assert "echo of first" in worker.log.read_text()


def test_a_child_killed_between_two_calls_is_started_anew(make: Make) -> None:
    worker = make()
    before = worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: not running(before))
    assert worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid != before


def test_kedges_errors_arrive_as_the_same_class(make: Make) -> None:
    worker = make()
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KedgeError)]
    assert len(tree) > 20
    for kind in tree:
        with pytest.raises(errors.KedgeError) as caught:
            worker.call(TASKS + "refuse", Ask(text=kind.__name__), Told, deadline=60)
        assert type(caught.value) is kind
        assert (caught.value.what, caught.value.where, caught.value.remedy) == (
            "the node is odd",
            "node 'x'",
            "Leave it out",
        )


def test_other_errors_arrive_with_type_text_and_log(make: Make) -> None:
    worker = make()
    with pytest.raises(errors.WorkerTaskError, match="ValueError: seven is no eight") as caught:
        worker.call(TASKS + "stumble", Ask(text="seven is no eight"), Told, deadline=60)
    assert "in stumble" in str(caught.value)
    with pytest.raises(errors.WorkerTaskError, match="SystemExit: a vendor's idea"):
        worker.call(TASKS + "leave_politely", Ask(), Told, deadline=60)
    worker.close()
    assert worker.log is not None
    assert "last words of the vendor" in worker.log.read_text()


def test_an_unknown_task_and_a_wrong_request_are_errors(make: Make) -> None:
    worker = make()
    with pytest.raises(errors.WorkerTaskError, match="AttributeError"):
        worker.call(TASKS + "nothing", Ask(), Told, deadline=60)
    with pytest.raises(errors.MessageError, match="text"):
        worker.call(TASKS + "echo", {"text": 5}, Told, deadline=60)


def test_the_log_and_the_scratch_folder_go_after_success(make: Make, tmp_path: Path) -> None:
    worker = make()
    worker.call(TASKS + "echo", Ask(), Told, deadline=60)
    assert list(tmp_path.glob("*.log"))
    scratch = Path(worker.call(TASKS + "environment", Ask(text="TMPDIR"), Told, deadline=60).text)
    assert scratch.is_dir()
    worker.close()
    assert not list(tmp_path.glob("*.log"))
    assert not scratch.exists()


def test_an_interruption_kills_the_child(make: Make, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().call(TASKS + "sleep", Ask(number=300, path=tmp_path / "pids"), Told, deadline=60, on_progress=interrupt)
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda pid=pid: not running(int(pid)))  # type: ignore[misc]


def test_two_workers_live_at_once_and_outlive_the_thread_that_started_them(make: Make) -> None:
    workers = [make(), make()]
    found: list[int] = []

    def first_call(worker: Worker) -> None:
        found.append(worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid)

    threads = [threading.Thread(target=first_call, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2
    # The death signal goes with the thread that started a child: these two have ended.
    again = [worker.call(TASKS + "echo", Ask(), Told, deadline=60).pid for worker in workers]
    assert set(again) == set(found)


@pytest.mark.parametrize("task", ["sleep", "nested"])
def test_the_child_dies_with_its_parent(tmp_path: Path, task: str) -> None:
    program = textwrap.dedent(f"""
        from pathlib import Path
        from kedge_targets.worker import Worker
        from tests.support.worker_tasks import Ask, Told
        with Worker(name="orphan", log_dir=Path({str(tmp_path)!r})) as worker:
            worker.call("{TASKS}{task}", Ask(number=300, path=Path({str(tmp_path / "pids")!r})), Told, deadline=300)
    """)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as parent:
        pids = tmp_path / "pids"
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        child, grandchild = map(int, pids.read_text().split())
        assert running(child)
        parent.send_signal(signal.SIGKILL)
        wait_for(lambda: not running(child))
        os.kill(grandchild, signal.SIGKILL)  # a plain child of the child is bound to nobody


def test_the_loop_of_drivers_answers_refuses_and_goes_on(make: Make, tmp_path: Path) -> None:
    shared = ROOT / "targets/kedge_targets/toolchain/driver_side"
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(f"""
            import os, sys
            sys.path.append({str(shared)!r})
            import driver_loop
            answers = driver_loop.Answers()
            def where(request):
                answers.progress("w", 1, 1)
                return {{"text": os.getcwd(), "pid": os.getpid()}}
            def refuse(request):
                raise driver_loop.RefusedError("LoweringError", "no", where="node 'x'", remedy="Export it again")
            driver_loop.serve(answers, {{"where": where, "refuse": refuse, "leave": lambda request: sys.exit(3)}})
        """)
    )
    worker = make(driver=driver, python=Path(sys.executable))
    steps: list[tuple[str, int, int]] = []
    for task, words in (("refuse", "node 'x': no"), ("leave", "SystemExit")):
        with pytest.raises(errors.KedgeError, match=words):
            worker.call(task, {}, Told, deadline=60)
    told = worker.call("where", {}, Told, deadline=60, on_progress=lambda *step: steps.append(step))
    assert told.pid > 0
    assert steps == [("w", 1, 1)]


def test_a_driver_speaks_the_same_lines(make: Make, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent("""
            import json, os, sys
            answers = os.fdopen(int(os.environ["KEDGE_ANSWER_FD"]), "w", buffering=1)
            for line in sys.stdin:
                message = json.loads(line)
                print(json.dumps({"progress": {"what": "w", "done": 1, "total": 1}}), file=answers)
                if message["task"] == "refuse":
                    print(json.dumps({"error": {"kind": "LoweringError", "what": "no"}}), file=answers)
                else:
                    print(json.dumps({"answer": {"text": os.getcwd(), "pid": os.getpid()}}), file=answers)
        """)
    )
    worker = make(driver=driver, python=Path(sys.executable))
    told = worker.call("where", {}, Told, deadline=60)
    assert Path(told.text).name.startswith("kedge-test-")
    with pytest.raises(errors.LoweringError, match="no"):
        worker.call("refuse", {}, Told, deadline=60)


def test_an_interpreter_that_is_not_there_is_said(make: Make, tmp_path: Path) -> None:
    with pytest.raises(errors.WorkerCrashedError, match="could not be started"):
        make(python=tmp_path / "python").call(TASKS + "echo", Ask(), Told, deadline=5)
