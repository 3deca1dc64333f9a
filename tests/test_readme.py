"""The README and the page of results: every command in them is run with tiny flags or, where it cannot be, parsed; every
piece of Python is run."""
import importlib
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, SCRIPTS, Run, flags, pictures, reference

import common

PAGES = ("README.md", "tests/results/README.md", "tests/results/demo/README.md")
TEXT = (ROOT / PAGES[0]).read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def commands():
    """Command lines in fenced blocks and in backticks that start one of the project's programs."""
    lines = [line for language, code in BLOCKS if language in ("", "bash") for line in code.replace("\\\n", " ").split("\n")]
    outside = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL) + (ROOT / PAGES[1]).read_text()
    lines += [code for code in re.findall(r"`([^`\n]+)`", outside) if re.match(r"(python|torchrun) ", code)]
    parts = [part.split(" #")[0].strip() for line in lines for part in line.split("&&")]
    return sorted({part for part in parts if re.match(r"(srun )?(python|torchrun) .*\.py", part)})


def split(command):
    """-> launcher's words, program's path, its flags"""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[:at], words[at], words[at + 1:]


def test_the_first_two_commands_are_there():
    code = next(code for language, code in BLOCKS if "pip install" in code)
    assert [line.split("#")[0].strip() for line in code.strip().split("\n")] == [
        "pip install -r requirements.txt && python slotcon.py",
        "pip install -r tests/requirements.txt && python -m pytest"]
    assert len(commands()) >= 25


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    common.save_backbone(path, common.backbone("resnet50"))
    return path


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command, weights, tmp_path, monkeypatch):
    launcher, program, argv = split(command)
    assert (ROOT / program).is_file()
    monkeypatch.chdir(tmp_path)
    for word in argv:  # what the flags name has to be there
        if word.endswith((".pth", ".pt")):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).symlink_to(weights)
    if "--masks" in argv:
        argv[argv.index("--masks") + 1] = str(tmp_path)
    if program.startswith("tests/"):
        helped = subprocess.run([sys.executable, ROOT / program, *argv, "--help"], check=True, capture_output=True, text=True)
        assert helped.stdout.startswith("usage")
        return
    if "torchrun" in launcher:
        from torch.distributed.run import parse_args
        parsed = parse_args([*launcher[launcher.index("torchrun") + 1:], program, *argv])
        assert parsed.training_script == program
        processes = int(parsed.nproc_per_node) * int(parsed.nnodes.split(":")[-1])
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", parsed.nproc_per_node)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module(program[:-3]).parse_args(argv).preset


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ") and split(c)[1][:-3] in SCRIPTS])
def test_commands_of_one_process_run(command, tmp_path):
    """With few steps on a few images; a folder that is not on this machine is replaced by one that is."""
    _, program, argv = split(command)
    for i, word in enumerate(argv):
        if word == "--data" and "/" in argv[i + 1]:
            argv[i + 1] = str(pictures())
        if word in ("--out", "--cache"):
            argv[i + 1] = str(tmp_path / argv[i + 1].strip("/"))
    scenes = "scenes-fine:64" if program == "cvsa.py" else "scenes:64"
    tiny = flags(program[:-3], tmp_path / "run", "--steps", 1, "--data", scenes)
    Run(program[:-3], [*tiny, *argv], command=True).wait()  # of a flag given twice the last counts: the README's
    out = argv[argv.index("--out") + 1] if "--out" in argv else tmp_path / "run"
    assert os.path.exists(os.path.join(out, "backbone.pth"))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python eval_linear.py")])
def test_evaluations_of_one_process_run(command, tmp_path):
    """With few steps on a few scenes, which have labels, masks and boxes, for data that is not on this machine."""
    _, program, argv = split(command)
    run = reference("slotcon")
    at = argv.index("--weights") + 1
    if argv[at] != "random":
        argv[at] = str(run / Path(argv[at]).name)
    tiny = ["--data", "scenes:64", "--preset", "demo", "--steps", "2", "--image-size", "32", "--canvas", "32",
            "--batch-size", "16", "--workers", "0", "--median", "1", "--out", str(tmp_path)]
    if "--label-fraction" in argv:  # 1 % of 64 images would leave classes empty
        tiny += ["--label-fraction", "0.5"]
    done = subprocess.run([sys.executable, ROOT / program, *argv, *tiny], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "results.jsonl").read_text())
    asked = argv[argv.index("--protocol") + 1] if "--protocol" in argv else "linear"
    assert line["protocol"] == asked and line["arch"] == "small"


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """A place in which the README's files lie: a demo run, a ResNet-50's weights, photographs."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(reference("slotcon"), place / "runs" / "slotcon-demo")
    (place / "runs" / "slotcon-coco").mkdir()
    (place / "runs" / "slotcon-coco" / "backbone.pth").symlink_to(weights)
    shutil.copytree(pictures(), place / "photos")
    return place


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_piece_of_python_runs(number, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (folder / "piece.py").write_text(PYTHON[number])
    have = runpy.run_path(str(folder / "piece.py"))
    weights = torch.load("runs/slotcon-coco/backbone.pth", weights_only=True)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = common.backbone("resnet50")
    ours.load_state_dict(weights)
    if isinstance(have.get("net"), torch.nn.Module) and not isinstance(have["net"], common.ResNet):  # torchvision, timm
        net, last = have["net"].eval(), ours.eval()(image)[-1].mean((2, 3))
        net.fc = torch.nn.Identity()
        assert torch.allclose(net(image), last, atol=1e-4)
    if "maskrcnn" in PYTHON[number]:
        assert torch.equal(have["model"].backbone.body.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])
    if "detectron2" in PYTHON[number]:
        with open("backbone-d2.pkl", "rb") as file:
            names = set(pickle.load(file)["model"])
        wanted = {"stem.conv1.weight", "stem.conv1.norm.running_var", "res2.0.shortcut.weight",
                  "res2.0.shortcut.norm.bias", "res4.5.conv2.norm.weight", "res5.2.conv3.weight"}
        assert wanted <= names and len(names) == len(weights)
        assert all(re.fullmatch(r"(stem|res[2-5]\.\d+)\.(conv\d|shortcut)(\.norm)?\.\w+", name) for name in names)
    if "common.features" in PYTHON[number]:
        assert have["x"].shape == (64, 2048) and have["x"].isfinite().all()
    for written in ("slots.png", "log.png"):
        if f'"{written}"' in PYTHON[number]:
            assert (folder / written).stat().st_size > 5000


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_of_the_loop_are_those_of_every_script(script, capsys):
    section = TEXT.split("## The flags of the loop")[1].split("\n## ")[0]
    named = set(re.findall(r"`(--[a-z-]+)`", "".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE))))
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert len(named) > 20 and named <= shown, named - shown


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        file, _, title = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert target.startswith("http") or there.is_file(), target
        if title and not target.startswith("http"):
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert title in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in titles}, target
