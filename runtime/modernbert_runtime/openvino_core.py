"""OpenVINO's `Core`: one for the whole process, which stays until its end."""

import threading
from typing import Any

_LOCK = threading.Lock()
_CORES: list[Any] = []


def openvino_core() -> Any:
    """The `openvino.Core` of this process, made when first asked for.

    Every Core's CPU plugin gives the thread that loads it a stack for signal handlers, and frees that stack when the
    Core goes: while it is in use, if Cores do not go in reverse order, or go in another thread. The next signal then
    ends the process without a word, such as SIGCHLD after a subprocess (seen with 2026.4; the plugin has done so since
    pull request 11894 of OpenVINO).

    Raises:
        ImportError: openvino is not installed.
    """
    import openvino

    with _LOCK:
        if not _CORES:
            _CORES.append(openvino.Core())
        return _CORES[0]
