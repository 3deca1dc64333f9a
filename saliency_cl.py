"""Saliency-guided contrastive learning on scene images, in one file.

Paper: Chen, Wang, Tang, Zhu, Yang, Bai, Zhao, Qi, Ouyang, 2023 (arXiv 2302.11461). No code is public; at hand were the
idea and the gains of the abstract (ImageNet linear +1.1 points, fine-tuned on 1 % of labels +4.3, on 10 % +2.2, over a
baseline it does not name). So this implements the idea, not the recipe; what had to be decided is listed below.

The idea. Two random crops of a scene often show two different things. The learner's own features tell, while it learns,
which regions are distinct: this saliency says where crops are taken, a crop and its close neighbour being a positive
pair, and how much each pair's loss counts.

  networks      online f, projector g, predictor q (the student below); target f', g', its moving average (the teacher)
  (1) saliency  A = sum over channels of f'(whole image), h x w; S = (A - min A) / (max A - min A + 1e-6)
  (2) score     s(box) = mean of S inside the box, by an integral image
  (3) pairs     K of M random boxes, drawn one after another, p ~ exp(s / T), with IoU <= 0.5 if there are: c_k;
                its partner c'_k is a shifted, rescaled, reshaped copy with IoU > 0.5
  (4) loss      l(u -> v) = 2 - 2 cos(q(g(f(u))), g'(f'(v))), per image; with --loss infonce 2 tau times the
                cross-entropy of finding g'(f'(v)) among the targets of all images of all processes
  (5) sums      L_global = l(v_1 -> v_2) + l(v_2 -> v_1) of two random views,  L_k = l(c_k -> c'_k) + l(c'_k -> c_k)
  (6) weights   a_k = (s(c_k) + s(c'_k)) / 2,  w_k = K a_k^gamma / sum_j a_j^gamma: mean 1 an image
  (7) total     L = mean over images of L_global + lambda / K sum_k w_k L_k;  no gradient through S, w and the target
  (8) target    xi <- m xi + (1 - m) theta before it runs; parameters only

Choices. (1): the target's map in eval mode, steadier than the online network's; activation, the simplest; flat for 10 %
of the steps, when padding makes borders hot. (3): M = 50, areas and T, so that chosen boxes hold 1.5 times the mean
saliency yet reach everywhere, or the model would see only what it knows; partners as in ORL (Xie et al., NeurIPS 2021),
50 tries for its 200. (4), the recipe: BYOL as in ORL's public COCO configuration, but one predictor, not three, and one
pass for crops; running statistics of v_1, v_2 only; heads as the framework starts them; warm-up from 1 %; infonce's
negatives. (6): mean 1, so that loss scale and rate stay. K, crop sizes, lambda, gamma. Deviations: crops come from a
canvas (the whole image resized once to S x S), not the file; true Gaussians; jitter in one order a step and view.
Small crops help by themselves, and (3) favours small ones: the control is B1, as many at random places with weights 1.
  B1  --saliency none               A1  --no-weight-saliency     C1  --saliency shuffled   another image's map
  A2  --no-crop-saliency            A3  (no flag: the method)    C2  --saliency inverted   C3  --saliency truth  masks

  python saliency_cl.py                                                    no data: embedded scenes, minutes; see runs/
  python saliency_cl.py --data /data/coco/train2017                        one GPU, ORL's COCO recipe, batch 512
  torchrun --nproc_per_node=8 saliency_cl.py --data /data/coco/train2017   eight GPUs: the same batch, the same numbers
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 saliency_cl.py --data ...  two
At the start L_global and L_crops are near 4 each (infonce: 0.8 ln of the batch).
"""
import argparse
import copy
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

from common import (  # isort: skip
    ARCHS, PHOTO_COLUMNS, RRC_COLUMNS, agree, backbone, batches, crop, full, heed_signals, jitter_order, knn_probe,
    knn_split, load_backbone, normalize, numerics, open_images, parse_preset, photometry, random_boxes, refuse,
    rendezvous, run_length, run_script, save_backbone, sequential, settings_of, sync_batchnorm, training_arguments,
    uniforms, upload)

# ------------------------------------------------------------------------------------------------------------ arguments

ORL = {"arch": "resnet50", "image_size": 224, "canvas": 512, "batch_size": 512, "epochs": 800.0, "optimizer": "sgd",
       "lr": 0.2, "weight_decay": 1e-4, "warmup_epochs": 4.0, "dim": 256, "hidden": 4096, "crop_size": 96,
       "crop_area": [0.08, 1.0], "momentum": 0.99, "save_every": 1000, "log_every": 50, "knn_every": 10.0}  # ORL's
PRESETS = {  # choice: infonce in the demo; byol learned little there (tests/results/demo, attempts)
    "demo": {"arch": "small", "image_size": 64, "canvas": 96, "batch_size": 32, "epochs": 3.0, "optimizer": "adamw",
             "lr": 8e-3, "final_lr": 0.0, "weight_decay": 0.01, "warmup_epochs": 0.3, "dim": 128, "hidden": 512,
             "crop_size": 32, "crop_area": [0.2, 1.0], "blur": 0.6, "jitter": [0.6, 0.4, 0.2, 0.5], "momentum": 0.97,
             "loss": "infonce", "save_every": 400, "log_every": 50, "knn_every": 1.0},
    "coco": ORL, "cocoplus": ORL,  # the latter on train2017 and unlabeled2017, joined by a comma in --data
}
SALIENCY = ("activation", "agreement", "none", "shuffled", "inverted", "truth")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Saliency-guided contrastive pre-training", allow_abbrev=False)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="", help="nothing or scenes[:N]: embedded scenes; a folder; Name:root; a,b joins")
    g.add_argument("--cache", default="", help="pack the resized images into this file once, then read them from it")
    g.add_argument("--image-size", type=int, help="side of a view in pixels")
    g.add_argument("--canvas", type=int, help="side S of the square each image is resized to; larger: sharper crops")
    g.add_argument("--crop-area", type=float, nargs=2, metavar=("MIN", "MAX"), help="share of v_1, v_2 in the image")
    g.add_argument("--blur", type=float, default=2.0, help="largest sigma in pixels; 2 is meant for 224-pixel views")
    g.add_argument("--workers", type=int, help="decoding processes each; default a process's cores less one, at most 8")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=PRESETS, help="a recipe: demo without data, coco with; any flag beats it")
    g.add_argument("--arch", choices=ARCHS, help="encoder f")
    g.add_argument("--dim", type=int, help="D, width of projections and predictions")
    g.add_argument("--hidden", type=int, help="hidden width of projector g and predictor q")
    g.add_argument("--saliency", choices=SALIENCY, default="activation", help="(1), agreement with the mean, controls")
    g.add_argument("--saliency-warmup", type=float, default=0.1, help="share of the steps at the start with a flat map")
    g.add_argument("--crop-saliency", action=argparse.BooleanOptionalAction, default=True, help="choose c_k by it")
    g.add_argument("--weight-saliency", action=argparse.BooleanOptionalAction, default=True, help="weigh pairs by it")
    g.add_argument("--crops", type=int, default=2, help="K, pairs of crops an image; one alone has weight 1")  # choice
    g.add_argument("--crop-size", type=int, help="side of such a crop in pixels")  # choice
    g.add_argument("--box-area", type=float, nargs=2, default=[0.05, 0.3], metavar=("MIN", "MAX"), help="share of c_k")
    g.add_argument("--box-temperature", type=float, default=0.1, help="T in (3), 0.05 and above; lower: peaks")
    g.add_argument("--gamma", type=float, default=1.0, help="in (6): how sharply weights follow saliency")  # choice
    g.add_argument("--crop-weight", type=float, default=1.0, help="lambda in (7)")  # choice
    g.add_argument("--loss", choices=("byol", "infonce"), default="byol", help="(4): without or with negatives")
    g.add_argument("--temperature", type=float, default=0.2, help="tau of infonce")
    g.add_argument("--momentum", type=float, help="the target's m in (8) at the first step; a cosine takes it to 1")
    training_arguments(p)
    args = parse_preset(p, argv, PRESETS, "coco", "saliency_cl")
    if min(args.dim, args.hidden, args.crop_size, args.crops, args.temperature) <= 0 or (
            args.box_temperature < 0.05 or max(args.crops, args.gamma) > 50):  # M boxes; 0 ^ gamma without underflow
        refuse("--dim --hidden --crop-size --temperature above 0, --box-temperature 0.05 or more, K 1..50, gamma 0..50")
    if max(args.momentum, args.saliency_warmup, *args.crop_area, *args.box_area) > 1 or not (
            0 < args.crop_area[0] <= args.crop_area[1] and 0 < args.box_area[0] <= args.box_area[1]):
        refuse("--momentum and --saliency-warmup lie in 0..1, 0 < MIN <= MAX <= 1 in --crop-area, --box-area")
    return args

# ----------------------------------------------------------------------------------------------------------- the method

@torch.no_grad()
def saliency_map(encoder, canvas, size, kind="activation", mask=None):
    """(1): whole images, canvas B 3 S S uint8, as `encoder`, the target's, sees them at `size` -> B h w float64 in
    [0, 1], on its device, 32 x 32 of "none" (0) and "truth", which needs mask: B 1 S S. "shuffled": B is 4 n."""
    whole = torch.tensor([[0.0, 0, 1, 1]]).repeat(len(canvas), 1)
    if kind in ("none", "truth"):
        a = ((mask > 0) & (mask < 255)).double() if kind == "truth" else torch.zeros_like(canvas[:, :1]).double()
        a = crop(a, whole, 32, kernel="box")[:, 0]
    else:
        view = normalize(crop(canvas, whole, size, dtype=next(encoder.parameters()).dtype))  # bf16: up to 2/255 off
        training, _ = encoder.training, encoder.eval()  # choice: running statistics: a map hangs on no other image
        x = full(encoder(view.contiguous(memory_format=torch.channels_last))[-1])  # B C h w
        encoder.train(training)
        # choice: of the maps that are the model's own output, the cheapest; beside it, agreement with the pooled one
        a = (F.cosine_similarity(x, x.mean((2, 3), keepdim=True)) if kind == "agreement" else x.sum(1)).double()
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    s = (a - low) / (high - low + 1e-6)  # a flat map is 0 everywhere
    if kind == "shuffled":  # the neighbour's in the block of 4 images, which no process shares with another
        s = s.unflatten(0, (-1, 4)).roll(1, 1).flatten(0, 1)
    return 1 - s if kind == "inverted" else s

def box_means(s, boxes):
    """(2): maps B h w, boxes B N 4 (x0 y0 x1 y1, fractions) -> means inside, B N. The integral of a map constant in
    each cell is bilinear within a cell, so that interpolating the integral image is exact wherever a box cuts."""
    (h, w), (x0, y0, x1, y1) = s.shape[1:], (2 * boxes - 1).unbind(2)  # B N, in grid_sample's -1..1
    integral = s.new_ones(h + 1, h).tril(-1) @ s @ s.new_ones(w, w + 1).triu(1)  # B h+1 w+1: all above and to the left
    corners = torch.stack([torch.stack([x, y], 2) for x, y in ((x1, y1), (x0, y1), (x1, y0), (x0, y0))], 1)  # B 4 N 2
    sums = F.grid_sample(integral[:, None], corners, align_corners=True)[:, 0]  # B 4 N
    return (sums[:, 0] - sums[:, 1] - sums[:, 2] + sums[:, 3]) / ((x1 - x0) * (y1 - y0) * (h * w / 4))

def iou(a, b):
    """Of boxes ... 4, broadcast; in fractions of an image what it is in pixels."""
    both = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    return both / (sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)) - both)

def candidate_boxes(u, size, box_area):
    """u: B M 4 uniforms (area, ratio, left, top); size: B 2, original height and width -> B M 4. Width to height is
    log-uniform in 3/4..4/3 in original pixels; a side longer than the image's is cut to it."""
    area, ratio = box_area[0] + u[..., 0] * (box_area[1] - box_area[0]), (4 / 3) ** (2 * u[..., 1] - 1)
    ratio = ratio * (size[:, :1] / size[:, 1:])  # now in fractions
    side = torch.stack([area * ratio, area / ratio], 2).sqrt().clamp_max(1)
    return torch.cat([u[..., 2:] * (1 - side), u[..., 2:] * (1 - side) + side], 2)

def choose(logits, u, boxes, k):
    """(3), Gumbel top-k: the highest of logit - ln(-ln u) is a draw with p ~ exp(logit), the next one a draw from the
    rest. logits, u: B M; boxes B M 4 -> indices B k. Boxes with IoU > 0.5 to one chosen come last."""
    score, chosen = logits - (-u.clamp_min(1e-300).log()).log(), []
    for _ in range(k):
        chosen.append(score.argmax(1, keepdim=True))  # B 1
        score = score - 1e9 * (iou(boxes, boxes.take_along_dim(chosen[-1][..., None], 1)) > 0.5)
        score = score.scatter(1, chosen[-1], -math.inf)
    return torch.cat(chosen, 1)

def partner_boxes(u, boxes):
    """choice: ORL's rule. The centre moves by -0.5..0.5 of the sides, area and ratio change by 0.5..2 (log-uniform: the
    ratio), until the box is in the image with IoU > 0.5; else it is the same. u: B K tries 4, boxes B K 4 -> B K 4."""
    boxes, area, ratio = boxes[:, :, None], 0.5 + 1.5 * u[..., 2], 2 ** (2 * u[..., 3] - 1)
    side = boxes[..., 2:] - boxes[..., :2]  # B K 1 2
    half = side / 2 * torch.stack([area * ratio, area / ratio], 3).sqrt()
    middle = boxes[..., :2] + side * u[..., :2]  # half a side from the centre + (u - 0.5) sides
    tries = torch.cat([middle - half, middle + half], 3)
    good = F.pad(((tries >= 0) & (tries <= 1)).all(3) & (iou(tries, boxes) > 0.5), (0, 1), value=True)
    return torch.cat([tries, boxes], 2).take_along_dim(good.int().argmax(2)[..., None, None], 2)[:, :, 0]

@torch.no_grad()
def salient_pairs(s, u, size, crops=2, box_area=(0.05, 0.3), temperature=0.1, gamma=1.0):
    """(2), (3), (6) for a batch, on the device of the float64 maps s, B h w. u: uniforms B 4M, B M, B 4 tries K,
    and size: B 2 (original height, width), on the CPU: nothing waits for the device. -> boxes B 2K 4, c_1 .. c_K,
    c'_1 .. c'_K; weights B K; candidates B M 4. A flat map gives what temperature inf and gamma 0 give: the control."""
    size, *u = upload(torch.cat([size, *u], 1), s.device).split([2, *(part.shape[1] for part in u)], 1)
    candidates = candidate_boxes(u[0].unflatten(1, (-1, 4)), size, box_area)
    # choice: M, areas, T; a draw instead of the K best, so that boxes favour saliency and still reach everywhere
    chosen = choose(box_means(s, candidates) / temperature, u[1], candidates, crops)[..., None]
    chosen = candidates.take_along_dim(chosen, 1)  # choice: a pair is a box and its neighbour, not two far-off boxes
    pairs = torch.cat([chosen, partner_boxes(u[2].unflatten(1, (crops, -1, 4)), chosen)], 1)
    # choice: relative saliency, mean 1; the floor, a power of two, makes weights 1, at gamma 1 exactly, where s is 0
    a = box_means(s, pairs).unflatten(1, (2, crops)).mean(1).clamp_min(2 ** -20) ** gamma
    return pairs, a / a.mean(1, keepdim=True), candidates

def pair_loss(p, z, kind="byol", temperature=0.2):
    """(4): predictions p of V views, targets z of the views they have to meet, V B D -> V B, not averaged: weights come
    first. infonce: among the same-numbered views of all images of all processes; the factor is MoCo-v3's."""
    p, z = F.normalize(full(p), dim=2), F.normalize(full(z), dim=2)
    if kind == "byol":
        return 2 - 2 * (p * z).sum(2)
    # choice: negatives are other images' crops only; an image's other crops, often of the same thing, are neither
    logits = p @ gather(z).transpose(0, 1).flatten(1, 2).mT / temperature  # V B N, images in the order of ranks
    label = process()[0] * p.shape[1] + torch.arange(p.shape[1], device=p.device).expand(p.shape[:2])
    return 2 * temperature * F.cross_entropy(logits.mT, label, reduction="none")

def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))

class Branch(nn.Module):
    """Encoder f and projector g: what online network and target have in common. B 3 H W -> B D."""

    def __init__(self, arch, dim, hidden):
        super().__init__()
        self.encoder = backbone(arch)
        self.projector = mlp(self.encoder.channels[-1], hidden, dim)

    def forward(self, view):
        return self.projector(full(self.encoder(view)[-1]).mean((2, 3)))

def track(net, on):
    """Whether batch norm, which takes the batch's statistics either way, updates its running ones (momentum 0.1)."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.1 * on

class Model(nn.Module):
    """Online network (student), predictor q. The target (`make_teacher`) stands outside: DDP wraps this module alone.

    model = Model("resnet50")
    teacher = model.make_teacher()
    targets, _ = [teacher(v) for v in views], track(teacher, False)  # views: two B 3 H W; crops: 2KB 3 s s, c_1 of all
    crop_targets, _ = teacher(crops), track(teacher, True)           # images first, then c_2 .. c_K, c'_1 .. c'_K
    model(views, crops, targets, crop_targets, weights)["loss"].backward()  # weights: B K
    """

    def __init__(self, arch="resnet50", dim=256, hidden=4096, loss="byol", temperature=0.2, crop_weight=1.0):
        super().__init__()
        self.loss, self.temperature, self.crop_weight = loss, temperature, crop_weight
        self.student = Branch(arch, dim, hidden)
        self.predictor = mlp(dim, hidden, dim)

    def make_teacher(self):
        """A copy of the student without gradients, in train mode: it normalises with its own batch statistics."""
        return copy.deepcopy(self.student).requires_grad_(False).train()

    def forward(self, views, crops, targets, crop_targets, weights):
        """-> dict of scalars: loss (7), loss_global and loss_crops, its two terms before lambda."""
        p = torch.stack([self.predictor(self.student(view)) for view in views])  # two passes: statistics are per view
        track(self, False)  # choice: running statistics are of v_1, v_2 alone, which are like what is seen later
        q = self.predictor(self.student(crops))
        track(self, True)
        with torch.autocast(crops.device.type, enabled=False):
            (b, k), kind = weights.shape, (self.loss, self.temperature)
            loss_global = pair_loss(p, torch.stack([targets[1], targets[0]]), *kind).sum(0).mean()
            q, z = q.view(2 * k, b, -1), crop_targets.view(2 * k, b, -1).roll(k, 0)  # rolled by K: c_k meets c'_k
            loss_k = pair_loss(q, z, *kind).view(2, k, b).sum(0)
            loss_crops = (weights.detach().to(loss_k.dtype).T * loss_k).mean()
        loss = loss_global + self.crop_weight * loss_crops
        return {"loss": loss, "loss_global": loss_global, "loss_crops": loss_crops}

@torch.no_grad()
def gauges(s, pairs, weights, candidates, mask):
    """map_entropy of maps s, B h w, over ln(cells): 1 is flat. map_spread: deviation of centres of mass over images;
    near 0: a prior of place. weight_spread: the weights' own. saliency_ratio: mean in chosen boxes over the image's.
    on_object_*, with masks: % of centres of chosen boxes, of candidates, of peaks (flat: the first cell) on objects."""
    (h, w), k, side = s.shape[1:], weights.shape[1], mask.shape[-1]
    p = (s + 1e-6) / (s + 1e-6).sum((1, 2), keepdim=True)
    y, x = ((torch.arange(n, device=s.device) + 0.5).to(s.dtype) / n for n in (h, w))
    ratio = (box_means(s, pairs[:, :k]).mean(1) + 1e-6) / (s.mean((1, 2)) + 1e-6)
    found = {"map_entropy": -(p * p.log()).sum((1, 2)).mean() / math.log(max(2, h * w)), "saliency_ratio": ratio.mean(),
             "map_spread": torch.stack([p.sum(1) @ x, p.sum(2) @ y]).std(1, correction=0).mean(),
             "weight_spread": weights.std(correction=0)}
    peak = s.flatten(1).argmax(1, keepdim=True)
    chosen, random = ((box[..., :2] + box[..., 2:]) / 2 for box in (pairs[:, :k], candidates))  # B N 2
    points = {"chosen": chosen, "random": random, "peak": torch.stack([x[peak % w], y[peak // w]], 2)}
    for name, point in points.items() if mask.shape[1] else ():
        column, row = (point * side).long().clamp(0, side - 1).unbind(2)
        value = mask.flatten(1).gather(1, row * side + column)
        found[f"on_object_{name}"] = 100 * ((value > 0) & (value < 255)).double().mean()
    return found

def make_views(batch, u, orders, pairs, crop_area, image_size, crop_size, jitter, blur, device, dtype):
    """Two random views and the crops of `pairs` (B 2K 4, on the device). batch: common.Batch; u: this process's rows of
    the uniforms, split by `columns`; orders: of the colour operations in v_1, v_2, c_1 .. c_K, c'_1 .. c'_K.
    -> views: two B 3 H W; crops: 2KB 3 s s, c_1 of all images first; normalised"""
    boxes, k = [random_boxes(u[i], batch.size, crop_area) for i in (0, 1)], pairs.shape[1] // 2
    packed = upload(torch.cat([*boxes, u[2] < 0.5], 1).to(dtype), device)  # one copy
    boxes, flips = [*packed[:, :8].split(4, 1), *pairs.unbind(1)], packed[:, 8:].bool().unbind(1)
    sizes, first, second = [image_size] * 2 + [crop_size] * 2 * k, {"p_blur": 1.0}, {"p_blur": 0.1, "p_solarize": 0.2}
    recipes = [first, second, *[first] * k, *[second] * k]  # BYOL's two sides, for crops as for views
    x = [photometry(crop(batch.canvas, box, size, flip, dtype=dtype), v, order, jitter=jitter, sigma=(0.1, blur), **r)
         for box, size, flip, v, order, r in zip(boxes, sizes, flips, u[3:], orders, recipes)]
    x = [v.contiguous(memory_format=torch.channels_last) for v in (x[0], x[1], torch.cat(x[2:]))]
    return x[:2], x[2]

def columns(k, m=50, tries=50):  # of the uniforms: boxes, flips, photometry; `salient_pairs`: boxes, choice, partners
    return [RRC_COLUMNS] * 2 + [2 + 2 * k] + [PHOTO_COLUMNS] * (2 + 2 * k) + [4 * m, m, 4 * tries * k]

# ----------------------------------------------------------- machinery: the same text in all four method scripts

def process():
    """-> this process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def setup_processes(device, minutes):
    """Joins the group that torchrun announces (NCCL on GPUs, gloo on CPUs), none without torchrun -> torch.device."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if kind == "cuda" else None)
    torch.cuda.set_device(device) if kind == "cuda" else None
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", **rendezvous(minutes))
    return device

@torch.no_grad()
def gather(x):
    """x of every process, stacked in the order of ranks: shape of x -> processes x shape of x; no gradient."""
    if process()[1] == 1:
        return x[None]
    x = x.to(torch.uint8 if x.dtype == torch.bool else x.dtype).contiguous()
    out = x.new_empty(process()[1], *x.shape)
    dist.all_gather_into_tensor(out.flatten(), x.flatten())
    return out

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates as in Barlow Twins and SlotCon's release (utils/lars.py), without a synchronisation.
    d = g + weight_decay p; if `adapt`: d *= eta |p| / |d| (1 if either norm is 0); mu = momentum mu + d; p -= lr mu."""

    def __init__(self, params, lr=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            d = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                p_norm, d_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, d))
                ratio = torch.where((p_norm > 0) & (d_norm > 0), group["eta"] * p_norm / d_norm, 1.0)
                torch._foreach_mul_(d, list(ratio.unbind()))
            for p in params:
                if not self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            mu = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(mu, group["momentum"])
            torch._foreach_add_(mu, d)
            torch._foreach_add_(params, mu, alpha=-group["lr"])

def make_optimizer(name, model, weight_decay, decay_all=False):
    """Weight decay (and LARS's adaptation) on matrices and kernels; biases and batch norm without, unless decay_all."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": weight_decay * decay_all, "adapt": False}]
    if name == "lars":
        return LARS(groups)
    return torch.optim.AdamW(groups, lr=0.0) if name == "adamw" else torch.optim.SGD(groups, lr=0.0, momentum=0.9)

def schedule(step, total, base, final, warmup=0, start=0.0, reach=None):
    """While step < warmup a line from `start` to `base` at step `reach` (default: warmup), then a cosine to `final`."""
    if step < warmup:
        return start + (base - start) * step / max(1, warmup if reach is None else reach)
    return final + (base - final) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

@torch.no_grad()
def ema_update(teacher, student, momentum):
    """xi <- m xi + (1 - m) theta over parameters; buffers are the teacher's own."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

def save_checkpoint(out, state, net):
    """Rank 0 only. checkpoint.pt is written beside and renamed, the one before is kept; backbone.pth goes with it."""
    path = Path(out) / "checkpoint.pt"
    beside = path.with_suffix(".tmp")
    try:
        save_backbone(path.with_name("backbone.pth"), net)  # first: a run killed in between goes on and writes both
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, path.with_name("checkpoint.previous.pt"))
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        refuse(f"step {state['step']} could not be saved in {out} ({str(error).splitlines()[0]}): make room or mend "
               "the folder; the last good checkpoint is whole, and the same command goes on from it")

def load_checkpoint(out, method, settings, fresh=False):
    """The folder's newest readable checkpoint as a dict, None where there is none. Nothing in it is ever run.
    fresh: they and the log are removed, though not when torchrun restarts a run of its own."""
    broken = ""
    if fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        for name in ("checkpoint.pt", "checkpoint.previous.pt", "log.jsonl"):
            (Path(out) / name).unlink(missing_ok=True)
    for path in (Path(out) / "checkpoint.pt", Path(out) / "checkpoint.previous.pt"):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            torn = zipfile.ZipFile(path).testzip()  # checksums, which torch.load does not look at
        except Exception as error:  # noqa: BLE001 -- a damaged file leads the reader to any of them
            if "GLOBAL" in str(error):
                refuse(f"{path} holds more than tensors and numbers: nothing in it was run; --fresh starts over")
            torn = (str(error) or type(error).__name__).splitlines()[0][:80]
        if torn:
            broken = f"{path} cannot be read ({torn}), the one before it is used"
            continue
        if not isinstance(state, dict) or state.get("method") != method or "settings" not in state:
            refuse(f"{path} is no checkpoint of {method}: name another --out or start over with --fresh")
        was = state["settings"]
        differ = [f"{k} was {was.get(k)!r}, is {v!r}" for k, v in settings.items() if was.get(k) != v]
        if differ:
            refuse(f"{path} was made with other settings ({'; '.join(differ)}): name another --out or use --fresh")
        return state | {"note": broken}
    return refuse(f"{broken}: but there is none; --fresh starts over") if broken else None

class Log:
    """log.jsonl, one object a logged step, cut back to the checkpoint's step; a bar on a terminal, else plain lines."""

    def __init__(self, out, step, total):
        self.path, self.speaks = Path(out) / "log.jsonl", process()[0] == 0
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not (self.speaks and sys.stderr.isatty()))
        if self.speaks:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
            os.replace(self.path.with_suffix(".tmp"), self.path)

    def restart(self):
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0

    def rates(self, device):
        """Since the last line: images/s of all processes, share of time waiting for data; peak memory so far in GiB."""
        seconds = time.perf_counter() - self.started
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
        return {"images_per_second": self.images / seconds, "waiting": self.waited / seconds, "memory_gb": peak / 2**30}

    def say(self, text):
        if self.speaks:
            tqdm.write(text, file=sys.stderr)

    def line(self, values):
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no NaN
        if self.speaks:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
        self.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
        self.restart()

# ---------------------------------------------------------------------------------------------------------- what it saw

@torch.no_grad()
def draw(teacher, images, indices, path, size, kind="activation", crops=2, **options):
    """Some images; saliency over them, blue low to red high; chosen boxes with weights, partners thin. The same random
    numbers each time, so that pictures compare. options: of `salient_pairs`. -> gauges over all `indices`"""
    device, cut = next(teacher.parameters()).device, columns(crops)[-3:]
    batch = next(sequential(images, indices, batch_size=len(indices), workers=0, device=device))
    s = saliency_map(teacher.encoder, batch.canvas, size, kind, batch.mask)
    pairs = salient_pairs(s, uniforms(0, 0, len(s), sum(cut)).split(cut, 1), batch.size, crops, **options)
    image, hot, boxes, weights = (x[:8].cpu() for x in (batch.canvas / 255, 4 * s[:, None].float(), *pairs[:2]))
    image, hot = (F.interpolate(x, size=192, mode="bilinear") for x in (image, hot))
    hot, drawn = torch.cat([(1.5 - (hot - c).abs()).clamp(0, 1) for c in (3, 2, 1)], 1), []
    colors, ink = (["yellow", "cyan", "magenta"] * crops)[:crops], {"label_colors": "black", "fill_labels": True}
    for view, box, a in zip((255 * image).byte(), 192 * boxes, weights):
        for part, width in ((box[crops:], 1), (box[:crops], 3)):
            view = draw_bounding_boxes(view, part, colors=colors, width=width)
        drawn.append(draw_bounding_boxes(view, box[:crops, [0, 1, 0, 1]], [f"{w:.2f}" for w in a], colors, **ink) / 255)
    save_image(torch.cat([image, (image + hot) / 2, torch.stack(drawn)]), path, nrow=len(image))
    return gauges(s, *pairs, batch.mask)

# ------------------------------------------------------------------------------------------------------------- the loop

def train(args):
    # data and checkpoint: what can go wrong goes wrong before one process waits for another
    images = open_images(args.data, args.canvas, "train", cache=args.cache)
    split = knn_split(images, open_images(args.data, args.canvas, "val", cache=args.cache), args.seed)
    epoch, total, stretch = run_length(args, len(images))  # in steps; --steps stretches all that is given in epochs
    warmup, knn_every = (int(x * epoch * stretch + 1e-6) for x in (args.warmup_epochs, args.knn_every))
    if args.saliency == "truth" and not images.has_masks:
        refuse(f"--saliency truth: {images.name} has no masks; leave the flag out, or use scenes")
    settings = settings_of(args, images)
    cut, flat_steps = columns(args.crops), int(args.saliency_warmup * total)  # choice: at first padding decides a map
    options = {"box_area": args.box_area, "temperature": args.box_temperature if args.crop_saliency else math.inf,
               "gamma": args.gamma if args.weight_saliency else 0.0}
    out, state = Path(args.out), load_checkpoint(args.out, "saliency_cl", settings, args.fresh)

    # processes, networks, optimiser
    device = setup_processes(args.device, args.timeout_minutes)
    dtype, half, scaler = numerics(args.precision, device, args.deterministic)
    rank, world = process()
    torch.manual_seed(args.seed)
    shape = {k: settings[k] for k in inspect.signature(Model).parameters}
    model = Model(**shape)
    if args.init:
        model.student.encoder.load_state_dict(load_backbone(args.init))
    teacher = model.make_teacher()
    for part in (model, teacher):
        sync_batchnorm(part.to(device, dtype, memory_format=torch.channels_last), device)
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay, decay_all=True)
    parts = {"model": model, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
    for name, part in parts.items() if state else ():
        part.load_state_dict(state.pop(name))  # popped: not held in memory any longer
    step = state["step"] if state else 0
    run = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True) if dist.is_initialized() else model

    # folder, log, signals
    if rank == 0 and step < total:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    log, signals = Log(out, step, total), heed_signals()
    log.say(f"saliency_cl, preset {args.preset}: {len(images)} images, {total} steps of {args.batch_size} on {world} x "
            f"{device.type}, {str(half or dtype)[6:]}, to {out}"
            + (f"; goes on from step {step}. {state['note']}" if state else ""))
    data = batches(images, batch_size=args.batch_size, seed=args.seed, start=step, stop=total, rank=rank, world=world,
                   workers=args.workers, device=device)
    if step == total and next(data, None) is None:  # its start compares what the processes found
        return log.say("this run is finished, there is nothing to do: --fresh starts over")

    def look(step):  # rank 0 looks at both networks; the others wait for it at the next collective
        if rank:
            return {}
        kind = args.saliency if args.saliency == "agreement" else "activation"  # controls, too: its own map
        found = draw(teacher, split[1], split[2][:256], out / "pictures" / f"saliency-{step:07d}.png", args.image_size,
                     kind, args.crops, **options)
        found = {f"held_out_{name}": value for name, value in found.items()}
        return knn_probe(model.student.encoder, images, split, args.image_size, device, half, args.workers) | found
    at_start = {f"{k}_at_start": v for k, v in look(0).items()} if step == 0 else {}
    if args.compile:  # after the first look: its batches would make this process's graphs general ones
        model.student.compile(dynamic=False)  # the branch: kNN, with its own batches, uses the encoder alone
        teacher.encoder.compile(dynamic=False)
    unreadable, bad_step = {}, torch.zeros((), dtype=torch.long, device=device)
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)  # this process's rows
    log.restart()
    while step < total:
        tick = time.perf_counter()
        batch = next(data)
        log.waited += time.perf_counter() - tick
        unreadable |= dict(batch.unreadable)
        peak_lr = args.lr * args.batch_size / 256
        lr = schedule(step, total, peak_lr, args.final_lr, warmup, start=peak_lr / 100)  # choice: 1 %
        momentum = schedule(step, total, args.momentum, 1.0)
        u = uniforms(args.seed, step, args.batch_size, sum(cut))[mine].split(cut, 1)
        orders = [jitter_order(args.seed, step, view) for view in range(2 + 2 * args.crops)]
        ema_update(teacher, model.student, momentum)
        kind = args.saliency if step >= flat_steps else "none"
        with torch.autocast(device.type, half, enabled=half is not None):
            s = saliency_map(teacher.encoder, batch.canvas, args.image_size, kind, batch.mask)
        pairs, weights, candidates = salient_pairs(s, u[-3:], batch.size, args.crops, **options)
        views, crops = make_views(batch, u, orders, pairs, args.crop_area, args.image_size, args.crop_size,
                                  args.jitter, args.blur, device, dtype)
        with torch.autocast(device.type, half, enabled=half is not None):
            with torch.no_grad():
                targets = [teacher(view) for view in views]
                track(teacher, False)  # only v_1, v_2 make the statistics by which the map is seen
                crop_targets = teacher(crops)
                track(teacher, True)
            losses = run(views, crops, targets, crop_targets, weights)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        finite = losses["loss"].isfinite() & (grad_norm.isfinite() | (scaler.scale(torch.ones_like(grad_norm)) > 1))
        bad_step = torch.where((bad_step == 0) & ~finite, step + 1, bad_step)  # fp16: a scale above 1 is halved instead
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        step, log.images = step + 1, log.images + args.batch_size
        log.bar.update()
        looks, saves = (step == total or every and step % every == 0 for every in (knn_every, args.save_every))
        if not (looks or saves or step == 1 or step % args.log_every == 0):
            continue
        stop, lost = agree(signals, bad_step, unreadable, len(images))
        seen = [gather(x).flatten(0, 1) for x in (s, pairs, weights, candidates, batch.mask)]  # of all processes
        z = gather(F.normalize(full(targets[0]), dim=1)).flatten(0, 1)
        values = {"step": step, "epoch": step / epoch, **{k: gather(v.detach()).mean() for k, v in losses.items()},
                  **gauges(*seen), "feature_spread": z.var(0, correction=0).sum().sqrt(),  # of v_1; 1: spread out
                  "lr": lr, "momentum": momentum, "grad_norm": grad_norm, "unreadable": lost, **log.rates(device)}
        log.line(values | (at_start if step == 1 else {}) | ({} if not looks or stop and step < total else look(step)))
        if values["feature_spread"] < 0.1:
            log.say("warning: all images give nearly the same features, a collapse: lower --lr or raise --momentum")
        if step > total / 4 and values["map_spread"] < 0.02 and kind not in ("none", "truth"):
            log.say("warning: all saliency maps are alike, a prior of place and not of objects: see pictures/")
        if rank == 0 and (saves or stop):
            state = {"method": "saliency_cl", "step": step, "settings": settings, "shape": shape}
            save_checkpoint(out, state | {k: part.state_dict() for k, part in parts.items()}, model.student.encoder)
        if stop:
            log.say(f"{signal.Signals(stop).name}: saved at step {step}, the same command goes on from there")
            sys.exit(128 + stop + int(gather(bad_step).sum()))  # which is 0, but waits until rank 0 has saved
    log.say(f"done: {out}/backbone.pth is the online network's encoder, {out}/pictures shows the saliency")

if __name__ == "__main__":
    run_script(train, parse_args)
