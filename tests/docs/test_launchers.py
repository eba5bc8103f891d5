"""The files that start a run on several nodes do what they say.

Covers: the sbatch script with a stand-in for srun, which starts two processes with Slurm's variables: preempted, back
in the queue, continued, complete, a wrong setting, killed without a word, killed while it starts, cancelled, one
torchrun for each node, stopped before the first step; the commands of the Kubernetes jobs, as torchrun and our command
line read them, their time to save and their memory; the function that Ray Train calls, in a thread under Ray's process
group.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from extrema_fast.config import to_dict
from tests.docs.test_pages import check_cli
from tests.training.conftest import status, tiny

RECIPES = Path(__file__).resolve().parents[2] / "docs/recipes"

# what follows `python -m extrema_fast` goes to the test, which answers with the exit code; nodes run what else there is
SRUN = """#!/usr/bin/env python3
import json, os, socket, subprocess, sys
assert os.environ["SRUN_CPUS_PER_TASK"] == "3"
words = [w for w in sys.argv[1:] if w != "--kill-on-bad-exit=0"]
if words[:3] == ["python", "-m", "extrema_fast"]:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(os.environ["ASK"])
        s.sendall(json.dumps(words[3:]).encode() + b"\\n")
        sys.exit(int(s.recv(10)))
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
running = [subprocess.Popen(words, env=os.environ | {"SLURM_NODEID": str(n)}) for n in nodes]
sys.exit(max(p.wait() for p in running))
"""
SCONTROL = """#!/bin/sh
case $1 in
    requeue) echo "$2" >> "$(dirname "$0")/requeued" ;;
    show) case $2 in job) echo "JobId=$3 JobState=$STATE" ;; *) printf 'node0\\nnode1\\n' ;; esac ;;
esac
"""
TORCHRUN = """#!/usr/bin/env python3
import json, os, signal, sys
with open(os.path.dirname(sys.argv[0]) + "/torchrun" + os.environ["SLURM_NODEID"] + ".json", "w") as f:
    json.dump(sys.argv[1:], f)
assert 0 < int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 300
if os.environ["SIGNALS"] == os.environ["SLURM_NODEID"]:
    os.kill(os.getppid(), signal.SIGTERM)
sys.exit(1)
"""
PREEMPT = """
import os, signal
from extrema_fast import train
original = train.train_step
def stopping(run, batch):
    if run.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(run, batch)
train.train_step = stopping
"""


@pytest.fixture
def programs(tmp_path):
    """A folder with stand-ins for Slurm's programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return folder


@pytest.fixture
def sbatch(programs, tmp_path, run_cli):
    """`sbatch(*words, tasks=2, restarts=0, ...)` -> (exit code, output, whether it is back in the queue)."""

    def free_port() -> int:
        for port in range(21000, 30000):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)):
                    return port
        raise AssertionError("no free port")

    def run(*words: object, tasks=2, restarts=0, setup="", answer=None, state="RUNNING", signals=""):
        address, said = str(tmp_path / "ask"), []
        job = str(free_port() - 20000)
        step = {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": job}
        step |= {"GLOO_SOCKET_IFNAME": "lo"}
        envs = [step | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(tasks)]

        def serve(server: socket.socket) -> None:
            try:
                connection, _ = server.accept()
            except OSError:  # the script ended without asking
                return
            with connection, connection.makefile() as lines:
                words = json.loads(lines.readline())
                codes, text = ([answer], "") if answer else run_cli(*words, env=envs, setup=setup)
                said.append(text)
                connection.sendall(str(max(codes)).encode())

        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "ASK": address, "SLURM_JOB_ID": job}
        env |= {"SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_RESTART_COUNT": str(restarts)}
        env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_GPUS_ON_NODE": "8"}
        env |= {"SLURM_CPUS_PER_TASK": "3", "STATE": state, "SIGNALS": signals}
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen()
            thread = threading.Thread(target=serve, args=(server,), daemon=True)
            thread.start()
            command = ["bash", RECIPES / "slurm.sbatch", *map(str, words)]
            done = subprocess.run(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200
            )
            # wakes `accept`, whose number would be another file's once the socket is closed
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
        os.unlink(address)
        queue = programs / "requeued"
        requeued = queue.exists() and queue.read_text() == f"{job}\n"
        queue.unlink(missing_ok=True)
        return done.returncode, done.stdout + "".join(said), requeued

    return run


def test_a_preempted_job_goes_back_and_continues(sbatch, tmp_path):
    out, file = tmp_path / "run", tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(tiny(out))))
    words = (out, "smoke", "--config", file)
    code, text, requeued = sbatch(*words, setup=PREEMPT)
    assert (code, requeued) == (0, True), text
    assert (status(out)["state"], status(out)["exit_code"], status(out)["step"]) == ("preempted", 75, 3)
    # killed before it wrote a word, again and again
    assert sbatch(*words, answer=137)[::2] == (0, True)
    assert sbatch(*words, answer=137, restarts=20)[::2] == (137, False)
    # by the signal, while Python starts
    assert sbatch(*words, answer=143)[::2] == (0, True)
    # scancel kills, too, and the job is not to come back
    assert sbatch(*words, answer=137, state="COMPLETING")[::2] == (137, False)
    code, text, requeued = sbatch(*words, restarts=1)
    assert (code, requeued) == (0, False) and "continuing at step 3 of 6" in text, text
    assert (status(out)["state"], status(out)["exit_code"]) == ("complete", 0)
    # not the end of the run before it
    code, text, requeued = sbatch(*words, "--train.epochs", "3")
    assert (code, requeued) == (2, False) and "train.epochs" in text, text


def test_one_torchrun_for_each_node(sbatch, programs):
    code, text, requeued = sbatch("run", "paper_base_80x5", "--data.train", "a folder", tasks=1)
    assert (code, requeued) == (1, False), text
    for node in range(2):
        check_torchrun(json.loads((programs / f"torchrun{node}.json").read_text()), node, "node0")
    code, text, requeued = sbatch("run", "paper_base_80x5", tasks=1, signals="1")
    assert (code, requeued) == (0, True), text


def check_torchrun(words: list[str], node: int, master: str) -> None:
    """Raises AssertionError unless torchrun starts process groups of ours on two nodes of eight GPUs."""
    args = get_args_parser().parse_args(words)
    assert (args.nnodes, args.node_rank, args.nproc_per_node, args.master_addr) == ("2", node, "8", master)
    assert args.module and args.training_script == "extrema_fast"
    check_cli(args.training_script_args)
    assert args.training_script_args[:2] == ["pretrain", "paper_base_80x5"]


def check_pod(spec: dict) -> None:
    """Raises AssertionError unless a pod leaves its processes time to save, and NCCL shared memory."""
    (container,) = spec["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < spec["terminationGracePeriodSeconds"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in spec["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_kubernetes():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: docs)")
    service, job = yaml.safe_load_all((RECIPES / "kubernetes_job.yaml").read_text())
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    (container,) = pod["containers"]
    check_pod(pod)
    for node in range(job["spec"]["completions"]):
        args = [w.replace("$(JOB_COMPLETION_INDEX)", str(node)) for w in container["args"]]
        check_torchrun(args, node, f"{name}-0.{pod['subdomain']}")
    (job,) = yaml.safe_load_all((RECIPES / "kubernetes_pytorchjob.yaml").read_text())
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        check_pod(replicas["template"]["spec"])
        (container,) = replicas["template"]["spec"]["containers"]
        assert container["command"] == ["sh", "-c"]
        line = (
            container["args"][0]
            .replace("$RANK", "1")
            .replace("$MASTER_ADDR", "m")
            .replace("$MASTER_PORT", "2")
        )
        words = shlex.split(line)
        assert words[:2] == ["exec", "torchrun"]
        check_torchrun(words[2:], 1, "m")


RAY = """
import importlib.util, json, os, threading, torch
spec = importlib.util.spec_from_file_location("ray_train", RECIPE)
ray_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ray_train)
torch.distributed.init_process_group("cpu:gloo,cuda:gloo", init_method="env://")
worker = threading.Thread(target=ray_train.train, args=(OPTIONS,))
worker.start()
worker.join()
torch.distributed.destroy_process_group()
"""


def test_the_function_of_ray_train(run_cli, tmp_path):
    changes = to_dict(tiny())
    del changes["out"]
    options = {"preset": "smoke", "changes": changes, "out": str(tmp_path / "run")}
    setup = RAY.replace("RECIPE", repr(str(RECIPES / "ray_train.py"))).replace("OPTIONS", repr(options))
    codes, text = run_cli("--version", processes=2, setup=setup)
    assert codes == [0, 0] and status(tmp_path / "run")["state"] == "complete", text
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2
