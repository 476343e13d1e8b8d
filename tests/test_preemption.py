"""SIGTERM: what it does at which moment, and the command's status."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from covid_flax import command, preemption


def _sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_is_noted_where_a_save_comes_first():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Terminated), preemption.deferred():
        assert not preemption.noticed(together=True)
        _sigterm()
        assert preemption.noticed(together=True) and preemption.noticed(together=False)
    assert signal.getsignal(signal.SIGTERM) == before
    with preemption.deferred():
        assert not preemption.noticed(together=True)


def test_an_interrupt_that_a_garbage_collection_swallows_is_heeded_later():
    """JAX has such a callback, and Python drops what is raised in one."""
    code = """
import gc, os, signal
from covid_flax import preemption
signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run where it is ignored
preemption.notice_interrupts()
preemption.heed_interrupt()
gc.callbacks.append(lambda phase, info: phase == "stop" or os.kill(os.getpid(), signal.SIGINT))
gc.collect()
gc.callbacks.clear()
print("swallowed", flush=True)
try:
    preemption.heed_interrupt()
except KeyboardInterrupt:
    print("heeded", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["swallowed", "heeded"], done.stderr


def test_an_interrupt_while_a_command_is_imported_leaves_no_traceback():
    usual = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = usual + "from covid_flax.errors import die_of_interrupts as die; die()\n"
    code += "signal.raise_signal(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    code = usual + "from covid_flax import errors, preemption; errors.die_of_interrupts()\n"
    code += "preemption.notice_interrupts(); signal.raise_signal(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr  # the command's to tell, from then on


def test_what_the_shell_has_ignore_interrupts_does():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "from covid_flax import preemption; preemption.notice_interrupts()\n"
    code += "signal.raise_signal(signal.SIGINT); preemption.heed_interrupt(); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "goes on\n", done.stderr


def test_a_second_one_does_not_wait():
    code = """
import os, signal, time
from covid_flax import preemption
with preemption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # as make and srun hand it on: one and the same
    time.sleep(preemption._APART_S + 0.5)
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    print("too late")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (preemption.STATUS, "noted\n")


def test_a_second_one_ends_a_call_that_no_python_code_interrupts():
    """As a compilation, or a collective that waits for a process that hangs."""
    code = """
import hashlib, os, signal, threading, time
from covid_flax import preemption
def send():
    for _ in range(2):
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)
with preemption.deferred():
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)  # minutes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (preemption.STATUS, "")


def test_a_thread_may_train():
    """As in a sweep; Python lets the main thread alone handle signals."""
    failed = []

    def work():
        try:
            with preemption.deferred():
                pass
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_the_command_says_so_and_ends_with_143(monkeypatch, capsys):
    def main():
        with preemption.deferred():
            _sigterm()

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as e:
        command.run_command(main)
    assert e.value.code == 143
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "SIGTERM" in told and "goes on" in told


@pytest.mark.parametrize("resumes", [False, True])
def test_an_interrupted_command_ends_with_130(resumes, monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as e:
        command.run_command(main, resumes=resumes)
    assert e.value.code == 130
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ("goes on" in told) == resumes


def test_programs_are_kept_in_the_cache_folder_and_a_closed_pipe_ends_a_command(tmp_path):
    code = """
import jax
from covid_flax.command import run_command
def main():
    while True:
        print(jax.config.jax_compilation_cache_dir, flush=True)
run_command(main)
"""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert process.stdout.readline() == f"{tmp_path / 'covid_flax' / 'xla'}\n"
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""
