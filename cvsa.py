"""CVSA: cross-view saliency alignment for self-supervised fine-grained recognition, in one file.

Paper: Wu, Li, Zang, Li, "Exploring Localization for Self-supervised Fine-grained Contrastive Learning", BMVC 2022
(arXiv 2106.15788). It publishes two ingredients on top of BYOL and their gains; no code is known. So this implements
the two ingredients; what they leave open is a choice, listed below and marked `choice` where it stands. Compare
gains over plain BYOL of the same recipe (`--swap-prob 0 --align-weight 0`), not absolute values, with the paper's.

The idea. Contrastive learning remembers background and texture and does not know where the object is; telling birds
apart takes both. (a) Views that show the salient object of an image before another image's background, so that
little but the object is shared. (b) A loss by which the network finds, in one view, the object seen in the other.

  masks        m: the object, from image-boundary contrast (Zhang et al., MB+, ICCV 2015), from files, or the data's own
  (1) swap     view = crop(host, the region of its object covered by the region of this image's object), m moves along;
               for each of the two views with probability p, from different hosts in the image's block of 4 rows
  maps         F = f(view), z = q(g(mean F)), y = g'(mean F'), D = p(d(F)), E = d'(F'); ' is the teacher; view 1, 2
  (2) ssl      L_ssl = 2 - 2 cos(z_1, y_2) + 2 - 2 cos(z_2, y_1), which is BYOL
  (3) key      k_u = norm sum_i m_u(i) E_u(i) / sum_i m_u(i), the object as the teacher saw it, no gradient
  (4) look     P_v|u(i) = softmax over cells i of cos(D_v(i), k_u) / tau: where is that object in the other view?
  (5) align    L_align = (H(m_1 / sum m_1, P_1|2) + H(m_2 / sum m_2, P_2|1)) / (2 ln N), cross-entropies over N cells,
               mean over images with a mask in both views. `--align pooled`: 2 - 2 cos(p(mean of d(F_v) under m_v), k_u)
  (6) total    L = L_ssl + lambda L_align
  (7) teacher  xi <- mu xi + (1 - mu) theta before it runs; parameters only (BYOL's target; student: the online network)

Choices. The forms of (1) and (3) to (5) and the detector are ours. Detector: 64 x 64 pixels, ridge, Otsu; under 1 % or
over 90 % is no mask: such an image is a plain sample and a host, for objects at their own place. Box: padded
percentiles. Paste: 0.9-1.2 of it, hard edges, aspect kept in original pixels, covers the host's box, skipped if
enlarged over 3 times or outside 8-85 % of the host; p 0.5: edges can be a shortcut. Crops: the first of ten with a
fifth of the object, or the whole host; area 0.2-1, BYOL's, too. Cells' masks: soft, under 1 % of a view void. Residual
branches start at 0. d, p: BYOL's layers a cell. tau 0.1, lambda 1; warm-up from 1 %. Deviations: crops come from a
canvas (the whole image resized once to S x S), not the file; true Gaussians; jitter in one order a step and view.

  python cvsa.py                                                  no data: embedded scenes-fine, minutes; see runs/
  python cvsa.py --data /data/CUB_200_2011 --init imagenet.pth    one GPU, batch 256; Cars, Aircraft, NABirds alike
  torchrun --nproc_per_node=8 cvsa.py --data /data/inat2018 --preset inat         eight GPUs, batch 4096
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 cvsa.py --data ...  two nodes
At the start L_ssl is about 4 and L_align 1 (pooled: 2); (5) is at least its target's entropy, in the demo about 0.82.
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
    ARCHS, PHOTO_COLUMNS, RRC_COLUMNS, agree, backbone, batches, center_views, crop, find_masks, full, heed_signals,
    jitter_order, knn_probe, knn_split, load_backbone, normalize, numerics, open_images, parse_preset, photometry,
    place_matrix, random_boxes, refuse, rendezvous, resample, run_length, run_script, save_backbone, sequential,
    settings_of, sync_batchnorm, training_arguments, uniforms, upload)

# ------------------------------------------------------------------------------------------------------------ arguments

RECIPE = {"arch": "resnet50", "image_size": 224, "canvas": 512, "batch_size": 256, "epochs": 100.0, "optimizer": "lars",
          "lr": 0.3, "weight_decay": 1.5e-6, "warmup_epochs": 10.0, "hidden": 4096, "dim": 256, "dense_hidden": 2048,
          "momentum": 0.996, "save_every": 500, "log_every": 50, "knn_every": 10.0}
LARGE = {"canvas": 384, "batch_size": 4096, "epochs": 200.0, "weight_decay": 1e-6, "momentum": 0.99}  # LR 4.8 in all
PRESETS = {
    "demo": {"arch": "small", "image_size": 64, "canvas": 96, "batch_size": 32, "epochs": 4.0, "optimizer": "adamw",
             "lr": 8e-3, "weight_decay": 0.01, "warmup_epochs": 0.4, "hidden": 512, "dim": 128, "dense_hidden": 256,
             "momentum": 0.97, "blur": 0.6, "save_every": 400, "log_every": 50, "knn_every": 1.0},
    "finegrained": RECIPE, "imagenet": RECIPE | LARGE, "inat": RECIPE | LARGE,
}

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="CVSA pre-training", allow_abbrev=False)
    g = p.add_argument_group("data")  # choice: crops of 0.2 to 1: the smaller, the less object
    g.add_argument("--data", default="scenes-fine", help="scenes-fine[:N]: embedded; a folder; Name:root; a,b joins")
    g.add_argument("--cache", default="", help="pack the resized images into this file once, then read them from it")
    g.add_argument("--masks", default="boundary", help="boundary: from pixels; truth; a folder of grey or number PNGs")
    g.add_argument("--image-size", type=int, help="side of a view in pixels")
    g.add_argument("--canvas", type=int, help="side S of the square each image is resized to; larger: sharper crops")
    g.add_argument("--crop-area", type=float, nargs=2, default=[0.2, 1.0], metavar=("MIN", "MAX"), help="of a view")
    g.add_argument("--blur", type=float, default=2.0, help="largest sigma in pixels; 2 is meant for 224-pixel views")
    g.add_argument("--workers", type=int, help="decoding processes each; default a process's cores less one, at most 8")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=PRESETS, help="a recipe: demo without data, finegrained with; any flag beats it")
    g.add_argument("--arch", choices=ARCHS, help="encoder f")
    g.add_argument("--dim", type=int, help="width of z and of the dense maps")
    g.add_argument("--hidden", type=int, help="hidden width of projector g and predictor q")
    g.add_argument("--dense-hidden", type=int, help="hidden width of the dense head d and its predictor p")
    g.add_argument("--swap-prob", type=float, default=0.5, help="p in (1), for each view; 0: no swaps")  # choice
    g.add_argument("--mask-crop", choices=("on", "off"), help="redraw crops without object; default: on, in BYOL off")
    g.add_argument("--align", choices=("attention", "pooled"), default="attention", help="(5): find it, or resemble it")
    g.add_argument("--align-weight", type=float, default=1.0, help="lambda in (6): grad_ratio 0.2-0.5 first")  # choice
    g.add_argument("--tau", type=float, default=0.1, help="of the look (4); lower: harder")  # choice
    g.add_argument("--momentum", type=float, help="the teacher's mu in (7) at the first step; a cosine takes it to 1")
    training_arguments(p)
    args = parse_preset(p, argv, PRESETS, "finegrained", "cvsa")
    if min(args.dim, args.hidden, args.dense_hidden, args.tau) <= 0:
        refuse("--dim, --hidden, --dense-hidden and --tau must be above 0")
    if max(args.swap_prob, args.momentum) > 1 or not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        refuse("--swap-prob and --momentum lie in 0..1, 0 < MIN <= MAX <= 1 in --crop-area")
    if args.masks not in ("boundary", "truth") and not Path(args.masks).is_dir():
        refuse(f"--masks {args.masks}: no such folder; give boundary, truth or a folder of PNGs named as the images")
    args.mask_crop = args.mask_crop or ("on" if args.swap_prob or args.align_weight else "off")
    return args

# ----------------------------------------------------------------------------------------------------------- the method

def head(n_in, hidden, n_out, dense=False):
    """Two layers with batch norm between them: over vectors, or over the cells of a map."""
    layer, norm = (lambda a, b: nn.Conv2d(a, b, 1), nn.BatchNorm2d) if dense else (nn.Linear, nn.BatchNorm1d)
    return nn.Sequential(layer(n_in, hidden), norm(hidden), nn.ReLU(inplace=True), layer(hidden, n_out))

class Branch(nn.Module):
    """Encoder f, projector g and, for the alignment, dense head d: what student and teacher have in common.
    forward(view B 3 H W) -> last map B C h w, projection B D, dense map B D h w (None without a dense head)."""

    def __init__(self, arch, dim, hidden):
        super().__init__()
        self.encoder = backbone(arch, zero_init_residual=True)  # choice: as large-batch recipes do
        self.projector, self.dense = head(self.encoder.channels[-1], hidden, dim), None

    def forward(self, view):
        x = self.encoder(view)[-1]
        return x, self.projector(x.mean((2, 3))), self.dense(x) if self.dense else None

def distance(z, y):
    """2 - 2 cos, BYOL's: z, y B D -> B; y is a target, it gets no gradient."""
    return 2 - 2 * F.cosine_similarity(full(z), full(y).detach(), dim=1, eps=1e-12)

def object_mean(x, mask):
    """The mean of x (B D h w) under the mask (B 1 h w; where it is empty, over all cells) -> B D."""
    mask = torch.where(mask.sum((2, 3), keepdim=True) > 0, mask, 1.0)
    return (mask * x).sum((2, 3)) / mask.sum((2, 3))

def attend(x, key, mask, tau=0.1):
    """(4, 5), one view (choice: their form): x B D h w, key B D of unit norm, mask B 1 h w -> P (B N), its loss (B; 1
    for an even look, 0 without a mask) and its share on the object (B)."""
    log_p = F.log_softmax(torch.einsum("bdn,bd->bn", F.normalize(x.flatten(2), dim=1), key) / tau, dim=1)
    p, mask, n = log_p.exp(), mask.flatten(1), log_p.shape[1]
    target = mask / mask.sum(1, keepdim=True).clamp_min(1e-12)
    return p, -(target * log_p).sum(1) / math.log(max(n, 2)), (p * mask).sum(1)

class Model(nn.Module):
    """Student and predictors. The teacher (`make_teacher`) stands outside: DDP wraps this module alone.

    model = Model("resnet50")
    teacher = model.make_teacher()
    targets = [teacher(v) for v in views]               # views: two tensors B 3 H W, normalised; B a multiple of 4
    losses = model(views, masks, targets)               # masks of the object: two B 1 H W in 0..1, zeros where unknown
    losses["loss"].backward()
    """

    def __init__(self, arch="resnet50", dim=256, hidden=4096, dense_hidden=2048, align="attention", align_weight=1.0,
                 tau=0.1):
        super().__init__()
        self.align, self.align_weight, self.tau = align, align_weight, tau
        self.student = Branch(arch, dim, hidden)
        self.predictor = head(dim, hidden, dim)  # q
        if align_weight:  # made last: plain BYOL with the same seed starts from the same weights
            self.student.dense = head(self.student.encoder.channels[-1], dense_hidden, dim, dense=True)
            self.dense_predictor = head(dim, dense_hidden, dim, dense=True)  # p; choice: as BYOL's q, a cell at a time

    def make_teacher(self):
        """A copy of the student without gradients, in train mode: it normalises with its own batch statistics."""
        return copy.deepcopy(self.student).requires_grad_(False).train()

    def forward(self, views, masks, targets, measure=False):
        """-> dict of scalars: loss (6) and loss_ssl (2); with alignment also what `alignment` gives and, if `measure`,
        grad_ratio: norm of the gradient of lambda L_align at the encoder's last map over that of L_ssl."""
        x, z, d = zip(*[self.student(view) for view in views])  # two passes: batch statistics are per view
        z = [self.predictor(one) for one in z]
        with torch.autocast(x[0].device.type, enabled=False):
            loss_ssl = (distance(z[0], targets[1][1]) + distance(z[1], targets[0][1])).mean()
        if not self.align_weight:
            return {"loss": loss_ssl, "loss_ssl": loss_ssl}
        found = self.alignment(d, [e for _, _, e in targets], masks)
        aligned = self.align_weight * found["loss_align"]
        if measure:  # the way back ends at the maps: no parameter, so none of DDP's buckets, hears of it
            with torch.autocast(x[0].device.type, enabled=False):
                squares = [sum(full(g).square().sum() for g in torch.autograd.grad(loss, x, retain_graph=True))
                           for loss in (aligned, loss_ssl)]
            align, ssl = gather(torch.stack(squares)).sum(0).sqrt()
            found["grad_ratio"] = align / ssl.clamp_min(1e-30)
        return {"loss": loss_ssl + aligned, "loss_ssl": loss_ssl, **found}

    def alignment(self, student, teacher, masks):
        """(3-5) from dense maps d(F), d'(F'), two B D h w each -> loss_align; loss_align_shuffled: with another image's
        key; attention_mass: the look's share on the object, beside mask_share: the view's; pairs: images that count."""
        masks = [F.adaptive_avg_pool2d(m, e.shape[2:]) for m, e in zip(masks, teacher)]  # soft, B 1 h w
        if self.align == "pooled":
            z = [self.dense_predictor(object_mean(full(d), m)[..., None, None]) for d, m in zip(student, masks)]
        else:
            student = [self.dense_predictor(d) for d in student]
        def both_ways(keys, valid, n):  # means over both and all processes' valid rows, on average n a process
            _, losses, masses = zip(*[attend(full(d), k, m, self.tau) for d, k, m in zip(student, keys[::-1], masks)])
            if self.align != "attention":
                losses = [distance(y.flatten(1), k) for y, k in zip(z, keys[::-1])]
            return [(valid * (a + b) / (2 * n)).sum() for a, b in (losses, masses, shares)]
        other = torch.arange(len(masks[0]), device=masks[0].device).view(-1, 4).roll(1, 1).flatten()  # in a block of 4
        with torch.autocast(student[0].device.type, enabled=False):
            keys = [F.normalize(object_mean(full(e), m), dim=1).detach() for e, m in zip(teacher, masks)]  # choice: (3)
            shares = [m.mean((1, 2, 3)) for m in masks]
            valid = (shares[0] >= 0.01) & (shares[1] >= 0.01)  # choice: under 1 % of the view is as good as empty
            both = valid & valid[other]  # the same images for both keys
            n, n_both = gather(torch.stack([valid.sum(), both.sum()])).sum(0).clamp_min(1).double() / process()[1]
            loss, mass, share = both_ways(keys, valid, n)
            with torch.no_grad():
                own, shuffled = (both_ways(k, both, n_both)[0] for k in (keys, [k[other] for k in keys]))
        return {"loss_align": loss, "loss_align_shuffled": loss.detach() + shuffled - own,
                "attention_mass": mass.detach(), "mask_share": share, "pairs": valid.to(loss.dtype).mean()}

def gauges(targets):
    """Collapse: the deviation of the teacher's unit projections over the batch; 1: spread out, 0: all the same."""
    y = F.normalize(gather(torch.cat([full(y) for _, y, _ in targets])).flatten(0, 1), dim=1)
    return {"feature_spread": y.var(0, correction=0).sum().sqrt()}

# ------------------------------------------------------------------------------------------------- masks, swaps, views

def plan_swap(box, usable, size, host, wanted, jitter):
    """(1): box, usable: of `find_masks`; size: B 2, height and width in pixels; host: B rows; wanted: B bool; jitter: B
    2 in 0..1 -> source, target: what is cut out of the image and where it goes in its host, B 2 2, fractions of either,
    the whole of both where nothing is swapped; swapped: B bool."""
    center, sides = box.mean(1), (box[:, 1] - box[:, 0]) * (0.9 + 0.3 * jitter)  # choice: cut 0.9 to 1.2 times the box
    cut = torch.stack([center - sides / 2, center + sides / 2], 1).clamp(0, 1)
    place = torch.where(usable[host, None, None], box[host], box)  # choice: no mask, the object's own place
    sides, pixels = cut[:, 1] - cut[:, 0], size.flip(1).double() / size[host].flip(1)  # choice: the aspect is kept
    grown = ((place[:, 1] - place[:, 0]) / (sides * pixels)).amax(1, keepdim=True) * pixels  # choice: covers it
    whole = torch.arange(2, device=box.device)[:, None]  # low and high ends of both axes
    target = place.mean(1)[:, None] + (grown * sides)[:, None] * (whole - 0.5)
    seen = target.clamp(0, 1)
    source = cut[:, :1] + (seen - target[:, :1]) / grown[:, None]
    area = (seen[:, 1] - seen[:, 0]).prod(1)
    swapped = wanted & usable & (grown.amax(1) <= 3) & (area >= 0.08) & (area <= 0.85)  # choice; on the canvases
    return *(torch.where(swapped[:, None, None], x, whole) for x in (source, seen)), swapped

def aware_box(tries, mask, source, target, dtype):
    """The first of tries (B K 2 2, fractions of the host) that shows 20 % of the object, else, choice, the whole host;
    without a mask the first. mask B 1 S S; source, target: of `plan_swap` -> B 2 2."""
    n, i, mask = mask.shape[2], torch.arange(mask.shape[2], device=mask.device), mask[:, 0].to(dtype)
    (s0, s1), (t0, t1) = (x[:, None].split(1, 2) for x in (source, target))  # B 1 1 2
    seen = s0 + (tries - t0) * (s1 - s0) / (t1 - t0)  # the tries in the image that the object was cut from
    seen = torch.cat([source[:, None], seen], 1).clamp(s0, s1)[..., None] * n
    x, y = (torch.minimum(i + 1, seen[:, :, 1]) - torch.maximum(i, seen[:, :, 0])).clamp(0).to(dtype).unbind(2)
    mass = ((y @ mask) * x).sum(2)
    good = mass[:, 1:] >= 0.2 * mass[:, :1]  # choice: 20 %; all of them without a mask
    found = tries.gather(1, good.int().argmax(1)[:, None, None, None].expand(-1, 1, 2, 2))[:, 0]
    return torch.where(good.any(1)[:, None, None], found, torch.arange(2, device=mask.device)[:, None])

def make_views(batch, found, u, orders, crop_area, image_size, jitter, blur, swap_prob, aware, dtype):
    """(1): two views of each of 4 n images and its object in them. batch: common.Batch; found: of `find_masks`; u: own
    uniforms; orders: of the colour operations, one a view; aware: crops heed masks. No pasted canvas is ever
    formed: host and object go straight into the view, the mask as a fourth channel through the same products.
    -> views: two B 3 H W, normalised; masks: two B 1 H W in 0..1; swapped: two B bool"""
    (mask, box, usable), u, k, device = found, u.split(COLUMNS, dim=1), TRIES if aware else 1, batch.canvas.device
    x = torch.cat([batch.canvas, mask.to(torch.uint8) * 255], 1)  # B 4 S S
    (b, _, _, n), own, step = x.shape, torch.arange(len(x)), (u[0] * torch.tensor([3, 2])).long()
    made = []
    for draws, photo, order, shift, recipe in zip(
            u[1:3], u[3:], orders, (step[:, 0], (step[:, 0] + 1 + step[:, 1]) % 3),  # two hosts of the block
            ({"p_blur": 1.0}, {"p_blur": 0.1, "p_solarize": 0.2})):  # BYOL's two sides
        host, crops = own // 4 * 4 + (own + 1 + shift) % 4, draws[:, :k * RRC_COLUMNS].reshape(b * k, RRC_COLUMNS)
        sizes = batch.size, batch.size[host]  # whose shape the crops' law heeds, the device decides
        tries = [random_boxes(crops, size.repeat_interleave(k, 0), crop_area).view(b, 4 * k) for size in sizes]
        packed = upload(torch.cat([*tries, draws[:, -4:], batch.size, torch.stack([host, own], 1)], 1), device)
        *tries, wish, sides, flip, size, hosts = packed.split([4 * k, 4 * k, 1, 2, 1, 2, 2], 1)
        wanted, flip, hosts = wish[:, 0] < swap_prob, flip < 0.5, hosts.long()
        source, target, swapped = plan_swap(box, usable, size, hosts[:, 0], wanted, sides)
        tries = torch.where(swapped[:, None], tries[1], tries[0]).view(b, k, 2, 2)
        frame = aware_box(tries, x[:, 3:] > 0, source, target, dtype) if aware else tries[:, 0]
        shown = x[torch.where(swapped, hosts[:, 0], hosts[:, 1])]
        view = crop(shown, frame.flatten(1), image_size, flip[:, 0], dtype=dtype)
        view[:, 3] *= ~swapped[:, None, None]  # the host's object is none of this view's
        rows = (draws[:, -4] < swap_prob).nonzero()[:, 0]  # the device knows whose mask allows it
        if len(rows):
            r, mirrored = upload(rows, device), torch.where(flip, frame[:, :, 0].flip(1), frame[:, :, 0])
            (wx, at_x), (wy, at_y) = (place_matrix(source[r, :, a], target[r, :, a], f[r], image_size, n, dtype)
                                      for a, f in enumerate((mirrored, frame[:, :, 1])))
            pasted = swapped[r, None, None, None] & at_y[:, None, :, None] & at_x[:, None, None]  # choice: hard edges
            view[r] = torch.where(pasted, resample(x[r].to(dtype), wy, wx / 255).clamp(0, 1), view[r])
        seen = photometry(view[:, :3], photo, order, jitter=jitter, sigma=(0.1, blur), **recipe)  # of the image alone
        made.append((seen.contiguous(memory_format=torch.channels_last), view[:, 3:], swapped))
    return [list(part) for part in zip(*made)]

TRIES = 10  # choice; crops drawn at once, each an ordinary RandomResizedCrop; plain BYOL takes the first
VIEW_COLUMNS = TRIES * RRC_COLUMNS + 4  # of the uniforms: crops; swap?, the cut's sides, flip
COLUMNS = [2, VIEW_COLUMNS, VIEW_COLUMNS, PHOTO_COLUMNS, PHOTO_COLUMNS]  # hosts, views, photometry

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
def draw(model, teacher, images, indices, path, size, masks="boundary", show=8):
    """One column an image: the whole and its box; then, for each of two views, swapped if possible, the view, the
    object, and where the student looks (bright) when asked for the object that the teacher saw in the other view, or,
    without alignment, where the encoder does. Takes the first `show` of `indices`, a multiple of 4; of 3 one twice."""
    weight, indices = next(model.parameters()), (4 * list(indices))[:max(4, min(show, len(indices) // 4 * 4))]
    batch = next(sequential(images, indices, batch_size=show, workers=0, device=weight.device))
    found, u = find_masks(batch, masks, weight.dtype, images.grey), uniforms(0, 0, len(indices), sum(COLUMNS))
    u[:, -2 * PHOTO_COLUMNS:] = 1  # no photometry
    views, masks, _ = make_views(batch, found, u, [range(4)] * 2, (0.2, 1.0), size, [0] * 4, 2, 1, True, weight.dtype)
    modes, _ = [model.training, teacher.training], [model.eval(), teacher.eval()]
    seen = [(model.student(view), teacher(view)) for view in views]
    canvas = F.interpolate(batch.canvas / 255, size=size, mode="bilinear").mul(255).byte().cpu()
    boxed = [draw_bounding_boxes(c, b.view(1, 4) * size, colors="red") for c, b in zip(canvas, found[1].cpu())]
    tiles, (black, white) = [torch.stack(boxed).to(weight) / 255], [normalize(0 * views[0] + v) for v in (0, 1)]
    for v, u in ((0, 1), (1, 0)):
        (x, _, asked), (other, _, key) = seen[v][0], seen[u][1]
        if asked is None:  # no alignment
            asked, key = x, other
        asked = model.dense_predictor(asked) if key is not other and model.align == "attention" else asked
        small = [F.adaptive_avg_pool2d(m, key.shape[2:]) for m in masks]
        p = attend(asked, F.normalize(object_mean(key, small[u]), dim=1), small[v], model.tau)[0].view_as(small[v])
        p = F.interpolate(p / p.amax((2, 3), keepdim=True), size=size, mode="bilinear")
        view = (views[v] - black) / (white - black)
        tiles += [view, torch.where(masks[v] > 0.5, view, 0.25 * view + 0.6), view * (0.15 + 0.85 * p)]
    model.train(modes[0]), teacher.train(modes[1])
    save_image(torch.cat(tiles).float(), path, nrow=len(indices))

def object_mass(encoder, images, indices, size):
    """Does the encoder tell object from ground? By true masks: object_mass, the share in % of the look (4; tau 0.1)
    of its last map, asked for the mean under the mask itself, that is on the object; object_area: an even look's."""
    _, mask, x = center_views(images, indices, size, encoder, lambda out: out[-1])
    mask = F.adaptive_avg_pool2d(((mask > 0) & (mask < 255)).to(x), x.shape[2:])
    mass = attend(x, F.normalize(object_mean(x, mask), dim=1), mask)[2]
    return {"object_mass": 100 * mass.mean().item(), "object_area": 100 * mask.mean().item()}

# ------------------------------------------------------------------------------------------------------------- the loop

def train(args):
    # data and checkpoint: what can go wrong goes wrong before one process waits for another
    folder = "" if args.masks in ("boundary", "truth") else args.masks
    images = open_images(args.data, args.canvas, "train", masks=folder, cache=args.cache)
    if args.masks != "boundary" and not images.has_masks:
        refuse(f"--masks {args.masks}: {images.name} has no masks; give boundary or a folder of PNGs")
    split = knn_split(images, open_images(args.data, args.canvas, "val", cache=args.cache), args.seed)
    epoch, total, stretch = run_length(args, len(images))  # in steps; --steps stretches all that is given in epochs
    warmup, knn_every = (int(x * epoch * stretch + 1e-6) for x in (args.warmup_epochs, args.knn_every))
    settings = settings_of(args, images) | ({"masks": "folder"} if folder else {})
    out, state = Path(args.out), load_checkpoint(args.out, "cvsa", settings, args.fresh)

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
    optimizer = make_optimizer(args.optimizer, model, args.weight_decay)
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
    log.say(f"cvsa, preset {args.preset}: {len(images)} images, {total} steps of {args.batch_size} on {world} x "
            f"{device.type}, {str(half or dtype)[6:]}, to {out}"
            + (f"; goes on from step {step}. {state['note']}" if state else ""))
    data = batches(images, batch_size=args.batch_size, seed=args.seed, start=step, stop=total, rank=rank, world=world,
                   workers=args.workers, device=device)
    if step == total and next(data, None) is None:  # its start compares what the processes found
        return log.say("this run is finished, there is nothing to do: --fresh starts over")

    def look(step):  # rank 0 looks at the student; the others wait for it at the next collective
        if rank:
            return {}
        some = split[0][::len(split[0]) // 8 or 1]  # of several classes: the bank is in the order of the data
        draw(model, teacher, images, some, out / "pictures" / f"views-{step:07d}.png", args.image_size, args.masks)
        found = knn_probe(model.student.encoder, images, split, args.image_size, device, half, args.workers)
        if not split[1].has_masks or folder and split[1] is images:  # a folder's masks need not be true
            return found
        return found | object_mass(model.student.encoder, split[1], split[2][:512], args.image_size)
    at_start = {f"{k}_at_start": v for k, v in look(0).items()} if step == 0 else {}
    if args.compile:  # after the first look: its batches would make this process's graphs general ones
        model.student.encoder.compile(), teacher.encoder.compile()  # not the heads: grad_ratio goes back through twice
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
        u = uniforms(args.seed, step, args.batch_size, sum(COLUMNS))[mine]
        orders = [jitter_order(args.seed, step, view) for view in (0, 1)]
        found = find_masks(batch, args.masks, dtype, images.grey)
        views, masks, swapped = make_views(batch, found, u, orders, args.crop_area, args.image_size, args.jitter,
                                           args.blur, args.swap_prob, args.mask_crop == "on", dtype)
        measure = step + 1 in (1, total) or (step + 1) % args.log_every == 0
        ema_update(teacher, model.student, momentum)
        with torch.autocast(device.type, half, enabled=half is not None):
            with torch.no_grad():
                targets = [teacher(view) for view in views]
            losses = run(views, masks, targets, measure)
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
        shares = gather(torch.stack([found[2].to(dtype).mean(), torch.cat(swapped).to(dtype).mean()])).mean(0)
        values = {"step": step, "epoch": step / epoch, **{k: gather(v.detach()).mean() for k, v in losses.items()},
                  "lr": lr, "momentum": momentum, "grad_norm": grad_norm, **gauges(targets),
                  "usable_masks": shares[0], "swapped": shares[1], "unreadable": lost, **log.rates(device)}
        log.line(values | (at_start if step == 1 else {}) | ({} if not looks or stop and step < total else look(step)))
        if values["feature_spread"] < 0.1:
            log.say("warning: all projections are the same, BYOL has collapsed: lower --lr or raise --momentum")
        gap = values.get("loss_align_shuffled", 9.0) - values.get("loss_align", 0.0)
        if step > total / 4 and gap < 0.01 and values["pairs"] > 0.2:
            log.say("warning: another image's key serves as well: any object is found, or only the place of masks")
        if rank == 0 and (saves or stop):
            state = {"method": "cvsa", "step": step, "settings": settings, "shape": shape}
            save_checkpoint(out, state | {k: part.state_dict() for k, part in parts.items()}, model.student.encoder)
        if stop:
            log.say(f"{signal.Signals(stop).name}: saved at step {step}, the same command goes on from there")
            sys.exit(128 + stop + int(gather(bad_step).sum()))  # which is 0, but waits until rank 0 has saved
    log.say(f"done: {out}/backbone.pth is the student's encoder, {out}/pictures shows views and looks")

if __name__ == "__main__":
    run_script(train, parse_args)
