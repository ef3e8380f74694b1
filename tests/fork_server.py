"""A process that has imported vmoe and forks once for each command that a test runs.

Importing JAX, Flax and Orbax takes two seconds, a fork some milliseconds. What a fork gives is the
command in a process of its own, as ``python -m vmoe`` starts it: with its own streams, folder,
environment, limits, signals, exit status, and the ordinary end of an interpreter. Forking is safe
here because nothing has started a JAX backend yet, which ``_import_everything`` checks: the process
has one thread. The hash seed is the one thing that all commands of a server share.

A request is one message on the socket whose number is given: JSON, and the descriptors of stdin,
stdout, stderr and of a pipe that receives two lines, the process id and then the exit status.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import sys
from typing import Any

MESSAGE = 1 << 18  # bytes of a request at most


def serve(requests: socket.socket) -> list[str] | None:
    """Returns in the process of a command, with its words, and with None when the tests end."""
    _import_everything()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted pytest closes the socket
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE, 4)
        _reap(0 if not message else os.WNOHANG)
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            return _supervise(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _import_everything() -> None:
    import vmoe

    for module in pkgutil.walk_packages(vmoe.__path__, "vmoe."):
        importlib.import_module(module.name)
    for name in ("sklearn.datasets", "sklearn.model_selection"):  # imported where they are used
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads > 1:
        raise SystemExit(f"importing vmoe started {threads - 1} threads: forks would lack them")
    gc.collect()
    gc.freeze()  # so that collections in forks leave the shared pages alone


def _reap(options: int) -> None:
    """Waits for supervisors, so that the time they took counts as that of the tests."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _supervise(request: dict[str, Any], *descriptors: int) -> list[str]:
    """Forks the process of the command, in which this returns; here, waits for it and reports."""
    *streams, report = descriptors
    child = os.fork()
    if child == 0:
        os.close(report)
        _enter(request, streams)
        return request["words"]
    for stream in streams:
        os.close(stream)
    os.write(report, b"%d\n" % child)
    _, status = os.waitpid(child, 0)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _enter(request: dict[str, Any], streams: list[int]) -> None:
    """Takes over the streams, the folder, the environment and the limits of the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if (size := request["max_file_size"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


if __name__ == "__main__":
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is not None:
        sys.argv = ["vmoe", *words]
        from vmoe.__main__ import main

        sys.exit(main())
