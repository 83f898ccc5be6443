"""The first signal requests a stop; the second has its default effect."""

import os
import signal
import threading

import pytest

from rescalevit_jax.training import preemption


@pytest.mark.parametrize("number", preemption.StopSignal.SIGNALS)
def test_the_first_signal_requests_a_stop(number):
  before = signal.getsignal(number)
  with preemption.StopSignal() as stop:
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    assert signal.getsignal(number) == before
  assert signal.getsignal(number) == before


def test_the_second_signal_has_its_default_effect():
  with pytest.raises(KeyboardInterrupt), preemption.StopSignal():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_install_no_signal_handlers():
  found = []

  def work():
    with preemption.StopSignal() as stop:
      found.append(stop.requested)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]


def test_sighup_is_ignored_under_nohup(monkeypatch):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with preemption.StopSignal() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested
  finally:
    signal.signal(signal.SIGHUP, before)
