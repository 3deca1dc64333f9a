"""Faults of clusters, disks, images and people: a case a row of the table of faults, for every method script. Processes
are real and are really killed; see launch.py."""
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
    PATIENCE,
    SCRIPTS,
    Run,
    assert_same_losses,
    assert_same_tensors,
    children,
    flags,
    load,
    pictures,
    read_log,
    reference,
    reference_of_two,
    server,
    steps_of,
)
from PIL import Image

from common import UserError, save_backbone


def row(name, every=False):
    """A row of the table, for every script. Their machinery is one text, which test_runs.py compares to the letter: unless
    `every`, the first script stands for it by default, the others run with -m slow."""
    return pytest.mark.parametrize("script", [
        pytest.param(script, id=f"{script}: {name}", marks=() if every or script == SCRIPTS[0] else pytest.mark.slow)
        for script in SCRIPTS])


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # checkpoints are large


def go_on(script, out, *more, **how):
    """The same command again, to the end."""
    return Run(script, flags(script, out, *more), **how).wait()


def assert_whole(out):
    """No unreadable checkpoint, whatever happened. -> the newest one's step, 0 where there is none"""
    steps = [load(out / name)["step"] for name in ("checkpoint.previous.pt", "checkpoint.pt") if (out / name).exists()]
    assert steps == sorted(set(steps))
    return max(steps, default=0)


def assert_all_logged(script, out):
    assert steps_of(out) == list(range(1, 11))
    assert_same_losses(out, reference(script), rel=1e-13)


# ---- killed ----------------------------------------------------------------------------------------------------------
def die_within_writing(n, share):  # the run's own SIGKILL, with this share of its n-th file on the disk
    left, save = itertools.count(n - 1, -1), torch.save

    def cut(state, file):
        if next(left):
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        with open(file, "wb") if isinstance(file, str) else file as begun:
            begun.write(whole.getvalue()[:int(share * whole.tell())])
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = cut


def kill_again_and_again(script, out, times, seed):
    chance, torn = random.Random(seed), 0
    for i in range(times):
        before = functools.partial(die_within_writing, chance.randint(1, 4), chance.random()) if i % 3 == 0 else None
        run = Run(script, flags(script, out, "--workers", chance.choice((0, 1))), before=before)
        if i % 3 == 0:  # while a backbone or checkpoint is being written; where the run was at its end before, it ends
            run.wait(-signal.SIGKILL, 0)
        elif i % 3 == 1:  # soon after a step
            step = min(9, assert_whole(out) + chance.randint(1, 2))
            run.until_step(step)
            time.sleep(chance.uniform(0, 0.3))
        else:  # at any time, start included
            time.sleep(chance.uniform(0, 3))
        if run.alive():
            run.kill()
        run.wait(-signal.SIGKILL, 0)
        torn += any(out.glob("*.tmp"))
        assert_whole(out)
    go_on(script, out)
    assert_same_tensors(out, reference(script))
    assert_all_logged(script, out)
    assert not list(out.glob("*.tmp"))
    assert torn  # the first one at least


@row("SIGKILL at 3 random moments, checkpoint writing included", every=True)
def test_killed_3_times(script, out):
    kill_again_and_again(script, out, 3, seed=1)


@pytest.mark.slow
@row("SIGKILL at 20 random moments, checkpoint writing included")
def test_killed_20_times(script, out):
    kill_again_and_again(script, out, 20, seed=2)


@row("SIGKILL at the end, while backbone.pth or the last checkpoint is being written: the same command finishes both")
def test_killed_while_writing_the_end(script, out):
    for n in (19, 20):  # ten steps write two files each
        run = Run(script, flags(script, out), before=functools.partial(die_within_writing, n, 0.5))
        run.wait(-signal.SIGKILL)
        assert load(out / "checkpoint.pt")["step"] == 9 and len(list(out.glob("*.tmp"))) == 1
        assert "goes on from step 9" in go_on(script, out)
        assert_same_tensors(out, reference(script))
        mine, whole = (load(folder / "backbone.pth") for folder in (out, reference(script)))
        assert mine.keys() == whole.keys() and all(torch.equal(mine[k], whole[k]) for k in whole)
        assert not list(out.glob("*.tmp"))
        shutil.rmtree(out)


@row("SIGKILL between the two renames of a checkpoint; a log line cut short")
def test_killed_between_two_renames(script, out):
    shutil.copytree(reference(script), out)
    shutil.copy(out / "checkpoint.pt", out / "checkpoint.tmp")
    os.replace(out / "checkpoint.pt", out / "checkpoint.previous.pt")
    state = load(out / "checkpoint.previous.pt")
    assert state["step"] == 10
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 11, "epo')
    assert "finished" in go_on(script, out)
    assert_all_logged(script, out)


@row("SIGTERM, SIGINT, SIGUSR1: saved, left at the next log step; the same command goes on")
def test_signals(script, out):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = assert_whole(out) if out.exists() else 0
        plain = number == signal.SIGTERM  # once a plain command, with a data worker
        run = Run(script, flags(script, out, "--save-every", 100, "--workers", int(plain)), command=plain)
        run.until_step(before + 1)
        run.kill(number)
        said = run.wait(128 + number)
        assert f"{number.name}: saved at step {steps_of(out)[-1]}" in said and "Traceback" not in said
        assert before < assert_whole(out) == steps_of(out)[-1] < 10
    assert f"goes on from step {assert_whole(out)}" in go_on(script, out)
    assert_same_tensors(out, reference(script))
    assert_all_logged(script, out)


@row("restart with 1, 2, 4 processes in turn (fp64); a signal to one rank of two")
def test_restarts_with_1_2_4_processes(script, out):
    run = Run(script, flags(script, out, "--save-every", 100)).until_step(2)
    run.kill(signal.SIGTERM)
    run.wait(128 + signal.SIGTERM)
    assert_same_losses(out, reference(script), rel=1e-13, steps=steps_of(out))
    before = assert_whole(out)
    run = Run(script, flags(script, out, "--save-every", 100), processes=2).until_step(before + 2)
    run.kill(signal.SIGUSR1, rank=1)
    run.wait(128 + signal.SIGUSR1)  # both
    assert before < assert_whole(out) < 10
    go_on(script, out, processes=4)
    assert steps_of(out) == list(range(1, 11))
    assert_same_losses(out, reference(script))


def folder_of_its_own():  # in each process: the checkpoint is on a disk that the others do not see
    sys.argv[sys.argv.index("--out") + 1] += f"/{os.environ['RANK']}"


@pytest.mark.parametrize("finished", [False, True])
@row("two ranks that find different checkpoints: refused before the first step")
def test_processes_that_found_different_checkpoints(script, tmp_path, finished):
    shutil.copytree(reference(script), tmp_path / "1")
    if not finished:
        (tmp_path / "1" / "checkpoint.pt").unlink()  # there is the one before it, which is not finished
    run = Run(script, flags(script, tmp_path), processes=2, before=folder_of_its_own)
    assert "--out where all nodes see it" in run.refusal()


def slow_to_save():
    for script in SCRIPTS:
        module = importlib.import_module(script)
        module.save_checkpoint = lambda *a, plain=module.save_checkpoint: (time.sleep(3), plain(*a))


@row("a signal to rank 1 alone: it stays until rank 0 has saved, as torchrun ends the others soon after the first")
def test_nobody_leaves_before_the_checkpoint_is_there(script, out):
    run = Run(script, flags(script, out, "--save-every", 100), processes=2, before=slow_to_save).until_step(2)
    run.kill(signal.SIGTERM, rank=1)
    run.forks[1].join(60)
    assert not run.forks[1].is_alive() and (out / "checkpoint.pt").exists()
    run.wait(128 + signal.SIGTERM)


def signal_at_step_2():
    for script in SCRIPTS:
        module = importlib.import_module(script)
        module.agree = lambda *seen, calls=[]: (calls.append(seen), (signal.SIGTERM if len(calls) == 2 else 0, 0))[1]


@row("a signal at a step with a look: saved without it, there may be no time")
def test_no_look_at_a_signal(script, out):
    every = importlib.import_module(script).PRESETS["demo"]["epochs"] / 5  # two of ten steps
    more = ["--knn-every", every]
    Run(script, flags(script, out, *more), before=signal_at_step_2).wait(128 + signal.SIGTERM)
    assert assert_whole(out) == steps_of(out)[-1] == 2
    go_on(script, out, *more)
    numbers = {path.stem[-7:] for path in (out / "pictures").iterdir()}
    assert {int(n) for n in numbers if n.isdigit()} == {0, 4, 6, 8, 10}


@row("one of two ranks killed under torchrun --max-restarts: comes back by itself")
def test_a_rank_killed_under_torchrun(script, out):
    run = Run(script, flags(script, out), torchrun=["--nproc_per_node=2", "--max-restarts=1"]).until_step(3)
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children(run.popen.pid)}
    pid, = [pid for pid, environment in ranks.items() if b"RANK=1" in environment]
    os.kill(pid, signal.SIGKILL)
    assert "goes on from step" in run.wait()
    assert steps_of(out) == list(range(1, 11))
    assert_same_tensors(out, reference_of_two(script))


def join(script, environment, delay, out):
    os.environ.update(environment)
    method = importlib.import_module(script)
    time.sleep(delay)
    method.setup_processes("cpu", 1)
    Path(out).write_text(str(method.gather(torch.tensor(int(os.environ["RANK"]) + 1)).tolist()))
    os._exit(9)  # as a process that is killed: nothing is said to the others


@row("a rank killed under torchrun --max-restarts: addresses of the dead in its store mislead nobody")
def test_the_dead_mislead_nobody(script, tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent has it
    for attempt, late in enumerate((0, 1, 0)):
        ranks = []
        for rank in range(3):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            ranks.append(server().Process(target=join, args=(script, {k: str(v) for k, v in environment.items()},
                                                             2 * (rank == late), tmp_path / f"{attempt} {rank}")))
            ranks[-1].start()
        for process in ranks:
            process.join(PATIENCE)
            process.kill()
        assert [process.exitcode for process in ranks] == [9, 9, 9]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"[1, 2, 3]"} and len(list(tmp_path.iterdir())) == 9


# ---- disk ------------------------------------------------------------------------------------------------------------
@row("disk full while saving: clear error, last good checkpoint whole")
def test_disk_full(script, out):
    run = Run(script, flags(script, out)).until_step(2)
    size = (out / "checkpoint.pt").stat().st_size
    resource.prlimit(run.forks[0].pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    last = run.refusal()
    assert "could not be saved" in last and "make room" in last
    assert 1 <= assert_whole(out) == steps_of(out)[-1] - 1 and not list(out.glob("*.tmp"))
    go_on(script, out)
    assert_same_tensors(out, reference(script))


def nobody():
    """Gives up root's right to write anywhere."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@row("folder not writable")
def test_folder_not_writable(script, tmp_path):
    closed = Path("/proc/sys")  # there on every Linux, and of nobody but root
    last = Run(script, flags(script, closed / "run"), before=nobody).refusal()
    assert f"{closed} is no folder that can be written to" in last and "name another" in last


@row("checkpoint cut short: the previous one is used, and said so")
def test_checkpoint_cut_short(script, out):
    shutil.copytree(reference(script), out)
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    said = go_on(script, out)
    assert "goes on from step 9" in said and "checkpoint.pt cannot be read" in said and "the one before" in said
    assert_same_tensors(out, reference(script))
    assert_all_logged(script, out)


DAMAGE = {"nothing in it": lambda b: b"", "one byte": lambda b: b[:1], "a header": lambda b: b[:100],
          "all but a byte": lambda b: b[:-1], "zeros": lambda b: bytes(len(b)),
          "no head": lambda b: bytes(4096) + b[4096:],
          "a torn head": lambda b: b[:30] + bytes(6000) + b[6030:], "text": lambda b: b"hello world\n" * 9,
          "a hole of zeros": lambda b: b[:len(b) // 2] + bytes(4096) + b[len(b) // 2 + 4096:]}


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """-> bytes of a checkpoint.pt that is quick to write in many ways."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    torch.save({"method": "x", "step": 7, "settings": {"lr": 1.0}, "model": {"w": torch.arange(9000.0)}}, path)
    return path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGE)
@row("checkpoint cut short or damaged")
def test_damaged_checkpoints(script, damage, small_checkpoint, tmp_path):
    """The one before is used and it is said so; where there is none, refused in words."""
    load_checkpoint = importlib.import_module(script).load_checkpoint
    (tmp_path / "checkpoint.pt").write_bytes(DAMAGE[damage](small_checkpoint))
    with pytest.raises(UserError) as refused:
        load_checkpoint(tmp_path, "x", {"lr": 1.0})
    assert "checkpoint.pt cannot be read" in str(refused.value) and "--fresh" in str(refused.value)
    assert "\n" not in str(refused.value)
    (tmp_path / "checkpoint.previous.pt").write_bytes(small_checkpoint)
    found = load_checkpoint(tmp_path, "x", {"lr": 1.0})
    assert found["step"] == 7 and "the one before it is used" in found["note"]
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"PK\3\4")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path, "x", {"lr": 1.0})


class Code:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@row("a pickle with code in it: refused, not run")
def test_checkpoint_with_code(script, out, tmp_path):
    out.mkdir()
    trace, init = tmp_path / "trace", tmp_path / "weights.pth"
    for bad in (lambda p: torch.save({"method": script, "x": Code(trace)}, p),
                lambda p: p.write_bytes(pickle.dumps(Code(trace), protocol=2))):
        bad(out / "checkpoint.pt")
        last = Run(script, flags(script, out)).refusal()
        assert "nothing in it was run" in last and not trace.exists()
    (out / "checkpoint.pt").unlink()
    bad(init)
    assert "nothing in it was run" in Run(script, flags(script, out, "--init", init)).refusal()
    assert not trace.exists()


@row("checkpoint of another method, of other settings")
def test_other_checkpoints(script, out):
    shutil.copytree(reference(script), out)
    for more, words in ((["--lr", 0.5, "--seed", 3], ["lr was", "is 0.5", "seed was 0, is 3"]), (
            ["--data", "scenes:64"], ["images was"]), (["--steps", 12], ["steps was 10, is 12"])):
        last = Run(script, flags(script, out, *more)).refusal()
        assert all(word in last for word in [*words, "other settings", "--fresh"]), last
    state = load(out / "checkpoint.pt")
    for other in (state | {"method": "another"}, {"model": state["model"]}, [1, 2], state["model"],
                  {"method": script, "step": 10}):
        torch.save(other, out / "checkpoint.pt")
        last = Run(script, flags(script, out)).refusal()
        assert "no checkpoint of" in last and "--fresh" in last
    finished = Run(script, flags(script, reference(script), "--workers", 3, "--log-every", 7, "--device", "cpu"))
    assert "finished" in finished.wait()  # of these settings no number depends
    assert json.loads((reference(script) / "args.json").read_text())["log_every"] != 7  # what made the run stands


# ---- images ----------------------------------------------------------------------------------------------------------
def odd_images(folder):
    """Readable oddities and five files that cannot be read, beside the 64 pictures."""
    shutil.copytree(pictures(), folder)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    rgb.save(folder / "jpeg.jpg")
    Image.fromarray(noise, "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 256).save(folder / "16bit.png")
    Image.new("RGB", (1, 1)).save(folder / "1x1.png")
    Image.new("RGB", (30_000, 9)).save(folder / "30000.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    Image.fromarray(noise).save(folder / "alpha.png")
    (folder / "cut.jpg").write_bytes((folder / "jpeg.jpg").read_bytes()[:1500])
    (folder / "cut.png").write_bytes((folder / "alpha.png").read_bytes()[:3000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image\n")
    bomb = bytearray((folder / "16bit.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # a header that promises 3.6 billion pixels
    (folder / "bomb.png").write_bytes(bomb)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return odd_images(tmp_path_factory.mktemp("odd") / "images")


@row("unreadable images: cut short, empty, text, 1x1, 30,000 wide, CMYK, 16-bit, animated: read or replaced, counted")
def test_odd_images(script, out, odd):
    command = ["--data", odd, "--steps", 5, "--precision", "fp32", "--workers", 1, "--batch-size", 12]
    said = Run(script, flags(script, out, *command)).wait()  # five steps of 12, or an epoch of six
    counted = [line["unreadable"] for line in read_log(out)]
    assert steps_of(out) == [1, 2, 3, 4, 5] and counted == sorted(counted) and 3 <= counted[-1] <= 5
    named = [name for name in ("cut.jpg", "cut.png", "empty.png", "text.jpg", "bomb.png") if name in said]
    assert len(named) == counted[-1]
    assert all(sum(name in line for line in said.splitlines()) == 1 for name in named)  # each is named in one line


@row("unreadable images over the limit: stops")
def test_too_many_unreadable(script, out, tmp_path):
    shutil.copytree(pictures(), tmp_path / "images")
    for path in sorted((tmp_path / "images").iterdir())[::3]:
        path.write_bytes(b"")
    last = Run(script, flags(script, out, "--data", tmp_path / "images", "--precision", "fp32")).refusal()
    assert "images could not be read" in last and ".png" in last


@row("an image folder emptied or changed under a run")
def test_folder_emptied(script, out, tmp_path):
    folder = shutil.copytree(pictures(), tmp_path / "images")
    run = Run(script, flags(script, out, "--data", folder, "--workers", 1), command=True).until_step(2)
    for path in folder.iterdir():
        path.unlink()
    assert "images could not be read" in run.refusal()
    before = assert_whole(out)
    assert "no images" in Run(script, flags(script, out, "--data", folder)).refusal()
    shutil.copytree(pictures(), folder, dirs_exist_ok=True)
    (folder / "00.png").rename(folder / "other.png")
    assert "other settings" in Run(script, flags(script, out, "--data", folder)).refusal()
    assert assert_whole(out) == before


@row("a cache whose source changed")
def test_cache_whose_source_changed(script, out, tmp_path):
    folder, more = shutil.copytree(pictures(), tmp_path / "images"), ["--cache", tmp_path / "cache", "--steps", 1]
    Run(script, flags(script, out, "--data", folder, *more)).wait()
    (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
    last = Run(script, flags(script, out, "--data", folder, *more, "--fresh")).refusal()
    assert "cache" in last and "delete" in last


# ---- numbers ---------------------------------------------------------------------------------------------------------
@row("NaN in a gradient or loss: stops naming the step, no checkpoint after it")
def test_not_finite(script, out):
    more = ["--lr", 1e17, "--precision", "fp32", "--optimizer", "sgd", "--warmup-epochs", 0]
    last = Run(script, flags(script, out, *more)).refusal()
    bad = int(last.split("not finite at step ")[1].split(",")[0])
    assert 1 < bad <= 10 and "lower --lr" in last
    assert assert_whole(out) == steps_of(out)[-1] == bad - 1
    assert bad == int(Run(script, flags(script, out, *more)).refusal().split("at step ")[1].split(",")[0])


@row("NaN seen late: log lines and checkpoints further apart than the step it comes from")
def test_not_finite_seen_late(script, out):
    more = ["--lr", 1e17, "--precision", "fp32", "--optimizer", "sgd", "--warmup-epochs", 0, "--log-every", 5]
    last = Run(script, flags(script, out, *more, "--save-every", 5)).refusal()
    assert 1 < int(last.split("at step ")[1].split(",")[0]) < 5 and not (out / "checkpoint.pt").exists()


class ScalerAtItsLimit(torch.amp.GradScaler):
    """At its start far too high; times 16, as gradients below 2 would fit into fp32 even so."""

    def __init__(self, device):
        super().__init__(device.type, init_scale=2.0 ** 127)

    def scale(self, loss):
        return 16 * super().scale(loss)


def scaler_at_its_limit():
    """fp16's scaler over fp32 arithmetic: half precision is very slow on a CPU."""
    for script in SCRIPTS:
        module = importlib.import_module(script)
        module.numerics = lambda precision, device, deterministic: (torch.float32, None, ScalerAtItsLimit(device))


@row("fp16 overflow: the scaler skips")
def test_overflow_is_skipped(script, out):
    """Steps whose scaled gradients overflow leave the weights alone; the scale is halved until they are finite, and the
    run goes on to its end. The log stays what every reader of JSON takes."""
    more = ["--precision", "fp16", "--save-every", 1]
    run = Run(script, flags(script, out, *more), before=scaler_at_its_limit)
    said = run.wait()
    after, before = load(out / "checkpoint.pt"), load(out / "checkpoint.previous.pt")
    assert 2.0 ** 100 < after["scaler"]["scale"] < 2.0 ** 127 and "not finite" not in said
    skipped = round(127 - math.log2(after["scaler"]["scale"]))
    assert 1 <= skipped < 10
    counts = {v["step"].item() for v in after["optimizer"]["state"].values()}
    assert counts == {10 - skipped} and before["step"] == 9
    assert steps_of(out) == list(range(1, 11))
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def gradients_that_are_nan():
    for script in SCRIPTS:
        module = importlib.import_module(script)
        module.numerics = lambda *a: (torch.float32, None, torch.amp.GradScaler("cpu", init_scale=4.0))
        def make_teacher(model, plain=module.Model.make_teacher):
            teacher = plain(model)
            next(model.parameters()).register_hook(lambda g: g * math.nan)
            return teacher
        module.Model.make_teacher = make_teacher


@row("fp16, gradients not finite whatever the scale: stops naming the step at which it has fallen to 1")
def test_not_finite_at_any_scale(script, out):
    assert "not finite at step 3," in Run(script, flags(script, out), before=gradients_that_are_nan).refusal()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@row("fp16 overflow: the scaler skips, on a GPU")
def test_fp16_on_a_gpu(script, out):
    Run(script, flags(script, out, "--precision", "fp16"), command=True).wait()
    assert steps_of(out) == list(range(1, 11)) and load(out / "checkpoint.pt")["scaler"]["scale"] > 0


# ---- processes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["at once", "within a step"])
@row("a worker process killed: clear error, no hang")
def test_a_data_worker_killed(script, when, out):
    run = Run(script, flags(script, out, "--workers", 1, "--steps", 200)).until_step(1 if when == "at once" else 3)
    pid, = children(run.forks[0].pid)
    os.kill(pid, signal.SIGKILL)
    last = run.refusal()
    assert "DataLoader worker" in last and "--workers" in last
    assert_whole(out)


def third_step_breaks(message="an error that no one expects"):
    for script in SCRIPTS:
        module = importlib.import_module(script)
        steps, update = itertools.count(1), module.ema_update
        def broken(*args, steps=steps, update=update):
            if next(steps) == 3:
                raise RuntimeError(message)
            update(*args)
        module.ema_update = broken


def third_step_is_too_large():
    third_step_breaks("CUDA out of memory. Tried to allocate 2.00 GiB.")


@row("an error nobody expects, with workers at work: ends, with its traceback")
def test_an_unexpected_error_ends_the_run(script, out):
    """The workers ignore SIGTERM, by which the interpreter ends children at its own end before it waits for them."""
    run = Run(script, flags(script, out, "--workers", 2, "--steps", 200), before=third_step_breaks).until_step(2)
    workers = children(run.forks[0].pid)
    said = run.wait(1)
    assert "Traceback" in said and "no one expects" in said
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)


@row("memory that runs out: one line that says what to lower")
def test_memory_runs_out(script, out):
    run = Run(script, flags(script, out, "--workers", 2, "--steps", 200), before=third_step_is_too_large).until_step(2)
    workers = children(run.forks[0].pid)
    last = run.refusal()
    assert "out of memory" in last and "--batch-size" in last
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)


@pytest.mark.slow
@row("a rank that hangs: the others wait --timeout-minutes, not for ever")
def test_a_rank_that_hangs(script, out):
    run = Run(script, flags(script, out, "--timeout-minutes", 0.1, "--steps", 500), processes=2).until_step(3)
    run.kill(signal.SIGSTOP, rank=1)
    started = time.monotonic()
    while run.forks[0].is_alive() and time.monotonic() < started + 60:
        time.sleep(0.1)
    status = run.forks[0].exitcode
    run.stop()
    assert status not in (None, 0)
    assert_whole(out)


# ---- small and empty -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("images, labels", [(1, False), (3, False), (4, False), (5, True), (8, True)])
@row("one image, fewer images than the batch, one class, no labels")
def test_few_images(script, images, labels, out, tmp_path):
    """A batch of four: refused below four images; from four on, with labels of one class or none, a right run."""
    folder = tmp_path / "images" / "one" if labels else tmp_path / "images"
    folder.mkdir(parents=True)
    for path in sorted(pictures().iterdir())[:images]:
        shutil.copy(path, folder)
    run = Run(script, flags(script, out, "--data", tmp_path / "images", "--batch-size", 4, "--steps", 2))
    if images < 4:
        assert "lower --batch-size" in run.refusal()
    else:
        run.wait()
        assert steps_of(out) == [1, 2] and "knn" not in read_log(out)[-1]


@row("all views without overlap, no present slot, one present slot, empty masks")
def test_views_without_overlap(script, out):
    """Crops of a thousandth of the image: finite losses, and what the views lack is counted."""
    tiny = [0.001, 0.001]
    more = {"slotcon": ["--crop-area", *tiny, "--prototypes", 1], "scfs": ["--crop-area", *tiny, "--local-area", *tiny],
            "saliency_cl": ["--crop-area", *tiny, "--box-area", *tiny], "cvsa": ["--crop-area", *tiny]}[script]
    Run(script, flags(script, out, *more, "--steps", 2)).wait()
    lines = read_log(out)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(abs(v) < 1e9 for line in lines for v in line.values())
    if script == "slotcon":
        assert lines[0]["no_overlap"] > 0.5 and lines[0]["slots_per_image"] == 1


@pytest.mark.parametrize("k, size", [(100, 32), (2, 8)])
@pytest.mark.parametrize("script", ["slotcon"], ids=["slotcon: K larger than the cells"])
def test_more_prototypes_than_cells(script, k, size, out):
    Run(script, flags(script, out, "--prototypes", k, "--image-size", size, "--steps", 2)).wait()
    assert all(line["slots_per_image"] <= (size // 8) ** 2 for line in read_log(out))


# ---- long ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@row("2,000 steps on scenes: memory flat, open files flat, every log line parses")
def test_soak(script, out):
    spec = "scenes-fine:64" if script == "cvsa" else "scenes:64"
    run = Run(script, flags(script, out, "--data", spec, "--batch-size", 8, "--steps", 2000, "--save-every", 100,
                            "--precision", "fp32", "--workers", 1))
    seen = []
    for step in range(200, 2000, 100):
        run.until_step(step) if step > 200 else run.until(lambda: len(read_log(out, torn=True)) >= 200, "step 200")
        pid = run.forks[0].pid
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        seen.append((resident / 2**20, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))))
    run.wait()
    memory, files, threads = zip(*seen)
    half = len(seen) // 2
    assert max(memory[half:]) < max(memory[:half]) + 40, memory  # MiB: less than 50 kB a step could hide here
    assert max(files) - min(files) <= 8 and max(threads) - min(threads) <= 2, seen
    assert steps_of(out) == list(range(1, 2001))


# ---- wrong command lines ---------------------------------------------------------------------------------------------
WRONG = {  # what is wrong: the flags, and what the line has to name
    "unknown flag": (["--prototipes", 8], "--prototipes"),
    "abbreviated flag": (["--warmup", 1], "--warmup"),
    "stray word": (["scenes"], "scenes"),
    "no value": (["--lr"], "--lr"),
    "no number": (["--epochs", "many"], "--epochs"),
    "half a step": (["--steps", 1.5], "--steps"),
    "no such preset": (["--preset", "imagnet"], "demo"),
    "no such network": (["--arch", "vgg16"], "resnet50"),
    "no such optimiser": (["--optimizer", "adam"], "adamw"),
    "no such precision": (["--precision", "fp8"], "bf16"),
    "no such device": (["--device", "tpu"], "cpu"),
    "no GPU here": (["--device", "cuda"], "leave the flag out"),
    "no such folder": (["--data", "/no/such/folder"], "/no/such/folder"),
    "no data set of torchvision": (["--data", "CIFAR:/tmp"], "CIFAR10"),
    "data set not on disk": (["--data", "STL10:/no/such"], "STL10"),
    "no scene": (["--data", "scenes:0"], "scenes:0 holds no image"),
    "no number of scenes": (["--data", "scenes:many"], "--data"),
    "a file as data": (["--data", __file__], "folder"),
    "too few images": (["--data", "scenes:12"], "lower --batch-size"),
    "batch not divisible by 4": (["--batch-size", 18], "try 16"),
    "batch of none": (["--batch-size", 0], "above 0"),
    "negative rate": (["--lr", -1], "above 0"),
    "rate that is no number": (["--lr", "nan"], "above 0"),
    "endless rate": (["--lr", "inf"], "above 0"),
    "negative seed": (["--seed", -1], "0 or more"),
    "negative workers": (["--workers", -2], "0 or more"),
    "no steps": (["--steps", 0], "above 0"),
    "canvas below the view": (["--canvas", 24], "try 48"),
    "canvas for no memory": (["--canvas", 99999], "above 16384"),
    "endless seed": (["--seed", 10 ** 20], "< 1e18"),
    "view of no pixel": (["--image-size", 0], "above 0"),
    "crops larger than the image": (["--crop-area", 0.5, 2], "0..1"),
    "crops the wrong way round": (["--crop-area", 0.9, 0.1], "--crop-area"),
    "teacher's momentum above 1": (["--momentum", 1.5], "--momentum"),
    "no time to wait": (["--timeout-minutes", 0], "above 0"),
    "weights that are not there": (["--init", "/no/such.pth"], "/no/such.pth"),
    "weights of another network": (["--init", "RESNET18"], "resnet18"),
    "weights that are none": (["--init", __file__], "no readable PyTorch checkpoint"),
    "a file as the folder": (["--out", __file__], "name another"),
    "below a file": (["--out", f"{__file__}/run"], "name another"),
    "cache in no folder": (["--cache", "/no/such/cache"], "/no/such/cache"),
}


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    import common
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    save_backbone(path, common.backbone("resnet18"))
    return str(path)


def command_line(script, mistake, out, resnet18):
    return [resnet18 if a == "RESNET18" else a for a in flags(script, out, *WRONG[mistake][0])]


@pytest.mark.parametrize("mistake", WRONG)
@row("wrong command lines: one line each, the remedy named")
def test_wrong_command_lines(script, mistake, out, resnet18):
    if mistake == "no GPU here" and torch.cuda.is_available():
        pytest.skip("there is one")
    run = Run(script, command_line(script, mistake, out, resnet18))
    last = run.refusal()
    assert run.said() == last + "\n" and WRONG[mistake][1] in last
    assert not (out / "checkpoint.pt").exists() and not (out / "pictures").exists()


@pytest.mark.parametrize("mistake", ["unknown flag", "no such folder", "batch not divisible by 4",
                                     "canvas below the view"])
@row("wrong command lines: exactly one line on stderr, status 2")
def test_wrong_command_lines_of_a_shell(script, mistake, out):
    run = Run(script, command_line(script, mistake, out, ""), command=True)
    assert run.refusal() + "\n" == run.said() and not run.output.read_text() and not out.exists()
