"""SIGTERM: what it does at which moment, and the command's status."""

import os
import signal

import pytest

from covid_flax import command, preemption


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    preemption.catch()
    yield
    signal.signal(signal.SIGTERM, before)


def _sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_ends_at_once_where_nothing_is_to_be_saved():
    with pytest.raises(preemption.Terminated):
        _sigterm()


def test_is_noted_where_a_save_comes_first():
    with pytest.raises(preemption.Terminated), preemption.deferred():
        assert not preemption.noticed(together=True)
        _sigterm()
        assert preemption.noticed(together=True) and preemption.noticed(together=False)
    with preemption.deferred():
        assert not preemption.noticed(together=True)


def test_a_second_one_does_not_wait():
    with preemption.deferred():
        _sigterm()
        with pytest.raises(preemption.Terminated):
            _sigterm()
        raise_nothing_more = preemption.noticed(together=True)
        preemption.catch()
    assert raise_nothing_more


def test_the_command_says_so_and_ends_with_143(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command"])
    monkeypatch.setattr(command.distributed, "define_flags", lambda: None)
    monkeypatch.setattr(command.distributed, "initialize", lambda: None)
    with pytest.raises(SystemExit) as e:
        command.run_command(_sigterm, together=True)
    assert e.value.code == 143
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "SIGTERM" in told and "goes on" in told
