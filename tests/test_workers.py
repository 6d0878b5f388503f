"""Tasks in separate processes: what they return, how they fail, how they are stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from core.errors import NonFiniteLoss, UserError
from core.workers import Task, WorkerDiedError, run_tasks

ROOT = Path(__file__).parents[1]


def echo(value: Any) -> Any:
    print(f"working on {value}")
    return value, os.environ["SLOT"]


def process_id() -> int:
    return os.getpid()


def fails(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "wrong setting":
        raise UserError("method.k is wrong.")
    if kind == "diverged":
        raise NonFiniteLoss(7, "TopK")
    raise Unpicklable(lambda: None)


class Unpicklable(Exception):  # noqa: N818
    pass


def waits_until_stopped(folder: str) -> None:
    path = Path(folder) / str(os.getpid())
    path.touch()
    try:
        time.sleep(100)
    finally:
        path.with_suffix(".saved").touch()


def task(label: str, function: str, *arguments: Any) -> Task:
    return Task(label, f"tests.test_workers:{function}", arguments)


def test_results_keep_the_order_of_the_tasks_and_each_line_has_the_label_of_its_task(capfd):
    outcomes = run_tasks(
        [task("x", "echo", 1), task("y", "echo", 2), task("z", "echo", 3)], [{"SLOT": "0"}, {"SLOT": "1"}]
    )
    assert [value for value, _ in outcomes] == [1, 2, 3]
    assert {slot for _, slot in outcomes} == {"0", "1"}
    err = capfd.readouterr().err
    assert "[x] working on 1" in err and "[y] working on 2" in err and "[z] working on 3" in err


def test_a_task_that_fails_does_not_affect_the_others_and_its_error_is_returned(capfd):
    kinds = ("killed", "wrong setting", "diverged", "odd")
    tasks = [*(task(kind, "fails", kind) for kind in kinds), task("good", "echo", 5)]
    killed, wrong, diverged, odd, good = run_tasks(tasks, [{"SLOT": "0"}] * 5)
    assert isinstance(killed, WorkerDiedError) and "memory" in str(killed) and "[killed]" in str(killed)
    assert isinstance(wrong, UserError) and str(wrong) == "method.k is wrong."
    assert isinstance(diverged, NonFiniteLoss) and diverged.step == 7
    assert isinstance(odd, RuntimeError) and "Unpicklable" in str(odd) and "pickling it failed: " in str(odd)
    assert good == (5, "0")
    err = capfd.readouterr().err
    assert "[odd] Traceback" in err and "[wrong setting]" not in err


def test_one_process_takes_one_task_after_another_and_is_replaced_when_it_dies():
    outcomes: list[tuple[int, Any]] = []
    tasks = [task("a", "process_id"), task("b", "process_id"), task("c", "fails", "killed"), task("d", "process_id")]
    a, b, c, d = run_tasks(tasks, [{}], on_end=lambda index, outcome: outcomes.append((index, outcome)))
    assert a == b and isinstance(c, WorkerDiedError) and d != a
    assert outcomes == [(0, a), (1, b), (2, c), (3, d)]


def test_lines_have_the_label_of_their_own_task_when_one_process_runs_many(capfd):
    run_tasks([task(f"label {i}", "echo", i) for i in range(20)], [{"SLOT": "0"}])
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"[label {i}] working on {i}" for i in range(20)]


def test_a_failure_stops_all_tasks_that_depend_on_each_other_and_is_raised(tmp_path):
    tasks = [task("waits", "waits_until_stopped", str(tmp_path)), task("fails", "fails", "wrong setting")]
    with pytest.raises(UserError, match=r"method\.k is wrong"):
        run_tasks(tasks, [{}, {}], all_or_none=True)


PARENT = """
from core.interrupts import Interrupted
from core.workers import Task, run_tasks
import sys
tasks = [Task(str(i), "tests.test_workers:waits_until_stopped", (sys.argv[1],)) for i in range(2)]
try:
    run_tasks([*tasks, Task("never", "tests.test_workers:echo", (1,))], [{}, {}])
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def files(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_save_and_end_when_the_parent_is_stopped_or_killed(tmp_path, signum):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(files(tmp_path, "*")) == 2)
    workers = [int(path.name) for path in files(tmp_path, "*")]
    parent.send_signal(signum)
    code = parent.wait(60)
    assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 128 + signum)
    wait_for(lambda: len(files(tmp_path, "*.saved")) == 2)
    wait_for(lambda: not any(map(is_worker, workers)))
    assert len(files(tmp_path, "*")) == 4  # the third task never began


def is_worker(pid: int) -> bool:
    command = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout
    return "core.workers" in command
