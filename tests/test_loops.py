"""What `train` makes of a method: steps, schedules, teacher, weights left behind and flags, against loops written out
here. Whole runs compared with other whole runs cannot see a mistake that both make."""
import argparse
import importlib
import inspect
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from launch import SCRIPTS

import common
import cvsa
import saliency_cl
import scfs
import slotcon

SMALL = {"slotcon": ["--prototypes", "8", "--dim", "8", "--hidden", "8"],
         "scfs": ["--out-dim", "10", "--dim", "6", "--hidden", "8", "--local-size", "16"],
         "saliency_cl": ["--crop-size", "16", "--dim", "8", "--hidden", "8"],
         "cvsa": ["--dim", "8", "--hidden", "8", "--dense-hidden", "8"]}
each = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def handlers():
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for s, handler in kept.items():
        signal.signal(s, handler)


def train(script, out, *more):
    """Trains in float64 with tiny networks. -> the module, its arguments, the log, checkpoint.pt, backbone.pth"""
    m = importlib.import_module(script)
    args = m.parse_args(["--data", "scenes:36", "--preset", "demo", "--batch-size", "8", "--epochs", "2", "--image-size", "32",
                         "--canvas", "48", "--precision", "fp64", "--device", "cpu", "--workers", "0", "--knn-every", "0",
                         "--log-every", "1", "--out", str(out), *SMALL[script], *map(str, more)])
    m.train(args)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return m, args, log, *(torch.load(out / name, weights_only=True) for name in ("checkpoint.pt", "backbone.pth"))


def spy(monkeypatch, m, name):
    """From now on m.name leaves its arguments and what it returned in the list that is returned."""
    calls, old = [], getattr(m, name)

    def seen(*args, **more):
        calls.append((args, old(*args, **more)))
        return calls[-1][1]
    monkeypatch.setattr(m, name, seen)
    return calls


def no_looks(monkeypatch, m):
    """kNN and pictures are not what is tested. -> the networks that kNN was asked about"""
    asked = []
    monkeypatch.setattr(m, "knn_probe", lambda net, *more: asked.append(net) or {})
    return asked


def cosine(i, n, start, end):
    return end + (start - end) * (1 + math.cos(math.pi * i / n)) / 2


def start(m, args):
    """The networks as they are before any step, and SGD's momenta, empty."""
    torch.manual_seed(0)
    model = m.Model(**{k: vars(args)[k] for k in inspect.signature(m.Model).parameters}).double()
    return model, model.make_teacher(), {}


def step(model, loss, momenta, i, log, decay_all=False):
    """SGD's step i of RATES with a decay of 0.1; the log has its loss and rate."""
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        g = p.grad + 0.1 * p.detach() if p.ndim > 1 or decay_all else p.grad
        momenta[name] = 0.9 * momenta[name] + g if name in momenta else g.clone()
        p.data -= RATES[i] * momenta[name]
    assert log[i]["loss"] == pytest.approx(loss.item(), rel=1e-7) and log[i]["lr"] == pytest.approx(RATES[i])


def follow(teacher, student, m):
    for p, q in zip(teacher.parameters(), student.parameters()):
        p.data = m * p.data + (1 - m) * q.data


def assert_exported(saved, asked, state, prefix):
    """backbone.pth is this network's encoder, and the one that kNN was asked about."""
    assert all(torch.equal(v, state[prefix + k].to(v.dtype)) for k, v in saved.items())
    assert all(torch.equal(v.to(saved[k]), saved[k]) for k, v in asked[-1].state_dict().items())


def assert_state(net, state, but=()):
    for k, v in net.state_dict().items():
        assert k in but or torch.allclose(v.to(state[k]), state[k], rtol=1e-6, atol=1e-8), k


RECIPE = ["--optimizer", "sgd", "--lr", "3", "--final-lr", "0.004", "--weight-decay", "0.1", "--warmup-epochs", "0.5",
          "--momentum", "0.9"]
RATES = [0.01 * 3 / 32, (0.01 + 1) / 2 * 3 / 32] + [cosine(i, 6, 3 / 32, 0.004) for i in range(6)]  # of 8 steps, 2 warm-up


def test_slotcon_trains_as_written_out(tmp_path, monkeypatch):
    """The teacher moves before it runs, along a cosine over 36 / 8 x 2 = 9 steps, not whole epochs; no decay on biases."""
    asked, seen = no_looks(monkeypatch, slotcon), spy(monkeypatch, slotcon, "make_views")
    _, args, log, state, saved = train("slotcon", tmp_path, *RECIPE)
    model, teacher, momenta = start(slotcon, args)
    for i, (_, (views, overlaps, flips)) in enumerate(seen):
        follow(teacher, model.student, cosine(i, 9, 0.9, 1.0))
        with torch.no_grad():
            targets = [teacher(v) for v in views]
        losses = model(views, targets, overlaps, flips)
        step(model, losses["loss"], momenta, i, log)
    assert len(seen) == 8
    assert_state(model, state["model"])
    assert_state(teacher, state["teacher"])
    assert_exported(saved, asked, state["teacher"], "encoder.")


def test_saliency_cl_trains_as_written_out(tmp_path, monkeypatch):
    """The target's own map after the flat start; running statistics of v_1 and v_2 alone; decay on everything."""
    asked, seen = no_looks(monkeypatch, saliency_cl), spy(monkeypatch, saliency_cl, "make_views")
    maps, pairs = spy(monkeypatch, saliency_cl, "saliency_map"), spy(monkeypatch, saliency_cl, "salient_pairs")
    monkeypatch.setattr(saliency_cl, "draw", lambda *a, **more: {})
    _, args, log, state, saved = train("saliency_cl", tmp_path, *RECIPE, "--saliency-warmup", 0.25, "--gamma", 2, "--loss", "byol")
    model, teacher, momenta = start(saliency_cl, args)

    def without_trace(net, x):  # as if x had never been seen by its batch norm
        kept = {k: v.clone() for k, v in net.named_buffers()}
        y = net(x)
        for k, v in net.named_buffers():
            v.copy_(kept[k])
        return y
    for i, (_, (views, crops)) in enumerate(seen):
        follow(teacher, model.student, cosine(i, 8, 0.9, 1.0))
        (_, canvas, size, kind, mask), _ = maps[i]
        assert kind == ("activation" if i >= 2 else "none") and size == 32
        s = saliency_cl.saliency_map(teacher.encoder, canvas, 32, kind, mask)
        (_, u, hw, k), found = pairs[i]
        boxes, weights, _ = saliency_cl.salient_pairs(s, u, hw, k, gamma=2.0)
        assert torch.allclose(boxes, found[0]) and torch.allclose(weights, found[1], rtol=1e-5)
        assert (weights.std() > 0.01) == (i >= 2)
        with torch.no_grad():
            targets = [teacher(v) for v in views]
            crop_targets = without_trace(teacher, crops)
        z = F.normalize(targets[0], dim=1)
        assert log[i]["feature_spread"] == pytest.approx((z - z.mean(0)).square().sum(1).mean().sqrt().item(), rel=1e-4)
        losses = model(views, crops, targets, crop_targets, weights)
        step(model, losses["loss"], momenta, i, log, decay_all=True)
    counts = {k for k in state["teacher"] if k.endswith("num_batches_tracked")}
    assert len(seen) == 8
    assert_state(model, state["model"])
    assert_state(teacher, state["teacher"], counts)
    assert_exported(saved, asked, state["model"], "student.encoder.")


def test_cvsa_trains_as_written_out(tmp_path, monkeypatch):
    asked, seen = no_looks(monkeypatch, cvsa), spy(monkeypatch, cvsa, "make_views")
    monkeypatch.setattr(cvsa, "object_mass", lambda *a: {})
    monkeypatch.setattr(cvsa, "draw", lambda *a: None)
    _, args, log, state, saved = train("cvsa", tmp_path, *RECIPE, "--masks", "truth")
    model, teacher, momenta = start(cvsa, args)
    for i, (_, (views, masks, swapped)) in enumerate(seen):
        follow(teacher, model.student, cosine(i, 8, 0.9, 1.0))
        with torch.no_grad():
            targets = [teacher(v) for v in views]
        losses = model(views, masks, targets)
        step(model, losses["loss"], momenta, i, log)
        assert log[i]["swapped"] == pytest.approx(torch.cat(swapped).double().mean().item())
        assert log[i]["usable_masks"] == pytest.approx(seen[i][0][1][2].double().mean().item())
    assert len(seen) == 8
    assert_state(model, state["model"])
    assert_state(teacher, state["teacher"])
    assert_exported(saved, asked, state["model"], "student.encoder.")


def test_scfs_exports_the_teacher(tmp_path, monkeypatch):
    """Its steps are in test_scfs.py."""
    asked = no_looks(monkeypatch, scfs)
    _, _, log, state, saved = train("scfs", tmp_path, *RECIPE, "--steps", 2, "--freeze-epochs", 1)
    assert_exported(saved, asked, state["teacher"], "encoder.")
    assert [line["frozen"] for line in log] == [1, 0]


# ---- flags that have to reach the loop -------------------------------------------------------------------------------
@each
def test_init_reaches_both_networks_and_adamw_starts_from_unit_prototypes(script, tmp_path, monkeypatch):
    m = importlib.import_module(script)
    no_looks(monkeypatch, m)
    torch.manual_seed(7)
    net = common.backbone("small")
    common.save_backbone(tmp_path / "init.pth", net)
    met, move = [], m.ema_update
    monkeypatch.setattr(m, "ema_update", lambda *a: met.append(
        [{k: v.clone() for k, v in part.named_parameters()} for part in a[:2]]) or move(*a))
    train(script, tmp_path / "run", "--steps", 1, "--init", tmp_path / "init.pth", "--optimizer", "adamw", "--lr", 1e-12)
    for part in met[0]:
        for k, v in net.named_parameters():
            assert torch.allclose(part[f"encoder.{k}"], v.double(), atol=1e-9), k
        if script == "slotcon":
            assert torch.allclose(part["prototypes"].norm(dim=1), torch.ones(8).double())


@pytest.mark.parametrize("flags, swap, aware, masks", [
    (["--swap-prob", "0", "--align-weight", "0"], 0, False, "boundary"),  # plain BYOL
    (["--swap-prob", "0", "--align-weight", "0", "--mask-crop", "on"], 0, True, "boundary"),
    (["--mask-crop", "off", "--masks", "truth"], 0.5, False, "truth"), (["--swap-prob", "1"], 1, True, "boundary")])
def test_cvsas_controls_are_what_their_flags_say(tmp_path, monkeypatch, flags, swap, aware, masks):
    no_looks(monkeypatch, cvsa)
    monkeypatch.setattr(cvsa, "draw", lambda *a: None)
    views, found = spy(monkeypatch, cvsa, "make_views"), spy(monkeypatch, cvsa, "find_masks")
    _, _, log, *_ = train("cvsa", tmp_path, *flags, "--steps", 1)
    assert [arguments[8:10] for arguments, _ in views] == [(swap, aware)] and [a[1] for a, _ in found] == [masks]
    assert (log[0]["swapped"] > 0) == (swap > 0) and ("loss_align" in log[0]) == ("--align-weight" not in flags)


# ---- views -----------------------------------------------------------------------------------------------------------
def the_batch(n=8):
    torch.manual_seed(0)
    return common.open_images("scenes:8", 48).__getitems__(list(range(n)))._replace(size=torch.randint(40, 200, (n, 2)))


PHOTO = {"jitter": (0.3, 0.2, 0.4, 0.2), "p_jitter": 0.8, "p_grey": 0.2, "sigma": (0.1, 1.2)}
SIDES = {"p_blur": 1.0}, {"p_blur": 0.1, "p_solarize": 0.2}


def test_slotcons_views_written_out():
    batch, orders = the_batch(), [[0, 1, 2, 3], [3, 1, 0, 2]]
    u = common.uniforms(0, 0, 8, sum(slotcon.COLUMNS))
    views, rectangles, flips = slotcon.make_views(batch, u, orders, (0.1, 0.4), 32, PHOTO["jitter"], 1.2, "cpu", torch.float64)
    first, second, mirror, *photo = u.split(slotcon.COLUMNS, 1)
    boxes = [common.random_boxes(first, batch.size, (0.1, 0.4))]
    boxes.append(common.random_boxes_overlapping(second, batch.size, (0.1, 0.4), boxes[0], least=0.01))
    for i in (0, 1):
        assert torch.equal(flips[i], mirror[:, i] < 0.5)
        view = common.crop(batch.canvas, boxes[i], 32, flips[i], dtype=torch.float64)
        assert torch.allclose(views[i], common.photometry(view, photo[i], orders[i], **PHOTO, **SIDES[i]))
    for found, right in zip(rectangles, common.overlap_rectangles(boxes[0], flips[0], boxes[1], flips[1])):
        assert torch.allclose(found, right)


def test_scfs_views_written_out():
    batch, orders = the_batch(), [[0, 1, 2, 3], [3, 1, 0, 2], [2, 1, 0, 3], [1, 3, 2, 0]]
    args = argparse.Namespace(image_size=32, local_size=16, crop_area=(0.3, 1.0), local_area=(0.05, 0.3), local_crops=2,
                              jitter=PHOTO["jitter"], blur=1.2)
    u = common.uniforms(0, 0, 8, 4 * scfs.VIEW_COLUMNS)
    large, local = scfs.make_views(batch, u, orders, args, torch.float64)
    views = [*large.split(8), *local.split(8)]
    for i, part in enumerate(u.split(scfs.VIEW_COLUMNS, 1)):
        where, flip, photo = part.split((common.RRC_COLUMNS, 1, common.PHOTO_COLUMNS), 1)
        box = common.random_boxes(where, batch.size, (0.3, 1.0) if i < 2 else (0.05, 0.3))
        view = common.crop(batch.canvas, box, 32 if i < 2 else 16, flip[:, 0] < 0.5, dtype=torch.float64)
        recipe = SIDES[i] if i < 2 else {"p_blur": 0.5}
        assert torch.allclose(views[i], common.photometry(view, photo, orders[i], **PHOTO, **recipe)), i


def test_saliencys_two_views_written_out():
    """Its crops are in test_saliency_cl.py."""
    batch, orders, cut = the_batch(), [[0, 1, 2, 3], [3, 1, 0, 2]] + [[0, 1, 2, 3]] * 2, saliency_cl.columns(1)
    u = common.uniforms(0, 0, 8, sum(cut)).split(cut, 1)
    pairs = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.2, 0.1, 0.6, 0.5]]]).double().expand(8, 2, 4)
    views, _ = saliency_cl.make_views(batch, u, orders, pairs, (0.1, 0.4), 32, 16, PHOTO["jitter"], 1.2, "cpu", torch.float64)
    for i in (0, 1):
        box = common.random_boxes(u[i], batch.size, (0.1, 0.4))
        view = common.crop(batch.canvas, box, 32, u[2][:, i] < 0.5, dtype=torch.float64)
        assert torch.allclose(views[i], common.photometry(view, u[3 + i], orders[i], **PHOTO, **SIDES[i]))


def test_every_view_has_its_own_order_of_colours(monkeypatch, tmp_path):
    no_looks(monkeypatch, slotcon)
    seen = spy(monkeypatch, slotcon, "make_views")
    train("slotcon", tmp_path, "--steps", 4)
    orders = [[list(order) for order in arguments[2]] for arguments, _ in seen]
    assert orders == [[list(common.jitter_order(0, step, view)) for view in (0, 1)] for step in range(4)]
    assert any(a != b for a, b in orders)


# ---- settings --------------------------------------------------------------------------------------------------------
PAPERS = {  # as the specifications have them: the release's scripts (SlotCon, SCFS), ORL's and BYOL's recipes (the others)
    ("slotcon", "coco"): {"arch": "resnet50", "image_size": 224, "batch_size": 512, "epochs": 800, "optimizer": "lars", "lr": 1.0,
                          "final_lr": 1e-6, "weight_decay": 1e-5, "warmup_epochs": 5, "prototypes": 256, "dim": 256,
                          "hidden": 4096, "tau_s": 0.1, "tau_t": 0.07, "tau_c": 0.2, "center_momentum": 0.9,
                          "group_weight": 0.5, "momentum": 0.99, "crop_area": [0.08, 1.0]},
    ("slotcon", "imagenet-200ep"): {"epochs": 200, "prototypes": 2048, "batch_size": 512},
    ("slotcon", "imagenet-100ep"): {"epochs": 100, "prototypes": 2048},
    ("scfs", "imagenet-200ep"): {"batch_size": 256, "epochs": 200, "optimizer": "sgd", "lr": 0.1, "final_lr": 0.0048,
                                 "weight_decay": 1e-4, "warmup_epochs": 10, "crop_area": [0.25, 1.0],
                                 "local_area": [0.05, 0.25], "local_crops": 8, "local_size": 96, "out_dim": 65536,
                                 "hidden": 2048, "dim": 256, "head_norm": False, "tau_s": 0.1, "tau_t": [0.04, 0.07],
                                 "tau_t_epochs": 50, "momentum": 0.996, "freeze_epochs": 1, "clip": 3.0, "gate": "cosine",
                                 "search_views": "first", "search_center": False, "stages": [2, 3, 4]},
    ("scfs", "imagenet-800ep"): {"epochs": 800, "batch_size": 1024, "lr": 0.1},
    ("saliency_cl", "coco"): {"batch_size": 512, "epochs": 800, "optimizer": "sgd", "lr": 0.2, "weight_decay": 1e-4,
                              "warmup_epochs": 4, "dim": 256, "hidden": 4096, "crop_size": 96, "crop_area": [0.08, 1.0],
                              "momentum": 0.99, "loss": "byol", "crops": 2, "gamma": 1.0, "crop_weight": 1.0},
    ("cvsa", "finegrained"): {"batch_size": 256, "epochs": 100, "optimizer": "lars", "lr": 0.3, "weight_decay": 1.5e-6,
                              "warmup_epochs": 10, "hidden": 4096, "dim": 256, "momentum": 0.996, "swap_prob": 0.5,
                              "align_weight": 1.0, "tau": 0.1, "crop_area": [0.2, 1.0]},
    ("cvsa", "imagenet"): {"batch_size": 4096, "epochs": 200, "lr": 0.3, "weight_decay": 1e-6, "momentum": 0.99}}


@pytest.mark.parametrize("script, preset", PAPERS)
def test_presets_are_the_papers(script, preset):
    args = vars(importlib.import_module(script).parse_args(["--data", "x", "--preset", preset]))
    right = PAPERS[script, preset] | {"jitter": [0.4, 0.4, 0.2, 0.1], "blur": 2.0}
    assert {k: args[k] for k in right} == right


def test_defaults_of_the_shared_functions():
    def defaults(function):
        return {k: p.default for k, p in inspect.signature(function).parameters.items()}
    found = defaults(common.photometry)
    assert (found["p_jitter"], found["p_grey"], found["jitter"], found["sigma"]) == (0.8, 0.2, (0.4, 0.4, 0.2, 0.1), (0.1, 2.0))
    assert defaults(common.random_boxes_overlapping)["least"] == 0.01 and defaults(common.random_boxes)["ratio"] == (3 / 4, 4 / 3)
    assert (defaults(common.knn_split)["bank"], defaults(common.knn_split)["queries"]) == (20_000, 2_000)
    with pytest.raises(KeyError):  # check_args has settled what it is
        common.numerics("auto", torch.device("cpu"), False)
    for name, half in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)):
        dtype, found, scaler = common.numerics(name, torch.device("cpu"), False)
        assert (dtype, found, scaler.is_enabled()) == (torch.float32, half, name == "fp16")


def test_the_logs_knn_is_k_20_t_007(monkeypatch):
    seen, images = spy(monkeypatch, common, "features"), common.open_images("scenes:60", 32)
    split = common.knn_split(images, None)
    found = common.knn_probe(common.backbone("small"), images, split, 32, "cpu", None)
    (x, y), (q, truth) = (values for _, values in seen)
    nearest = (F.normalize(q, dim=1) @ F.normalize(x, dim=1).T).topk(20)
    votes = torch.zeros(len(q), 12).scatter_add_(1, y[nearest.indices], (nearest.values / 0.07).exp())
    assert found["knn"] == pytest.approx(100 * (votes.argmax(1) == truth).float().mean().item())


@each
def test_what_a_checkpoint_may_differ_in(script):
    """Nothing that changes the numbers."""
    args = importlib.import_module(script).parse_args(["--data", "scenes:8", "--preset", "demo"])
    compared = common.settings_of(args, argparse.Namespace(fingerprint="x"))
    assert set(vars(args)) - set(compared) == {"data", "cache", "workers", "out", "fresh", "save_every", "log_every",
                                               "knn_every", "timeout_minutes", "device", "compile", "deterministic", "preset"}
    assert compared["images"] == "x"


@each
def test_a_run_goes_on_in_the_precision_it_began_with(script, tmp_path, monkeypatch):
    """--precision auto is settled by the machine, and a run may meet another one."""
    no_looks(monkeypatch, importlib.import_module(script))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast, name in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert importlib.import_module(script).parse_args(["--preset", "demo", "--device", "cpu"]).precision == name
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    train(script, tmp_path, "--precision", "auto", "--steps", 1)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with pytest.raises(common.UserError, match="precision was 'fp32', is 'bf16'"):
        train(script, tmp_path, "--precision", "auto", "--steps", 1)


def test_init_is_compared_by_what_the_file_holds(tmp_path, monkeypatch):
    no_looks(monkeypatch, slotcon)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        common.save_backbone(tmp_path / f"{name}.pth", common.backbone("small"))
    (tmp_path / "copy.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    train("slotcon", tmp_path / "run", "--init", tmp_path / "a.pth", "--steps", 1)
    train("slotcon", tmp_path / "run", "--init", tmp_path / "copy.pth", "--steps", 1)  # is finished
    for other in (["--init", tmp_path / "b.pth"], []):
        with pytest.raises(common.UserError, match="init was"):
            train("slotcon", tmp_path / "run", *other, "--steps", 1)
    (tmp_path / "a.pth").write_bytes((tmp_path / "b.pth").read_bytes())
    with pytest.raises(common.UserError, match="init was 'sha256 [0-9a-f]{16}', is 'sha256"):
        train("slotcon", tmp_path / "run", "--init", tmp_path / "a.pth", "--steps", 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), None],
                         ids=["cuda", "cpu"])
def test_too_little_memory_is_one_line(capsys, error):
    def train(args):
        if error:
            raise error
        torch.empty(2 ** 60)
    with pytest.raises(SystemExit) as left:
        common.run_script(train, lambda: None)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "--batch-size" in said
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # any other is a mistake of ours
        common.run_script(lambda args: torch.ones(2, 3) @ torch.ones(2, 3), lambda: None)


def test_one_in_a_hundred_may_be_unreadable():
    names = {i: "x.jpg: broken" for i in range(10)}
    assert common.agree([], torch.tensor(0), names, 1000) == (0, 10)
    with pytest.raises(common.UserError, match="11 of 1000"):
        common.agree([], torch.tensor(0), names | {10: "y"}, 1000)
    assert common.agree([], torch.tensor(0), {i: "x" for i in range(5)}, 10) == (0, 5)
    with pytest.raises(common.UserError, match="6 of 10"):
        common.agree([], torch.tensor(0), {i: "x" for i in range(6)}, 10)
    assert common.agree([], torch.tensor(0), {i: "x" for i in range(3)}, 4) == (0, 3)
    with pytest.raises(common.UserError, match="4 of 4"):  # no image is left to stand in
        common.agree([], torch.tensor(0), {i: "x" for i in range(4)}, 4)


def test_a_module_that_is_missing_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:  # slotcon.py, for prototypes, where eval_linear.py was copied without it
        common.run_script(importlib.import_module, lambda: "no_such_module")
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- what must not go on ---------------------------------------------------------------------------------------------
@each
def test_an_infinite_gradient_of_a_finite_loss_ends_the_run(script, tmp_path, monkeypatch):
    no_looks(monkeypatch, importlib.import_module(script))
    norms, count = torch.nn.utils.get_total_norm, iter(range(100))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: norms(*a, **k) * (math.inf if next(count) == 2 else 1))
    with pytest.raises(common.UserError, match="not finite at step 3"):
        train(script, tmp_path, "--steps", 4, "--save-every", 1)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


@each
def test_the_scaler_goes_on_where_it_was(script, tmp_path, monkeypatch):
    m, calls = importlib.import_module(script), []
    no_looks(monkeypatch, m)
    monkeypatch.setattr(m, "numerics", lambda *a: (torch.float32, None, torch.amp.GradScaler("cpu")))  # fp16 is slow here
    more = ["--precision", "fp16", "--steps", 4]
    *_, whole, _ = train(script, tmp_path / "whole", *more)
    with monkeypatch.context() as stop:
        stop.setattr(m, "agree", lambda *seen: (signal.SIGTERM * (len(calls) == 1), len(calls.append(seen) or ())))
        with pytest.raises(SystemExit):
            train(script, tmp_path / "parts", *more)
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 2
    *_, parts, _ = train(script, tmp_path / "parts", *more)
    assert parts["scaler"] == whole["scaler"] and whole["scaler"]["_growth_tracker"] == 4


# ---- gauges ----------------------------------------------------------------------------------------------------------
def test_slotcons_gauges_written_out():
    torch.manual_seed(0)
    targets, center = [(None, torch.randn(3, 5, 2, 2).double() / 4) for _ in (0, 1)], torch.randn(5).double() / 9
    targets[0][1][:, 4] = targets[1][1][:, 4] = -1
    found, entropy, slots = slotcon.gauges(targets, center, 0.07), [], []
    for _, t in targets:
        for image in t:
            slots.append(len(set(image.argmax(0).flatten().tolist())))
            for p in ((image - center[:, None, None]) / 0.07).flatten(1).softmax(0).T:
                entropy.append(-sum(x * math.log(x) for x in p.tolist() if x > 0))
    assert found["teacher_entropy"].item() == pytest.approx(sum(entropy) / len(entropy))
    assert found["slots_per_image"].item() == pytest.approx(sum(slots) / len(slots))
    assert found["prototypes_used"].item() == 4 and found["center_norm"].item() == pytest.approx(center.norm().item())


def test_slots_are_named_on_one_half_and_scored_on_the_other():
    first, second = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])  # segments of an image of 1 x 4 pixels
    segment = torch.stack([first, second])
    truth = torch.stack([torch.tensor([[2, 2, 0, 0]]), torch.tensor([[2, 2, 0, 255]])])  # 0 is named 2, 1 is named 0
    # on the second image guesses are 2 0 0 (void is left out): class 2 has 1 of 2, class 0 has 1 of 2, 1 is not met
    assert slotcon.majority_miou(segment, truth) == pytest.approx(50)
    assert slotcon.majority_miou(segment.to(torch.uint8), truth.to(torch.int16)) == pytest.approx(50)
    assert math.isnan(slotcon.majority_miou(segment, torch.full_like(truth, 255)))  # all void: no figure, no crash


def test_winners_of_enlarged_maps():
    scores = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    assert torch.equal(slotcon.argmax_at(scores, 9), F.interpolate(scores, size=9, mode="bilinear").argmax(1))


@pytest.mark.parametrize("kind, share", [("place", 100), ("noise", 0)])
def test_position_share(monkeypatch, kind, share):
    torch.manual_seed(0)
    scores = torch.randn(1 if kind == "place" else 4000, 3, 2, 2).expand(4000, 3, 2, 2)
    monkeypatch.setattr(slotcon, "center_views", lambda *a: (None, torch.zeros(4000, 0, 8, 8), scores))
    assert slotcon.slot_quality(None, None, None, 8)["position_share"] == pytest.approx(share, abs=0.5)


def test_center_views_cut_image_and_mask_alike():
    images, size = common.open_images("scenes:4", 80), 28
    batch = images.__getitems__([0, 1, 2, 3])

    class Net(torch.nn.Conv2d):
        def forward(self, x):
            return x
    view, mask, out = common.center_views(images, range(4), size, Net(3, 1, 1))
    low = (1 - 28 / 32) / 2  # the central 224 / 256
    box = torch.tensor([[low, low, 1 - low, 1 - low]]).expand(4, 4)
    assert torch.allclose(view, common.crop(batch.canvas, box, size, dtype=torch.float32), atol=1e-6)
    shift, scale = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(out, (view - shift) / scale, atol=1e-5)
    place = ((low + (torch.arange(size) + 0.5) / size * 28 / 32) * 80).long()  # 2.5 pixels apart
    assert torch.equal(mask[:, 0], batch.mask[:, 0][:, place][:, :, place])


def test_cvsas_object_mass_asks_by_the_object_alone(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 4).double()
    mask = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    mask[:, :, 2:6, :4], mask[:, :, :2] = 3, 255  # an object, void above it
    monkeypatch.setattr(cvsa, "center_views", lambda *a: (None, mask, x))
    found, soft, mass = cvsa.object_mass(None, None, None, 8), torch.zeros(4, 4).double(), []
    soft[1:3, :2] = 1
    for one in x:
        key = F.normalize((one * soft).sum((1, 2)) / 4, dim=0)
        p = ((F.normalize(one, dim=0) * key[:, None, None]).sum(0) / 0.1).flatten().softmax(0)
        mass.append((p * soft.flatten()).sum().item())
    assert found["object_mass"] == pytest.approx(100 * sum(mass) / 6) and found["object_area"] == 25


def test_saliencys_gauges_written_out():
    torch.manual_seed(0)
    s, weights = torch.rand(3, 4, 4).double(), torch.rand(3, 2).double()
    corner = torch.rand(3, 4, 2).double() / 2
    pairs = torch.cat([corner, corner + 0.1 + torch.rand(3, 4, 2).double() / 4], 2)  # two chosen, their two partners
    candidates, mask = pairs.flip(1)[:, :3], torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    mask[:, :, :3], mask[:, :, 3] = 5, 255
    found = saliency_cl.gauges(s, pairs, weights, candidates, mask)
    ratio, entropy, centers = [], [], []
    for image, boxes in zip(s, pairs[:, :2]):
        means = [saliency_cl.box_means(image[None], box.view(1, 1, 4)).item() for box in boxes]
        ratio.append(sum(means) / 2 / image.mean().item())
        p = (image / image.sum()).flatten()
        entropy.append(-(p * p.log()).sum().item() / math.log(16))
        p, at = p.view(4, 4), (torch.arange(4) + 0.5) / 4
        centers.append([(p.sum(0) * at).sum().item(), (p.sum(1) * at).sum().item()])
    assert found["saliency_ratio"].item() == pytest.approx(sum(ratio) / 3, rel=1e-4)
    assert found["map_entropy"].item() == pytest.approx(sum(entropy) / 3, rel=1e-4)
    assert found["map_spread"].item() == pytest.approx(torch.tensor(centers).std(0, correction=0).mean().item(), rel=1e-3)
    assert found["weight_spread"].item() == pytest.approx(weights.std(correction=0).item())
    on = [[100 * (((box[..., 1] + box[..., 3]) / 2) < 3 / 8).double().mean().item() for box in boxes]
          for boxes in (pairs[:, :2].unbind(1), candidates.unbind(1))]
    assert found["on_object_chosen"].item() == pytest.approx(sum(on[0]) / 2)
    assert found["on_object_random"].item() == pytest.approx(sum(on[1]) / 3)
    rows = (2 * (s.flatten(1).argmax(1) // 4) + 1).tolist()  # of the peak's centre in the mask: cells are two pixels wide
    assert found["on_object_peak"].item() == pytest.approx(100 * sum(row < 3 for row in rows) / 3)


def test_initialisation():
    """Residual branches of SlotCon and CVSA start at zero, the others' as the framework has it; layers of the heads of
    SlotCon and SCFS from a deviation of 0.02, SCFS's prototypes as the framework has them, uniform within 1 / sqrt(D)."""
    torch.manual_seed(0)
    nets = {"slotcon": slotcon.Model("small", prototypes=8, dim=64, hidden=256), "cvsa": cvsa.Model("small"),
            "scfs": scfs.Model("small", out_dim=512), "saliency_cl": saliency_cl.Model("small")}
    for name, model in nets.items():
        last = [block.bn2.weight for layer in ("layer1", "layer4") for block in getattr(model.student.encoder, layer)]
        assert all((w == (name not in ("slotcon", "cvsa"))).all() for w in last), name
    heads = [nets["slotcon"].student.projector[:4:3], nets["slotcon"].predictor[::3], nets["scfs"].student.view_head.mlp[::3]]
    for layer in (layer for head in heads for layer in head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03) and (layer.bias == 0).all()
    kinds = [torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.GELU] * 2 + [torch.nn.Linear]
    assert [type(layer) for layer in scfs.Model("small", out_dim=8, head_norm=True).student.view_head.mlp] == kinds
    prototypes, bound = nets["scfs"].student.view_head.prototypes.weight, 256 ** -0.5
    assert prototypes.abs().max() <= bound and prototypes.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.03)


def test_deterministic_reaches_torch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        for wanted in (False, True):
            common.numerics("fp32", torch.device("cpu"), wanted)
            assert torch.are_deterministic_algorithms_enabled() == wanted != torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def test_workers_share_the_cores_of_a_node(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for processes, workers in (("1", 8), ("2", 5), ("4", 2), ("16", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert slotcon.parse_args([]).workers == workers


@pytest.mark.parametrize("rank, error, said", [
    ("0", common.UserError("x"), 1), ("1", common.UserError("x"), 0), ("1", OSError("x"), 1)])
def test_who_tells_of_an_error(monkeypatch, capsys, rank, error, said):
    """A node's first process, and one that alone knows."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    def fail(args):
        raise error
    def refuse(args):
        common.refuse("x", local=True)
    for train, lines in ((fail, said), (refuse, 1)):
        with pytest.raises(SystemExit) as end:
            common.run_script(train, lambda: None)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == lines
