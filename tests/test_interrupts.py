import contextlib
import ctypes
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.interrupts import (
    LOOK_SECONDS,
    SIGNALS,
    Deferred,
    Interrupted,
    handled_by,
    held_back,
    raise_if_interrupted,
    remove_folder,
    stop_at_once,
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_interrupted_which_is_not_an_exception_and_has_an_exit_code(number: int, code: int):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="run the same command again") as stop, handled_by(stop_at_once):
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == code and not isinstance(stop.value, Exception)
    assert signal.getsignal(number) is before


def test_the_first_signal_is_noted_and_the_second_one_stops_at_once(capfd: pytest.CaptureFixture[str]):
    deferred = Deferred()
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        with pytest.raises(Interrupted), handled_by(deferred):
            os.kill(os.getpid(), signal.SIGINT)
            assert deferred.signum == signal.SIGINT
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is stop_at_once
    assert "SIGINT: stopping after the current chunk" in capfd.readouterr().err


def clean_up_badly() -> None:
    try:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise AttributeError("half of an object")
    except AttributeError as error:
        raise ValueError("could not be built") from error


def test_an_interruption_is_recovered_from_the_error_of_a_library_that_cleaned_up():
    stopped, failed = pytest.raises(Interrupted), pytest.raises(ValueError, match="could not be built")
    with stopped, handled_by(stop_at_once), failed as wrong:
        clean_up_badly()
    with pytest.raises(Interrupted):
        raise_if_interrupted(wrong.value)
    raise_if_interrupted(ValueError("unrelated"))


def test_an_error_caused_by_an_interruption_is_raised_as_the_interruption_and_others_as_themselves():
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        clean_up_badly()
    with pytest.raises(ValueError, match="unrelated"), handled_by(stop_at_once):
        raise ValueError("unrelated")


def test_a_delayed_signal_is_raised_when_the_block_ends_even_if_it_ends_with_an_error():
    done = []
    with pytest.raises(Interrupted) as stop, handled_by(stop_at_once):
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the block")
        done.append("what follows")
    assert done == ["the block"] and stop.value.signum == signal.SIGTERM
    with pytest.raises(Interrupted), handled_by(stop_at_once), held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("unrelated")
    with handled_by(stop_at_once), held_back():
        pass  # no signal, so nothing is raised


@pytest.mark.parametrize("call", ["os.unlink", "os.rmdir", "os.close", "os.scandir"])
def test_a_folder_is_removed_completely_whenever_the_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    (tmp_path / "folder/in/it").mkdir(parents=True)
    (tmp_path / "folder/in/file").touch()
    original, calls = getattr(os, call.split(".")[1]), []

    def interrupted_call(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        calls.append(call)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.raises(Interrupted), handled_by(stop_at_once):
        monkeypatch.setattr(f"{shutil.__name__}.{call}", interrupted_call)
        try:
            remove_folder(tmp_path / "folder")
        finally:
            monkeypatch.undo()
    assert calls and not (tmp_path / "folder").exists()


def test_a_signal_that_the_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled_by(stop_at_once):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_changes():
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def work() -> None:
        with handled_by(stop_at_once):
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


# ---- the exception that a handler raised gets lost

ROOT = Path(__file__).parents[1]


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Finalised:
    def __del__(self) -> None:
        kill_me()


class InACycle(Finalised):
    def __init__(self) -> None:
        self.me = self


def in_a_finaliser() -> None:
    Finalised()


def in_a_collected_cycle() -> None:
    InACycle()
    gc.collect()


def in_a_callback_of_a_weak_reference() -> None:
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: kill_me())
    del thing
    assert reference() is None


def in_a_callback_of_c_code() -> None:
    ctypes.CFUNCTYPE(None)(kill_me)()


def behind_a_bare_except() -> None:
    try:
        kill_me()
    except:  # noqa: E722
        done = True
        assert done


def behind_suppress() -> None:
    with contextlib.suppress(BaseException):
        kill_me()


KEPT: list[BaseException] = []


def kept_for_later() -> None:
    try:
        kill_me()
    except BaseException as error:
        KEPT.append(error)


def returned_from_finally() -> None:
    def swallow() -> None:
        try:
            kill_me()
        finally:
            return  # noqa: B012

    swallow()


def in_a_context_that_says_it_is_handled() -> None:
    class Handles:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> bool:
            return True

    with Handles():
        kill_me()


def in_a_comparison_of_hasattr() -> None:
    class Odd:
        @property
        def name(self) -> str:
            try:
                kill_me()
            except BaseException:
                raise AttributeError from None
            return ""

    assert not hasattr(Odd(), "name")


def while_an_error_is_handled() -> None:
    try:
        raise ValueError("of another kind")
    except ValueError:
        behind_a_bare_except()


SWALLOWED = [
    in_a_finaliser, in_a_collected_cycle, in_a_callback_of_a_weak_reference, in_a_callback_of_c_code,
    behind_a_bare_except, behind_suppress, kept_for_later, returned_from_finally, in_a_context_that_says_it_is_handled,
    in_a_comparison_of_hasattr, while_an_error_is_handled,
]  # fmt: skip


def work_on() -> None:
    """Goes on for a minute unless something is raised."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)


def work_on_while_an_error_is_handled() -> None:
    try:
        raise ValueError("of another kind")
    except ValueError:
        work_on()


@pytest.mark.parametrize("rest", [work_on, work_on_while_an_error_is_handled])
@pytest.mark.parametrize("lose", SWALLOWED)
def test_a_raise_that_was_swallowed_is_raised_again_soon_and_without_a_word(
    lose: Callable[[], None], rest: Callable[[], None], capfd: pytest.CaptureFixture[str]
):
    started = time.monotonic()
    with pytest.raises(Interrupted) as stop, handled_by(stop_at_once):
        lose()
        rest()
    assert time.monotonic() - started < 50 and stop.value.exit_code == 143
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("lose", SWALLOWED)
def test_a_run_that_ends_right_after_a_raise_was_swallowed_has_been_stopped(lose: Callable[[], None]):
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        lose()


@pytest.mark.parametrize("error", [ImportError("numpy.core.multiarray failed to import"), KeyError("x"), SystemExit(1)])
def test_whatever_error_ends_a_run_after_a_signal_it_has_been_stopped(error: BaseException):
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        behind_a_bare_except()
        raise error
    with pytest.raises(type(error)), handled_by(stop_at_once):
        raise error  # without a signal it stays what it is


def test_an_error_that_comes_after_a_signal_is_not_taken_for_a_failure_of_its_own():
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        behind_a_bare_except()
        raise_if_interrupted(ImportError("half of a library"))
        pytest.fail("a cell would be recorded as failed")


def test_cleaning_up_is_not_disturbed_however_long_it_takes():
    done = []
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        try:
            kill_me()
        finally:
            time.sleep(4 * LOOK_SECONDS)
            done.append("in finally")
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        try:
            kill_me()
        except BaseException as error:
            time.sleep(4 * LOOK_SECONDS)
            done.append("in except")
            raise RuntimeError("of another kind") from error
    with pytest.raises(Interrupted), handled_by(stop_at_once), contextlib.ExitStack() as stack:
        stack.callback(lambda: done.append("in a callback"))
        stack.callback(time.sleep, 4 * LOOK_SECONDS)
        kill_me()
    assert done == ["in finally", "in except", "in a callback"]


def test_a_second_signal_breaks_off_the_cleaning_up():
    done = []
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        try:
            kill_me()
        finally:
            kill_me()
            done.append("the rest")
    assert not done


def test_work_that_defers_signals_is_left_alone_and_the_signal_is_handed_on_when_it_ends():
    done, deferred = [], Deferred()
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        with handled_by(deferred):
            kill_me()
            time.sleep(4 * LOOK_SECONDS)
            done.append("the chunk")
        done.append("what follows")
    assert done == ["the chunk"]
    with pytest.raises(Interrupted), handled_by(stop_at_once), contextlib.suppress(ValueError), handled_by(Deferred()):
        kill_me()
        raise ValueError("the training fails")
    with pytest.raises(Interrupted), handled_by(Deferred()):
        kill_me()  # even without a handler around it


def test_short_work_is_not_disturbed_by_a_signal_that_was_swallowed_before():
    done = []
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        try:
            kill_me()
        finally:
            with held_back():
                behind_a_bare_except()
                time.sleep(4 * LOOK_SECONDS)
                done.append("the folder is removed")
    assert done


def test_a_signal_of_an_earlier_run_in_this_process_does_not_stop_the_next_one():
    with pytest.raises(Interrupted), handled_by(stop_at_once):
        kill_me()
    with handled_by(stop_at_once):
        time.sleep(2 * LOOK_SECONDS)
        raise_if_interrupted(ValueError("unrelated"))


# ---- the command line, in processes of their own

IN_AN_IMPORT = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
number, at, how, *arguments = sys.argv[1:]

class Finder:
    calls = 0
    def find_spec(self, name, path=None, target=None):
        Finder.calls += 1
        if Finder.calls == int(at):
            if how == "plain":
                os.kill(os.getpid(), int(number))
            elif how == "finaliser":
                Finalised()
            elif how == "swallowed":
                try:
                    os.kill(os.getpid(), int(number))
                except BaseException:
                    pass
            else:
                try:
                    os.kill(os.getpid(), int(number))
                except BaseException:
                    raise ImportError("numpy.core.multiarray failed to import") from None

class Finalised:
    def __del__(self):
        os.kill(os.getpid(), int(number))

sys.argv = ["run.py", *arguments]
import core.interrupts
sys.meta_path.insert(0, Finder())
runpy.run_path("run.py", run_name="__main__")
"""


def arguments(folder: Path) -> list[str]:
    places = [f"output_dir={folder / 'outputs'}", f"artifacts_dir={folder / 'artifacts'}"]
    return ["experiment=oneill_theorem", "scale=smoke", "logging=none", *places]


@pytest.mark.parametrize(
    ("how", "number", "at"),
    [
        ("plain", signal.SIGTERM, 20),
        ("finaliser", signal.SIGINT, 100),
        ("swallowed", signal.SIGTERM, 300),
        ("converted", signal.SIGINT, 500),
        *(
            pytest.param(how, number, at, marks=pytest.mark.slow)
            for how in ("plain", "finaliser", "swallowed", "converted")
            for number in (signal.SIGINT, signal.SIGTERM)
            for at in (30, 200, 700, 1200)
        ),
    ],
)
def test_a_signal_during_an_import_ends_the_command_line_as_a_stop(tmp_path: Path, how: str, number: int, at: int):
    command = [sys.executable, "-c", IN_AN_IMPORT, str(int(number)), str(at), how, *arguments(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    before_the_handlers_stand = done.returncode == -number and at < 50
    assert done.returncode == 128 + number or before_the_handlers_stand, done.stderr
    assert "run the same command again" in done.stderr or before_the_handlers_stand
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("failed.json"))


@pytest.mark.slow
def test_a_signal_at_any_of_40_moments_of_a_run_ends_it_as_a_stop(tmp_path: Path):
    command = [sys.executable, "run.py", *arguments(tmp_path), "force=true"]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - started
    for moment in range(40):
        number = SIGNALS[moment % 2]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.1 + seconds * moment / 40)  # before that, Python itself starts
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        ended_before = process.returncode == 0 and "finished: " in err
        assert process.returncode in (128 + number, -number) or ended_before, (moment, process.returncode, err)
        assert "Traceback" not in err and "Exception ignored" not in err, (moment, err)
