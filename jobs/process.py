"""A worker's process: bound to its device and its log, ended with its supervisor."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from jobs.devices import binding
from jobs.mail import Outbox
from jobs.signals import STOP_SIGNALS
from jobs.stages import PipelineLike, load_pipeline
from jobs.worker import Row, Worker, WorkerSpec, log_trace, message_of, warm_up

BEAT_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def main(spec: WorkerSpec, pipe: Connection) -> None:
    """Run a worker until it is told to end. The process starts here."""
    outbox = Outbox(pipe)
    try:
        _settle(spec)
    except OSError as error:  # not even its log can be opened
        outbox.send("fatal", error=message_of(error))
        return
    try:
        pipeline, info = _load(spec)
    except Exception as error:
        log_trace()
        outbox.send("failed", error=message_of(error))
        return
    outbox.send("ready", **info)
    threading.Thread(target=_beat, args=(outbox,), daemon=True).start()
    worker = Worker(spec, pipeline, outbox, info)
    threading.Thread(target=worker.listen, args=(pipe,), daemon=True).start()
    try:
        worker.run()
    except OSError as error:
        log_trace()
        outbox.send("fatal", error=message_of(error))


def _settle(spec: WorkerSpec) -> None:
    """Bind the process to its device and its log before anything heavy is imported."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    if spec.device_target == "Ascend":
        os.environ.update(binding(spec.device_id))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(spec.threads))
    os.environ.setdefault("GLOG_v", "3")
    log = (spec.root / "logs" / f"{spec.name}.log").open("ab", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def _die_with_parent() -> None:
    """Have the kernel end this process with its supervisor, in mid-call even (Linux).

    Elsewhere the closed pipe does it, as soon as the call in flight lets go.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def _beat(outbox: Outbox) -> None:
    """Tell the supervisor now and then that this process is alive."""
    while True:
        time.sleep(BEAT_SECONDS)
        try:
            outbox.send("beat")
        except OSError:
            return


def _load(spec: WorkerSpec) -> tuple[PipelineLike, Row]:
    pipeline = load_pipeline(spec.pipeline, spec.pipeline_options)
    warm_up()
    mindspore = sys.modules.get("mindspore")
    if mindspore and spec.device_target == "Ascend":
        _check_binding(mindspore)
    version = getattr(mindspore, "__version__", None)
    return pipeline, {"pid": os.getpid(), "mindspore_version": version}


def _check_binding(mindspore: Any) -> None:
    visible = mindspore.hal.device_count("Ascend")
    if visible != 1:
        raise RuntimeError(
            f"{visible} devices are visible to this worker instead of one: "
            "ASCEND_RT_VISIBLE_DEVICES did not take effect"
        )
