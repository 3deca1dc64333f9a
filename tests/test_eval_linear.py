"""eval_linear.py: its measures against brute force and hand-worked cases, its training against itself in parts."""
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import launch
import numpy as np
import pretend
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from scipy.ndimage import label as connected
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits

import eval_linear as ev
from common import UserError, backbone, find_backbone, load_backbone, save_backbone, scenes

TINY = ["--weights", "random", "--preset", "demo", "--image-size", "32", "--canvas", "32", "--batch-size", "16",
        "--precision", "fp64", "--workers", "0", "--device", "cpu", "--steps", "6", "--log-every", "1"]
PROTOCOLS = [["linear", "--lrs", "0.1", "1"], ["linear", "--feature-bn", "--lrs", "0.1"], ["knn", "--k", "3", "10"],
             ["finetune", "--label-fraction", "0.8"], ["retrieval"], ["segment", "--lrs", "1"],
             ["segment", "--unsupervised"], ["localize"]]


@pytest.fixture(autouse=True)
def quiet():
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in kept.items():
        signal.signal(s, handler)


def write(folder, images, names):
    for image, name in zip(images, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ and masks/ with train/ and val/: 4 classes, 12 and 5 images of each, 32 pixels; masks 0..4 and void."""
    root = tmp_path_factory.mktemp("data")
    found, count = scenes(list(range(600)), 32), [0] * 4
    for image, mask, c in zip(found[0].permute(0, 2, 3, 1).numpy(), found[1][:, 0].numpy(), found[2].tolist()):
        if c > 3 or count[c] == 17:
            continue
        name = f"{'val' if count[c] < 5 else 'train'}/class{c}/{count[c]:03d}.png"
        write(root / "images", [image], [name])
        write(root / "masks", [np.where(mask > 4, 255, mask).astype(np.uint8)], [name])
        count[c] += 1
    assert count == [17] * 4
    return root


def run(folder, out, protocol, *more):
    argv = [*TINY, "--data", str(folder), "--out", str(out), "--protocol", *map(str, (protocol, *more))]
    return ev.main(ev.parse_args(argv))


def measures(line):
    """What a run found, without where and when."""
    same = ("weights", "data", "versions", "device", "processes", "precision", "seconds", "settings")
    return {k: v for k, v in line.items() if k not in same}

# ------------------------------------------------------------------------------------------------------------- measures


def test_hungarian_equals_brute_force_and_scipy():
    rng = np.random.default_rng(0)
    for trial in range(60):
        n, m = sorted(rng.integers(1, 6, 2))
        cost = rng.integers(-3, 4, (n, m)).astype(float) if trial % 2 else rng.normal(size=(n, m))  # ties, too
        column = ev.hungarian(cost)
        assert len(set(column)) == n
        least = min(cost[range(n), p].sum() for p in itertools.permutations(range(int(m)), int(n)))
        assert cost[range(n), column].sum() == pytest.approx(least, abs=1e-12)
    for n, m in ((40, 40), (27, 60)):
        cost = -rng.integers(0, 10 ** 6, (n, m)).astype(float)
        rows, columns = linear_sum_assignment(cost)
        assert cost[range(n), ev.hungarian(cost)].sum() == cost[rows, columns].sum()


def test_miou_and_accuracy_of_a_hand_worked_case():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    guess = torch.tensor([[0, 1, 1, 1], [2, 0, 2, 1]])
    counts = ev.confusion(guess, truth, 4)  # class 3 is met nowhere
    assert counts.tolist() == [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    found = ev.segment_scores(counts)  # IoU 1/3, 2/3, 1/2
    assert found["miou"] == pytest.approx(50) and found["pixel_accuracy"] == pytest.approx(100 * 4 / 6)
    with pytest.raises(UserError, match="all are void"):
        ev.segment_scores(ev.confusion(guess, torch.full_like(truth, 255), 4))


def test_matching_is_one_to_one_over_the_whole_set():
    counts = torch.tensor([[5, 4, 0], [6, 0, 1]])  # 4 + 6 right, against 5 + 1
    named, column = ev.match(counts)
    assert column.tolist() == [1, 0]
    assert named.tolist() == [[6, 0, 1], [5, 4, 0], [0, 0, 0]]
    named, column = ev.match(torch.tensor([[1, 0, 5], [6, 1, 0]]))
    assert column.tolist() == [2, 0] and named.tolist() == [[6, 1, 0], [0, 0, 0], [1, 0, 5]]


def test_retrieval_hand_worked():
    angle = torch.tensor([0.0, 10, 25, 60, 200]) / 180 * torch.pi
    x, y = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 0, 0, 7])
    # 0: b c d -> 1 0 0: hits at 2, 3; of 10: a(10) c(15) no partner; 25: b a d: hits 2, 3; 60: c b a: hits 1, 3
    found = ev.retrieval_scores(x, y, chunk=2)
    ap = [(1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, (1 + 2 / 3) / 2]
    assert found["queries"] == 3 and found["rank1"] == pytest.approx(100 / 3) and found["rank5"] == pytest.approx(100)
    assert found["map"] == pytest.approx(100 * sum(ap) / 3)


def test_retrieval_equals_a_loop():
    torch.manual_seed(0)
    x, y = torch.randn(41, 5).double(), torch.randint(0, 6, (41,))
    rank1, ap = [], []
    for i in range(41):
        order = sorted((j for j in range(41) if j != i), key=lambda j: -F.cosine_similarity(x[i], x[j], dim=0).item())
        places = [r for r, j in enumerate(order, 1) if y[j] == y[i]]
        if places:
            rank1.append(places[0] == 1)
            ap.append(sum(n / r for n, r in enumerate(places, 1)) / len(places))
    found = ev.retrieval_scores(x, y, chunk=7)
    assert found["rank1"] == pytest.approx(100 * np.mean(rank1)) and found["map"] == pytest.approx(100 * np.mean(ap))


def test_largest_box_is_that_of_scipys_largest_part():
    rng = np.random.default_rng(1)
    masks = np.stack([rng.random((9, 14)) < p for p in np.linspace(0.05, 0.9, 40)])
    snake = np.zeros((9, 14), bool)  # one long part: the number has far to go
    snake[::2], snake[1::4, -1], snake[3::4, 0] = True, True, True
    masks = np.concatenate([masks, snake[None], np.zeros((1, 9, 14), bool)])
    for mask, box in zip(masks, ev.largest_boxes(torch.from_numpy(masks))):
        parts, n = connected(mask)
        sizes = np.bincount(parts.ravel(), minlength=n + 1)[1:]
        found = [0, 0, 1, 1] if not n else None
        boxes = []
        for part in (k + 1 for k in range(n) if sizes[k] == sizes.max()):
            y, x = (parts == part).nonzero()
            boxes.append([x.min() / 14, y.min() / 9, (x.max() + 1) / 14, (y.max() + 1) / 9])
        assert any(np.allclose(box, b, atol=1e-6) for b in boxes or [found])


def test_corloc_and_maxboxacc_hand_worked():
    s = torch.full((3, 10, 10), 0.2)
    s[0, 2:6, 2:6] = 1  # truth is this square: right above 0.2
    s[1, 0:5, 0:4], s[1, 9, 9] = 0.5, 1  # truth is the 0.5 part: right in (0.2, 0.5], wrong above, peak outside
    truth = [torch.tensor(boxes).view(-1, 4) for boxes in ([[0.9, 0.9, 1, 1], [0.2, 0.2, 0.6, 0.6]],
                                                           [[0, 0, 0.4, 0.5]], [])]
    counts, boxes = ev.localize_scores(s, truth)
    level = dict(zip(ev.LEVELS, counts[1:-2].tolist()))
    assert counts[0] == 2 and counts[-1] == 2 and counts[-2] == 1
    assert level[0.1] == 0 and level[0.25] == 2 and level[0.5] == 2 and level[0.55] == 1
    assert torch.allclose(boxes[0], truth[0][1]) and torch.allclose(boxes[1], truth[1][0])


@pytest.mark.parametrize("height, hits", [(0.45, 0), (0.5, 1), (0.55, 1)])
def test_a_box_is_right_from_an_iou_of_a_half_on(height, hits):
    s = torch.zeros(1, 20, 20)
    s[0, :, :10] = 1
    assert ev.localize_scores(s, [torch.tensor([[0, 0, 0.5, height]])])[0][0] == hits


def test_kmeans_finds_separate_directions_and_heeds_weights():
    torch.manual_seed(0)
    true = F.normalize(torch.randn(5, 8).double(), dim=1)
    x = F.normalize(true.repeat_interleave(40, 0) + 0.05 * torch.randn(200, 8).double(), dim=1)
    c = ev.kmeans(x, 5, torch.Generator().manual_seed(0))
    assert ((true @ c.T).amax(1) > 0.99).all() and torch.allclose(c.norm(dim=1), torch.ones(5).double())
    weight = torch.zeros(200).double()
    weight[:80] = 1
    c = ev.kmeans(x, 2, torch.Generator().manual_seed(0), weight)
    assert ((true[:2] @ c.T).amax(1) > 0.99).all()


def test_cut_mask_follows_the_crop():
    mask = (torch.arange(16)[:, None] * 8 // 16 * 10 + torch.arange(16) * 8 // 16)[None, None].to(torch.uint8)  # 2 x 2
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]]).double()
    whole = ev.cut_mask(mask, box, 4)
    assert whole[0].tolist() == [[10 * r + c for c in range(2, 6)] for r in range(4, 8)]
    assert torch.equal(ev.cut_mask(mask, box, 4, torch.tensor([True])), whole.flip(2))

# ------------------------------------------------------------------------------------------------------------- training


def checkpoint(out):
    path, = out.glob("*.pt")
    return torch.load(path, weights_only=True)


def test_a_sweeps_head_is_that_head_trained_alone(folder, tmp_path):
    both = run(folder, tmp_path / "both", "linear", "--lrs", 0.3, 3)
    alone = run(folder, tmp_path / "alone", "linear", "--lrs", 3)
    heads = [checkpoint(tmp_path / name)["heads"] for name in ("both", "alone")]
    assert torch.equal(heads[0]["1.weight"], heads[1]["0.weight"])
    assert torch.equal(heads[0]["1.bias"], heads[1]["0.bias"])
    assert not torch.equal(heads[0]["0.weight"], heads[0]["1.weight"])
    assert both["sweep"][1] == alone["sweep"][0] and both["top1"] == max(row["top1"] for row in both["sweep"])


def test_linear_equals_a_plain_loop(folder, tmp_path):
    """The head after two steps, from crops of the whole image without a flip, against SGD written out by hand."""
    from common import crop, normalize, open_images, seeded, uniforms
    run(folder, tmp_path, "linear", "--lrs", 3, "--steps", 2, "--crop-area", 1, 1, "--weight-decay", 0.1)
    torch.manual_seed(0)
    net, images = backbone("small").double().eval(), open_images(str(folder), 32)
    torch.manual_seed(0)
    w = torch.nn.Conv2d(256, 4, 1).double()
    w = torch.nn.init.normal_(w.weight.data.float(), std=0.01).double()[:, :, 0, 0]
    b, order = torch.zeros(4).double(), torch.randperm(48, generator=seeded(0, 1, 0))
    mu_w, mu_b = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(2):
        batch = images.__getitems__(order[step * 16:step * 16 + 16].tolist())
        flip = uniforms(0, step, 16, 41)[:, 40] < 0.5
        box = torch.tensor([[0.0, 0, 1, 1]]).double().repeat(16, 1)
        with torch.no_grad():
            x = net(normalize(crop(batch.canvas, box, 32, flip, dtype=torch.float64)))[-1].mean((2, 3))
        g = ((x @ w.T + b).softmax(1) - F.one_hot(batch.label, 4)) / 16
        rate = 3 * 16 / 256 * (1 + np.cos(np.pi * step / 2)) / 2
        mu_w, mu_b = 0.9 * mu_w + g.T @ x + 0.1 * w, 0.9 * mu_b + g.sum(0) + 0.1 * b
        w, b = w - rate * mu_w, b - rate * mu_b
    found = checkpoint(tmp_path)["heads"]
    assert torch.allclose(found["0.weight"][:, :, 0, 0], w, rtol=1e-9, atol=1e-12), "head"
    assert torch.allclose(found["0.bias"], b, rtol=1e-9, atol=1e-12)


def test_frozen_means_frozen_and_finetune_trains_all(folder, tmp_path):
    torch.manual_seed(0)
    before = backbone("small").double()
    model = ev.Classifier(before, 3, heads=2).double().train()
    state = {k: v.clone() for k, v in before.state_dict().items()}
    sum(x.sum() for x in model(torch.randn(4, 3, 32, 32).double())).backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.heads[0].weight.grad is not None
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items())  # batch norm's statistics, too
    run(folder, tmp_path, "finetune")
    after = find_backbone(checkpoint(tmp_path), "checkpoint")
    changed = [k for k, v in after.items() if not torch.allclose(v.double(), state[k].double(), atol=1e-9)]
    assert len(changed) == len(after)
    exported = load_backbone(next(tmp_path.glob("**/finetune-*-backbone.pth")))
    assert exported.keys() == after.keys() and all(torch.equal(v, after[k].to(v.dtype)) for k, v in exported.items())


@pytest.mark.parametrize("protocol", [PROTOCOLS[1], ["finetune", "--median", "3"], PROTOCOLS[5]], ids=lambda p: p[0])
def test_interrupted_and_gone_on_is_never_interrupted(folder, tmp_path, protocol, monkeypatch, capsys):
    whole = run(folder, tmp_path / "whole", *protocol)
    calls = []
    with monkeypatch.context() as m:
        m.setattr(ev, "agree", lambda *seen: (signal.SIGTERM * (len(calls) == 3), len(calls.append(seen) or ())))
        with pytest.raises(SystemExit) as stopped:
            run(folder, tmp_path / "parts", *protocol)
    assert stopped.value.code == 128 + signal.SIGTERM and checkpoint(tmp_path / "parts")["step"] == 4
    again = run(folder, tmp_path / "parts", *protocol)
    assert "goes on from step 4 of 6" in capsys.readouterr().err
    assert measures(again) == measures(whole)
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(v, b[part][k]) for part in ("heads", "norm", "encoder") for k, v in a.get(part, {}).items())
    assert measures(run(folder, tmp_path / "parts", *protocol)) == measures(whole)  # finished: nothing is trained
    monkeypatch.setattr(ev, "heed_signals", lambda: 1 / 0)  # --fresh dies before its first checkpoint: the old one is gone
    with pytest.raises(ZeroDivisionError):
        run(folder, tmp_path / "parts", *protocol, "--fresh")
    assert not list((tmp_path / "parts").glob("*.pt"))


@pytest.mark.parametrize("sound", [True, False])
def test_gradients_never_finite_in_fp16_end_finetuning(folder, tmp_path, monkeypatch, sound):
    """The scaler skips such steps and the loss stays finite: nothing would be trained, and the run would end as done."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # over fp32 arithmetic: half precision is very slow on a CPU
    monkeypatch.setattr(ev, "numerics", lambda *a: (torch.float32, None, scaler))
    plain = ev.Classifier
    def broken(*args):
        model = plain(*args)
        next(model.encoder.parameters()).register_hook(lambda g: g if sound else g * math.nan)
        return model
    monkeypatch.setattr(ev, "Classifier", broken)
    if sound:
        assert run(folder, tmp_path, "finetune")["steps"] == 6 and scaler.get_scale() == 4
    else:
        with pytest.raises(UserError, match="not finite at step 3,"):  # 4, 2, 1: not finite at 1 either
            run(folder, tmp_path, "finetune")


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("bad", [2, 6])
def test_an_infinite_gradient_of_a_finite_loss_ends_finetuning(folder, tmp_path, monkeypatch, precision, bad):
    """Also at the last step: nothing that is not finite is saved or exported."""
    plain, count = ev.Classifier, iter(range(1, 100))
    def broken(*args):
        model = plain(*args)
        model.encoder.conv1.weight.register_hook(lambda g: g * math.inf if next(count) == bad else g)
        return model
    monkeypatch.setattr(ev, "Classifier", broken)
    with pytest.raises(UserError, match=f"not finite at step {bad},"):
        run(folder, tmp_path, "finetune", "--save-every", 1, "--precision", precision)
    assert not list(tmp_path.glob("*-backbone.pth"))
    assert checkpoint(tmp_path)["step"] == bad - 1
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["encoder"].values())


@pytest.mark.parametrize("drops", [[], ["--drop-epochs", "2", "4"]])
def test_rates_of_finetuning(folder, tmp_path, drops):
    """Of head and backbone, not scaled by the batch: a cosine, or a fifth after each of some epochs, stretched with --steps."""
    run(folder, tmp_path, "finetune", "--epochs", 6, "--steps", 9, "--lr", 0.01, "--head-lr", 0.5, *drops)
    head, body = checkpoint(tmp_path)["optimizer"]["param_groups"]
    fall = 0.2 ** 2 if drops else (1 + math.cos(math.pi * 8 / 9)) / 2
    assert (head["lr"], body["lr"]) == pytest.approx((0.5 * fall, 0.01 * fall))
    assert len(head["params"]) == 2 < len(body["params"])
    if drops:  # the drop is at the third step's end, not before
        run(folder, tmp_path / "early", "finetune", "--epochs", 1, "--steps", 3, "--lr", 0.01, "--drop-epochs", "1")
        assert checkpoint(tmp_path / "early")["optimizer"]["param_groups"][1]["lr"] == pytest.approx(0.01)


def test_the_best_is_by_top1_and_looks_are_at_ends_of_epochs(folder, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(ev, "test_heads", lambda run, model, *a: steps.append(run) or [{"top1": 5.0, "top5": 9.0},
                                                                                       {"top1": 6.0, "top5": 7.0}])
    line = run(folder, tmp_path, "linear", "--lrs", 0.1, 0.3, "--epochs", 3, "--steps", 9, "--median", 2)
    assert line["best_lr"] == 0.3 and line["top1"] == 6 and len(steps) == 2


@pytest.mark.parametrize("flags", [["--lrs", "0.3"], ["--crop-area", "0.5", "1"], ["--weight-decay", "0.1"]])
def test_another_setting_does_not_go_on_from_this_checkpoint(folder, tmp_path, capsys, flags):
    run(folder, tmp_path, "linear", "--lrs", "0.1")
    run(folder, tmp_path, "linear", *(flags if "--lrs" in flags else ["--lrs", "0.1", *flags]))
    assert len(list(tmp_path.glob("*.pt"))) == 2 and "goes on" not in capsys.readouterr().err


def test_one_head_may_diverge(folder, tmp_path):
    line = run(folder, tmp_path, "linear", "--lrs", "1e17", "0.1", "--weight-decay", "1", "--precision", "fp32")
    assert line["best_lr"] == 0.1 and line["sweep"][0]["top1"] == 0


def test_heads_are_counted_by_hand(folder, monkeypatch):
    """Of ten classes; top-5; a head with a logit that is not finite is right nowhere."""
    labels = torch.tensor([3, 0, 9, 4])
    logits = torch.zeros(3, 4, 10, 1, 1)
    logits[0, range(4), labels] = 1  # always first
    logits[1] = torch.arange(10.0).flip(0).view(1, 10, 1, 1)  # 0 1 2 3 4 are its five
    logits[2] = logits[0]
    logits[2, :, 7] = math.nan
    batch = type("Batch", (), {"label": labels})
    monkeypatch.setattr(ev, "last_maps", lambda *a: [(batch, None, None, None)])
    counted = []
    monkeypatch.setattr(ev, "gather", lambda x: counted.append(x.shape) or x[None])
    model = torch.nn.Module()
    model.heads, model.dense = [torch.nn.Conv2d(1, 10, 1)] * 3, False
    model.encoder, model.classify = None, lambda x: list(logits)
    found = ev.test_heads(type("Run", (), {"device": "cpu", "rank": 0, "world": 1}), model, None, range(4))
    assert found == [{"top1": 100, "top5": 100}, {"top1": 25, "top5": 75}, {"top1": 0, "top5": 0}]
    assert counted == [(3, 1, 2)]  # not 10 x 10, which of 10,000 classes and 20 heads would be 16 GB


def test_views_of_tests(folder, tmp_path, monkeypatch):
    """The central 224 / 256, for boxes the whole image."""
    import common
    seen, plain = [], ev.crop
    monkeypatch.setattr(ev, "crop", lambda x, box, *a, **more: seen.append(box) or plain(x, box, *a, **more))
    run(folder, tmp_path, "localize")
    assert all(torch.equal(box, torch.tensor([0.0, 0, 1, 1]).to(box).expand_as(box)) for box in seen) and seen
    seen.clear()
    run(folder, tmp_path, "linear", "--lrs", "0.1", "--steps", "1")
    assert torch.allclose(seen[-1], common.center_boxes(torch.full((len(seen[-1]), 2), 32), round(32 * 256 / 224), 32))


def test_the_median_of_the_last_epochs(folder, tmp_path, monkeypatch):
    looks = iter([{"top1": v} for v in (10.0, 90.0, 20.0)])
    monkeypatch.setattr(ev, "test_heads", lambda *a: [next(looks)])
    line = run(folder, tmp_path, "finetune", "--steps", 9, "--median", 3)  # 3 steps an epoch
    assert line["top1"] == 20 and line["epochs_tested"] == 3


def test_the_last_epochs_stretch_with_steps(folder, tmp_path, monkeypatch):
    """Of 10 epochs the last 5: with 6 steps in all, the second half, at steps 6, 5.4, 4.8, 4.2 and 3.6."""
    looks, at = [], iter(range(1, 7))
    monkeypatch.setattr(ev, "test_heads", lambda *a: looks.append(step[0]) or [{"top1": 1.0}])
    step, plain = [0], ev.normalize
    monkeypatch.setattr(ev, "normalize", lambda x: step.__setitem__(0, next(at)) or plain(x))
    assert run(folder, tmp_path, "finetune", "--epochs", 10, "--steps", 6, "--median", 5)["epochs_tested"] == len(looks)
    assert looks == [4, 5, 6]

# ------------------------------------------------------------------------------------------------------------ protocols


def test_knn_of_the_script_equals_a_loop(folder, tmp_path):
    from common import features, open_images
    line = run(folder, tmp_path, "knn", "--k", 5, "--temperature", 0.1)
    torch.manual_seed(0)
    net, right = backbone("small").double(), 0
    (x, y), (q, t) = (features(net, open_images(str(folder), 32, split), range(n), size=32, device="cpu")
                      for split, n in (("train", 48), ("val", 20)))
    for query, true in zip(q, t):
        near = sorted(((F.cosine_similarity(query, row, dim=0).item(), c.item()) for row, c in zip(x, y)), reverse=True)
        votes = [sum(np.exp(s / 0.1) for s, c in near[:5] if c == k) for k in range(4)]
        right += int(np.argmax(votes)) == true
    assert line["top1_k5"] == pytest.approx(100 * right / 20)


def test_label_fraction_is_balanced_and_seeded_and_lists_are_kept(folder, tmp_path):
    from common import open_images
    args = ev.parse_args([*TINY, "--data", str(folder), "--protocol", "finetune", "--label-fraction", "0.25"])
    images = open_images(str(folder), 32)
    rows = ev.few_labels(args, images, list(range(48)))
    assert images.labels[rows].bincount().tolist() == [3] * 4 and rows == ev.few_labels(args, images, list(range(48)))
    args.seed = 1
    assert rows != ev.few_labels(args, images, list(range(48)))
    (tmp_path / "list.txt").write_text("class2/007.png\nclass0/016.png\n\n")
    args.label_list = str(tmp_path / "list.txt")
    assert [os.fsdecode(images.files[i])[-14:] for i in ev.few_labels(args, images, list(range(48)))] == [
        "class0/016.png", "class2/007.png"]
    for names in (b"007.png\n", b"\xff\xfe0\0.\0"):  # in each class there is one; no text
        (tmp_path / "list.txt").write_bytes(names)
        with pytest.raises(UserError, match="no or several"):
            ev.few_labels(args, images, list(range(48)))


class Seer(torch.nn.Module):
    """A "backbone" whose map says, in each pixel, which of five colours is nearest: perfect features."""

    colors = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]).double()

    def __init__(self, arch):
        super().__init__()
        self.channels = [5]

    def forward(self, x):
        shift, scale = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
        far = (((x * scale + shift)[:, None] - self.colors.view(1, 5, 3, 1, 1)) ** 2).sum(2)
        return [F.one_hot(far.argmin(1), 5).permute(0, 3, 1, 2).double()]


@pytest.mark.parametrize("how", [["--unsupervised"], ["--lrs", "3", "30", "--steps", "12"]], ids=["kmeans", "head"])
def test_perfect_features_segment_perfectly(tmp_path, monkeypatch, how):
    rng = np.random.default_rng(0)
    masks = [np.kron(rng.permutation(8).reshape(2, 4) % 5, np.ones((16, 8))).astype(np.uint8) for _ in range(30)]
    names = [f"{'val' if i < 6 else 'train'}/{i:02d}.png" for i in range(30)]
    write(tmp_path / "data" / "images", [(Seer.colors.numpy()[m] * 255).astype(np.uint8) for m in masks], names)
    voids = [np.where(np.arange(32) < 3, 255, m).astype(np.uint8) for m in masks]
    write(tmp_path / "data" / "masks", voids, names)
    monkeypatch.setattr(ev, "backbone", Seer)
    line = run(tmp_path / "data", tmp_path / "out", "segment", *how)
    assert line["classes"] == 5 and line["miou"] > 90 and line["pixel_accuracy"] > 95  # resizing blurs the edges


def test_segment_learns_the_mask_that_the_crop_shows(tmp_path, monkeypatch):
    """Targets are masks under the image's own crop and flip; void counts in no sum and in no mean."""
    rng = np.random.default_rng(0)
    masks = [np.kron(rng.permutation(8).reshape(2, 4) % 5, np.ones((16, 8))).astype(np.uint8) for _ in range(22)]
    names = [f"{'val' if i < 6 else 'train'}/{i:02d}.png" for i in range(22)]
    write(tmp_path / "data/images", [(Seer.colors.numpy()[m] * 255).astype(np.uint8) for m in masks], names)
    write(tmp_path / "data/masks", [np.where(np.arange(32) < 8, 255, m).astype(np.uint8) for m in masks], names)
    shown, asked, told, plain = [], [], [], F.cross_entropy

    class Watched(Seer):
        def forward(self, x):
            shown.append(super().forward(x)[0].argmax(1))
            return super().forward(x)

    def entropy(x, target, **more):
        asked.append((x.detach(), target))
        return plain(x, target, **more)
    monkeypatch.setattr(ev, "backbone", Watched)
    monkeypatch.setattr(ev.F, "cross_entropy", entropy)
    stack = torch.stack
    monkeypatch.setattr(ev.torch, "stack", lambda x, *a: told.append(found := stack(x, *a)) or found)
    run(tmp_path / "data", tmp_path / "out", "segment", "--lrs", "1", "--steps", "1", "--crop-area", "1", "1")
    (logits, target), color = asked[0], shown[0]
    assert target.shape == (16, 32, 32) and (target == -1).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (target == color)[target >= 0].double().mean() > 0.9  # resized borders are of neither colour
    loss = plain(logits, target, ignore_index=-1).item()
    assert any(x.numel() == 1 and x.item() == pytest.approx(loss, rel=1e-9) for x in told)


def test_slotcon_prototypes_are_merged_and_matched(folder, tmp_path):
    import slotcon
    torch.manual_seed(0)
    shape = {"arch": "small", "prototypes": 9, "dim": 16, "hidden": 32}
    model = slotcon.Model(**shape)
    state = {"method": "slotcon", "shape": shape, "teacher": model.make_teacher().state_dict(), "step": 1}
    torch.save(state, tmp_path / "checkpoint.pt")
    line = run(folder, tmp_path, "segment", "--unsupervised", "--weights", tmp_path / "checkpoint.pt")
    assert line["clusters"].startswith("9 prototypes") and 0 < line["pixel_accuracy"] < 100
    save_backbone(tmp_path / "backbone.pth", model.student.encoder)
    bare = run(folder, tmp_path, "segment", "--unsupervised", "--weights", tmp_path / "backbone.pth")
    assert bare["clusters"] == "k-means" and bare["weights_sha256"] == line["weights_sha256"]
    assert len(list((tmp_path / "pictures").glob("segment-*.png"))) == 2


def test_every_run_leaves_a_line_a_table_and_pictures(folder, tmp_path, capsys):
    for protocol in PROTOCOLS[:2] + PROTOCOLS[-2:]:
        run(folder, tmp_path, *protocol)
    said, lines = capsys.readouterr().out, (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line in said
        line = json.loads(line)
        assert {"seed", "weights_sha256", "train", "test", "versions", "arch", "test_images"} <= set(line)
    assert "best" in said and "corloc" in said and "miou" in said
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def on_a_gpu(folder, out):
    pretend.start()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for protocol in PROTOCOLS:
            run(folder, out, *protocol, "--device", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_gives_the_cpus_numbers(folder, tmp_path):
    process = launch.server().Process(target=on_a_gpu, args=(folder, tmp_path / "there"))
    process.start()
    process.join()
    found = [json.loads(line) for line in (tmp_path / "there" / "results.jsonl").read_text().splitlines()]
    assert process.exitcode == 0 and [line["device"] for line in found] == ["cuda"] * len(PROTOCOLS)
    for protocol, line in zip(PROTOCOLS, found):
        for k, v in measures(run(folder, tmp_path / "here", *protocol)).items():
            assert line[k] == (pytest.approx(v, rel=1e-7) if isinstance(v, float) else v), (protocol, k)


def two(rank, port, folder, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    ev.setup_processes = lambda device, minutes: torch.device("cpu")  # one group for all protocols
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for protocol in PROTOCOLS:
            run(folder, out, *protocol)
    dist.destroy_process_group()


def test_two_processes_give_one_processs_numbers(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "data")
    sorted((folder / "images" / "train").rglob("*.png"))[3].write_bytes(b"x")  # both processes meet it: it counts once
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(two, (port, folder, tmp_path / "two"), nprocs=2)
    found = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert len(found) == len(PROTOCOLS)
    for protocol, line in zip(PROTOCOLS, found):
        wanted = run(folder, tmp_path / "one", *protocol)
        assert line["processes"] == 2 and wanted["processes"] == 1
        for k, v in measures(wanted).items():
            assert line[k] == (pytest.approx(v, rel=1e-9) if isinstance(v, float) else v), (protocol, k)
    for path in (tmp_path / "one").glob("*.pt"):
        a, b = (torch.load(tmp_path / n / path.name, weights_only=True)["heads"] for n in ("one", "two"))
        assert all(torch.allclose(a[k], b[k], rtol=1e-8, atol=1e-12) for k in a), path.name


def test_digits_a_trained_backbone_is_worth_more_than_a_random_one(tmp_path):
    """Real data, 8 x 8 pixels, as an image folder; trained briefly by `finetune`, whose checkpoint is weights, too."""
    digits = load_digits()
    for i in range(700):
        image = np.kron(digits.images[i] / 16 * 255, np.ones((4, 4))).astype(np.uint8)
        write(tmp_path / "digits", [image], [f"{'val' if i < 200 else 'train'}/{digits.target[i]}/{i:04d}.png"])
    fast = ["--precision", "fp32", "--crop-area", "0.8", "1", "--batch-size", "32", "--image-size", "16"]
    tuned = run(tmp_path / "digits", tmp_path / "out", "finetune", *fast, "--steps", 120, "--lr", .03, "--head-lr", .03)
    weights, = (tmp_path / "out").glob("finetune-*.pt")
    load_backbone(weights)
    scores = [run(tmp_path / "digits", tmp_path / "out", "knn", *fast, "--k", 20, "--weights", w)["top1_k20"]
              for w in ("random", weights)]
    assert scores[1] > scores[0] + 5 and tuned["top1"] > 75, (scores, tuned["top1"])

# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("flags", "words"), [
    (["--weights", "nowhere.pth"], "no file"), (["--weights", ""], "random for the control"),
    (["--label-fraction", "0.1"], "--protocol finetune"), (["--protocol", "finetune", "--label-fraction", "2"], "0..1"),
    (["--protocol", "knn", "--unsupervised"], "segment"), (["--lrs", "0"], "above 0"), (["--k", "0"], "above 0"),
    (["--protocol", "finetune", "--label-fraction", "0.01"], "leaves classes empty"),
    (["--batch-size", "200", "--steps", "1"], "do not fill a batch")])
def test_mistakes_are_one_line(folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words) as error:
        ev.main(ev.parse_args([*TINY, "--data", str(folder), "--out", str(tmp_path), *flags]))
    assert "\n" not in str(error.value)


def test_data_that_does_not_fit_is_refused(folder, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    write(tmp_path / "flat", [pixels] * 20, [f"{i}.png" for i in range(20)])
    with pytest.raises(UserError, match="needs labels"):
        run(tmp_path / "flat", tmp_path / "out", "linear")
    with pytest.raises(UserError, match="has no masks"):
        run(tmp_path / "flat", tmp_path / "out", "segment")
    write(tmp_path / "gap", [pixels] * 21, [*(f"train/a/{i}.png" for i in range(18)), "val/a/0.png", "val/b/0.png"])
    with pytest.raises(UserError, match="1 of 2 classes have no training image, such as 'b'"):
        run(tmp_path / "gap", tmp_path / "out", "knn")
    names = [f"{i:02d}.png" for i in range(20)]
    write(tmp_path / "odd" / "images", [pixels] * 20, names)
    write(tmp_path / "odd" / "masks", [np.ones((8, 8 + (i == 19)), np.uint8) for i in range(20)], names)
    with pytest.raises(UserError, match="19.png is of"):
        run(tmp_path / "odd", tmp_path / "out", "segment")
    for part, value in (("train/images", pixels), ("train/masks", np.ones((8, 8), np.uint8)), ("val/images", pixels)):
        write(tmp_path / "half" / part, [value] * 20, names)
    with pytest.raises(UserError, match="has no masks in val/"):
        run(tmp_path / "half", tmp_path / "out", "segment")
    (tmp_path / "list.txt").write_text("class0/nowhere.png\n")
    with pytest.raises(UserError, match="1 of its 1 lines"):
        run(folder, tmp_path / "out", "finetune", "--label-list", tmp_path / "list.txt")
    with pytest.raises(UserError, match="no two test images"):
        ev.retrieval_scores(torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="no ResNet"):
        run(folder, tmp_path / "out", "linear", "--weights", tmp_path / "none.pth")


def test_the_val_folder_is_the_test_whatever_its_folders_are_called(tmp_path):
    """Folders of cities share no name: masks need no classes. Where labels are needed, a val/ without them is refused
    instead of being left out for a tenth of train/."""
    pixels, mask = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), np.uint8)
    names = [*(f"train/{city}/{i}.png" for city in ("aachen", "bonn") for i in range(9)), *(f"val/ulm/{i}.png" for i in range(3))]
    write(tmp_path / "streets" / "images", [pixels] * 21, names)
    write(tmp_path / "streets" / "masks", [mask] * 21, names)
    _, rows, test, asked = ev.choose_data(ev.parse_args([*TINY, "--data", str(tmp_path / "streets"), "--protocol", "segment"]))
    assert (rows, asked) == (list(range(18)), list(range(3))) and "/val/ulm/" in os.fsdecode(test.files[0])
    write(tmp_path / "flat", [pixels] * 21, [name.replace("val/ulm", "val") for name in names])
    for protocol in ("linear", "knn", "finetune"):
        with pytest.raises(UserError, match="2 classes, 0 to test"):
            ev.choose_data(ev.parse_args([*TINY, "--data", str(tmp_path / "flat"), "--protocol", protocol]))
    ev.choose_data(ev.parse_args([*TINY, "--data", str(tmp_path / "flat" / "train"), "--protocol", "linear"]))


def test_masks_fit_images_as_exif_turns_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size, kind_of_file in (("good", (24, 40), "jpg"), ("tiff", (24, 40), "tif"), ("raw", (40, 24), "jpg")):
        for i in range(20):
            for kind in ("images", "masks"):
                (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 24)).save(tmp_path / name / "images" / f"{i}.{kind_of_file}", exif=exif)
            Image.new("L", size, 1).save(tmp_path / name / "masks" / f"{i}.png")
    argv = [*TINY, "--protocol", "segment", "--data"]
    ev.choose_data(ev.parse_args([*argv, str(tmp_path / "good")]))
    ev.choose_data(ev.parse_args([*argv, str(tmp_path / "tiff")]))  # which Pillow turns by itself
    with pytest.raises(UserError, match=r"is of \(40, 24\) pixels, its image \(EXIF applied\) of \(24, 40\)"):
        ev.choose_data(ev.parse_args([*argv, str(tmp_path / "raw")]))


def test_test_images_that_cannot_be_read_stop_the_evaluation(folder, tmp_path, capsys):
    """One is named and its neighbour stands in; more than five and 1 % are no measurement."""
    shutil.copytree(folder, tmp_path / "data")
    found = sorted((tmp_path / "data" / "images" / "val").rglob("*.png"))
    found[3].write_bytes(b"x")
    run(tmp_path / "data", tmp_path / "out", "retrieval")
    said = capsys.readouterr()
    assert found[3].name in said.err and json.loads(said.out.splitlines()[-1])["unreadable"] == 1
    for path in found[:14:2]:
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path / "data", tmp_path / "out", "retrieval")


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_full_disk(folder, tmp_path, protocol):
    """One line; the figures that are there already are told first."""
    (tmp_path / "out").mkdir()
    code = ("import resource, sys, signal; sys.path.insert(0, sys.argv[1]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); import eval_linear as ev; sys.argv[0] = 'eval_linear.py'; "
            "import common; common.run_script(ev.main, lambda: ev.parse_args(sys.argv[2:]))")
    found = subprocess.run([sys.executable, "-c", code, str(ROOT), *TINY, "--weights", "random", "--data", str(folder),
                            "--protocol", protocol, "--out", str(tmp_path / "out"), "--steps", "1"], capture_output=True,
                           text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = found.stderr.splitlines()[-1]
    assert found.returncode == 2 and "Traceback" not in found.stderr and said.startswith("eval_linear.py: ")
    assert "no room left in --out" in said if protocol == "linear" else "top1_k20" in found.stdout


@pytest.mark.parametrize("reader", ["of ASCII", "that has gone"])
def test_a_result_is_kept_whoever_reads_it(folder, tmp_path, reader):
    (tmp_path / "Fotos-ü").symlink_to(folder)
    read, write = os.pipe()
    if reader == "that has gone":
        os.close(read)
    done = subprocess.run([sys.executable, str(ROOT / "eval_linear.py"), *TINY, "--data", str(tmp_path / "Fotos-ü"), "--protocol",
                           "knn", "--out", str(tmp_path / "out")], stdout=write, stderr=subprocess.PIPE, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"})
    os.close(write)
    assert "Traceback" not in done.stderr and len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 1
    if reader == "of ASCII":
        assert done.returncode == 0 and b"Fotos-\\xfc" in os.read(read, 10_000)


def test_the_command_ends_in_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "eval_linear.py"), "--weights", "random", "--data", "nowhere"]
    found = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 2 and found.stderr.startswith("eval_linear.py: ") and found.stderr.count("\n") == 1


def test_feature_bn_gives_the_heads_mean_0_and_deviation_1(folder, tmp_path):
    torch.manual_seed(0)
    model = ev.Classifier(backbone("small"), 3, feature_bn=True).double().train()
    model.heads, x = torch.nn.ModuleList([torch.nn.Identity()]), 5 + 3 * torch.randn(64, 256, 2, 2).double()
    y, = model.classify(x)
    assert y.mean(0).abs().max() < 1e-9 and (y.std(0, correction=0) - 1).abs().max() < 1e-3 and not list(model.norm.parameters())
    for _ in range(99):
        model.classify(x)
    assert torch.allclose(model.eval().classify(x[:1])[0], y[:1], atol=0.05)  # the running statistics
    run(folder, tmp_path, "linear", "--feature-bn", "--lrs", 1)
    assert checkpoint(tmp_path)["norm"]["running_mean"].any()


def test_other_weights_and_another_seed_do_not_go_on_from_this_checkpoint(folder, tmp_path, capsys):
    for i in (0, 1):
        torch.manual_seed(i)
        save_backbone(tmp_path / f"{i}.pth", backbone("small"))
    for weights, seed in (("0.pth", 0), ("1.pth", 0), ("0.pth", 1)):
        run(folder, tmp_path / "out", "linear", "--lrs", 1, "--weights", tmp_path / weights, "--seed", seed, "--steps", 1)
    heads = [torch.load(path, weights_only=True)["heads"]["0.weight"] for path in (tmp_path / "out").glob("*.pt")]
    assert len(heads) == 3 and not torch.equal(heads[0], heads[1]) and "goes on" not in capsys.readouterr().err


def test_the_seed_reaches_network_heads_order_and_views(folder, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(ev, "uniforms", lambda seed, *a, plain=ev.uniforms: seeds.append(seed) or plain(seed, *a))
    monkeypatch.setattr(ev, "batches", lambda *a, seed, plain=ev.batches, **more: seeds.append(seed) or plain(*a, seed=seed, **more))
    torch.manual_seed(0)
    save_backbone(tmp_path / "w.pth", backbone("small"))
    for seed in (5, 6):
        seeds.clear()
        run(folder, tmp_path, "linear", "--lrs", 1e-12, "--weights", tmp_path / "w.pth", "--seed", seed, "--steps", 1)
        assert set(seeds) == {seed}
    heads = [torch.load(path, weights_only=True)["heads"]["0.weight"] for path in tmp_path.glob("*.pt")]
    assert (heads[0] - heads[1]).abs().max() > 0.01
    assert len({run(folder, tmp_path, "knn", "--seed", seed)["weights_sha256"] for seed in (0, 1)}) == 2  # of the random one


def test_checkpoints_come_in_time_and_are_never_half_there(folder, tmp_path, monkeypatch, capsys):
    save, steps = torch.save, []

    def cut(state, file):
        steps.append(state["step"])
        save(state, file)
        if state["step"] == 4:  # killed within writing
            Path(file).write_bytes(Path(file).read_bytes()[:1000])
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path, "linear", "--lrs", 1, "--save-every", 2)
    assert steps == [2, 4] and checkpoint(tmp_path)["step"] == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun starts it again: --fresh counts once
    run(folder, tmp_path, "linear", "--lrs", 1, "--fresh")
    assert "goes on from step 2 of 6" in capsys.readouterr().err


def test_localize_by_hand(tmp_path, monkeypatch):
    """A map that is far above zero everywhere, in which a wide halo holds the mean: only levels above the halo find the object."""
    class Lit(torch.nn.Module):
        def __init__(self, arch):
            super().__init__()
            self.channels, self.w = [1], torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            shift, scale = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).to(x).view(2, 1, 3, 1, 1)
            return [10 + x * scale + shift]
    picture, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    picture[4:28, 4:28], picture[10:20, 8:18], mask[10:20, 8:18] = 80, 255, 1  # 80 / 255 lies above 0.3, below 0.35
    names = [f"{i}.png" for i in range(3)]
    write(tmp_path / "data/images", [picture] * 3, names)
    write(tmp_path / "data/masks", [mask] * 3, names)
    monkeypatch.setattr(ev, "backbone", Lit)
    line = run(tmp_path / "data", tmp_path / "out", "localize")
    assert [line[k] for k in ("corloc", "maxboxacc", "peak_in_box", "images_with_boxes")] == [0, 100, 100, 3]
    assert line["at_threshold"] == pytest.approx(0.35)


def test_collected_in_pieces_rows_keep_their_order(monkeypatch):
    x, sent = torch.arange(22).view(11, 2), []
    first, second = (types.SimpleNamespace(rank=rank, world=2) for rank in (0, 1))
    monkeypatch.setattr(ev.dist, "gather_object", lambda part, into: sent.append(part))
    assert len(ev.collect(ev.share(x, second), 11, second, chunk=2)) == 0 and len(sent) == 3

    def gathered(part, into):
        into[:] = part, sent.pop(0)
    monkeypatch.setattr(ev.dist, "gather_object", gathered)
    assert torch.equal(ev.collect(ev.share(x, first), 11, first, chunk=2), x)


def test_classes_of_masks_are_those_of_both_splits(monkeypatch):
    few, more = (types.SimpleNamespace(source=types.SimpleNamespace(scene=None), mask=torch.tensor(values, dtype=torch.uint8))
                 for values in ([0, 1, 255], [0, 4, 255]))
    monkeypatch.setattr(ev, "sequential", lambda images, rows, **how: [images])
    alone = types.SimpleNamespace(rank=0, world=1, device="cpu", args=types.SimpleNamespace(workers=0))
    for data in ((few, [0], more, [0]), (more, [0], few, [0])):
        assert ev.count_classes(alone, data) == 5


def test_kmeans_keeps_the_best_of_its_tries_and_empty_clusters_stay():
    g = torch.Generator().manual_seed(0)
    x, weight = F.normalize(torch.randn(120, 3, generator=g).double(), dim=1), torch.rand(120, generator=g).double() ** 4
    def worth(c):
        return (weight * (x @ c.T).amax(1)).sum().item()
    one = torch.Generator().manual_seed(1)
    tries = [worth(ev.kmeans(x, 7, one, weight, tries=1)) for _ in range(3)]
    assert worth(ev.kmeans(x, 7, torch.Generator().manual_seed(1), weight)) == max(tries) > min(tries)
    c = ev.kmeans(torch.eye(2).double().repeat(9, 1), 3, g)  # two directions for three clusters
    assert torch.allclose(c.norm(dim=1), torch.ones(3).double())


def test_prototypes_count_by_the_cells_they_win(folder, tmp_path, monkeypatch):
    import slotcon
    torch.manual_seed(0)
    shape = {"arch": "small", "prototypes": 9, "dim": 16, "hidden": 32}
    state = {"method": "slotcon", "shape": shape, "teacher": slotcon.Model(**shape).make_teacher().state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    seen, plain = [], ev.kmeans
    monkeypatch.setattr(ev, "kmeans", lambda x, k, g, weight=None: seen.append(weight) or plain(x, k, g, weight))
    run(folder, tmp_path, "segment", "--unsupervised", "--weights", tmp_path / "checkpoint.pt")
    assert seen[0].sum().item() == pytest.approx(48 * 16, abs=1e-3) and (seen[0] > 0).all()  # 4 x 4 cells of 48 images


def test_views_are_cut_by_the_images_own_proportions(tmp_path, monkeypatch):
    rng, seen, plain = np.random.default_rng(0), [], ev.crop
    names = [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(9)]
    write(tmp_path / "data", rng.integers(0, 255, (36, 24, 60, 3), np.uint8), names)
    monkeypatch.setattr(ev, "crop", lambda x, box, *a, **more: seen.append(box) or plain(x, box, *a, **more))
    run(tmp_path / "data", tmp_path / "out", "linear", "--lrs", 1, "--steps", 1)
    pixels = seen[0] * torch.tensor([60, 24, 60, 24])
    assert torch.allclose(pixels, pixels.round(), atol=1e-9) and (pixels[:, 2:] - pixels[:, :2]).amax(0)[0] <= 32  # 4:3 of 24
    assert torch.allclose(seen[-1][0], ev.center_boxes(torch.tensor([[24, 60]]), 37, 32)[0])


def test_the_picture_has_the_truth_above_what_was_said(tmp_path, monkeypatch):
    """Void, which nobody says, is white."""
    drawn, mask = [], np.arange(32, dtype=np.uint8)[None].repeat(32, 0) // 16
    mask[:8] = 255
    names = [f"{i:02d}.png" for i in range(20)]
    write(tmp_path / "data/images", [np.zeros((32, 32, 3), np.uint8)] * 20, names)
    write(tmp_path / "data/masks", [mask] * 20, names)
    monkeypatch.setattr(ev, "save_image", lambda x, *a, **more: drawn.append(x))
    run(tmp_path / "data", tmp_path / "out", "segment", "--lrs", 1, "--steps", 1)
    images, truth, said = drawn[0].chunk(3)
    white = [(part > 0.59).all(1).double().mean().item() for part in (images, truth, said)]
    assert white == pytest.approx([0, 0.2, 0], abs=0.05)


def test_decay_is_on_all_that_is_trained(folder, tmp_path):
    run(folder, tmp_path, "finetune", "--weight-decay", 0.1, "--steps", 1)
    assert [(g["weight_decay"], g["momentum"]) for g in checkpoint(tmp_path)["optimizer"]["param_groups"]] == [(0.1, 0.9)] * 2


def test_maps_are_enlarged_between_their_cells():
    assert ev.enlarge(torch.tensor([[[[0.0, 1], [2, 3]]]]), 4)[0, 0, :2].flatten().tolist() == [0, .25, .75, 1, .5, .75, 1.25, 1.5]


def test_each_k_has_its_own_figure(folder, tmp_path):
    both = run(folder, tmp_path, "knn", "--k", 1, 48)
    alone = [run(folder, tmp_path, "knn", "--k", k)[f"top1_k{k}"] for k in (1, 48)]
    assert [both["top1_k1"], both["top1_k48"]] == alone and alone[0] != alone[1]


def test_the_precision_asked_for_is_that_of_training_and_of_tests(folder, tmp_path, monkeypatch):
    seen = []

    def watched(arch):
        net = backbone(arch)
        net.conv1.register_forward_hook(lambda module, x, y: seen.append((len(y), y.dtype)))
        return net
    monkeypatch.setattr(ev, "backbone", watched)
    run(folder, tmp_path, "linear", "--lrs", 1, "--steps", 1, "--precision", "bf16")
    assert seen == [(16, torch.bfloat16)] * 2 + [(4, torch.bfloat16)]  # a step; 20 test images


@pytest.mark.parametrize("preset, right", [
    ("imagenet", {"batch_size": 1024, "epochs": 100, "crop_area": [0.08, 1], "weight_decay": 0, "drop_epochs": []}),
    ("semi", {"batch_size": 256, "epochs": 20, "lr": 0.01, "head_lr": 1, "drop_epochs": [12, 16], "median": 1}),
    ("fine-grained", {"batch_size": 64, "epochs": 100, "lr": 0.01, "head_lr": 0.1, "weight_decay": 1e-4, "median": 10}),
    ("voc", {"batch_size": 64, "epochs": 50, "image_size": 448, "crop_area": [0.25, 1]})])
def test_presets(preset, right):
    args = vars(ev.parse_args(["--weights", "random", "--data", "x", "--preset", preset]))
    right = right | {"arch": "resnet50", "k": [10, 20, 100, 200], "temperature": 0.07}
    assert {k: args[k] for k in right} == right


def test_prototypes_are_directions(folder, tmp_path):
    import slotcon
    torch.manual_seed(0)
    shape, found = {"arch": "small", "prototypes": 9, "dim": 16, "hidden": 32}, []
    teacher = slotcon.Model(**shape).make_teacher().state_dict()
    for scale in (torch.ones(9, 1), torch.arange(1.0, 10)[:, None]):
        state = {"method": "slotcon", "shape": shape, "teacher": teacher | {"prototypes": teacher["prototypes"] * scale}}
        torch.save(state, tmp_path / "checkpoint.pt")
        line = run(folder, tmp_path, "segment", "--unsupervised", "--weights", tmp_path / "checkpoint.pt")
        found.append([line[k] for k in ("miou", "pixel_accuracy", "clusters")])
    assert found[0] == found[1]
