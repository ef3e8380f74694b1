"""A server that imports vmoe once and forks a process for each command that a test runs.

Importing JAX, Flax and Orbax takes two seconds, a fork a few milliseconds. A forked command behaves
like ``python -m vmoe``: it has its own streams, working directory, environment, limits, signal
handlers and exit status, waits for its threads and runs its exit functions. It then ends without
destroying its modules, which would write to, and therefore copy, most of the memory that it shares
with the server, and take 0.2 seconds. All commands of a server share one hash seed. Forking is safe
because the server has a single thread: no JAX backend has started, and ``_import_everything``
checks the number of threads.

A request is one message on the socket whose descriptor is given: JSON, with the descriptors of
stdin, stdout, stderr and a pipe. The pipe receives two lines: the process id, then the exit status.
"""

import atexit
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

LAZY = "scipy.optimize", "scipy.stats", "sklearn.datasets", "sklearn.model_selection"
MESSAGE = 1 << 18  # maximum size of a request in bytes

returned: list[int] = []  # the return value of the command's main function


@atexit.register  # the first that is registered is the last that is called
def _end() -> None:
    if returned:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(returned[0])


def serve(requests: socket.socket) -> list[str] | None:
    """Returns its arguments in each command's process, and None in the server when tests end."""
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
    from vmoe.__main__ import XLA_LOG

    os.environ.update(XLA_LOG)  # read by jax when it is imported

    for module in pkgutil.walk_packages(vmoe.__path__, "vmoe."):
        importlib.import_module(module.name)
    for name in LAZY:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads > 1:
        raise SystemExit(f"importing vmoe started {threads - 1} threads: forks would lack them")
    gc.collect()
    gc.freeze()  # so that garbage collection in a fork copies no shared pages
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py


def _reap(options: int) -> None:
    """Waits for finished supervisors, so that their CPU time counts as the tests' own."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _supervise(request: dict[str, Any], *descriptors: int) -> list[str]:
    """Forks the command's process and returns in it; the parent waits and reports its status."""
    *streams, report = descriptors
    child = os.fork()
    if child == 0:
        os.close(report)
        _enter(request, streams)
        return request["arguments"]
    for stream in streams:
        os.close(stream)
    os.write(report, b"%d\n" % child)
    _, status = os.waitpid(child, 0)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _enter(request: dict[str, Any], streams: list[int]) -> None:
    """Sets the streams, working directory, environment and limits of the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    changed = dict(request["environment"].items() - os.environ.items())
    os.environ.clear()
    os.environ.update(request["environment"])
    if paths := changed.get("PYTHONPATH"):
        sys.path[:0] = paths.split(os.pathsep)
    _configure_jax(changed)
    encoding = os.environ.get("PYTHONIOENCODING")
    lines = 1 if os.environ.get("PYTHONUNBUFFERED") else -1  # the interpreter reads it earlier
    sys.stdout = open(1, "w", lines, encoding=encoding, closefd=False)  # noqa: SIM115 (as there)
    sys.stderr = open(2, "w", 1, encoding=encoding, closefd=False)  # noqa: SIM115
    if (size := request["max_file_size"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _configure_jax(variables: dict[str, str]) -> None:
    """Gives JAX the settings that it has read from other variables when it was imported."""
    import jax

    for name, text in variables.items():
        if name.lower() in jax.config.values:
            try:
                value = json.loads(text.lower())  # a number or a boolean
            except ValueError:
                value = text
            jax.config.update(name.lower(), value)


if __name__ == "__main__":
    arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        sys.argv = ["vmoe", *arguments]
        from vmoe.__main__ import main

        returned.append(main())
