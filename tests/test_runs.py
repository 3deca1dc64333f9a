"""Whole runs of every method script: one process and several, stopped and gone on with, on real photographs; and the
rules the scripts keep as texts."""
import argparse
import ast
import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import skimage
import torch
import torch.distributed as dist
import torchvision
from launch import (
    METHODS,
    ROOT,
    SCRIPTS,
    TINY,
    Run,
    assert_same_losses,
    assert_same_tensors,
    flags,
    load,
    read_log,
    reference,
    reference_of_two,
    steps_of,
)
from PIL import Image

import common

SHARED = {"process", "setup_processes", "gather", "LARS", "make_optimizer", "schedule", "ema_update", "agree",
          "NOT_COMPARED", "save_checkpoint", "load_checkpoint", "Log"}  # one text wherever they stand
OWN = {"RELEASE", "PRESETS", "COLUMNS", "VIEW_COLUMNS", "parse_args", "Branch", "Model", "make_views", "gauges", "draw",
       "train"}
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png",
          "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png", "moon.png")  # no two groups of one size

each = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # checkpoints are large


def photographs(folder, labelled):
    """scikit-image's own photographs in classes of four, or flat; with a file among them that is none."""
    source = os.path.join(os.path.dirname(skimage.__file__), "data")
    for i, name in enumerate(PHOTOS):
        place = folder / "abc"[i // 4] if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(source, name), place)
    (place / "broken.png").write_bytes((place / "moon.png").read_bytes()[:20_000])
    return folder


# ---- numbers ---------------------------------------------------------------------------------------------------------
@each
def test_torchrun_with_two_processes_gives_the_losses_of_one_in_fp64(script):
    """Ten steps to 1e-8, augmentations, gradient norm and gauges included."""
    assert steps_of(reference(script)) == list(range(1, 11))
    assert_same_losses(reference_of_two(script), reference(script))


@each
def test_first_step_in_fp32_agrees_to_1e_5(script, out):
    for processes in (1, 2):
        Run(script, flags(script, out / str(processes), "--precision", "fp32", "--steps", 1), processes).wait()
    assert_same_losses(out / "2", out / "1", rel=1e-5)


@each
def test_the_same_command_again_and_fresh(script, out):
    """A finished run says so, exits with 0 and changes nothing; --fresh starts over, to the same tensors."""
    done = {p: p.read_bytes() for p in reference(script).rglob("*.*") if p.is_file()}
    said = Run(script, flags(script, reference(script))).wait()
    assert "finished" in said and "--fresh" in said
    assert {p: p.read_bytes() for p in reference(script).rglob("*.*") if p.is_file()} == done
    shutil.copytree(reference(script), out)
    said = Run(script, flags(script, out, "--fresh", "--workers", 2)).wait()
    assert "goes on" not in said and steps_of(out) == list(range(1, 11))
    assert_same_tensors(out, reference(script))


def test_fresh_is_refused_where_a_restart_would_start_over(monkeypatch):
    """torchrun counts a restart only on the node whose process died: the others' processes would take it for the first
    start and remove the run. On one node the count is right."""
    argv = ["--preset", "demo", "--batch-size", "16", "--fresh"]
    for world, restarts in (("4", "0"), ("2", "3"), ("4", "3")):
        for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", "2"), ("TORCHELASTIC_MAX_RESTARTS", restarts)):
            monkeypatch.setenv(name, value)
        if (world, restarts) == ("4", "3"):
            with pytest.raises(common.UserError, match="remove the .pt files"):
                importlib.import_module("slotcon").parse_args(argv)
            argv.pop()
        importlib.import_module("slotcon").parse_args(argv)


def test_fp32_is_no_tf32():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    for precision in ("bf16", "fp32", "fp16"):
        common.numerics(precision, torch.device("cpu"), False)
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


@each
def test_jitter_reaches_the_views(script, out):
    """Without it the same first images give another loss."""
    Run(script, flags(script, out, "--jitter", 0, 0, 0, 0, "--steps", 1)).wait()
    still, usual = read_log(out)[0]["loss"], read_log(reference(script))[0]["loss"]
    assert abs(still - usual) > 1e-4 * usual


# ---- what a run leaves -----------------------------------------------------------------------------------------------
@each
def test_files_of_a_run(script):
    out = reference(script)
    for line in read_log(out):
        assert {"step", "epoch", "loss", "lr", "images_per_second", "waiting", "memory_gb", "grad_norm"} <= line.keys()
        assert sum(name.startswith("loss_") for name in line) >= 1
        assert all(isinstance(v, (int, float)) and abs(v) < 1e18 for v in line.values()), line
    assert json.loads((out / "args.json").read_text())["batch_size"] == 16
    found = sorted((out / "pictures").glob("*.png"))
    assert any("0000000" in p.name for p in found) and any("0000010" in p.name for p in found)
    for path in found:
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.std() > 10 and min(picture.shape[:2]) >= 32, path
    left = {p.name for p in out.iterdir()}
    assert left == {"args.json", "log.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "backbone.pth", "pictures"}
    assert load(out / "checkpoint.pt")["step"] == 10 and load(out / "checkpoint.previous.pt")["step"] == 9


@each
def test_scenes_with_labels_as_a_plain_command(script, out):
    """`python script.py`: kNN at the start and the end, in the log."""
    spec = "scenes-fine:64" if script == "cvsa" else "scenes:64"
    Run(script, flags(script, out, "--data", spec, "--steps", 1, "--precision", "fp32"), command=True).wait()
    line, = read_log(out)
    assert 0 <= line["knn_at_start"] <= 100 and 0 <= line["knn"] <= 100


@each
def test_flat_photographs_and_backbone(script, out, tmp_path):
    """Real photographs of mixed sizes without labels, one unreadable: counted, and named once. backbone.pth loads
    strictly into torchvision's network."""
    command = flags(script, out, "--data", photographs(tmp_path / "photos", labelled=False), "--arch", "resnet18",
                    "--batch-size", 8, "--steps", 3, "--precision", "fp32", "--workers", 1)
    said = Run(script, command).wait()
    lines = read_log(out)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["unreadable"] == 1
    assert "knn_at_start" not in lines[0]  # nothing is measured against labels that are not there
    assert said.count("broken.png") == 1
    net = torchvision.models.resnet18()
    wrong = net.load_state_dict(load(out / "backbone.pth"), strict=False)
    assert not wrong.unexpected_keys and wrong.missing_keys == ["fc.weight", "fc.bias"]
    del net.fc
    net.load_state_dict(load(out / "backbone.pth"), strict=True)


@each
def test_labelled_photographs_under_torchrun(script, out, tmp_path):
    command = flags(script, out, "--data", photographs(tmp_path / "photos", labelled=True), "--batch-size", 8,
                    "--steps", 2, "--precision", "fp32", "--canvas", 64, "--image-size", 48)
    Run(script, command, torchrun=["--nproc_per_node=2"]).wait()
    lines = read_log(out)
    assert [line["step"] for line in lines] == [1, 2] and "knn_at_start" in lines[0] and "knn" in lines[-1]


# ---- the scripts as texts --------------------------------------------------------------------------------------------
LIFT_OUT = {
    "slotcon": """
        model = slotcon.Model("small", prototypes=8, dim=16, hidden=32)
        teacher, views = model.make_teacher(), [torch.randn(4, 3, 32, 32) for _ in range(2)]
        whole, flips = [torch.tensor([[0.0, 0, 1, 1]] * 4)] * 2, [torch.zeros(4, dtype=torch.bool)] * 2
        losses = model(views, [teacher(v) for v in views], whole, flips)
        losses["loss"].backward()""",
    "scfs": """
        model = scfs.Model("small", out_dim=32, hidden=32, dim=16)
        teacher, views = model.make_teacher(), [torch.randn(8, 3, 32, 32), torch.randn(12, 3, 16, 16)]
        targets = teacher(views[0])
        losses = model(views, targets, teacher.stage_heads, tau_t=0.04)
        losses["loss"].backward()""",
    "saliency_cl": """
        model = saliency_cl.Model("small", dim=16, hidden=32)
        teacher, views = model.make_teacher(), [torch.randn(4, 3, 32, 32) for _ in range(2)]
        crops = torch.randn(16, 3, 16, 16)
        losses = model(views, crops, [teacher(v) for v in views], teacher(crops), torch.ones(4, 2))
        losses["loss"].backward()""",
    "cvsa": """
        model = cvsa.Model("small", dim=16, hidden=32, dense_hidden=32)
        teacher, views = model.make_teacher(), [torch.randn(4, 3, 32, 32) for _ in range(2)]
        masks = [torch.ones(4, 1, 32, 32)] * 2
        losses = model(views, masks, [teacher(v) for v in views])
        losses["loss"].backward()""",
}


def test_steps_stretch_what_is_given_in_epochs():
    """Without --steps nothing is stretched, also where half an epoch is cut off; with it, all of the epochs are all steps."""
    for epochs in (1.5, 2.5, 3.0):
        args = argparse.Namespace(batch_size=2, epochs=epochs, steps=None)
        assert common.run_length(args, 11) == (5, int(5 * epochs), 1.0)
    for steps in range(1, 3000):
        epoch, total, stretch = common.run_length(argparse.Namespace(batch_size=64, epochs=3.0, steps=steps), 10_000)
        assert (epoch, total) == (156, steps)
        assert [int(x * epoch * stretch + 1e-6) for x in (3.0, 1.5, 0.3)] == [steps, steps // 2, steps // 10]


@each
def test_lift_out(script, tmp_path):
    """A script and common.py alone in an empty folder: losses and a backward pass in five lines, and no file."""
    for name in (script, "common"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = "\n".join([f"import torch, sys, {script}", *(line.strip() for line in LIFT_OUT[script].splitlines()), """
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
assert losses["loss"].isfinite() and not torch.distributed.is_initialized()
here = {n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(sys.path[0])}
assert here - {"__main__", "__mp_main__"} == {"common", sys.argv[1]}, here"""])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "five_lines.py").write_text(code)
    done = subprocess.run([sys.executable, "five_lines.py", script], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{script}.py", "common.py", "five_lines.py"}


def test_nothing_happens_at_import():
    """No output, file, process, thread, process group or signal handler comes from importing the scripts."""
    code = """
import signal, sys, threading
import numpy, torch, torch._dynamo, torchvision.utils, torchvision.transforms.v2.functional, tqdm, PIL.Image
events, writes = [], ("w", "a", "x", "+")
def audit(event, args):
    if event == "open" and isinstance(args[1], str) and any(c in args[1] for c in writes) or event.startswith((
            "subprocess", "socket", "os.system", "os.exec", "os.fork", "os.mkdir", "os.remove", "os.rename")):
        events.append((event, str(args)))
state, threads = torch.get_rng_state(), threading.active_count()
handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
number = torch.get_num_threads()
sys.addaudithook(audit)
for name in sys.argv[1:]:
    __import__(name)
assert not events, events
assert threads == threading.active_count() and number == torch.get_num_threads()
assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
assert torch.equal(state, torch.get_rng_state()) and not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


def top_level(script):
    """name -> source text of each definition and assignment at the top level of a script."""
    text, found = (ROOT / f"{script}.py").read_text(), {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node] if hasattr(node, "name") else []
        for target in targets:
            start = min([d.lineno for d in getattr(node, "decorator_list", [])] + [node.lineno])
            name = getattr(target, "name", None) or getattr(target, "id", "")
            found[name] = "\n".join(text.splitlines()[start - 1:node.end_lineno])
    return found


def test_machinery_is_one_text():
    """What two scripts both define is the same text, if it is shared machinery; only what each method has to have of
    its own goes by the same name in several."""
    texts = {script: top_level(script) for script in SCRIPTS}
    assert len(SHARED & set().union(*texts.values())) > 8
    for name in sorted(set().union(*texts.values()) - OWN):
        copies = {script: found[name] for script, found in texts.items() if name in found}
        assert len(copies) == 1 or name in SHARED, f"{name} stands in {', '.join(copies)}: is it machinery?"
        first = next(iter(copies))
        for script, copy in copies.items():
            assert copy == copies[first], f"{name} differs between {first} and {script}"


@each
def test_a_script_imports_from_common_alone(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    found = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert found <= set(sys.stdlib_module_names) | {"common", "numpy", "torch", "torchvision", "tqdm"}


@pytest.mark.parametrize("name, most", [*((s, 600) for s in SCRIPTS), ("common", 1250), ("eval_linear", 700)])
def test_lengths(name, most):
    path = ROOT / f"{name}.py"
    if not path.exists():
        pytest.skip(f"no {name}.py")
    lines = path.read_text().splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 120


def test_a_process_that_waits_in_vain_says_so(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in "01":
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", str(store.port)), ("TORCHELASTIC_USE_AGENT_STORE", "True")):
            monkeypatch.setenv(name, value)
        with pytest.raises(TimeoutError, match="not all 2 processes came together"):
            common.rendezvous(0.005)


def test_ruff_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--line-length", "120", "--no-cache", str(ROOT)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    long = [f"{p.name}:{i}" for p in ROOT.glob("*.py")
            for i, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert not long


@each
def test_no_eval_no_shell_no_unsafe_load(script):
    """Also common.py: nothing that runs text or what a file holds."""
    for name in (script, "common"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__", "pickle.load", "pickle.loads", "os.system", "os.popen")
            assert not called.startswith(("subprocess.", "urllib.", "requests.", "torch.hub."))
            if called == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                assert safe == "True", f"{name}.py:{node.lineno}"


@each
def test_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for flag in [*TINY, *METHODS[script], "--data", "--cache", "--arch", "--epochs", "--optimizer", "--lr", "--device",
                 "--weight-decay", "--warmup-epochs", "--compile", "--deterministic", "--seed", "--init", "--out",
                 "--fresh", "--timeout-minutes"]:
        assert not flag.startswith("--") or flag in said, flag
