"""Runs of the method scripts as processes of their own, for the tests of whole runs and of faults.

Importing torch takes seconds, so most processes are forked from one server that has imported everything: real processes
with their own exit status, standard error and signals. `torchrun=True` and `command` start the real thing."""
import atexit
import functools
import importlib
import json
import multiprocessing as mp
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # flags of a tiny run, per script
    "slotcon": ["--prototypes", "8", "--dim", "16", "--hidden", "32"],
    "scfs": ["--local-size", "16", "--local-crops", "2", "--out-dim", "32", "--dim", "16", "--hidden", "32"],
    "saliency_cl": ["--dim", "16", "--hidden", "32", "--crop-size", "16"],
    "cvsa": ["--dim", "16", "--hidden", "32", "--dense-hidden", "32"],
}
SCRIPTS = [name for name in METHODS if (ROOT / f"{name}.py").exists()]
TINY = ["--preset", "demo", "--batch-size", "16", "--steps", "10", "--precision", "fp64", "--image-size", "32",
        "--canvas", "48", "--knn-every", "0", "--log-every", "1", "--save-every", "1", "--workers", "0"]
PATIENCE = 300  # seconds until a run counts as hanging; only a failing test waits so long
RATES = ("images_per_second", "waiting", "memory_gb")  # what no two runs have in common

for name in SCRIPTS:  # in the server: every process forked from it has them
    importlib.import_module(name)


def flags(script, out, *more):
    """The command line of a tiny run on `pictures()`; of a flag given twice argparse takes the last."""
    return ["--data", str(pictures()), "--out", str(out), *TINY, *METHODS[script], *map(str, more)]


@functools.cache
def work():
    """A folder for what several tests share."""
    folder = Path(tempfile.mkdtemp(prefix="runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def pictures():
    """64 small PNGs of mixed sizes in one folder, without labels: what the runs of most tests train on."""
    from common import scenes
    images, folder = scenes(range(64), 64)[0], work() / "pictures"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[:, :40 + i % 24, :64 - i % 17].permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return folder


@functools.cache
def reference(script):
    """Folder of an uninterrupted tiny run, one process."""
    out = work() / script
    Run(script, flags(script, out)).wait()
    return out


@functools.cache
def reference_of_two(script):
    """The same by torchrun with two processes."""
    out = work() / f"{script}-of-two"
    Run(script, flags(script, out), torchrun=["--nproc_per_node=2"]).wait()
    return out


def server():
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["launch"])
    return context


def play(script, argv, environment, errors, output, before):  # in the forked process: what `python script.py` does
    import common
    os.environ.update(environment)
    for fd, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *argv]
    if before:
        before()
    module = importlib.import_module(script)
    status = 0
    try:
        common.run_script(module.train, module.parse_args)
    except SystemExit as end:  # which, as at the end of a script, lets go of the frames and the loaders in them
        status = end.code
    sys.exit(status)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Run:
    """A script at work. `processes`: its ranks, forked, one standard error a rank; torchrun: by the real torchrun, one
    standard error; command: True for a plain `python script.py`. `before`: called in the forked process first."""

    number = 0

    def __init__(self, script, argv, processes=1, torchrun=(), command=False, before=None):
        self.script, self.argv = script, [str(a) for a in argv]
        self.out = Path(self.argv[self.argv.index("--out") + 1]) if "--out" in self.argv else None
        Run.number += 1
        stem = work() / f"{script}-{Run.number}"
        self.errors = [Path(f"{stem}-{rank}.err") for rank in range(1 if torchrun or command else processes)]
        self.output, self.popen, self.forks = Path(f"{stem}.out"), None, []
        if torchrun or command:
            program = [sys.executable, str(ROOT / f"{script}.py")]
            if torchrun:
                program[1:1] = ["-m", "torch.distributed.run", "--standalone", *torchrun]
            with open(self.errors[0], "wb") as err, open(self.output, "wb") as out:
                self.popen = subprocess.Popen(program + self.argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                                              env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.group = os.getpgid(self.popen.pid)
            return
        context, port = server(), str(free_port())
        for rank in range(processes):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            fork = context.Process(target=play, args=(script, self.argv, environment if processes > 1 else {},
                                                      str(self.errors[rank]), str(self.output), before))
            fork.start()
            self.forks.append(fork)

    def alive(self):
        return self.popen.poll() is None if self.popen else any(f.is_alive() for f in self.forks)

    def kill(self, number=signal.SIGKILL, rank=0):
        os.kill(self.popen.pid if self.popen else self.forks[rank].pid, number)

    def until(self, true, what):
        """Waits until true(), while the run goes on."""
        end = time.monotonic() + PATIENCE
        while not true():
            assert self.alive(), f"the run ended before {what}:\n{self.said()}"
            if time.monotonic() > end:
                self.stop()
                raise AssertionError(f"no {what} in {PATIENCE} s:\n{self.said()}")
            time.sleep(0.005)
        return self

    def until_step(self, step):
        """Waits until a step is logged, or a later one."""
        def there():
            lines = read_log(self.out, torn=True)
            return bool(lines) and lines[-1]["step"] >= step
        return self.until(there, f"step {step}")

    def wait(self, *expected):
        """Waits for the end; the exit status, of every rank, has to be among `expected` (0). -> standard error"""
        end = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > end:
                self.stop()
                raise AssertionError(f"hangs:\n{self.said()}")
            time.sleep(0.005)
        found = [self.popen.returncode] if self.popen else [f.exitcode for f in self.forks]
        assert all(status in (expected or (0,)) for status in found), f"exit status {found}:\n{self.said()}"
        return self.said()

    def stop(self):
        if self.popen and self.popen.poll() is None:
            os.killpg(self.group, signal.SIGKILL)
            self.popen.wait()
        for fork in self.forks:
            if fork.is_alive():
                fork.kill()
                fork.join()

    def said(self):
        return "".join(path.read_text(errors="replace") for path in self.errors if path.exists())

    def refusal(self):
        """Waits for the end of a run that has to end with exit status 2, one last line and no traceback. -> the line"""
        said = self.wait(2)
        assert "Traceback" not in said and said.endswith("\n"), said
        last = said.splitlines()[-1]
        assert last.startswith(f"{self.script}.py: ") and said.count(f"{self.script}.py: ") == 1, said
        return last


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def read_log(out, torn=False):
    """Lines of log.jsonl; torn: a last line that is being written may be left out."""
    path = Path(out) / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    assert torn or lines[-1] == ""
    return [json.loads(line) for line in lines[:-1]]


def steps_of(out):
    return [line["step"] for line in read_log(out)]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def leaves(x, name=""):
    """(name, tensor or number) of all that a checkpoint holds but its settings."""
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else None
    if items is None:
        yield name, x
    else:
        for k, v in items:
            if (name, k) != ("", "settings"):
                yield from leaves(v, f"{name}/{k}")


def assert_same_tensors(out, reference):
    found, wanted = (dict(leaves(load(Path(folder) / "checkpoint.pt"))) for folder in (out, reference))
    assert found.keys() == wanted.keys() and sum(isinstance(v, torch.Tensor) for v in wanted.values()) > 100
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, f"{name} of step {wanted['/step']}"


def assert_same_losses(out, reference, rel=1e-8, steps=None):
    """All that is logged at a step, rates apart, agrees: losses, terms, gradient norm, gauges."""
    found, wanted = ({line["step"]: line for line in read_log(folder)} for folder in (out, reference))
    steps = steps or list(wanted)
    assert steps and set(steps) <= set(found) and set(steps) <= set(wanted)
    for step in steps:
        for name in (name for name in wanted[step] if name.startswith("loss")) if rel > 1e-8 else wanted[step]:
            if name in RATES:
                continue
            a, b = found[step][name], wanted[step][name]
            assert abs(a - b) <= rel * abs(b) + 1e-12, f"step {step}: {name} {a!r}, should be {b!r}"
