"""Signals and the clock become wishes; afterwards signals mean what they meant before."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from p3b.run import interruption
from p3b.run.interruption import SIGNALS, Interruption, Wish


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish_to_stop(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    wishes = Interruption(checkpoint_minutes=0, is_main=True)
    with wishes.listening():
        assert wishes.agreed() is Wish.GO_ON
        os.kill(os.getpid(), number)
        assert wishes.agreed() is Wish.STOP and wishes.agreed_now() is Wish.STOP
        assert wishes.cause == number.name
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing the step and saving" in capfd.readouterr().err


def test_a_second_interrupt_is_obeyed_at_once_but_not_the_same_one_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = Interruption(checkpoint_minutes=0, is_main=True)
    with wishes.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's, of the same key press
        monkeypatch.setattr(interruption, "IMPATIENT_AFTER", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler repeats itself: no reason to lose the step
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert wishes.agreed() is Wish.STOP


def test_the_clock_wishes_to_save_once_an_interval_and_on_the_main_rank_alone() -> None:
    main, other, never = Interruption(0.001, True), Interruption(0.001, False), Interruption(0.0, True)
    assert main.agreed() is Wish.GO_ON
    time.sleep(0.07)
    assert [main.agreed(), main.agreed()] == [Wish.SAVE, Wish.GO_ON]
    assert other.agreed() is Wish.GO_ON and never.agreed() is Wish.GO_ON
    time.sleep(0.07)
    main.saved()
    assert main.agreed() is Wish.GO_ON, "a checkpoint at an epoch's end starts the clock anew"


def test_a_forked_worker_does_not_decide() -> None:
    wishes = Interruption(checkpoint_minutes=0, is_main=True)
    with wishes.listening():
        if (worker := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0 if wishes.agreed() is Wish.GO_ON else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        assert wishes.agreed() is Wish.GO_ON


def test_outside_of_the_main_thread_signals_stay_as_they_are() -> None:
    seen: list[object] = []

    def train() -> None:
        with Interruption(0, True).listening():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR1)]
