"""A supervisor to be killed: forked, in a process group of its own, and watched."""

import contextlib
import os
import signal
import sys
import time

import psutil

HANG_SECONDS = 300
POLL_SECONDS = 0.004


class Job:
    """Run `work()` in a forked process; what it says goes to the file `talk`."""

    def __init__(self, work, talk):
        self.code = None
        self._children = []
        self._talk = talk
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.dup2(os.open(talk, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                code = work()
            finally:
                os._exit(code)
        self._process = psutil.Process(self.pid)

    def look(self):
        """Take note of its workers, and of its end; the exit code or None."""
        if self.code is None:
            with contextlib.suppress(psutil.Error):
                self._children += [
                    c for c in self._process.children() if c not in self._children
                ]
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds=HANG_SECONDS):
        """Wait for the end: the exit code, or None when it still runs."""
        deadline = time.monotonic() + seconds
        while self.look() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.code

    def wait_for(self, reached):
        """Wait until `reached()`; tell whether it came before the end."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.look() is None and time.monotonic() < deadline:
            if reached():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def kill(self, target, chance):
        """Kill with SIGKILL; tell whether there was anything left to kill."""
        if self.look() is not None:
            return False
        if target == "all":
            os.killpg(self.pid, signal.SIGKILL)
        elif target == "supervisor":
            os.kill(self.pid, signal.SIGKILL)
        else:
            workers = [c for c in self._children if is_worker(c)]
            if not workers:
                return False
            with contextlib.suppress(psutil.Error):
                chance.choice(workers).kill()
        return True

    def was_struck(self, target):
        """Tell, after its end, whether the kill came before the end came by itself."""
        if target == "worker":
            return "is lost: killed by signal 9" in self._talk.read_text()
        return self.code == -signal.SIGKILL

    def sweep(self):
        """Count the workers that outlived their supervisor, and end what is left."""
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        _, alive = psutil.wait_procs(self._children, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return len(alive)


def is_worker(process):
    try:
        dead = process.status() == psutil.STATUS_ZOMBIE
        return not dead and any("spawn_main" in word for word in process.cmdline())
    except psutil.Error:
        return False
