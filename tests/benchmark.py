"""How fast the method scripts are, beside what the same machine could do: one command, on a CPU or on CUDA GPUs.

  python tests/benchmark.py                                      everything; minutes on a GPU, long on a CPU
  python tests/benchmark.py --only data,views                    some of its parts
  python tests/benchmark.py --quick --out /tmp/try               tiny sizes: does it run? The numbers mean nothing
  python tests/benchmark.py --only step --methods slotcon --arch resnet50 --sizes recipe --batch-size 256 --profile

  data     (1) images/s and ms an image of ONE core: ours from files and from the cache, and what people do today
  views    (2) ms a view: the scripts' batched views on the device, torchvision's per-image transforms on a core
  step     (3) a training step on canvases that lie on the device already; roof, peak memory, synchronisations
  end      (4) the whole program: synthetic, cache, files; its own log's images/s and share of waiting
  ladder   (5) SlotCon from the customary loop to ours, a lever a row
  scaling  (6) batch, views, K, image size, GPUs
  bytes    (7) what processes exchange, counted under gloo and on paper for 8, 64, 512 GPUs; where a cache ends
  memory   (8) GB of tensors in a step of the recipes, counted from their shapes: takes no GPU and measures none

Nothing of a script is rebuilt here: (2) to (8) run its `train` itself, in a process of its own a row, with pictures,
kNN and checkpoints left out; except in (4) and (5) a loader that yields one batch again and again takes the place
of the data. Medians after a warm-up, with the least and the largest. Writes benchmark-cpu or benchmark-cuda, .json and
.md, to --out, where parts and scripts that were not asked for stay as they are. `--sizes recipe` (the papers' sizes,
the default on a GPU and always for `views`), `demo` (64 pixels, a small network; the default on a CPU).
"""
import argparse
import collections
import contextlib
import importlib
import inspect
import itertools
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as tvf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

PARTS = ("data", "views", "step", "end", "ladder", "scaling", "bytes", "memory")
PRESETS = {"slotcon": "coco", "scfs": "imagenet-200ep", "saliency_cl": "coco", "cvsa": "finegrained"}  # at full size
METHODS = [name for name in PRESETS if (ROOT / f"{name}.py").exists()]
RECIPES = [*PRESETS.items(), ("slotcon", "imagenet-100ep"), ("scfs", "imagenet-800ep"), ("cvsa", "imagenet")]  # for (8)
SAME = ("cpu", "gpus", "torch", "threads", "quick")  # what rows of one table have in common
STEP_FACTOR = 8 / 3  # two views, each three passes' work in the student and one in the teacher, over one view's three


# ---- measuring -------------------------------------------------------------------------------------------------------
def summary(values):
    """Numbers -> {"median", "min", "max", "n"}."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib():
    """Most memory so far, in GiB: the device's; on a CPU this process's, as Linux counts it from the start of the program
    (getrusage's figure, which a started program takes over from the one that started it, would be this table's)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, in bytes
        return importlib.import_module("resource").getrusage(0).ru_maxrss / 2**30
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20


def race(calls, repeats, images):
    """Functions that each treat `images` images, in turn, so that a machine's moods meet all of them alike; the first
    turn warms up. -> {name: {"wall", "cpu"}}, lists of ms an image; cpu is the time of all threads of this process."""
    found = {name: {"wall": [], "cpu": []} for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            if turn:
                found[name]["wall"].append((time.perf_counter() - wall) * 1000 / images)
                found[name]["cpu"].append((time.process_time() - cpu) * 1000 / images)
    return found


def ratios(times, over):
    """Of CPU times, turn by turn: neighbours in time are compared."""
    return summary([a / b for a, b in zip(times["cpu"], over["cpu"])])


def hardware():
    """What a figure hangs on, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpu, "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": importlib.import_module("PIL").__version__,
            "threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime())}


# ---- images, and what people do today --------------------------------------------------------------------------------
def write_jpegs(folder, n):
    """n JPEGs of 640 x 480 pixels, quality 90: scenes, shifted and with a camera's grain, which makes a file as large
    as a photograph's (60 to 150 kB). Without it decoding would be cheaper than anybody's. -> their paths"""
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept, generator, paths = common.scenes(range(min(n, 32)), 640)[0], torch.Generator().manual_seed(0), []
    for i in range(n):
        picture = kept[i % len(kept)].roll(37 * (i // len(kept)), 2)[:, 80:560]
        grain = torch.randn(480, 640, generator=generator) * (4 + i % 5)
        pixels = (picture + grain).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        paths.append(Path(folder) / f"{i:05d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


class PillowBlur:
    """The releases' blur: Pillow's, with a random radius."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class StandardViews:
    """Per-image views as the releases of BYOL, SlotCon and DINO make them: Pillow images through torchvision's first
    transforms. kinds: a (size, least and largest area, p of blur, p of solarise) a view.
    image -> views, boxes, flips"""

    def __init__(self, kinds):
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        end = transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.kinds = [(size, area, transforms.Compose([
            jitter, transforms.RandomGrayscale(0.2), transforms.RandomApply([PillowBlur()], p_blur),
            transforms.RandomSolarize(128, p_solarize), *end])) for size, area, p_blur, p_solarize in kinds]

    def __call__(self, image):
        views, boxes, flips = [], [], []
        for size, area, photometry in self.kinds:
            i, j, h, w = transforms.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
            view = tvf.resized_crop(image, i, j, h, w, [size, size], transforms.InterpolationMode.BICUBIC)
            flips.append(random.random() < 0.5)
            views.append(photometry(tvf.hflip(view) if flips[-1] else view))
            boxes.append([j / image.width, i / image.height, (j + w) / image.width, (i + h) / image.height])
        return views, boxes, flips


class StandardFiles(torch.utils.data.Dataset):
    """Decoded as torchvision's ImageFolder does, at full resolution; one image a call, collated by the DataLoader."""

    def __init__(self, paths, kinds):
        self.paths, self.views = paths, StandardViews(kinds)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as file:
            views, boxes, flips = self.views(Image.open(file).convert("RGB"))
        return views, torch.tensor(boxes), torch.tensor(flips)


TWO_VIEWS = [(224, (0.08, 1.0), 1.0, 0.0), (224, (0.08, 1.0), 0.1, 0.2)]
TEN_VIEWS = [(224, (0.25, 1.0), 1.0, 0.0), (224, (0.25, 1.0), 0.1, 0.2), *[(96, (0.05, 0.25), 0.5, 0.0)] * 8]


def kinds_of(script, args):
    """The views of a script, for StandardViews."""
    kinds = [(args.image_size, args.crop_area, 1.0, 0.0), (args.image_size, args.crop_area, 0.1, 0.2)]
    if script == "scfs":
        kinds += [(args.local_size, args.local_area, 0.5, 0.0)] * args.local_crops
    if script == "saliency_cl":
        kinds += [(args.crop_size, args.box_area, *p) for p in ((1.0, 0.0), (0.1, 0.2)) for _ in range(args.crops)]
    return kinds


# ---- (1) the data path -----------------------------------------------------------------------------------------------
def data_path(opt, folder):
    """One core, one process: from JPEGs on the disk, in the page cache, to what is handed to the device."""
    n, repeats = (4, 2) if opt.quick else (opt.images, opt.repeats or 9)
    paths, calls, rows = write_jpegs(folder / "jpegs", n), {}, list(range(n))
    for canvas in (512, 384, 240):  # COCO's and ImageNet's presets; 240: JPEGs of 640 x 480 are decoded at half their size
        calls[f"ours, files, canvas {canvas}"] = (common.open_images(str(folder / "jpegs"), canvas), rows)
        packed = common.open_images(str(folder / "jpegs"), canvas, cache=str(folder / f"{canvas}.cache"))
        calls[f"ours, cache, canvas {canvas}"] = (packed, rows)
    calls = {name: lambda images=images, rows=rows: images.__getitems__(rows) for name, (images, rows) in calls.items()}
    for name, kinds in (("standard, two views", TWO_VIEWS), ("standard, ten views", TEN_VIEWS)):
        files = StandardFiles(paths, kinds)
        calls[name] = lambda files=files: torch.utils.data.default_collate([files[i] for i in range(n)])
    calls["decoding alone, Pillow"] = lambda: [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    times = race(calls, repeats, n)
    torch.set_num_threads(threads)
    found = [{"path": name, "ms_wall": summary(t["wall"]), "ms_cpu": summary(t["cpu"]),
              "images_per_second": summary([1000 / ms for ms in t["cpu"]]),
              "of_two_views": ratios(t, times["standard, two views"]),
              "of_ten_views": ratios(t, times["standard, ten views"])} for name, t in times.items()]
    kilobytes = [path.stat().st_size / 1000 for path in paths]
    return {"rows": found, "images": n, "kilobytes": summary(kilobytes),
            "targets": {"files of two views": 1 / 5, "files of ten views": 1 / 15, "cache of two views": 1 / 20}}


# ---- a script's own train(), measured from within --------------------------------------------------------------------
class Done(BaseException):
    """Measured enough: leaves train()."""


def command(script, opt, *more, sizes=None, part=""):
    """The flags of a run, `more` last: they win."""
    sizes = sizes or opt.sizes
    flags = ["--preset", PRESETS[script] if sizes == "recipe" else "demo", "--steps", 10**9, "--log-every", 10**9,
             "--save-every", 10**9, "--knn-every", 0, "--data", f"scenes{'-fine' * (script == 'cvsa')}:100000"]
    if script == "saliency_cl":
        flags += ["--saliency-warmup", 0]  # its first steps are cheaper: no map
    if opt.quick:
        flags += ["--image-size", 32, "--canvas", 48, "--batch-size", 8]
        flags += {"scfs": ["--local-size", 16], "saliency_cl": ["--crop-size", 16]}.get(script, [])
    if opt.arch or sizes == "demo" or part == "views":
        flags += ["--arch", opt.arch or "small"]  # views hang on no network
    if opt.batch_size:
        flags += ["--batch-size", opt.batch_size]
    return [str(f) for f in [*flags, "--precision", opt.precision, *more]]


def synthetic(args, fine, rows):
    """One batch of scenes on the device, again and again: a step without its data path."""
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    canvas = common.scenes(range(min(rows, 16)), args.canvas, fine)[0]
    canvas = canvas.repeat(-(-rows // len(canvas)), 1, 1, 1)[:rows].to(device)
    return common.Batch(canvas, torch.tensor([[480, 640]]).repeat(rows, 1), torch.full((rows,), -1, device=device),
                        canvas[:, :0], torch.arange(rows), [])


def run_train(script, argv, boundary, feed="synthetic", levers=()):
    """script.train() without its pictures, kNN and checkpoints; boundary(step) is called whenever the loop asks for the
    batch of a step, and may raise Done. feed: "synthetic"; "loader", the script's own; "standard", a DataLoader of
    per-image views. levers: what to take out of SlotCon's loop, see `ladder`."""
    module = importlib.import_module(script)
    for name in ("draw", "knn_probe", "slot_quality", "object_mass"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: {})
    module.save_checkpoint = lambda *a: None
    args, load = module.parse_args(argv), module.batches

    def batches(images, **how):
        rows = how["batch_size"] // how["world"]
        if feed == "synthetic":
            batch = synthetic(args, script == "cvsa", rows)
        source = standard_batches(args, how) if feed == "standard" else load(images, **how)
        for step in range(how["start"], how["stop"]):
            boundary(step)
            yield batch if feed == "synthetic" else next(source)

    module.batches = batches
    take_out(module, levers, feed)
    with contextlib.suppress(Done):
        module.train(args)
    return args


def standard_batches(args, how):
    """Two per-image views a worker makes, in SlotCon's form. An endless order: no worker ever starts anew."""
    paths = sorted(Path(args.data).iterdir())
    order = ([random.randrange(len(paths)) for _ in range(how["batch_size"])] for _ in range(how["start"], how["stop"]))
    kinds = [(args.image_size, args.crop_area, 1.0, 0.0), (args.image_size, args.crop_area, 0.1, 0.2)]
    loader = torch.utils.data.DataLoader(StandardFiles(paths, kinds), batch_sampler=order, num_workers=args.workers,
                                         pin_memory=how["device"].type == "cuda")
    for views, boxes, flips in loader:
        flips = list(flips.unbind(1))
        rectangles = common.overlap_rectangles(boxes[:, 0], flips[0], boxes[:, 1], flips[1])
        views, rectangles, flips = ([common.upload(x, how["device"]) for x in part]
                                    for part in (views, rectangles, flips))
        yield types.SimpleNamespace(unreadable=[], made=(views, [r.float() for r in rectangles], flips))


def take_out(module, levers, feed):
    """Puts the customary way in place of ours: "nchw", "loops", and per-image views where the feed is "standard"."""
    make_views, to, layout = module.make_views, torch.nn.Module.to, torch.channels_last
    if "nchw" in levers:
        layout = torch.contiguous_format
        torch.nn.Module.to = lambda self, *a, memory_format=None, **k: to(self, *a, **k)

    def arranged(*a, **k):
        views, *rest = a[0].made if feed == "standard" else make_views(*a, **k)
        return [view.contiguous(memory_format=layout) for view in views], *rest

    def ema_loop(teacher, student, momentum):
        for p, q in zip(teacher.parameters(), student.parameters()):
            p.data = p.data * momentum + q.data * (1 - momentum)

    class LoopLARS(module.LARS):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    d = p.grad.add(p, alpha=group["weight_decay"])
                    if group["adapt"]:
                        p_norm, d_norm = p.norm(), d.norm()
                        one = torch.ones_like(p_norm)
                        ratio = torch.where(d_norm > 0, group["eta"] * p_norm / d_norm, one)
                        d = d.mul(torch.where(p_norm > 0, ratio, one))
                    if not self.state[p]:
                        self.state[p]["mu"] = torch.zeros_like(p)
                    mu = self.state[p]["mu"]
                    mu.mul_(group["momentum"]).add_(d)
                    p.add_(mu, alpha=-group["lr"])

    if "nchw" in levers or feed == "standard":
        module.make_views = arranged
    if "loops" in levers:
        module.ema_update, module.LARS = ema_loop, LoopLARS


def child_step(spec):
    """Warm-up, then `repeats` times `inner` steps on the clock, `inner` under CUDA's alarm for synchronisations and, if
    asked for, `inner` under the profiler."""
    warm, inner, repeats = spec["warmup"], spec["inner"], spec["repeats"]
    marks, alarms, work = [], [], []
    forward, stack = common.ResNet.forward, contextlib.ExitStack()
    cuda, profile = torch.cuda.is_available(), None

    def counted(net, x):  # pixels x passes: forward and backward of a trained network are three forwards
        trained = torch.is_grad_enabled() and net.conv1.weight.requires_grad
        work.append(x.shape[0] * x.shape[2] * x.shape[3] * (3 if trained else 1))
        return forward(net, x)

    def boundary(step):
        nonlocal alarms, profile
        if "read" in spec["levers"] and cuda:
            torch.cuda.current_stream().synchronize()  # what reading the loss after each step comes to
        if step == 1:
            common.ResNet.forward = forward
        if step < warm:
            return
        phase, rest = divmod(step - warm, inner)
        if rest:
            return
        synchronize()
        if phase <= repeats:
            marks.append(time.perf_counter())
        if phase == repeats and cuda:
            alarms = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if phase == repeats + 1 and cuda:
            torch.cuda.set_sync_debug_mode("default")
            stack.close()
        if phase == repeats + 1 and spec["profile"]:
            profile = torch.profiler.profile()
            profile.start()
        if phase == repeats + 1 + spec["profile"]:
            raise Done

    if "--compile" not in spec["argv"]:  # compilation would trace the counter
        common.ResNet.forward = counted
    args = run_train(spec["script"], spec["argv"], boundary, spec["feed"], spec["levers"])
    images = args.batch_size * inner
    seen = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in alarms if "called a sync" in str(w.message))
    found = {"images_per_second": summary([images / (b - a) for a, b in itertools.pairwise(marks)]),
             "batch_size": args.batch_size, "image_size": args.image_size, "peak_gib": peak_gib(), "arch": args.arch,
             "passes": sum(work) / (args.batch_size * 3 * args.image_size**2) if work else None,
             "syncs_per_step": sum(seen.values()) / inner if cuda else None,
             "syncs_at": {place: count / inner for place, count in seen.most_common(8)}}
    if profile:
        profile.stop()
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))
        total = sum(getattr(e, key) for e in events)
        found["profile"] = [[e.key[:80], getattr(e, key) / 1000 / inner, getattr(e, key) / total] for e in events[:15]]
    return found


def child_plain(spec):
    """The roof's measure: forward and backward of the plain backbone, channels_last, on one batch of noise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, half, _ = common.numerics(spec["precision"], device, False)
    torch.manual_seed(0)
    net = common.backbone(spec["arch"]).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(spec["batch_size"], 3, spec["image_size"], spec["image_size"], device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.type, half, enabled=half is not None):
            y = net(x)[-1]
        y.float().square().mean().backward()

    for _ in range(spec["warmup"]):
        step()
    times = race({"plain": lambda: [step() for _ in range(spec["inner"])]}, spec["repeats"],
                 spec["batch_size"] * spec["inner"])
    return {"images_per_second": summary([1000 / ms for ms in times["plain"]["wall"]])}


def child_views(spec):
    """A script's views of one batch, called again with the arguments that its loop gave; and the same kinds of views an
    image at a time, from decoded Pillow images, on one core."""
    module, kept, inner = importlib.import_module(spec["script"]), {}, spec["inner"]

    def keep(name):
        plain = getattr(module, name)

        def kept_call(*a, **k):
            found = plain(*a, **k)
            kept[name] = lambda: [plain(*a, **k) for _ in range(inner)]
            if name == "make_views":
                raise Done
            return found
        setattr(module, name, kept_call)

    for name in ("find_masks", "salient_pairs", "make_views"):  # what comes before the views, where there is something
        if hasattr(module, name):
            keep(name)
    args = run_train(spec["script"], spec["argv"], lambda step: None)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    ours = race(kept, spec["repeats"], inner * args.batch_size)
    kinds, rows = kinds_of(spec["script"], args), min(args.batch_size, 8)
    pictures = [Image.fromarray(x[:, 80:560].permute(1, 2, 0).numpy()) for x in common.scenes(range(rows), 640)[0]]
    transform, views = StandardViews(kinds), len(kinds)
    standard = race({"standard": lambda: [transform(picture) for picture in pictures]}, spec["repeats"], rows)
    clock = "wall" if torch.cuda.is_available() else "cpu"  # one thread: a busy machine's waits are nobody's cost
    return {"batch_size": args.batch_size, "views": views, "clock": clock, "canvas": args.canvas,
            "sizes": sorted({k[0] for k in kinds}, reverse=True),
            "ms_a_view": summary([t / views for t in ours["make_views"][clock]]),
            "ms_an_image": {name: summary(t[clock]) for name, t in ours.items()},
            "standard_ms_a_view": summary([t / views for t in standard["standard"]["cpu"]])}


def child_end(spec):
    """The program as a user starts it; what its log says from the third line on."""
    args = run_train(spec["script"], spec["argv"], lambda step: None, spec["feed"])
    lines = [json.loads(line) for line in (Path(args.out) / "log.jsonl").read_text().splitlines()][2:]
    return {name: summary([line[name] for line in lines]) for name in ("images_per_second", "waiting")} | {
        "memory_gb": summary([peak_gib()])}


def child_bytes(spec):
    """What a process hands to collectives in a step, counted, beside the formula. All count, rank 0 tells."""
    module, counted, steps, marks = importlib.import_module(spec["script"]), collections.defaultdict(list), [], []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def wrap(name, call):
        def counting(*tensors, **more):
            counted[name].append(tensors[-1].nbytes)  # the last one is what is sent
            return call(*tensors, **more)
        setattr(dist, name, counting)

    def gradients(state, bucket):
        counted["gradients"].append(bucket.buffer().nbytes)
        future = plain["all_reduce"](bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0].div_(dist.get_world_size()))

    class CountingDDP(module.DDP):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.register_comm_hook(None, gradients)

    def boundary(step):
        steps.append({name: list(sizes) for name, sizes in counted.items()})
        marks.append(time.perf_counter())
        counted.clear()
        if step == 5:  # the first steps rebuild DDP's buckets, and log
            raise Done

    for name, call in plain.items():
        wrap(name, call)
    module.DDP = CountingDDP
    args, world = run_train(spec["script"], spec["argv"], boundary), int(os.environ.get("WORLD_SIZE", "1"))
    step = steps[-1]
    formula = exchange(spec["script"], args, args.batch_size // world, sync_batchnorm="ours") if world > 1 else {
        "gradients": 0, "batch_norm": 0, "batch_norm_calls": 0, "gathered": 0, "keys_at_most": 0}
    gathered = sum(step.get("all_gather_into_tensor", []))
    return {"world": world, "counted": {"gradients": sum(step.get("gradients", [])),
                                        "batch_norm": sum(step.get("all_reduce", [])),
                                        "batch_norm_calls": len(step.get("all_reduce", [])), "gathered": gathered},
            "formula": formula, "images_per_second": args.batch_size / statistics.median(
                b - a for a, b in itertools.pairwise(marks[1:])),
            "agrees": all(sum(step.get(key, [])) == formula[name] for key, name in (
                ("gradients", "gradients"), ("all_reduce", "batch_norm")))
            and len(step.get("all_reduce", [])) == formula["batch_norm_calls"]
            and 0 <= gathered - formula["gathered"] <= formula["keys_at_most"]}


def most_slots(args):
    """SlotCon's slots in an image at most: as many as prototypes, or as cells."""
    return min(args.prototypes, (args.image_size // (8 if args.arch == "small" else 32)) ** 2)


def child_memory(spec):
    """Tensors on a GPU that is not there (pretend.py), shapes without numbers: what is alive when the second step's
    backward pass begins, the gradients to come and the canvases of the batch ahead. Beyond it a real one has what the
    allocator and the libraries take, and a few tensors of the pass itself. SlotCon's slots: the most there can be."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is one, it is left alone
    import pretend
    module = importlib.import_module(spec["script"])
    pretend.start(numbers=False)
    args = module.parse_args(spec["argv"])
    pretend.place["listed"] = args.batch_size * most_slots(args) if spec["script"] == "slotcon" else 0

    def boundary(step):
        if step == 2:
            raise Done
    run_train(spec["script"], spec["argv"], boundary)
    size, where = pretend.memory["largest"]
    return {"bytes": pretend.memory["kept"] + pretend.memory["gradients"] + 3 * args.canvas**2 * args.batch_size,
            "largest": size, "largest_at": where}


CHILDREN = {"step": child_step, "plain": child_plain, "views": child_views, "end": child_end, "bytes": child_bytes,
            "memory": child_memory}


def spawn(kind, world=1, **spec):
    """A row, measured in processes of its own -> what rank 0 found, or {"failed": its last line}."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    with tempfile.TemporaryDirectory() as out:
        if "argv" in spec:
            spec["argv"] = [*map(str, spec["argv"]), "--out", out]
        for rank in range(world):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                     "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(f"{out}/{rank}.said", "w") as said, open(f"{out}/{rank}.errors", "w") as errors:
                processes.append(subprocess.Popen(
                    [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"kind": kind, **spec})],
                    stdout=said, stderr=errors, env=os.environ | (group if world > 1 else {})))
        try:
            while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
                time.sleep(0.1)
        finally:  # where one has failed the others would wait for it
            for process in processes:
                process.kill()
                process.wait()
        bad = next((rank for rank, p in enumerate(processes) if p.returncode > 0), None)
        bad = bad if bad is not None else next((rank for rank, p in enumerate(processes) if p.returncode), None)
        if not processes[0].returncode:
            found = json.loads(Path(f"{out}/0.said").read_text().splitlines()[-1])
        else:
            lines = Path(f"{out}/{bad}.errors").read_text().strip().splitlines()
            found = {"failed": (lines or [f"exit status {processes[bad].returncode}"])[-1][:300]}
    what = {k: v for k, v in spec.items() if k in ("script", "feed", "levers") and v}
    print(kind, world, what, json.dumps(found)[:200], file=sys.stderr, flush=True)
    return found


# ---- (2) to (8) ------------------------------------------------------------------------------------------------------
def pace(opt):
    """Steps to warm up, steps on the clock at a time, times."""
    warm, inner, repeats = (1, 1, 2) if opt.quick else (10, 10, 5) if opt.cuda else (2, 4, 7)
    return {"warmup": warm, "inner": inner, "repeats": opt.repeats or repeats}


def view_cost(opt, folder):
    rows = []
    for script in opt.methods:
        batch = [] if opt.cuda or opt.quick or opt.batch_size else ["--batch-size", 16]
        argv = command(script, opt, *batch, sizes="demo" if opt.quick else "recipe", part="views")
        rows.append({"script": script, **spawn("views", script=script, argv=argv, inner=1,
                                               repeats=opt.repeats or (2 if opt.quick else 9))})
    return {"rows": rows}


def one_step(opt, script, *more, compiled=False, feed="synthetic", levers=(), data=(), world=1):
    argv = command(script, opt, *data, *more, *(["--compile"] if compiled else []))
    return spawn("step", world, script=script, argv=argv, feed=feed, levers=list(levers), profile=opt.profile,
                 **pace(opt))


def steps(opt, folder):
    rows = []
    for script in opt.methods:
        passes, plain = None, {"failed": "its script failed"}  # the roof is each script's own: machines change their pace
        for compiled in (False, True)[:1 if opt.quick else 2]:
            row = {"script": script, "compiled": compiled, **one_step(opt, script, compiled=compiled)}
            rows.append(row)
            if "failed" in row:
                continue
            if not compiled:
                plain = spawn("plain", arch=row["arch"], batch_size=row["batch_size"], image_size=row["image_size"],
                              precision=opt.precision, **pace(opt))
            passes = row["passes"] or passes
            row["plain"] = plain
            if "failed" not in plain and passes:
                rate, best = row["images_per_second"]["median"], plain["images_per_second"]["median"]
                row |= {"roof": best / STEP_FACTOR, "of_roof": rate / best * STEP_FACTOR, "passes": passes,
                        "of_own_roof": rate / best * passes}
    return {"rows": rows}


def files_and_cache(opt, folder, script, n):
    """Flags for the files path and for the cache path."""
    if not (folder / "many").exists():
        write_jpegs(folder / "many", n)
    canvas = command(script, opt)
    canvas = canvas[canvas.index("--canvas") + 1] if "--canvas" in canvas else "preset"
    path = ["--data", str(folder / "many")]
    return path, [*path, "--cache", str(folder / f"{script}-{canvas}.cache")]


def end_to_end(opt, folder):
    rows, every = [], 2 if opt.quick else 10
    for script in opt.methods:
        files, cache = files_and_cache(opt, folder, script, 32 if opt.quick else 1024)
        for source, data in (("synthetic", []), ("cache", cache), ("files", files)):
            argv = command(script, opt, *data, "--log-every", every, "--steps", every * 5)
            feed = "synthetic" if source == "synthetic" else "loader"
            rows.append({"script": script, "source": source, **spawn("end", script=script, argv=argv, feed=feed)})
    return {"rows": rows}


LADDER = [  # name, --precision, feed, what is still taken out, data
    ("fp32, NCHW, per-image views, loops", "fp32", "standard", ("nchw", "loops", "read"), "files"),
    ("+ AMP", "auto", "standard", ("nchw", "loops", "read"), "files"),
    ("+ channels_last", "auto", "standard", ("loops", "read"), "files"),
    ("+ views on the device", "auto", "loader", ("loops", "read"), "files"),
    ("+ cache", "auto", "loader", ("loops", "read"), "cache"),
    ("+ foreach EMA and optimiser", "auto", "loader", ("read",), "cache"),
    ("+ loss read at log lines only", "auto", "loader", (), "cache"),
    ("+ compile", "auto", "loader", (), "cache"),
]


def ladder(opt, folder):
    files, cache = files_and_cache(opt, folder, "slotcon", 32 if opt.quick else 1024)
    rows = []
    for name, precision, feed, levers, data in LADDER[:-1] if opt.quick else LADDER:
        more = ["--precision", precision, "--optimizer", "lars"]  # the recipe's, at every size
        rows.append({"lever": name, **one_step(opt, "slotcon", *more, compiled=name == "+ compile", feed=feed,
                                               levers=levers, data=files if data == "files" else cache)})
    return {"rows": rows}


def scaling(opt, folder):
    small, grown = opt.sizes == "demo", []
    batches, sizes = ((16, 32, 64), (48, 64, 96)) if small else ((64, 128, 256, 512), (160, 224, 288))
    for axis, script, flag, values in (
            ("batch", "slotcon", "--batch-size", batches), ("prototypes K", "slotcon", "--prototypes", (256, 2048)),
            ("image size", "slotcon", "--image-size", sizes), ("local views", "scfs", "--local-crops", (2, 4, 8)),
            ("crop pairs", "saliency_cl", "--crops", (1, 2, 4))):
        for value in () if opt.quick or script not in opt.methods else values:
            more = [flag, value, *(["--no-weight-saliency"] if (flag, value) == ("--crops", 1) else [])]
            grown.append({"axis": axis, "script": script, "value": value, **one_step(opt, script, *more)})
    for world in (1, 2, 4, 8) if torch.cuda.device_count() > 1 else ():
        if world <= torch.cuda.device_count() and "slotcon" in opt.methods:
            grown.append({"axis": "GPUs", "script": "slotcon", "value": world, **one_step(opt, "slotcon", world=world)})
    return {"grown": grown}


def exchanged(opt, folder):
    counted = []
    for script in opt.methods:
        for world in (1, 2) if opt.quick else (1, 2, 4):
            argv = command(script, opt, "--batch-size", 16, "--device", "cpu", "--precision", "fp32", sizes="demo")
            counted.append({"script": script, "processes": world, **spawn("bytes", world, script=script, argv=argv)})
    return {"counted": counted, "paper": paper(opt)}


def memory(opt, folder):
    """GB = what stays whatever the batch + images a GPU x what each needs, from two sizes of the batch; in SlotCon, from a
    third, + what grows with the square: its logits, a process's slots against the slots of all."""
    rows = []
    for script, preset in RECIPES:
        if script not in opt.methods:
            continue
        few, more = (8, 16) if opt.quick else (16, 32)
        sizes = (few, more, 2 * more) if script == "slotcon" else (few, more)
        found = [spawn("memory", script=script, argv=[
            "--preset", preset, "--data", "scenes:100000", "--steps", 10**9, "--log-every", 10**9, "--save-every", 10**9,
            "--knn-every", 0, "--precision", "bf16", "--workers", 0, "--device", "cuda", "--batch-size", n])
            for n in sizes]
        row = {"script": script, "preset": preset}
        failed = next((f["failed"] for f in found if "failed" in f), None)
        if failed:
            rows.append(row | {"failed": failed})
            continue
        slopes = [(b["bytes"] - a["bytes"]) / (n - m) for (a, m), (b, n) in itertools.pairwise(zip(found, sizes))]
        square = (slopes[-1] - slopes[0]) / (sizes[-1] - sizes[0])
        one = slopes[0] - square * (few + more)
        batch = importlib.import_module(script).parse_args(["--preset", preset, "--data", "scenes"]).batch_size
        rows.append(row | {"fixed": found[0]["bytes"] - few * one - few**2 * square, "an_image": one, "batch": batch,
                           "square": square,
                           "largest": found[1]["largest"], "largest_images": more, "largest_at": found[1]["largest_at"]})
    return {"rows": rows}


# ---- on paper --------------------------------------------------------------------------------------------------------
def exchange(script, args, images, sync_batchnorm):
    """Bytes that ONE process hands to collectives in a step of `images` images a process, float32: gradients; batch
    norm's sums (sync_batchnorm "ours": GlobalBatchNorm's, "torch": nn.SyncBatchNorm's) and how many calls they take;
    what is gathered every step; and, beyond that, SlotCon's keys at most, all of its prototypes or cells being used."""
    module = importlib.import_module(script)
    shape = {k: getattr(args, k) for k in inspect.signature(module.Model).parameters}
    with torch.device("meta"):
        model = module.Model(**shape)

    def norms(part):  # channels and number of its batch norms
        channels = [m.num_features for m in part.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        return np.array([sum(channels), len(channels)])

    student = norms(model.student)
    if script == "scfs":  # the large views, the small ones; the teacher the large ones and what was searched
        trained = 2 * student
        frozen = student + (norms(model.student.stage_heads) if args.search != "off" else 0)
        gathered, keys = 4 * (args.out_dim + len(args.stages) * args.dim), 0
    elif script == "saliency_cl":  # two views and all the crops
        trained, frozen = 3 * (student + norms(model.predictor)), 3 * student
        gathered = 4 * (2 + 2 * args.crops) * images * args.dim * (args.loss == "infonce")
        keys = 0
    elif script == "cvsa":
        dense = norms(model.dense_predictor) if args.align_weight else 0
        trained, frozen = 2 * (student + norms(model.predictor) + dense), 2 * student
        gathered, keys = 2 * 8 * bool(args.align_weight), 0  # two counts of valid pairs, int64
    else:
        trained, frozen = 2 * (student + norms(model.predictor)), 2 * student
        gathered = 4 * 8 + 4 * args.prototypes  # counts of keys and queries, int64; the centre
        keys = 2 * images * most_slots(args) * args.dim * 4
    (c, m), (cf, mf) = trained, frozen
    back = 2 * c + m if sync_batchnorm == "ours" else 2 * c
    return {"gradients": 4 * sum(p.numel() for p in model.parameters()),
            "batch_norm": int(4 * (2 * (c + cf) + m + mf + back)), "batch_norm_calls": int(2 * m + mf),
            "batch_norm_gathered": int(4 * (2 * (c + cf) + m + mf)), "gathered": gathered, "keys_at_most": keys}


def paper(opt):
    """The recipes on 8, 64 and 512 GPUs: what each GPU receives in a step. Rings: an all-reduce of n bytes brings it
    2 (N - 1) / N n, an all-gather of n bytes from each of N brings (N - 1) n. Milliseconds at --link and --latency."""
    rows = []
    for script in METHODS:
        args = importlib.import_module(script).parse_args(["--preset", PRESETS[script], "--data", "scenes"])
        for world in (8, 64, 512):
            for kind in ("same batch", "same images a GPU"):
                batch = max(4 * world, args.batch_size) if kind == "same batch" else args.batch_size // 8 * world
                if kind == "same images a GPU" and world == 8:
                    continue
                n = exchange(script, args, batch // world, "torch")
                ring, gather = 2 * (world - 1) / world, world - 1
                gradients = ring * n["gradients"]
                norm = gather * n["batch_norm_gathered"] + ring * (n["batch_norm"] - n["batch_norm_gathered"])
                keys = gather * (n["gathered"] + n["keys_at_most"])
                rate = opt.link[world > 8] * 1e9
                exposed = 1000 * (norm + keys) / rate + n["batch_norm_calls"] * opt.latency / 1000
                rows.append({"script": script, "gpus": world, "kind": kind, "batch": batch, "images": batch // world,
                             "gradients": gradients, "batch_norm": norm, "keys_at_most": keys,
                             "calls": n["batch_norm_calls"], "gradients_ms": 1000 * gradients / rate,
                             "exposed_ms": exposed})
    stores = [{"data": name, "images": n, "canvas": s, "gigabytes": n * (3 * s * s + 24) / 1e9}
              for name, n, s in (("COCO train2017", 118287, 512), ("ImageNet-1k train", 1281167, 384),
                                 ("iNaturalist 2021 train", 2686843, 384))]
    return {"rows": rows, "stores": stores, "link_gb_s": opt.link, "latency_us": opt.latency}


# ---- tables ----------------------------------------------------------------------------------------------------------
def number(x, digits=3):
    return "n/a" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def spread(s, digits=3):
    """{"median", "min", "max"} -> "median (min-max)"."""
    return f"{number(s['median'], digits)} ({number(s['min'], digits)}-{number(s['max'], digits)})"


def table(head, rows):
    """rows: lists of texts -> Markdown."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def rows_or_why(rows, names, cells):
    """cells(row) behind the row's names, or the reason why there are none."""
    return [[*(row[n] for n in names), *([f"failed: {row['failed']}"] if "failed" in row else cells(row))]
            for row in rows]


def data_table(part):
    def cells(row):
        return [spread(row["ms_cpu"]), spread(row["ms_wall"]), number(row["images_per_second"]["median"]),
                spread(row["of_two_views"], 2), spread(row["of_ten_views"], 2)]
    kb = part["kilobytes"]
    size = f"{kb['min']:.0f} to {kb['max']:.0f} kB, in the page cache"
    about = (f"{part['images']} JPEGs of 640 x 480, {size}; one core, one thread. "
             "Targets: files at most 0.2 of two views and 0.067 of ten, cache at most 0.05 of two. Ours ends with "
             "canvases for the device, which makes the views (2); the standard ends with views.")
    return [about, "",
            *table(["path", "CPU ms an image", "wall ms an image", "images/s a core (CPU)", "of two views (CPU)",
                    "of ten views (CPU)"], rows_or_why(part["rows"], ["path"], cells))]


def views_table(part, results):
    def cells(row):
        gap = row["standard_ms_a_view"]["median"] / row["ms_a_view"]["median"]
        before = sum(s["median"] for name, s in row["ms_an_image"].items() if name != "make_views")
        step = results.get("step", {}).get("rows", [])
        step = [r for r in step if r["script"] == row["script"] and "failed" not in r]
        share = "not measured yet"
        if step and step[0]["batch_size"] == row["batch_size"]:
            total = sum(s["median"] for s in row["ms_an_image"].values())
            share = f"{100 * total * step[0]['images_per_second']['median'] / 1000:.1f} %"
        return [f"{row['views']} of {', '.join(map(str, row['sizes']))}", row["canvas"], row["batch_size"],
                spread(row["ms_a_view"]), number(before), spread(row["standard_ms_a_view"]), number(gap), share]
    return table(["script", "views an image", "canvas", "batch", "ours, ms a view (device; on a CPU one core)",
                  "masks or boxes before, ms an image", "torchvision, decoded image, ms a view (CPU time)", "times",
                  "share of the step"],
                 rows_or_why(part["rows"], ["script"], cells))


def step_table(part):
    def cells(row):
        roof = [number(row["roof"]), f"{100 * row['of_roof']:.0f} %", number(row["passes"]),
                f"{100 * row['of_own_roof']:.0f} %"] if "roof" in row else ["n/a"] * 4
        return [row["arch"], row["batch_size"], row["image_size"], spread(row["images_per_second"]), *roof,
                number(row["peak_gib"]), number(row["syncs_per_step"]), ", ".join(row["syncs_at"])]
    about = ("Roof: images/s of the plain backbone's forward and backward, channels_last, same batch and precision, "
             "over 2.67. Own roof: over the backbone passes that this method makes, in supervised steps, counted at "
             "their sizes; heads are not counted.")
    lines = [about, "", *table(
        ["script", "compiled", "arch", "batch", "pixels", "images/s", "roof", "of it", "passes", "of own roof",
         "peak GiB", "syncs a step", "where"], rows_or_why(part["rows"], ["script", "compiled"], cells))]
    for row in part["rows"]:
        if "profile" in row:
            shares = [[f"`{name}`", number(ms), f"{100 * share:.1f} %"] for name, ms, share in row["profile"]]
            lines += [f"{row['script']}{', compiled' * row['compiled']}, self time:", "",
                      *table(["operation", "ms a step", "share"], shares)]
    return lines


def end_table(part):
    def cells(row):
        return [spread(row["images_per_second"]), f"{100 * row['waiting']['median']:.1f} %",
                number(row["memory_gb"]["max"])]
    return table(["script", "source", "images/s", "waiting for data", "peak GiB"],
                 rows_or_why(part["rows"], ["script", "source"], cells))


def ladder_table(part):
    first = next((r["images_per_second"]["median"] for r in part["rows"] if "failed" not in r), 1)
    def cells(row):
        return [spread(row["images_per_second"]), number(row["images_per_second"]["median"] / first),
                number(row["peak_gib"]), number(row["syncs_per_step"])]
    return ["SlotCon; a row has what the rows above it have. The boxes of the standard views need not overlap.", "",
            *table(["lever", "images/s", "times the first", "peak GiB", "syncs a step"],
                   rows_or_why(part["rows"], ["lever"], cells))]


def scaling_table(part):
    def cells(row):
        return [row["batch_size"], spread(row["images_per_second"]), number(1000 / row["images_per_second"]["median"]),
                number(row["peak_gib"])]
    return table(["axis", "script", "value", "batch", "images/s", "ms an image", "peak GiB"],
                 rows_or_why(part["grown"], ["axis", "script", "value"], cells))


def bytes_table(part, results):
    rates = {r["script"]: r for r in results.get("step", {}).get("rows", []) if "failed" not in r and not r["compiled"]}

    def counted(row):
        c, f = row["counted"], row["formula"]
        return [f"{c[n]:,} / {f[n]:,}" for n in ("gradients", "batch_norm", "batch_norm_calls")] + [
            f"{c['gathered']:,} / {f['gathered']:,} to {f['gathered'] + f['keys_at_most']:,}",
            "yes" if row["agrees"] else "NO", number(row["images_per_second"])]
    lines = ["Bytes that one process hands to gloo in a step, counted / formula (demo sizes, batch 16, fp32):", "",
             *table(["script", "processes", "gradients", "batch norm", "its calls", "gathered", "agree",
                     "images/s, all processes"], rows_or_why(part["counted"], ["script", "processes"], counted))]
    page, rows = part["paper"], []
    for r in page["rows"]:
        step = rates.get(r["script"])
        efficiency = "not measured yet"
        if step and step["arch"] == "resnet50":
            ms = 1000 * r["images"] / step["images_per_second"]["median"]
            efficiency = f"{100 * ms / (ms + r['exposed_ms'] + max(0, r['gradients_ms'] - ms / 2)):.0f} %"
        rows.append([r["script"], r["gpus"], r["kind"], r["batch"], r["images"],
                     *(number(r[n] / 1e6) for n in ("gradients", "batch_norm", "keys_at_most")), r["calls"],
                     number(r["gradients_ms"]), number(r["exposed_ms"]), number(9 * r["exposed_ms"]), efficiency])
    about = ("On paper, the recipes with nn.SyncBatchNorm: MB that each GPU receives in a step. Assumed, not measured: "
             "{:g} GB/s a GPU inside 8, {:g} beyond, {:g} us a batch-norm call (--link, --latency). Gradients travel "
             "during the backward pass, taken as half the step; batch norm and keys make everything wait. Same batch: the "
             "recipe's, or 4 images a GPU where that is more; same images a GPU: as on 8. Efficiency: "
             "step over step and waiting, from (3)'s images/s.").format(*page["link_gb_s"], page["latency_us"])
    lines += [about, "", *table(["script", "GPUs", "kind", "batch", "images a GPU", "gradients MB", "batch norm MB",
                          "keys, centres MB at most", "batch-norm calls", "gradients ms", "waiting ms",
                          "step for 90 %, ms", "efficiency"], rows)]
    lines += ["A cache pays while the page cache holds it; beyond, the disk sets its pace, and files take over:", ""]
    files = {r["path"]: r for r in results.get("data", {}).get("rows", [])}
    stores = []
    for s in page["stores"]:
        row = files.get(f"ours, files, canvas {s['canvas']}")
        stores.append([s["data"], f"{s['images']:,}", s["canvas"], number(s["gigabytes"]),
                       number(1000 / row["images_per_second"]["median"], 3) if row else "not measured yet"])
    return lines + table(["data", "images", "canvas", "cache GB", "cores busy decoding for 1,000 images/s"], stores)


def memory_table(part):
    def cells(row):
        batch = row["batch"]
        gb = [number((row["fixed"] + n * (row["an_image"] + row["square"] * batch)) / 1e9) for n in (batch / 8, batch)]
        return [number(row["fixed"] / 1e9), number(row["an_image"] / 1e6), row["batch"], *gb,
                f"{number(row['largest'] / row['largest_images'] / 1e6)} ({row['largest_at']})"]
    about = ("Counted, not measured: bf16; tensors alive when the backward pass begins, gradients, canvases of the batch "
             "ahead. What the allocator and the libraries take comes on top.")
    return [about, "", *table(
        ["script", "preset", "GB whatever the batch", "MB an image", "batch", "GB on each of 8 GPUs", "GB on one",
         "largest tensor, MB an image (where)"], rows_or_why(part["rows"], ["script", "preset"], cells))]


def markdown(results):
    """All parts; those without figures say so."""
    tables = {"data": data_table, "views": lambda p: views_table(p, results), "step": step_table, "end": end_table,
              "ladder": ladder_table, "scaling": scaling_table,
              "bytes": lambda p: bytes_table(p, results), "memory": memory_table}
    titles = ["(1) Data path", "(2) Views", "(3) The step", "(4) End to end", "(5) The ladder", "(6) How cost grows",
              "(7) Processes", "(8) Memory, counted"]
    lines = ["# Benchmark", "", "`python tests/benchmark.py`: medians after a warm-up, in brackets least and most.", ""]
    for name, title in zip(PARTS, titles):
        lines += [f"## {title}", ""]
        if name not in results:
            lines += [f"not measured yet (`python tests/benchmark.py --only {name}`)", ""]
            continue
        on = results[name]["on"]
        where = (f"{', '.join(on['gpus']) or on['cpu']}, {on['cores']} cores, {on['threads']} thread(s), "
                 f"load {on['load_average']:g}; torch {on['torch']}, torchvision {on['torchvision']}, Pillow "
                 f"{on['pillow']}; {on['date']}" + "; --quick: the figures mean nothing" * on["quick"])
        lines += [where, "", *tables[name](results[name])]
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description="how fast the method scripts are", allow_abbrev=False)
    p.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--arch", choices=common.ARCHS, help="default: the sizes' own")
    p.add_argument("--sizes", choices=("recipe", "demo"), help="default: recipe on a GPU, demo on a CPU")
    p.add_argument("--batch-size", type=int, help="default: the sizes' own")
    p.add_argument("--precision", choices=common.PRECISIONS, default="auto")
    p.add_argument("--images", type=int, default=32, help="JPEGs a turn in (1)")
    p.add_argument("--repeats", type=int, help="turns on the clock; default 9 in (1) and (2), else 5, on a CPU 7")
    p.add_argument("--profile", action="store_true", help="adds to (3) where the time goes")
    p.add_argument("--link", type=float, nargs=2, default=[450.0, 50.0], help="GB/s a GPU inside 8 and beyond, assumed")
    p.add_argument("--latency", type=float, default=30.0, help="microseconds a small collective, assumed")
    p.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    p.add_argument("--out", default=str(Path(__file__).resolve().parent / "results"))
    p.add_argument("--child", help=argparse.SUPPRESS)
    opt = p.parse_args()
    if opt.child:
        spec = json.loads(opt.child)
        found = CHILDREN[spec["kind"]](spec)
        print(json.dumps(found))
        return
    opt.cuda = torch.cuda.is_available()
    opt.precision = importlib.import_module("slotcon").parse_args(["--precision", opt.precision]).precision  # what auto is
    opt.sizes = opt.sizes or ("recipe" if opt.cuda and not opt.quick else "demo")
    opt.methods, wanted = opt.methods.split(","), opt.only.split(",")
    if not {*opt.methods} <= {*METHODS} or not {*wanted} <= {*PARTS}:
        p.error(f"--methods takes some of {','.join(METHODS)}, --only some of {','.join(PARTS)}")
    path = Path(opt.out) / f"benchmark-{'cuda' if opt.cuda else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    measure = {"data": data_path, "views": view_cost, "step": steps, "end": end_to_end, "ladder": ladder,
               "scaling": scaling, "bytes": exchanged, "memory": memory}
    with tempfile.TemporaryDirectory() as folder:
        for name in (part for part in PARTS if part in wanted):
            before = results.get(name, {})
            results[name] = {"on": hardware() | {"quick": opt.quick}, **measure[name](opt, Path(folder))}
            for key, rows in results[name].items():  # other scripts' rows stay, when taken on the same machine
                if isinstance(rows, list) and all(before.get("on", {}).get(k) == results[name]["on"][k] for k in SAME):
                    rows += [row for row in before.get(key, []) if row.get("script", opt.methods[0]) not in opt.methods]
                    rows.sort(key=lambda row: METHODS.index(row["script"]) if "script" in row else 0)
            path.write_text(json.dumps(results, indent=1) + "\n")  # a part a time: what is measured is kept
            path.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
