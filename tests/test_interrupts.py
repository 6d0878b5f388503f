import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from core.interrupts import (
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
