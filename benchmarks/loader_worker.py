"""One way of making batches in its own process: opens it, makes batches on request, says what that took.

Started by `processes.Worker(module="loader_worker")`. What a process prepares ahead is there when its turn begins, so a
turn begins with untimed batches until that is used up, and it ends only when the process has come to rest: the next
one finds the machine idle, and the processor time of a turn is that of as many batches as it delivered.
"""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .worker import main, status_mb

# at rest: less processor time than this in a while of this length (/proc counts in hundredths of a second)
REST_CPU_S, REST_S, PATIENCE_S = 0.011, 0.1, 10.0


def limit_cores(count: int) -> int:
    """This process and its children on `count` cores, where the system can (Linux); how many there are now."""
    try:
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[:count])
        return min(count, len(mine))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def cpu_s() -> float:
    """Processor seconds of this process and of all that it has started, also those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_ticks, _descendants(os.getpid())))


def _descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(c) for c in file.read_text().split()]
        except OSError:
            # a thread that has just ended
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _ticks(pid: int) -> float:
    try:
        # the name, in brackets, may hold spaces
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(fields[i]) for i in (11, 12)) / os.sysconf("SC_CLK_TCK")


def rest() -> None:
    """Returns when this process and its children compute no more, or after a while."""
    before, until = cpu_s(), time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        time.sleep(REST_S)
        now = cpu_s()
        if now - before < REST_CPU_S:
            return
        before = now


class Service:
    """Answers requests; the state of one way at one stage."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def build(self, way: str, stage: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Opens a way at a stage and makes the first batches: one epoch, but at most `warmup`."""
        import torch

        from .loader_ways import WAYS, opened

        cores = limit_cores(settings["threads"])
        torch.set_num_threads(settings["threads"])
        self.torch, self.setting = torch, setting_of(settings)
        began = time.perf_counter()
        self.fetch, self.use = self.stack.enter_context(opened(WAYS[way], stage, self.setting))
        self.one()
        first = time.perf_counter() - began
        epoch = len(self.setting.source) // self.setting.batch
        for _ in range(min(epoch, settings["warmup"])):
            self.one()
        rest()
        return {"first_batch_s": first, "cores": cores, "images": len(self.setting.source)}

    def one(self) -> float:
        """One batch; returns how long it was waited for, in seconds."""
        began = time.perf_counter()
        batch = self.fetch()
        waited = time.perf_counter() - began
        self.use(batch)
        return waited

    def turn(self, warm: int, batches: int) -> dict[str, Any]:
        """`warm` untimed batches, `batches` timed ones.

        returns  milliseconds per timed batch, the share of them waited for a batch, processor milliseconds per image
        """
        cpu = cpu_s()
        for _ in range(warm):
            self.one()
        self.wait()
        began = time.perf_counter()
        waited = sum(self.one() for _ in range(batches))
        self.wait()
        took = time.perf_counter() - began
        rest()
        images = (warm + batches) * self.setting.batch
        return {
            "ms": 1000 * took / batches,
            "waited": waited / took,
            "cpu_ms_per_image": 1000 * (cpu_s() - cpu) / images,
        }

    def wait(self) -> None:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()

    def epochs(self, count: int) -> dict[str, Any]:
        """`count` epochs, one after another: resident memory in MB at the end of each."""
        steps = len(self.setting.source) // self.setting.batch
        found = []
        for _ in range(count):
            for _ in range(steps):
                self.one()
            found.append(status_mb("VmRSS"))
        return {"rss_mb": found, "steps_per_epoch": steps, "peak_mb": status_mb("VmHWM")}

    def gates(self, ways: list[str], settings: dict[str, Any]) -> dict[str, Any]:
        """Instead of `build`: the pictures of these ways beside those of PIL, for the same boxes and factors."""
        import torch

        from .loader_gates import pictures

        torch.set_num_threads(settings["threads"])
        return {"gates": [vars(g) for g in pictures(ways, setting_of(settings))]}

    def finish(self) -> dict[str, Any]:
        """Ends what it has started."""
        self.stack.close()
        return {}


def setting_of(settings: dict[str, Any]) -> Any:
    """`loader_ways.Setting` from what a request can hold."""
    from extrema_fast.config import DataConfig, from_dict
    from extrema_fast.data.sources import open_source

    from .loader_ways import Setting

    data = from_dict(settings["data"], DataConfig())
    return Setting(
        open_source(data.train, "train", limit=data.limit), data, tuple(settings["size"]), settings["batch"],
        settings["threads"], settings["model"], settings["device"],
    )  # fmt: skip


if __name__ == "__main__":
    main(Service())
