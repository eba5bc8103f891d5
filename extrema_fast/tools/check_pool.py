"""Many files checked at once, each process of `image_check.py` driven by a thread of its own.

A process that dies, because a decoder crashed or the machine ran out of memory, is replaced, and its files are
tried one by one: the one it dies of again is the one to blame.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from ..errors import ExtremaError, UsageError
from .image_check import Verdict

# path, offset, length (-1: the whole file)
File = tuple[str, int, int]

BATCH = 16
# batches given out per process, so that none waits for the slowest
_AHEAD = 4

# the same places for modules as here; -I keeps the folder it is started in out of them
_CODE = (
    "import sys; strict, pixels, *sys.path = sys.argv[1:]; "
    "from extrema_fast.tools.image_check import serve; serve(strict == '1', int(pixels))"
)


class Pool:
    """Processes that check files; a context manager that ends them.

    processes  how many at most
    decoder    name of the decoder, "" before the first result
    raises     UsageError when Pillow is missing
    """

    def __init__(self, processes: int, *, strict: bool, max_pixels: int) -> None:
        self.decoder = ""
        self._arguments = ["1" if strict else "0", str(max_pixels), *sys.path]
        self._count, self._closed = processes, False
        self._own = threading.local()
        self._running: list[subprocess.Popen[str]] = []
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="check")

    def check(self, files: Sequence[File]) -> Iterator[list[Verdict]]:
        """Verdicts in the order of `files`, some at a time."""
        starts = iter(range(0, len(files), BATCH))
        waiting: deque[Future[list[Verdict]]] = deque()
        while True:
            free = _AHEAD * self._count - len(waiting)
            waiting += [self._threads.submit(self._batch, files[s : s + BATCH]) for s in islice(starts, free)]
            if not waiting:
                return
            yield waiting.popleft().result()

    def _batch(self, files: Sequence[File]) -> list[Verdict]:
        answers = self._ask(files)
        if answers is not None:
            return answers
        if len(files) == 1:
            return [Verdict(status=f"crashes the decoder: the process ended with {self._own.code}")]
        return [self._batch([file])[0] for file in files]

    def _ask(self, files: Sequence[File]) -> list[Verdict] | None:
        """The answers of this thread's process; None when it died over the question."""
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        try:
            process.stdin.write(json.dumps(files) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        # it may have died over its answer
        if answer.endswith("\n"):
            return [Verdict(*fields) for fields in json.loads(answer)]
        self._own.code, self._own.process = process.wait(), None
        return None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-c", _CODE, *self._arguments]
        # a session of its own: Ctrl-C is for this process alone, which then ends the others
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._running.append(process)
        if self._closed:
            process.kill()
        hello = process.stdout.readline()
        if not hello:
            raise ExtremaError(f"a process that decodes images ended at once, with {process.wait()}")
        name = json.loads(hello)
        if not isinstance(name, str):
            raise UsageError(f'reading images needs {name["error"]}: pip install "extrema-fast[train]"')
        self.decoder = name
        return process

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for process in self._running:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._running:
            process.communicate()
