"""The signals that end a command between two chunks."""

import os
import signal

import pytest

from memflow_ops.model.stories.interrupts import Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_it_is_allowed(number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests themselves ignore SIGHUP
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            assert interrupts.waiting
            with pytest.raises(KeyboardInterrupt), interrupts.allowed():
                pytest.fail("entered although a signal was waiting")
            with pytest.raises(KeyboardInterrupt), interrupts.allowed():
                os.kill(os.getpid(), number)
                pytest.fail("went on")
            assert not interrupts.waiting
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_before_stays_ignored(number):
    """As nohup asks for, or a shell that starts a job in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.allowed():
            os.kill(os.getpid(), number)
            assert not interrupts.waiting
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
