"""The benchmark runs and its tables hold together; --compile meets no graph break. No speed is asserted."""
import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import benchmark
import pytest
import torch
import torch._dynamo
from benchmark import METHODS, PARTS, Done, command, peak_gib, run_train, spawn, write_jpegs

import common

each = pytest.mark.parametrize("script", METHODS)
QUICK = types.SimpleNamespace(sizes="demo", quick=True, arch=None, batch_size=None, precision="fp32")


def test_quick_run_writes_whole_tables(tmp_path):
    """(1) and (2) as a user starts them: valid JSON, positive medians within their spread, JPEGs as large as
    photographs, and a table that says what was not measured."""
    program = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--quick", "--only", "data,views"]
    subprocess.run([*program, "--methods", METHODS[0], "--out", str(tmp_path)], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    (file,), (text,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    results = json.loads(file.read_text())
    assert set(results) == {"data", "views"} and results["data"]["on"]["quick"]
    paths, kilobytes = results["data"]["rows"], results["data"]["kilobytes"]
    names = {row["path"] for row in paths}
    assert len(paths) == 9 and {"standard, two views", "ours, files, canvas 512", "ours, cache, canvas 240"} <= names
    assert 60 < kilobytes["min"] and kilobytes["max"] < 150
    (row,) = results["views"]["rows"]
    summaries = [kilobytes, row["ms_a_view"], row["standard_ms_a_view"],
                 *(row[key] for row in paths for key in ("ms_cpu", "ms_wall", "images_per_second", "of_two_views"))]
    assert all(0 < s["min"] <= s["median"] <= s["max"] for s in summaries)
    an_image = row["ms_an_image"]["make_views"]["median"]
    assert row["ms_a_view"]["median"] == pytest.approx(an_image / row["views"])
    assert text.read_text().count("not measured yet (") == len(PARTS) - 2


def test_peak_memory_is_the_row_s_own():
    """Not that of the larger process that measures it, as getrusage has it."""
    ballast = torch.ones(2**28)  # 1 GiB
    child = [sys.executable, "-c", "import benchmark; print(benchmark.peak_gib())"]
    said = subprocess.run(child, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    assert 0.1 < float(said) < 1 < peak_gib() and len(ballast) == 2**28


def test_cache_and_files_give_the_same_canvases(tmp_path):
    """Bit for bit, in any order, with the original's size, from the images that the benchmark times."""
    write_jpegs(tmp_path / "jpegs", 3)
    files = common.open_images(str(tmp_path / "jpegs"), 384)
    cache = common.open_images(str(tmp_path / "jpegs"), 384, cache=str(tmp_path / "cache"))
    for rows in ([0, 1, 2], [2, 1]):
        one, other = files.__getitems__(rows), cache.__getitems__(rows)
        assert one.canvas.any() and one.size.tolist() == [[480, 640]] * len(rows)
        assert all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1]))


@each
def test_two_processes_exchange_what_the_formula_says(script):
    """(7): gradients, batch norm's sums and calls and what is gathered, counted as they go to gloo: nothing more a step."""
    found = spawn("bytes", 2, script=script, argv=command(script, QUICK, "--device", "cpu"))
    assert found["world"] == 2 and found["agrees"], found
    assert all(found["counted"].values())


def test_counted_memory_is_what_autograd_keeps(tmp_path, monkeypatch):
    """(8): bytes an image, from shapes alone, against the storages that a run on the CPU saves for its backward pass.
    Counted are canvases, too, of two batches, and what the teacher made. And K = 2048 makes no tensor of B x K x D."""
    argv = [*command("slotcon", QUICK, "--image-size", 64, "--canvas", 96), "--workers", "0"]
    few, kept, counted = ["--prototypes", 2], [], []  # all of them in each image: the most there can be, as is counted
    module = importlib.import_module("slotcon")
    for name in ("draw", "knn_probe", "slot_quality", "save_checkpoint", "batches"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr("signal.signal", lambda *a: None)
    for batch in (16, 32):
        more, saved = [*argv, *few, "--batch-size", batch], {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        def boundary(step, saved=saved):
            if step == 2:
                raise Done
            saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run_train("slotcon", [*map(str, more), "--device", "cpu", "--out", str(tmp_path / str(batch))], boundary)
        kept.append(sum(saved.values()))
        counted.append(spawn("memory", script="slotcon", argv=[*more, "--device", "cuda"])["bytes"])
    kept, counted = ((x[1] - x[0]) / 16 for x in (kept, counted))
    teacher = 2 * (module.parse_args(argv).dim + 2) * 8 * 8 * 4  # its maps and scores of both views: alive, not saved
    assert kept + 2 * 3 * 96**2 + teacher == pytest.approx(counted, rel=0.001)
    many = spawn("memory", script="slotcon", argv=[*argv, "--device", "cuda", "--batch-size", 64, "--prototypes", 2048,
                                                   "--dim", 512])
    assert many["largest"] < 64 * 2048 * 512 * 4 / 2, many  # logits, all slots by all, are a quarter


@each
def test_what_compile_compiles_has_no_graph_break(script, tmp_path, monkeypatch):
    """train() names the modules and calls them for one step; each is then traced whole at each shape and in each mode
    that it was called in, with its backward pass."""
    module, compiled, seen = importlib.import_module(script), [], {}
    for name in ("draw", "knn_probe", "slot_quality", "object_mass", "save_checkpoint", "batches"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name))  # as it was, once run_train has had its way
    monkeypatch.setattr("signal.signal", lambda *a: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))

    def called(net, inputs):
        seen[id(net), inputs[0].shape, net.training] = net, inputs

    def boundary(step):
        if step:
            raise Done
        hooks.extend(net.register_forward_pre_hook(called) for net in compiled)

    hooks = []
    run_train(script, command(script, QUICK, "--compile", "--device", "cpu", "--out", tmp_path), boundary)
    assert len(compiled) >= 2 and {id(net) for net in compiled} == {net for net, _, _ in seen}
    for hook in hooks:
        hook.remove()
    for (_, _, training), (net, inputs) in seen.items():
        torch._dynamo.reset()
        trained = next(net.parameters()).requires_grad
        traced = torch.compile(net.train(training), backend="aot_eager" if trained else "eager", fullgraph=True,
                               dynamic=False)
        found = traced(*inputs)
        while not isinstance(found, torch.Tensor):
            found = found[0]
        if trained:
            found.sum().backward()


@pytest.fixture
def clock(monkeypatch):
    """Seconds on the clock; the CPU's go twice as fast."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: 2 * now[0])
    return now


def test_a_race_leaves_out_the_first_turn_and_compares_neighbours(clock):
    took = {"slow": iter([100.0, 6, 2]), "fast": iter([50.0, 3, 1])}

    def call(name):
        clock[0] += next(took[name])
    times = benchmark.race({name: lambda name=name: call(name) for name in took}, 2, 4)  # four images
    assert times == {"slow": {"wall": [1500, 500], "cpu": [3000, 1000]}, "fast": {"wall": [750, 250], "cpu": [1500, 500]}}
    assert benchmark.ratios(times["slow"], times["fast"]) == {"median": 2, "min": 2, "max": 2, "n": 2}


def test_a_step_by_hand(clock, monkeypatch):
    """Images a second of 3 steps at a time, after the warm-up; passes of two views in a student and in a teacher."""
    def train(script, argv, boundary, feed, levers):
        student, teacher = common.backbone("small"), common.backbone("small")
        with contextlib.suppress(benchmark.Done):
            for step in range(99):
                boundary(step)
                for _ in range(2) if step == 0 else ():
                    student(torch.zeros(8, 3, 32, 32))
                    with torch.no_grad():
                        teacher(torch.zeros(8, 3, 32, 32))
                clock[0] += 0.5 if step >= 2 else 60
        return argparse.Namespace(batch_size=8, image_size=32, arch="small")
    monkeypatch.setattr(benchmark, "run_train", train)
    monkeypatch.setattr(common.ResNet, "forward", common.ResNet.forward)
    found = benchmark.child_step({"script": "", "argv": [], "feed": "", "levers": [], "profile": False, "warmup": 2, "inner": 3,
                                  "repeats": 4})
    assert found["images_per_second"] == {"median": 16, "min": 16, "max": 16, "n": 4}
    assert found["passes"] == pytest.approx(8 / 3) == benchmark.STEP_FACTOR


def test_memory_is_fitted_exactly(monkeypatch):
    def spawn(kind, script, argv):
        n = argv[argv.index("--batch-size") + 1]
        return {"bytes": 5e9 + 7e6 * n + (2e3 * n ** 2 if script == "slotcon" else 0), "largest": 8e6 * n, "largest_at": "x"}
    monkeypatch.setattr(benchmark, "spawn", spawn)
    rows = benchmark.memory(argparse.Namespace(quick=False, methods=["slotcon", "cvsa"]), None)["rows"]
    for row in rows:
        want = 5e9, 7e6, 2e3 * (row["script"] == "slotcon")
        assert [row[k] for k in ("fixed", "an_image", "square")] == pytest.approx(want, abs=1e-3)
    text = benchmark.memory_table({"rows": rows[:1]})[4]  # 5 + 512 x 7 MB + 512 x 512 x 2 kB on one GPU
    assert "| 512 | 5.51 | 9.11 | 8 (x) |" in text, text


def test_rows_of_other_scripts_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "view_cost",
                        lambda opt, folder: {"rows": [{"script": s, "failed": "x"} for s in opt.methods]})
    for methods in ("cvsa", "slotcon", "cvsa"):
        argv = ["benchmark.py", "--only", "views", "--methods", methods, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        benchmark.main()
    file, = tmp_path.glob("*.json")
    assert [row["script"] for row in json.loads(file.read_text())["views"]["rows"]] == ["slotcon", "cvsa"]
