"""One provider in its own process: builds it, steps it on request, says what it took.

Started by `processes.Worker`; requests and answers are JSON lines on standard input and output. A process of its
own keeps peak memory honest, and one provider's failure away from the others.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from extrema_fast.training.memory import is_out_of_memory


def status_mb(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB; 0 where /proc has none.

    Not ru_maxrss: that keeps the memory of the parent at the moment of the fork.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def forget_peak() -> bool:
    """Starts the peak resident memory anew (Linux); False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def whole_fp32(torch: Any) -> None:
    """fp32 means fp32 on a GPU too: cuDNN's convolutions would take TF32."""
    torch.backends.cudnn.allow_tf32 = False


class Service:
    """Answers requests; the state of one provider."""

    def __init__(self) -> None:
        self.samples_ms: list[float] = []

    # ---- requests --------------------------------------------------------------------------------

    def build(
        self,
        provider: dict,
        config: dict,
        device: str,
        precision: str,
        sets: int,
        threads: int,
        weights: str = "",
    ) -> dict[str, Any]:
        """Builds the provider and its inputs; nothing has been stepped yet."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        from extrema_fast.config import Config, from_dict
        from extrema_fast.training.plan import flops_per_image

        from .gates import check_inputs, random_images, with_coins
        from .providers import Provider

        self.torch = torch
        self.device = torch.device(device)
        if precision == "fp32":
            whole_fp32(torch)
        self.cfg = from_dict(config, Config())
        self.inputs = random_images(self.cfg, sets, self.device)
        for inputs in self.inputs:
            check_inputs(inputs.images)
        self.gpu = self.device.type == "cuda"
        began = time.perf_counter()
        self.stepper = Provider(**provider).make(self.cfg, self.device, precision)
        if weights:
            self.stepper.load(Path(weights))
        self.wait()
        built = time.perf_counter() - began
        self.first = with_coins(self.inputs[0], self.cfg, self.device)
        self.count = 0
        self.before_mb = self.resident_mb()
        return {
            "build_s": built,
            "before_first_step_mb": self.before_mb,
            "gflops_per_image": (self.stepper.flops_per_image() or flops_per_image(self.cfg)) / 1e9,
            "threads": torch.get_num_threads(),
        }

    def warmup(self, steps: int) -> dict[str, Any]:
        """The first step, on given masks and coins, then `steps - 1` ordinary ones."""
        began = time.perf_counter()
        self.stepper.step(self.first)
        loss = self.stepper.loss()
        first = time.perf_counter() - began
        for _ in range(steps - 1):
            self.one()
        self.wait()
        self.startup_peak_mb = self.peak_mb()
        self.restart_peak()
        return {"first_step_s": first, "first_loss": loss}

    def turn(self, warm: int, steps: int) -> dict[str, Any]:
        """`warm` untimed steps, then `steps` timed ones: milliseconds of each."""
        for _ in range(warm):
            self.one()
        self.wait()
        if self.gpu:
            marks = [self.torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            marks[0].record()
            for mark in marks[1:]:
                self.one()
                mark.record()
            self.wait()
            samples = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
            # the next provider's turn may need the memory
            self.torch.cuda.empty_cache()
        else:
            samples = []
            for _ in range(steps):
                began = time.perf_counter()
                self.one()
                samples.append(1000 * (time.perf_counter() - began))
        self.samples_ms += samples
        return {"samples_ms": samples}

    def memory(self) -> dict[str, Any]:
        """Peak since the warm-up, and what the steps add to what was there before the first one."""
        peak = self.peak_mb()
        return {
            "peak_mb": peak,
            "startup_peak_mb": self.startup_peak_mb,
            "before_first_step_mb": self.before_mb,
            "step_adds_mb": peak - self.before_mb,
        }

    def profile(self) -> dict[str, Any]:
        """A profiled step: the share of the matrix products; again while another program disturbs it."""
        from . import profiles

        usual = sorted(self.samples_ms)[len(self.samples_ms) // 2] if self.samples_ms else float("inf")
        found: list[dict[str, Any]] = []
        while len(found) < 3 and not any(f["step_ms"] < 1.25 * usual for f in found):
            found.append(profiles.products(self.one, self.device))
        return {"products": min(found, key=lambda f: f["step_ms"])}

    def components(self, config: dict, device: str, threads: int, out: str) -> dict[str, Any]:
        """Instead of `build`: the product's own profile, by component of the method."""
        from extrema_fast.config import Config, from_dict
        from extrema_fast.tools.profile import profile

        settings = {"train": {"compile": "none"}, "system": {"device": device, "threads": threads}}
        cfg = from_dict(settings, from_dict(config, Config()))
        found = profile(cfg, out, steps=1, warmup=20 if device.startswith("cuda") else 2, synthetic=True)
        return {key: found[key] for key in ("rows", "products", "step_ms", "traced_step_ms")}

    def gates(
        self, providers: list[dict], config: dict, device: str, threads: int, weights: str
    ) -> dict[str, Any]:
        """Instead of `build`: the exact comparison of every provider, and the first step's true loss."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        from extrema_fast.config import Config, from_dict

        from . import gates
        from .providers import Provider

        whole_fp32(torch)
        cfg, on, file = from_dict(config, Config()), torch.device(device), Path(weights)
        truth = gates.first_loss(cfg, on, file)
        checked = gates.exact([Provider(**p) for p in providers], cfg, on, file.parent)
        return {"first_loss": truth, "gates": [vars(g) for g in checked]}

    def encoder(self, threads: int, device: str, dtype: str, **case: Any) -> dict[str, Any]:
        """Instead of `build`: an encoder of `encode` (case: arguments of `encoders.Encoding`)."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        if dtype == "fp32":
            whole_fp32(torch)
        from .encoders import Encoding

        self.torch, self.device = torch, torch.device(device)
        self.gpu, self.count = self.device.type == "cuda", 0
        self.stepper = Encoding(device=self.device, dtype=dtype, **case)
        return {"patches": self.stepper.patches, "threads": torch.get_num_threads()}

    def encoding(self, kept: int, check: bool) -> dict[str, Any]:
        """Of an `encoder`: keeps so many patches (0: all) from now on; check: its first pass, against float64."""
        self.inputs = self.stepper.choose(kept)
        return self.stepper.check() if check else {}

    def rates(self, device: str, precisions: list[str], threads: int) -> dict[str, Any]:
        """Instead of `build`: gets ready to measure large products and copies."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        from .rates import Rates

        self.measured = Rates(device, precisions)
        return {}

    def rate(self) -> dict[str, Any]:
        """One measurement of the rates."""
        return self.measured.sample()

    # ---- helpers ---------------------------------------------------------------------------------

    def one(self) -> None:
        self.stepper.step(self.inputs[self.count % len(self.inputs)])
        self.count += 1

    def wait(self) -> None:
        if self.gpu:
            self.torch.cuda.synchronize()

    def resident_mb(self) -> float:
        return self.torch.cuda.memory_allocated() / 2**20 if self.gpu else status_mb("VmRSS")

    def peak_mb(self) -> float:
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.gpu else status_mb("VmHWM")

    def restart_peak(self) -> None:
        if self.gpu:
            self.torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()


def serve(requests: TextIO, answers: TextIO, service: Any) -> None:
    """Calls `service`'s methods until the requests end; an exception is an answer with `error`."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(service, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
            answer = {"error": text, "out_of_memory": is_out_of_memory(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(service: Any) -> None:
    """Keeps standard output for answers: whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers, service)


if __name__ == "__main__":
    main(Service())
