"""What a backbone is worth, by the field's own protocols, in one file.

  --protocol   what is done with the weights                                            what is reported, in %
  linear       a linear head on the frozen backbone's pooled features, random crops     top-1 and top-5 of each rate at
               and flips; a sweep of rates trained side by side on the same features    the end (--median), the best
  knn          weighted kNN of the test images among the training images                top-1 for each k
  finetune     all weights trained, the backbone at one rate, the head at another, on   top-1, top-5: the median of the
               a share of the labels, a list of files or everything                     last --median epochs
  retrieval    each test image asks for the others of its class                         Rank-1, Rank-5, mAP
  segment      a linear 1 x 1 head on the frozen last map, as in `linear`; or           mIoU, pixel accuracy
               --unsupervised: clusters of cells, matched one to one with the classes
  localize     a box around what activates the last map most, against true boxes        CorLoc, MaxBoxAcc

  kNN          argmax_c sum over the k nearest of exp(cosine / T) [y = c], T = 0.07         DINO, arXiv 2104.14294
  AP           (1/R) sum over the ranks r of the R relevant of (relevant among the first r) / r; mAP: mean over queries
  IoU of c     pixels that are and are called c / that are or are called c; mIoU: mean over the classes met
  matching     clusters to classes, one to one, so that most pixels of the test set are right (Hungarian method)
  CorLoc       share of images whose box, around the largest connected part of the map above its mean, has IoU >= 0.5
               with a true box                    # choice: the mean (LOST, arXiv 2109.14279, has another map)
  MaxBoxAcc    the same at the best one of the thresholds 0.05, 0.10, .. 0.95 of the 0..1 map     arXiv 2001.08437
The best rate of a sweep is the best on the test images, as in DINOv2 (arXiv 2304.07193): the others stand beside it.
Deviations: crops come from a canvas (the whole image resized once to S x S), not the file; rates fall by steps, not by
epochs; `segment` scores the central crop (PiCIE, arXiv 2103.17070), `localize` the image squeezed to a square.

  python eval_linear.py --weights runs/slotcon-demo/backbone.pth                            no data: embedded scenes
  python eval_linear.py --weights random --protocol knn                                     the control
  torchrun --nproc_per_node=8 eval_linear.py --weights backbone.pth --data /data/imagenet   eight GPUs, the same numbers
  python eval_linear.py --weights backbone.pth --data /data/imagenet --protocol finetune --label-fraction 0.01
  python eval_linear.py --weights backbone.pth --data /data/CUB_200_2011 --protocol finetune --preset fine-grained
  python eval_linear.py --weights backbone.pth --data VOCSegmentation:/data/voc --protocol segment
A run prints a table and adds a line of JSON to OUT/results.jsonl, finetune leaves OUT/finetune-*-backbone.pth too; the
same command goes on with interrupted training.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

from common import (  # isort: skip
    ARCHS, PRECISIONS, RRC_COLUMNS, SCENE_CLASSES, agree, arch_of, backbone, batches, center_boxes, crop, features,
    full, heed_signals, knn, knn_split, load_backbone, normalize, numerics, open_images, parse_preset, random_boxes,
    refuse, rendezvous, run_length, run_script, save_backbone, seeded, sequential, sync_batchnorm, uniforms, upload)

# ------------------------------------------------------------------------------------------------------------ arguments

STANDARD = {"arch": "resnet50", "image_size": 224, "canvas": 384, "crop_area": [0.08, 1.0], "batch_size": 1024,
            "epochs": 100.0, "lrs": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], "lr": 0.01, "head_lr": 0.1,
            "weight_decay": 0.0, "median": 1, "drop_epochs": []}
PRESETS = {
    "demo": STANDARD | {"arch": "small", "image_size": 64, "canvas": 96, "crop_area": [0.3, 1.0], "batch_size": 128,
                        "epochs": 5.0, "lrs": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]},
    "imagenet": STANDARD,  # DINO's and MoCo's linear recipe; their rates lie in the sweep
    # Fine-tuning on few labels, as the saliency paper's peers do; their grid: lr 0.001 0.01 0.1, head x 1 10 100.
    "semi": STANDARD | {"batch_size": 256, "epochs": 20.0, "head_lr": 1.0, "drop_epochs": [12.0, 16.0]},
    "fine-grained": STANDARD | {"canvas": 512, "crop_area": [0.5, 1.0], "batch_size": 64, "weight_decay": 1e-4,
                                "median": 10},
    "voc": STANDARD | {"image_size": 448, "canvas": 512, "crop_area": [0.25, 1.0], "batch_size": 64, "epochs": 50.0},
}
PROTOCOLS = {"linear": "imagenet", "knn": "imagenet", "finetune": "semi", "retrieval": "fine-grained", "segment": "voc",
             "localize": "fine-grained"}  # and the preset on data of one's own

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Evaluation of backbones", allow_abbrev=False)
    p.add_argument("--protocol", choices=PROTOCOLS, default="linear")
    p.add_argument("--weights", default="", help="file with a backbone, of any layout; random: none, the control")
    p.add_argument("--arch", choices=ARCHS, help="of --weights random; a file says it itself")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="", help="nothing, scenes[-fine][:N]: embedded; a folder; Name:root; a,b joins")
    g.add_argument("--cache", default="", help="pack the resized images into this file once, then read them from it")
    g.add_argument("--masks", default="", help="PNGs of the images' relative names: numbers, 255 void; or 0 and 255")
    g.add_argument("--label-fraction", type=float, default=1.0, help="finetune: this share, as many of each class")
    g.add_argument("--label-list", default="", help="finetune: a file with a training image's name in each line")
    g.add_argument("--image-size", type=int, help="side of a view; tests resize the shorter side to 256/224 of it")
    g.add_argument("--canvas", type=int, help="side S of the square each image is resized to; larger: sharper crops")
    g.add_argument("--crop-area", type=float, nargs=2, metavar=("MIN", "MAX"), help="a training crop's share")
    g.add_argument("--workers", type=int, help="decoding processes each; default a process's cores less one, at most 8")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=PRESETS, help="a recipe: demo without data, else by protocol; any flag beats it")
    g.add_argument("--lrs", type=float, nargs="+", help="linear, segment: the sweep; x batch / 256; fewer: less memory")
    g.add_argument("--feature-bn", action="store_true", help="batch norm without weights before the heads, as MAE has")
    g.add_argument("--lr", type=float, help="finetune: the backbone's rate, not scaled by the batch")
    g.add_argument("--head-lr", type=float, help="finetune: the head's rate, larger for few labels; not scaled")
    g.add_argument("--weight-decay", type=float, help="on all that is trained")
    g.add_argument("--drop-epochs", type=float, nargs="*", help="rates x 0.2 after these epochs instead of a cosine")
    g.add_argument("--median", type=int, help="report the median of the last so many epochs; 1: the last epoch")
    g.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="knn: neighbours; 20 is usually quoted")
    g.add_argument("--temperature", type=float, default=0.07, help="knn: T of the votes; lower: the nearest decide")
    g.add_argument("--unsupervised", action="store_true", help="segment: k-means, or a slotcon checkpoint's prototypes")
    g = p.add_argument_group("training")
    g.add_argument("--batch-size", type=int, help="images a step over ALL processes; a multiple of 4 x processes")
    g.add_argument("--epochs", type=float, help="length of the training")
    g.add_argument("--steps", type=int, help="length in steps instead; all that is given in epochs stretches with it")
    g.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 if fast, else fp32")
    g.add_argument("--compile", action="store_true", help="torch.compile the backbone: a slow start")
    g.add_argument("--deterministic", action="store_true", help="the same bits again on a GPU, too; slower")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--out", default="runs/eval", help="folder of results.jsonl, of pictures and of what is under way")
    g.add_argument("--fresh", action="store_true", help="start this command's training over")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    g.add_argument("--log-every", type=int, default=50, help="steps between looks at loss and signals")
    g.add_argument("--timeout-minutes", type=float, default=30, help="how long a process waits for another")
    p.set_defaults(init="")  # a training script's --init, which the shared checks ask for
    p.error = refuse  # one line instead of argparse's usage and a line
    args = parse_preset(p, argv, PRESETS, PROTOCOLS[p.parse_known_args(argv)[0].protocol], "eval")
    if args.weights != "random" and not Path(args.weights).is_file():
        refuse(f"--weights {args.weights!r} is no file: name one, or random for the control")
    if min(*args.lrs, args.head_lr, args.temperature, *args.k, args.median) <= 0:
        refuse("--lrs, --head-lr, --temperature, --k and --median must be above 0")
    if not 0 < args.label_fraction <= 1 or not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        refuse("--label-fraction lies in 0..1, and so does --crop-area MIN MAX")
    few = (args.label_fraction < 1) + bool(args.label_list)
    if few > (args.protocol == "finetune") or args.unsupervised > (args.protocol == "segment"):
        refuse("--label-fraction or --label-list goes with --protocol finetune, --unsupervised with segment")
    return args

# --------------------------------------------------------------------------------------------------------- the measures

def hungarian(cost):
    """The assignment of rows to columns, one to one, of the least total cost. cost: n x m finite numbers, n <= m.
    -> the column of each row, n. Shortest augmenting paths over reduced costs (Kuhn 1955, Jonker & Volgenant 1987)."""
    cost = np.asarray(cost, np.float64)
    n, m = cost.shape
    price, owner = np.zeros(m), np.full(m, -1)  # a column's dual, and the row that holds it
    for row in range(n):
        # Dijkstra from `row`: away[j], the least extra cost at which column j comes free, via[j], the column before it.
        away, via, done, i, j, base = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool), row, -1, 0.0
        while i >= 0:
            held = cost[i, j] - price[j] if j >= 0 else 0.0  # what row i pays now
            step = base + cost[i] - price - held
            nearer = ~done & (step < away)
            away[nearer], via[nearer] = step[nearer], j
            j = int(np.where(done, np.inf, away).argmin())
            done[j], base, i = True, away[j], owner[j]
        price[done] += away[done] - base  # reduced costs stay >= 0, and 0 on what is held
        while j >= 0:  # back along the path, each column goes to the row before it
            owner[j] = row if via[j] < 0 else owner[via[j]]
            j = via[j]
    column = np.empty(n, np.int64)
    column[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return column

def confusion(guess, truth, classes, groups=None, void=255):
    """Counts, int64 groups x classes (groups: None for classes), of pairs of whole numbers (guess, truth), two tensors
    of one shape. Pixels whose truth is `void`, or no class, are left out."""
    known = (truth >= 0) & (truth < classes) & (truth != void)
    pairs = guess[known].long() * classes + truth[known].long()
    return pairs.bincount(minlength=(groups or classes) * classes).view(-1, classes)

def segment_scores(counts):
    """{"miou", "pixel_accuracy"} in % of a confusion matrix, rows what was said and columns what is. Classes that
    neither the guesses nor the truth ever name are left out of the mean. UserError if nothing was counted."""
    c = counts.double() if counts.any() else refuse("no pixel of the test images' masks has a class: all are void")
    union = c.sum(0) + c.sum(1) - c.diag()
    return {"miou": 100 * (c.diag() / union)[union > 0].mean().item(),
            "pixel_accuracy": 100 * (c.diag().sum() / c.sum().clamp_min(1)).item()}

def match(counts):
    """Confusion matrix G x K, G <= K, of nameless groups -> K x K: each group takes the class, no two the same, so
    that the most cells are right; classes left over are never guessed. Also the class of each group, G."""
    column = torch.from_numpy(hungarian(-counts.cpu().double().numpy()))
    named = torch.zeros(counts.shape[1], counts.shape[1], dtype=counts.dtype)
    named[column] = counts.cpu()
    return named, column

@torch.no_grad()
def retrieval_scores(x, y, device="cpu", chunk=256):
    """Leave-one-out: every row asks, by cosine, for the others of its label. x N C, y N -> {"rank1", "rank5", "map"} in
    % and "queries", those with another image of their label; the rest only stand in the way. Of equal cosines, as x's
    dtype rounds them, the lower row comes first. Runs on `device`, `chunk` queries at a time."""
    x, y, sums = F.normalize(full(x.to(device)), dim=1), y.to(device), torch.zeros(4, dtype=torch.float64)
    for start in tqdm(range(0, len(x), chunk), "ranking", leave=False, disable=None):
        row = torch.arange(start, min(start + chunk, len(x)), device=device)
        cosine = x[row] @ x.T
        cosine.scatter_(1, row[:, None], -2.0)  # itself comes last, and is cut off
        order = cosine.argsort(dim=1, descending=True, stable=True)[:, :-1]
        hit = F.pad((y[order] == y[row, None]).double(), (0, 1))  # a column also for a single image
        relevant = hit.sum(1)
        precision = hit.cumsum(1) / torch.arange(1, len(x) + 1, device=device)
        ap, asks = (precision * hit).sum(1) / relevant.clamp_min(1), relevant > 0
        sums += torch.stack([hit[:, 0], hit[:, :5].amax(1), ap, asks.double()])[:, asks].sum(1).cpu()
    if not sums[3]:
        refuse("no two test images share a class: there is nothing to retrieve")
    return dict(zip(("rank1", "rank5", "map"), (100 * sums[:3] / sums[3]).tolist())) | {"queries": int(sums[3])}

def largest_boxes(mask):
    """Box around the largest connected part (4 neighbours) of each mask, B H W bool -> B 4, x0 y0 x1 y1 in fractions;
    of equal parts the one that ends lower; the whole image where a mask is empty."""
    (b, h, w), inside, device = mask.shape, mask.long(), mask.device
    runs = [(1 - inside).cumsum(2) + (w + 1) * torch.arange(h, device=device)[:, None],
            (1 - inside).cumsum(1) + (h + 1) * torch.arange(w, device=device)]  # a number for each run in row, column
    before, inside, part = None, inside.flatten(1), torch.arange(1, h * w + 1, device=device) * inside.flatten(1)
    while before is None or not torch.equal(part, before):  # the highest number of a part spreads, run by run
        before = part
        for run in runs:
            most = part.new_zeros(b, (h + 1) * (w + 1)).scatter_reduce_(1, run.flatten(1), part, "amax")
            part = most.gather(1, run.flatten(1)) * inside
    cells = part.new_zeros(b, h * w + 1).scatter_add_(1, part, inside)
    part = ((part == h * w - cells.flip(1).argmax(1, keepdim=True)) & (part > 0)).view(b, h, w).byte()
    x, y = part.amax(1), part.amax(2)  # argmax: the first of equals
    ends = [x.argmax(1) / w, y.argmax(1) / h, 1 - x.flip(1).argmax(1) / w, 1 - y.flip(1).argmax(1) / h]
    return torch.stack(ends, 1)

def kmeans(x, k, generator, weight=None, rounds=100, tries=3):
    """Spherical k-means: unit directions k C that make the weighted sum of each row's largest cosine high. x: N C of
    unit length; weight: N, None for all alike. k-means++ starts, `rounds` at most, the best of `tries`."""
    weight, found = torch.ones_like(x[:, 0]) if weight is None else weight.to(x), []
    for _ in tqdm(range(tries), "k-means", leave=False, disable=None):
        c, chance = x[:0], weight
        while len(c) < k:  # drawn on the CPU, so that devices agree
            edges = chance.double().cumsum(0)
            u = torch.rand(1, dtype=torch.float64, generator=generator).to(x.device) * edges[-1]
            c = torch.cat([c, x[torch.searchsorted(edges, u).clamp_max(len(x) - 1)]])
            chance = weight * (1 - (x @ c.T).amax(1)).clamp_min(1e-9)
        owner = None
        for _ in range(rounds):
            before, (cosine, owner) = owner, (x @ c.T).max(1)
            if before is not None and torch.equal(owner, before):
                break
            total = torch.zeros_like(c).index_add_(0, owner, x * weight[:, None])
            c = torch.where(total.norm(dim=1, keepdim=True) > 1e-9, F.normalize(total, dim=1), c)  # empty: stays
        found.append(((weight * cosine).sum().item(), c))
    return max(found, key=lambda pair: pair[0])[1]

LEVELS = [i / 20 for i in range(1, 20)]  # thresholds of a map, for MaxBoxAcc

def localize_scores(s, truth):
    """s: maps B H W, 0..1; truth: for each its true boxes, n 4 in fractions -> counts over the images that have one:
    box right at the map's mean, right at each of LEVELS, peak in a true box, images; and boxes at the mean, B 4."""
    w, counts = s.shape[2], torch.zeros(len(LEVELS) + 3, dtype=torch.long)
    boxes = torch.stack([largest_boxes(s >= t) for t in (s.mean((1, 2), keepdim=True), *LEVELS)], 1).cpu()  # B 20 4
    peak = s.flatten(1).argmax(1).cpu()
    peak = torch.stack([(peak % w + 0.5) / w, (peak // w + 0.5) / s.shape[1]], 1)
    for i in (i for i in range(len(s)) if len(truth[i])):
        within = ((truth[i][:, :2] <= peak[i]) & (peak[i] < truth[i][:, 2:])).all(1).any()
        right = (torchvision.ops.box_iou(boxes[i], truth[i]) >= 0.5).any(1)
        counts += torch.cat([right, torch.stack([within, within | True])])
    return counts, boxes[:, 0]

# -------------------------------------------------------------------------------------------------- processes and views

class Run(NamedTuple):                      # what every protocol is given beside its data
    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype       # of weights and views
    half: torch.dtype        # autocast's; None: off
    scaler: torch.amp.GradScaler
    rank: int
    world: int

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

def share(rows, run):
    """This process's part of `rows`: the parts follow one another and differ in length by at most one."""
    return rows[run.rank * len(rows) // run.world:(run.rank + 1) * len(rows) // run.world]

def collect(x, n, run, chunk=16384):
    """Of n rows each process holds its `share` -> all, in order, on rank 0's CPU; the others get an empty tensor. Only
    `chunk` rows a process travel at a time: ImageNet's features fill no GPU."""
    if run.world == 1:
        return x.cpu()
    found = []
    for start in range(0, -(-n // run.world), chunk):
        found.append([None] * run.world if run.rank == 0 else [])
        dist.gather_object(x[start:start + chunk].cpu().clone(), found[-1] or None)
    return torch.cat([x[:0].cpu(), *(rows for part in zip(*found) for rows in part)])

def cut_mask(mask, box, size, flip=None):
    """The part `box` (B 4, fractions) of masks B 1 S S at size x size pixels, the nearest ones of the canvas, mirrored
    where flip (B) -> B size size int64; None of B 0 S S. box and flip may stay on the CPU."""
    if not mask.shape[1]:
        return None
    step, side = (torch.arange(size) + 0.5) / size, mask.shape[-1]
    x, y = (((box[:, i, None] + step * (box[:, i + 2] - box[:, i])[:, None]) * side).long().clamp(0, side - 1)
            for i in (0, 1))
    x = x if flip is None else torch.where(flip[:, None], x.flip(1), x)
    x, y = upload(torch.stack([x, y]), mask.device)
    return mask.flatten(1).gather(1, (y[:, :, None] * side + x[:, None]).flatten(1)).view(-1, size, size).long()

@torch.no_grad()
def last_maps(run, net, images, rows, desc, whole=False, pick=lambda out: out[-1]):
    """Test views of images[rows] and what `net`, in eval mode, makes of them, batch by batch: the Batch; view B 3 H W
    in [0, 1]; mask B H W int64, None without; pick(net(normalised view)) in full precision, by default the last map
    B C h w. whole: the squeezed whole image instead of the central crop. desc: the progress bar's title."""
    args, size, b = run.args, run.args.image_size, run.args.batch_size // run.world
    loader = sequential(images, rows, batch_size=b, workers=args.workers, device=run.device)
    for batch in tqdm(loader, desc, -(-len(rows) // b), leave=False, disable=run.rank > 0 or None):
        box = center_boxes(batch.size, round(size * 256 / 224), size)
        box = box.new_tensor([0, 0, 1, 1]).expand_as(box) if whole else box
        view = crop(batch.canvas, box, size, dtype=run.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, run.half, enabled=run.half is not None):
            found = full(pick(net(normalize(view))))
        yield batch, view, cut_mask(batch.mask, box, size), found

# ------------------------------------------------------------------------------------ linear, finetune, segment: a head

class Classifier(nn.Module):
    """A backbone under one or several linear heads, which know nothing of one another: a sweep in one pass.
    forward(view B 3 H W) -> a list of logits, B K 1 1 a head, or B K h w (dense). All heads start alike, so that each
    learns what it would learn alone. frozen: the backbone stays in eval mode and gets no gradient."""

    def __init__(self, encoder, classes, heads=1, frozen=True, dense=False, feature_bn=False):
        super().__init__()
        self.encoder, self.frozen, self.dense = encoder.requires_grad_(not frozen), frozen, dense
        self.norm = nn.BatchNorm2d(encoder.channels[-1], affine=False) if feature_bn else nn.Identity()
        head = nn.Conv2d(encoder.channels[-1], classes, 1)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(heads))

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def classify(self, x):
        """Last maps B C h w -> list of logits."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(full(x) if self.dense else full(x).mean((2, 3), keepdim=True))
            return [head(x) for head in self.heads]

    def forward(self, view):
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            x = self.encoder(view)[-1]
        return self.classify(x)

def enlarge(x, size):
    """Maps B K h w -> B K size size."""
    return F.interpolate(x, size=size, mode="bilinear")

@torch.no_grad()
def test_heads(run, model, images, rows):
    """Every head on images[rows] -> a list of {"top1", "top5"} or {"miou", "pixel_accuracy"}, in %."""
    classes = model.heads[0].out_channels
    counts = torch.zeros(len(model.heads), *(classes, classes) if model.dense else (1, 2), device=run.device).long()
    model.eval()
    for batch, _, mask, x in last_maps(run, model.encoder, images, share(rows, run), "testing"):
        for i, logits in enumerate(model.classify(x)):
            if model.dense:
                counts[i] += confusion(enlarge(logits, run.args.image_size).argmax(1), mask, classes)
            else:
                sound = logits.isfinite().flatten(1).all(1, keepdim=True)  # a head that diverged is right nowhere
                hit = (logits.flatten(1).topk(min(5, classes)).indices == batch.label[:, None]) & sound
                counts[i, 0, :2] += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
    model.train()
    counts = gather(counts).sum(0).double().cpu()
    if model.dense:
        return [segment_scores(c) for c in counts]
    return [dict(zip(("top1", "top5")[:1 + (classes > 5)], (100 * c[0] / len(rows)).tolist())) for c in counts]

def train_heads(run, net, data, classes, path):
    """linear, finetune and segment in one loop. data: training images and rows, test images and rows; path: of the
    checkpoint, which is gone on from. -> measures of the best head (and of all), the Classifier, the best one"""
    args, (train, rows, test, asked) = run.args, data
    frozen, dense = args.protocol != "finetune", args.protocol == "segment"
    epoch, total, stretch = run_length(args, len(rows))
    torch.manual_seed(args.seed)
    lrs, step, looks = args.lrs if frozen else [args.head_lr], 0, []
    model = Classifier(net, classes, len(lrs), frozen, dense, args.feature_bn).train()
    sync_batchnorm(model.to(run.device, run.dtype, memory_format=torch.channels_last), run.device)
    groups = [{"params": list(head.parameters()), "peak": lr * (args.batch_size / 256 if frozen else 1)}
              for head, lr in zip(model.heads, lrs)]
    groups += [] if frozen else [{"params": list(model.encoder.parameters()), "peak": args.lr}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    # Heads are float32: scaled or skipped for one that diverges, the others would suffer.
    scaler = torch.amp.GradScaler(run.device.type, enabled=False) if frozen else run.scaler
    parts = {"heads": model.heads, "norm": model.norm, "optimizer": optimizer, "scaler": scaler}
    parts |= {} if frozen else {"encoder": model.encoder}
    if args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # not when torchrun restarts a run
        path.unlink(missing_ok=True)
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, looks = state["step"], state["looks"]
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))
        except Exception:  # noqa: BLE001 -- a damaged file leads to any of them
            refuse(f"{path} cannot be gone on from, nothing in it was run: start over with --fresh")
        if run.rank == 0:
            print(f"goes on from step {step} of {total}: --fresh starts over", file=sys.stderr)
    model.encoder.compile() if args.compile else None
    signals, unreadable, bad_step = heed_signals(), {}, torch.zeros((), dtype=torch.long, device=run.device)
    ends = {total - round(k * epoch * stretch) for k in range(args.median)}  # of the last epochs
    drops = [int(e * epoch * stretch + 1e-6) for e in args.drop_epochs]
    loader = batches(torch.utils.data.Subset(train, rows), batch_size=args.batch_size, seed=args.seed, start=step,
                     stop=total, rank=run.rank, world=run.world, device=run.device, workers=args.workers)
    module = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True) if dist.is_initialized() else model
    bar = tqdm(total=total, initial=step, unit="step", disable=run.rank > 0 or None)
    while step < total or next(loader, None):  # also if all is done it compares what the processes found
        batch = next(loader)
        unreadable |= dict(batch.unreadable)
        u = share(uniforms(args.seed, step, args.batch_size, RRC_COLUMNS + 1), run)
        box, flip = random_boxes(u[:, :RRC_COLUMNS], batch.size, args.crop_area), u[:, RRC_COLUMNS] < 0.5
        view = normalize(crop(batch.canvas, box, args.image_size, flip, dtype=run.dtype))
        target = cut_mask(batch.mask, box, args.image_size, flip) if dense else batch.label
        target = torch.where((0 <= target) & (target < classes), target, -1)
        with torch.autocast(run.device.type, run.half, enabled=run.half is not None):
            logits = module(view.contiguous(memory_format=torch.channels_last))
        logits = [enlarge(x, args.image_size) if dense else x.flatten(1) for x in logits]
        # Averaged over processes this is the mean over the global batch: void pixels differ in number.
        n = gather((target >= 0).sum()).sum().clamp_min(1) / run.world
        losses = torch.stack([F.cross_entropy(x, target, ignore_index=-1, reduction="none").sum() / n for x in logits])
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses.sum()).backward()
        for group in optimizer.param_groups:
            fall = 0.2 ** sum(step >= d for d in drops) if drops else (1 + math.cos(math.pi * step / total)) / 2
            group["lr"] = group["peak"] * fall
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        sound = norm.isfinite() | frozen | (scaler.scale(torch.ones_like(n)) > 1)  # a sweep's losses tell; fp16 halves
        scaler.step(optimizer)
        scaler.update()
        step += 1
        bad_step = torch.where((bad_step == 0) & ~(losses.isfinite().any() & sound), step, bad_step)
        bar.update()
        if step in ends:
            looks.append(test_heads(run, model, test, asked))
        saves = step == total or step % args.save_every == 0
        if not saves and step % args.log_every:
            continue
        stop, _ = agree(signals, bad_step, unreadable, len(rows))
        bar.set_postfix(loss=f"{gather(losses.detach()).mean(0).nan_to_num(math.inf).min().item():.4g}")
        if run.rank == 0 and (saves or stop):
            torch.save({k: v.state_dict() for k, v in parts.items()} | {"step": step, "looks": looks}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        if stop:
            if run.rank == 0:
                print(f"saved at step {step}, the same command goes on from there", file=sys.stderr)
            sys.exit(128 + stop + int(gather(bad_step).sum()))  # which is 0, but waits until rank 0 has saved
    bar.close()
    sweep = [{"lr": lr} | {k: float(np.median([look[i][k] for look in looks])) for k in looks[0][i]}
             for i, lr in enumerate(lrs)]
    best = max(range(len(sweep)), key=lambda i: list(sweep[i].values())[1])  # by top-1 or mIoU
    found = {k: v for k, v in sweep[best].items() if k != "lr"} | {"steps": total, "epochs_tested": len(looks)}
    return found | ({"best_lr": lrs[best], "sweep": sweep} if frozen else {}), model, best

# --------------------------------------------------------------------------------------------- segment, without a label

def cluster(run, net, data, classes):
    """segment --unsupervised: k-means of unit features, 64 cells an image of at most 4,096 training images; a SlotCon
    teacher's prototypes, merged to `classes` groups by k-means, weighted by the cells they win. A test pixel takes the
    highest enlarged cosine. -> measures; for the picture network, pick, and a function of what is picked: classes"""
    (train, rows, test, asked), pick, prototypes, state = data, lambda out: out[-1], None, {}
    with contextlib.suppress(Exception):  # random; a release's file, with more than tensors in it
        state = torch.load(run.args.weights, map_location="cpu", weights_only=True)
    if state.get("method") == "slotcon":
        from slotcon import Branch  # here alone: without such a checkpoint this file needs common.py only
        net = Branch(*(state["shape"][k] for k in ("arch", "prototypes", "dim", "hidden"))).eval()
        net.load_state_dict(state["teacher"])
        net.to(run.device, run.dtype, memory_format=torch.channels_last)
        pick, prototypes = lambda out: out[0], F.normalize(full(net.prototypes.detach()), dim=1)
    generator, cells = seeded(run.args.seed, 12), []
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:4096].sort().values]
    for batch, _, _, x in last_maps(run, net, train, share(rows, run), "cells", pick=pick):
        for i, cell in zip(batch.index.tolist(), F.normalize(x.flatten(2), dim=1).mT.cpu()):  # P C
            cells.append(cell[torch.randperm(len(cell), generator=seeded(run.args.seed, 13, i))[:64]])
    cells, found = collect(torch.stack(cells), len(rows), run).flatten(0, 1).to(run.device), [None] * 3
    if run.rank == 0 and prototypes is None:
        found = [kmeans(cells, classes, generator).cpu(), torch.arange(classes), "k-means"]
    elif run.rank == 0:
        used, group = (cells @ prototypes.T).argmax(1).bincount(minlength=len(prototypes)), range(len(prototypes))
        if len(prototypes) > classes:
            group = (prototypes @ kmeans(prototypes, classes, generator, used + 1e-6).T).argmax(1).tolist()
        found = [prototypes.cpu(), torch.tensor(group), f"{len(used)} prototypes, {(used > 0).sum()} of them in use"]
    dist.broadcast_object_list(found) if run.world > 1 else None
    centers, group, how = found[0].to(run.device), found[1].to(run.device), found[2]

    def segment(x):  # B C h w -> groups, B size size
        scores = torch.einsum("kc,bchw->bkhw", centers, F.normalize(x, dim=1))
        return group[enlarge(scores, run.args.image_size).argmax(1)]
    counts = torch.zeros(min(classes, len(centers)), classes, dtype=torch.long, device=run.device)
    for _, _, mask, x in last_maps(run, net, test, share(asked, run), "testing", pick=pick):
        counts += confusion(segment(x), mask, classes, len(counts))
    named, column = match(gather(counts).sum(0).cpu())
    return segment_scores(named) | {"clusters": how}, net, pick, lambda x: column[segment(x).cpu()]

def count_classes(run, data):
    """1 + the highest class in the masks of all images in use, 255 (void) apart."""
    if data[0].source.scene:
        return SCENE_CLASSES + 1
    most = torch.zeros((), dtype=torch.long, device=run.device)
    for images, rows in (data[:2], data[2:]):
        loader = sequential(images, share(rows, run), batch_size=32, workers=run.args.workers, device=run.device)
        for batch in tqdm(loader, "classes", -(-len(rows) // 32 // run.world), leave=False, disable=run.rank or None):
            most = torch.maximum(most, (batch.mask * (batch.mask != 255)).max())
    most = int(gather(most).max())
    return 1 + most if most else refuse("the masks hold nothing but background: they are no segmentation")

def draw_segments(view, mask, guess, path, show=8):
    """Images, with the truth laid over (void white), with what was said: three rows. mask, guess: B H W."""
    hue = torch.arange(256) * 0.618034 % 1 * 6  # golden ratio: neighbours in number are far apart in hue
    colors = torch.stack([((hue - k) % 6 - 3).abs().sub(1).clamp(0, 1) for k in (0, 2, 4)], 1) * 0.8 + 0.2
    colors[0], colors[255], view = 0, 1, view[:show].cpu().float()
    over = [0.4 * view + 0.6 * colors[x[:show].cpu()].permute(0, 3, 1, 2) for x in (mask, guess)]
    save_image(torch.cat([view, *over]), path, nrow=len(view))

# ------------------------------------------------------------------------------------------------------------- localize

def localize(run, net, images, rows, path, show=8):
    """CorLoc, MaxBoxAcc and how often the peak of the map (channels summed, enlarged, 0..1) lies in a true box, in %.
    Rank 0 draws its first images: map, box (red), true boxes (green)."""
    counts, drawn = torch.zeros(len(LEVELS) + 3, dtype=torch.long), []
    for batch, view, _, x in last_maps(run, net, images, share(rows, run), "boxes", whole=True):
        truth, s = [images.boxes(i) for i in batch.index.tolist()], enlarge(x.sum(1, keepdim=True), view.shape[-1])
        s = s[:, 0] - s[:, 0].amin((1, 2), keepdim=True)
        s = s / s.amax((1, 2), keepdim=True).clamp_min(1e-12)
        found, boxes = localize_scores(s, truth)
        counts += found
        for i in range(min(show - len(drawn), len(s)) if run.rank == 0 else 0):
            image, hot = view[i].cpu().float(), 4 * s[i].cpu().float()
            hot = torch.stack([(1.5 - (hot - c).abs()).clamp(0, 1) for c in (3, 2, 1)])  # blue low, red high
            pair = torch.cat([image, (image + hot) / 2], 1).mul(255).byte()
            for color, b in (("lime", truth[i]), ("red", boxes[i:i + 1])):
                pair = draw_bounding_boxes(pair, b * (view.shape[-1] - 1), colors=color) if len(b) else pair
            drawn.append(pair / 255)
    counts = gather(counts.to(run.device)).sum(0).cpu()
    rates = (100 * counts[:-1].double() / counts[-1]).tolist()
    best = max(range(len(LEVELS)), key=lambda i: rates[1 + i])
    save_image(torch.stack(drawn), path, nrow=len(drawn)) if run.rank == 0 else None
    return {"corloc": rates[0], "maxboxacc": rates[1 + best], "at_threshold": LEVELS[best], "peak_in_box": rates[-1],
            "images_with_boxes": int(counts[-1])} if counts[-1] else refuse("no test image has a true box")

# ---------------------------------------------------------------------------------------------------------- data, main

def few_labels(args, images, rows):
    """The rows that finetune learns from: --label-fraction, as many of each class (fewer where it has not so many), or
    --label-list, images whose name, with or without its folder, stands in the file."""
    if args.label_list:
        wanted, place = set(Path(args.label_list).read_text(errors="surrogateescape").split("\n")) - {""}, {}
        for row in rows if len(images.files) else ():
            parts = os.fsdecode(images.files[row]).split(os.sep)
            for name in ("/".join(parts[-n:]) for n in (1, 2)):
                place[name] = -1 if name in place else row  # a name in several folders is no name
        lost = sorted(name for name in wanted if place.get(name, -1) < 0)
        if lost or not wanted:
            refuse(f"{args.label_list}: {len(lost)} of its {len(wanted)} lines name no or several images: {lost[:1]}")
        return sorted({place[name] for name in wanted})
    n = int(args.label_fraction * len(rows) / len(images.classes) + 0.5) or refuse(
        f"--label-fraction {args.label_fraction} of {len(rows)} images leaves classes empty: raise it")
    order = torch.tensor(rows)[torch.randperm(len(rows), generator=seeded(args.seed, 11))]
    return sorted(row for c in range(len(images.classes)) for row in order[images.labels[order] == c][:n].tolist())

def check_masks(images, rows, part=""):
    """Refuses images without masks, and masks of another size than their image."""
    if not images.has_masks:
        refuse(f"{images.name} has no masks{part}: name their folder by --masks, or lay masks/ beside images/")
    for i in tqdm(rows, "masks", leave=False, disable=os.environ.get("RANK", "0") != "0" or None):
        size = drawn = None
        with contextlib.suppress(Exception):  # unreadable: the loader's; scenes: no files. PNG's own getexif decodes
            image, drawn = (Image.open(os.fsdecode(files[i])) for files in (images.files, images.masks))
            if image.format == "TIFF":  # it is turned by Pillow, by some versions as late as here
                image.load()
            size, drawn = image.size[::-1 if Image.Image.getexif(image).get(0x0112) in range(5, 9) else 1], drawn.size
        if size and drawn != size:
            refuse(f"the mask {os.fsdecode(images.masks[i])} is of {drawn} pixels, its image (EXIF applied) of {size}")

def choose_data(args):
    """-> training images and rows, test images and rows, checked. Without a split a seeded tenth is the test; retrieval
    and localize, which learn nothing, take all."""
    train, val = (open_images(args.data, args.canvas, split, args.masks, args.cache) for split in ("train", "val"))
    learns, world = args.protocol not in ("retrieval", "localize"), int(os.environ.get("WORLD_SIZE", "1"))
    whole = list(range(learns * len(train))), val or train, list(range(len(val or train)))
    split = knn_split(train, val, args.seed, 10 ** 12, 10 ** 12) if learns else whole  # all there are
    rows, test, asked = split if split[1] is whole[1] else whole  # no label in common: masks need none, else refused
    if args.protocol == "segment":
        check_masks(train, rows)
    if args.protocol == "segment" or args.protocol == "localize" and not len(test.corners):
        check_masks(test, asked, " in val/" * (test is not train))
    elif args.protocol != "localize" and (len(test.classes) < 2 or learns and test.classes != train.classes):
        refuse(f"--protocol {args.protocol} needs labels, a sub-folder for each class, the same in train/ and val/, or "
               f"name train/ alone: {train.name} has {len(train.classes)} classes, {len(test.classes)} to test")
    elif learns:
        rows = few_labels(args, train, rows) if args.label_list or args.label_fraction < 1 else rows
        empty = (train.labels[rows].bincount(minlength=len(train.classes)) == 0).nonzero().flatten().tolist()
        if empty:
            refuse(f"{len(empty)} of {len(train.classes)} classes have no training image, such as "
                   f"{train.classes[empty[0]]!r}: add some, or remove the class from all splits")
    if min(len(asked), len(rows) if learns else world) < world or not asked:
        refuse(f"{len(rows)} training, {len(asked)} test images for {world} process(es): start fewer, or add images")
    return train, rows, test, sorted(asked)

def digest(*values):
    """sha256, 16 digits, of tensors and of what JSON can hold."""
    data = (x.contiguous().numpy().tobytes() if torch.is_tensor(x) else json.dumps(x).encode() for x in values)
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]

def table(found):
    """The measures as lines: name and value, then a sweep's rows, the best one marked."""
    sweep = found.get("sweep", [])
    lines = [f"{k:<18}{round(v, 2) if isinstance(v, float) else v}" for k, v in found.items() if k != "sweep"]
    lines += ["".join(f"{k:>16}" for k in row) for row in sweep[:1]]
    return "\n".join(lines + ["".join(f"{v:>16.4g}" for v in row.values())
                              + "   best" * (row["lr"] == found["best_lr"]) for row in sweep])

NOT_COMPARED = ("data", "cache", "masks", "weights", "workers", "out", "fresh", "save_every", "log_every", "device",
                "timeout_minutes", "compile", "deterministic", "preset", "label_list", "init")  # no number hangs on it

def main(args):
    """One evaluation: prints its table and its line of JSON, which OUT/results.jsonl gets. -> that line, on rank 0."""
    started, weights = time.time(), None if args.weights == "random" else load_backbone(args.weights)
    data = choose_data(args)
    device = setup_processes(args.device, args.timeout_minutes)
    run = Run(args, device, *numerics(args.precision, device, args.deterministic), *process())
    torch.manual_seed(args.seed)
    args.arch = args.arch if weights is None else arch_of(weights)
    net = backbone(args.arch).eval()
    net.load_state_dict(weights or net.state_dict())
    identity = {"weights_sha256": digest(*(x for item in sorted(net.state_dict().items()) for x in item)),
                "train": data[0].fingerprint[:16], "test": data[2].fingerprint[:16]}
    settings = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED} | identity | {"rows": digest(data[1])}
    net.to(device, run.dtype, memory_format=torch.channels_last)
    out, name = Path(args.out), f"{args.protocol}-{digest(settings)}"  # other settings have files of their own
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    checkpoint, picture, found = out / f"{name}.pt", out / "pictures" / f"{name}-{Path(args.weights).stem}.png", {}

    if args.protocol == "segment":
        classes, pick = count_classes(run, data), lambda out: out[-1]
        if args.unsupervised:
            found, net, pick, segment = cluster(run, net, data, classes)
        else:
            found, model, best = train_heads(run, net, data, classes, checkpoint)
            model.eval()
            def segment(x):
                return enlarge(model.classify(x)[best], args.image_size).argmax(1)
        found["classes"] = classes
        if run.rank == 0:
            _, view, mask, x = next(last_maps(run, net, data[2], data[3][:8], "picture", pick=pick))
            draw_segments(view, mask, segment(x), picture)
    elif args.protocol in ("linear", "finetune"):
        found, model, _ = train_heads(run, net, data, len(data[0].classes), checkpoint)
        if args.protocol == "finetune" and run.rank == 0:
            save_backbone(out / f"{name}-backbone.pth", model.encoder)
    elif args.protocol == "localize":
        found = localize(run, net, *data[2:], picture)
    else:
        sides = (data[2:], data[:2])[:1 + (args.protocol == "knn")]
        x, y, *bank = [collect(part, len(rows), run) for images, rows in sides for part in features(
            net, images, share(rows, run), size=args.image_size, device=device, batch_size=args.batch_size // run.world,
            workers=args.workers, precision=run.half, desc=None if run.rank else "features")]
        if bank and run.rank == 0:
            votes = knn(*bank, x, k=args.k, temperature=args.temperature, classes=len(data[0].classes), device=device)
            found = {f"top1_k{k}": 100 * (vote == y).double().mean().item() for k, vote in zip(args.k, votes)}
        elif run.rank == 0:
            found = retrieval_scores(x, y, device)
    lost = agree([], 0, {(images.fingerprint, i): "" for images in (data[0], data[2]) for i in images.named}, 1e12)[1]
    if run.rank:
        return None
    line = {"protocol": args.protocol, "weights": args.weights, "arch": args.arch, "data": args.data or "scenes",
            **found, "seed": args.seed, **identity, "training_images": len(data[1]), "test_images": len(data[3]),
            "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)}, "device": device.type,
            "precision": str(run.half or run.dtype)[6:], "processes": run.world,
            "seconds": round(time.time() - started, 1), "unreadable": lost, "settings": settings}
    text = (f"{args.protocol} of {args.weights} ({args.arch}) on {line['data']}, {len(data[1])} images to learn from, "
            f"{len(data[3])} to test\n{table(found)}\n{json.dumps(line)}")  # first, as the disk may be full
    with contextlib.suppress(BrokenPipeError):  # and a path need not be text, nor one for this terminal
        print(text.encode(code := sys.stdout.encoding or "utf-8", "backslashreplace").decode(code), flush=True)
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return line

if __name__ == "__main__":
    run_script(main, parse_args)
