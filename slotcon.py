"""SlotCon: self-supervised visual representation learning with semantic grouping, in one file.

Paper: Wen, Zhao, Zheng, Zhang, Qi, NeurIPS 2022 (arXiv 2205.15288). Numbers and the order of operations are those of
the authors' release (CVMI-Lab/SlotCon), called [release] below with the file that holds them.

The idea. K learned prototypes share out the cells of the feature map: each cell goes, softly, to the prototypes it
resembles; the cells of one prototype in one image, pooled, are a *slot*: an object or a kind of stuff, found without
labels. A teacher, a moving average of the student, does the same on another view. Two things are learned at once: both
views must give the same place to the same prototypes (grouping), and a slot must find itself among all the slots of the
batch (contrast).

  maps         x_v = g(f(view_v)) student, y_v = g'(f'(view_v)) teacher: D x h x w; v = 1, 2; prototypes S, S': K x D
  (1) scores   s_v[k, p] = cos(S_k, x_v[:, p]),   t_v[k, p] = cos(S'_k, y_v[:, p])
  (2) slots    a = softmax over k of s / tau_t, plus 1e-6, scaled to sum 1 over cells; q_v[k] = sum_p a[k, p] x_v[:, p]
               (r_v: the same of t_v, y_v; the student, too, pools at the teacher's temperature)
  (3) group    H(1->2) = - mean over cells of softmax((t~_2 - c) / tau_t) . log softmax(s~_1 / tau_s)
               L_group = H(1->2) + H(2->1);  ~: inverse augmentation, the region that both views show, mirrored back, so
               that cell p is the same place
  (4) contrast C(1->2): cross-entropy of finding r_2[k] by cos(h(q_1[k]), r) / tau_c among the slots r present in the
               teacher's view 2 of all images of all processes, over the k that win a cell in both views
               L_slot = 2 tau_c (C(1->2) + C(2->1))
  (5) total    L = w L_group + (1 - w) L_slot, w = 0.5
  (6) centre   c <- 0.9 c + 0.1 mean of t_1 and t_2 over images and cells, after the loss
  (7) teacher  xi <- m xi + (1 - m) theta before it runs; parameters only: it has its own batch norm, in train mode

Traps of the original, handled here: an image whose views share nothing scores 0 everywhere, as RoIAlign gives, and
counts in the mean; no or one query row, on which batch norm fails, is a zero term; every loss is a mean over the
*global* batch (the release averages each process's own queries); the step counter is in the checkpoint.
Deviations: crops come from a canvas (the whole image resized once to S x S), not the file; blur is a true Gaussian;
the four colour operations come in one order a step and view; bf16 where it is fast, the release fp16 (--precision).

  python slotcon.py                                                    no data: embedded scenes, minutes; see runs/
  python slotcon.py --data /data/coco/train2017                        one GPU, the release's COCO recipe, batch 512
  torchrun --nproc_per_node=8 slotcon.py --data /data/coco/train2017   eight GPUs: the same batch, the same numbers
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 slotcon.py --data ...  two nodes
At the start L_group is 2 ln K (11.09 for K = 256) and L_slot near 4 tau_c ln(number of keys).
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
from torchvision.utils import save_image
from tqdm import tqdm

from common import (  # isort: skip
    ARCHS, PHOTO_COLUMNS, RRC_COLUMNS, agree, backbone, batches, center_views, crop, full, heed_signals, jitter_order,
    knn_probe, knn_split, load_backbone, numerics, open_images, overlap_rectangles, parse_preset,
    photometry, point_matrix, random_boxes, random_boxes_overlapping, refuse, rendezvous, resample, run_length,
    run_script, save_backbone, settings_of, sync_batchnorm, training_arguments, uniforms, upload)

# ------------------------------------------------------------------------------------------------------------ arguments

RELEASE = {"arch": "resnet50", "image_size": 224, "canvas": 512, "batch_size": 512, "optimizer": "lars", "lr": 1.0,
           "final_lr": 1e-6, "weight_decay": 1e-5, "warmup_epochs": 5.0, "prototypes": 256, "dim": 256, "hidden": 4096,
           "crop_area": [0.08, 1.0], "momentum": 0.99, "save_every": 1000, "log_every": 50, "knn_every": 10.0}
PRESETS = {  # [release] scripts/*.sh; the demo takes hue away, or objects of two hues would make slots of two hues
    "demo": {"arch": "small", "image_size": 64, "canvas": 96, "batch_size": 32, "epochs": 3.0, "optimizer": "adamw",
             "lr": 8e-3, "final_lr": 0.0, "weight_decay": 0.01, "warmup_epochs": 0.3, "prototypes": 16, "dim": 128,
             "hidden": 256, "tau_t": 0.05, "tau_c": 0.07, "crop_area": [0.1, 1.0], "blur": 0.6, "momentum": 0.97,
             "jitter": [0.6, 0.4, 0.2, 0.5], "save_every": 400, "log_every": 50, "knn_every": 1.0},
    "coco": RELEASE | {"epochs": 800.0},
    "cocoplus": RELEASE | {"epochs": 800.0},  # on train2017 and unlabeled2017, joined by a comma in --data
    "imagenet-100ep": RELEASE | {"epochs": 100.0, "prototypes": 2048, "canvas": 384},
    "imagenet-200ep": RELEASE | {"epochs": 200.0, "prototypes": 2048, "canvas": 384},
}

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="SlotCon pre-training", allow_abbrev=False)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="", help="nothing or scenes[:N]: embedded scenes; a folder; Name:root; a,b joins")
    g.add_argument("--cache", default="", help="pack the resized images into this file once, then read them from it")
    g.add_argument("--image-size", type=int, help="side of a view in pixels")
    g.add_argument("--canvas", type=int, help="side S of the square each image is resized to; larger: sharper crops")
    g.add_argument("--crop-area", type=float, nargs=2, metavar=("MIN", "MAX"), help="a view's share of the image")
    g.add_argument("--blur", type=float, default=2.0, help="largest sigma in pixels; 2 is meant for 224-pixel views")
    g.add_argument("--workers", type=int, help="decoding processes each; default a process's cores less one, at most 8")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=PRESETS, help="a recipe: demo without data, coco with; any flag beats it")
    g.add_argument("--arch", choices=ARCHS, help="encoder f")
    g.add_argument("--prototypes", type=int, help="K: 256 for COCO's scenes, 2048 for ImageNet's many classes")
    g.add_argument("--dim", type=int, help="D, width of prototypes and slots")
    g.add_argument("--hidden", type=int, help="hidden width of projector g and predictor h")
    g.add_argument("--tau-s", type=float, default=0.1, help="student's temperature in (3)")
    g.add_argument("--tau-t", type=float, default=0.07, help="teacher's in (3), both's in (2); lower: harder slots")
    g.add_argument("--tau-c", type=float, default=0.2, help="temperature of the contrast (4)")
    g.add_argument("--center-momentum", type=float, default=0.9, help="of c in (6), which keeps one k from taking all")
    g.add_argument("--group-weight", type=float, default=0.5, help="w in (5); 1: grouping only, 0: slots only")
    g.add_argument("--momentum", type=float, help="the teacher's m in (7) at the first step; a cosine takes it to 1")
    training_arguments(p)
    args = parse_preset(p, argv, PRESETS, "coco", "slotcon")
    if min(args.prototypes, args.dim, args.hidden, args.tau_s, args.tau_t, args.tau_c) <= 0:
        refuse("--prototypes, --dim, --hidden, --tau-s, --tau-t and --tau-c must be above 0")
    least, most = args.crop_area
    if max(args.group_weight, args.center_momentum, args.momentum) > 1 or not 0 < least <= most <= 1:
        refuse("--group-weight, --center-momentum and --momentum lie in 0..1, 0 < MIN <= MAX <= 1 in --crop-area")
    return args

# ----------------------------------------------------------------------------------------------------------- the method

class Branch(nn.Module):
    """Encoder f, projector g and prototypes S ([release] models/slotcon.py): what student and teacher have in common.
    forward(view B 3 H W) -> x, s: features B D h w, not normalised, and scores B K h w in [-1, 1], equation (1)."""

    def __init__(self, arch, prototypes, dim, hidden):
        super().__init__()
        self.encoder = backbone(arch, zero_init_residual=True)
        self.projector = nn.Sequential(  # biases before batch norm learn nothing; kept: official checkpoints hold them
            nn.Conv2d(self.encoder.channels[-1], hidden, 1), nn.BatchNorm2d(hidden), nn.GELU(),
            nn.Conv2d(hidden, hidden, 1), nn.BatchNorm2d(hidden), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))
        init_head(self.projector)

    def forward(self, view):
        x = self.projector(self.encoder(view)[-1])
        with torch.autocast(view.device.type, enabled=False):
            x = full(x)
            s = torch.einsum("kd,bdhw->bkhw", F.normalize(full(self.prototypes), dim=1), F.normalize(x, dim=1))
        return x, s

def init_head(head):
    """Weights N(0, 0.02), biases 0 ([release] models/slotcon.py); batch norm as the framework has it."""
    for m in head.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(m.bias)

def align(scores, rectangle, flip):
    """Inverse augmentation: the part of the map that both views show, unflipped, on the same h x w grid. scores
    B K h w; rectangle B 4 (x0 y0 x1 y1 in fractions of this view); flip B bool. One bilinear sample a cell, as the
    release's RoIAlign takes; 0 where the views do not meet, as RoIAlign gives."""
    h, w = scores.shape[-2:]
    x0, y0, x1, y1 = rectangle.to(scores.dtype).unbind(1)
    return resample(scores, point_matrix(y0, y1, h, h), point_matrix(x0, x1, w, w, flip))

def grouping_loss(s, t, center, tau_s=0.1, tau_t=0.07):
    """(3), one direction. s, t: aligned scores B K h w of student and teacher; center K. -> mean over B and cells."""
    target = F.softmax((t - center[:, None, None]) / tau_t, dim=1)
    return -(target * F.log_softmax(s / tau_s, dim=1)).sum(1).mean()

def present(scores):
    """Which prototypes win at least one cell: B K h w -> B K bool."""
    winner = scores.flatten(2).argmax(1)  # B P
    return torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, winner, True)

def pool(x, scores, index, tau):
    """(2) for some prototypes an image: x B D h w, scores B K h w, index B M into K -> slots B M D. An image cannot
    hold more prototypes than it has cells: with only those pooled, K = 2048 costs what 256 does."""
    a = F.softmax(scores.flatten(2) / tau, dim=1)  # B K P
    a = a.gather(1, index[:, :, None].expand(-1, -1, a.shape[2])) + 1e-6  # B M P
    return torch.einsum("bmp,bdp->bmd", a / a.sum(2, keepdim=True), x.flatten(2))

def rows(mask, n):
    """Positions of the n true entries of a mask in order, n known: no synchronisation, as nonzero() would need."""
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:n]

class Model(nn.Module):
    """Student, predictor h and centre. The teacher (`make_teacher`) stands outside: DDP wraps this module alone.

    model = Model("resnet50", prototypes=256)
    teacher = model.make_teacher()
    targets = [teacher(v) for v in views]                          # views: two tensors B 3 H W, normalised
    losses = model(views, targets, rectangles, flips)              # rectangles: two B 4, flips: two B bool
    losses["loss"].backward()
    """

    def __init__(self, arch="resnet50", prototypes=256, dim=256, hidden=4096, tau_s=0.1, tau_t=0.07, tau_c=0.2,
                 center_momentum=0.9, group_weight=0.5):
        super().__init__()
        self.tau_s, self.tau_t, self.tau_c = tau_s, tau_t, tau_c
        self.center_momentum, self.group_weight = center_momentum, group_weight
        self.student = Branch(arch, prototypes, dim, hidden)
        self.predictor = nn.Sequential(
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, dim))
        init_head(self.predictor)
        self.register_buffer("center", torch.zeros(prototypes))

    def make_teacher(self):
        """A copy of the student without gradients, in train mode: it normalises with its own batch statistics."""
        return copy.deepcopy(self.student).requires_grad_(False).train()

    def forward(self, views, targets, rectangles, flips):
        """-> dict of scalars: loss (5), loss_group, loss_slot (3, 4) and queries, their number over all processes."""
        (x1, s1), (x2, s2) = self.student(views[0]), self.student(views[1])  # two passes: batch statistics are per view
        (y1, t1), (y2, t2) = targets
        with torch.autocast(x1.device.type, enabled=False):
            s1_, s2_ = align(s1, rectangles[0], flips[0]), align(s2, rectangles[1], flips[1])
            t1_, t2_ = align(t1, rectangles[0], flips[0]), align(t2, rectangles[1], flips[1])
            loss_group = (grouping_loss(s1_, t2_, self.center, self.tau_s, self.tau_t)
                          + grouping_loss(s2_, t1_, self.center, self.tau_s, self.tau_t))
        loss_slot, queries = self.slot_loss([(x1, s1, y2, t2), (x2, s2, y1, t1)])
        self.update_center(t1, t2)
        loss = self.group_weight * loss_group + (1 - self.group_weight) * loss_slot
        return {"loss": loss, "loss_group": loss_group, "loss_slot": loss_slot, "queries": queries}

    def slot_loss(self, directions):
        """(4), both directions: each is student features and scores x, s of one view, teacher's y, t of the other."""
        picked = []
        for x, s, y, t in directions:
            there = present(t)  # B K, the keys
            m = min(there.shape[1], t.shape[2] * t.shape[3])
            index = there.byte().argsort(dim=1, descending=True, stable=True)[:, :m]  # B M, the present ones first
            picked.append((index, there.gather(1, index), (there & present(s)).gather(1, index)))
        counts = gather(torch.stack([mask.sum() for _, keys, queries in picked for mask in (keys, queries)]))
        counts = counts.view(-1, 2, 2).tolist()  # process, direction, (keys, queries): the step's one synchronisation
        rank, world = process()
        total, found = 0.0, 0
        for d, ((x, s, y, t), (index, is_key, is_query)) in enumerate(zip(directions, picked)):
            n_keys, n_queries = [c[d][0] for c in counts], [c[d][1] for c in counts]
            found += sum(n_queries)
            with torch.autocast(x.device.type, enabled=False):
                key = F.normalize(pool(y, t, index, self.tau_t), dim=2).detach()  # B M D
                key = key.flatten(0, 1)[rows(is_key, n_keys[rank])]
                key = gather(F.pad(key, (0, 0, 0, max(n_keys) - len(key))))  # all processes, padded to the fullest
                key = torch.cat([k[:n] for k, n in zip(key, n_keys)])
                chosen = rows(is_query, n_queries[rank])
                query = pool(x, s, index, self.tau_t).flatten(0, 1)[chosen]
                label = sum(n_keys[:rank]) + is_key.flatten().cumsum(0)[chosen] - 1  # place of (b, k) among the keys
            if sum(n_queries) < 2:  # batch norm has nothing to normalise with: a zero that still reaches every weight
                total = total + 0 * (query.sum() + sum(p.sum() for p in self.predictor.parameters()))
                continue
            # where a process has no query, float32 for all: nn.SyncBatchNorm gathers its zeros in the input's type, the
            # others' statistics in float32, and one collective cannot hold both
            half = torch.is_autocast_enabled(x.device.type) and min(n_queries) > 0
            with torch.autocast(x.device.type, enabled=half):
                query = self.predictor(query)
            with torch.autocast(x.device.type, enabled=False):
                logits = F.normalize(full(query), dim=1) @ key.T / self.tau_c
                # sum over own queries / mean number of queries a process: averaged over processes it is the global mean
                total = total + F.cross_entropy(logits, label, reduction="sum") / (sum(n_queries) / world)
        return 2 * self.tau_c * total, torch.full((), float(found), device=x.device)

    @torch.no_grad()
    def update_center(self, t1, t2):
        """(6): the mean is over both views, all cells and all processes, of whole (not aligned) maps."""
        mean = gather((t1.mean((0, 2, 3)) + t2.mean((0, 2, 3))) / 2).mean(0)
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)

@torch.no_grad()
def gauges(targets, center, tau_t):
    """Grouping or collapse, of the teacher: slots a view, |c|, prototypes in use, entropy in nats with the centre after
    the step (ln K: no grouping)."""
    there = torch.cat([present(t) for _, t in targets])
    p = [F.softmax((t - center[:, None, None]) / tau_t, dim=1) for _, t in targets]
    entropy = torch.stack([-(q * q.clamp_min(1e-12).log()).sum(1).mean() for q in p]).mean()
    return {"slots_per_image": gather(there.sum(1).double().mean()).mean(), "center_norm": center.norm(),
            "prototypes_used": gather(there.any(0)).any(0).sum(), "teacher_entropy": gather(entropy).mean()}

def make_views(batch, u, orders, crop_area, image_size, jitter, blur, device, dtype):
    """Two views of each image and what they share ([release] data/transforms.py). batch: common.Batch; u: this
    process's rows of the uniforms; orders: of the colour operations, one a view.
    -> views: two B 3 H W, normalised; rectangles: two B 4, in fractions of each view; flips: two B bool"""
    u = u.split(COLUMNS, dim=1)
    boxes = [random_boxes(u[0], batch.size, crop_area)]
    boxes.append(random_boxes_overlapping(u[1], batch.size, crop_area, boxes[0]))
    flips = [u[2][:, 0] < 0.5, u[2][:, 1] < 0.5]
    rectangles = overlap_rectangles(boxes[0], flips[0], boxes[1], flips[1])
    packed = upload(torch.cat([*boxes, *rectangles, *(f[:, None] for f in flips)], 1).to(dtype), device)  # one copy
    boxes, rectangles, flips = packed[:, :8].split(4, 1), packed[:, 8:16].split(4, 1), packed[:, 16:].bool().unbind(1)
    recipes = {"p_blur": 1.0}, {"p_blur": 0.1, "p_solarize": 0.2}  # BYOL's two sides
    views = [photometry(crop(batch.canvas, box, image_size, flip, dtype=dtype), v, order,
                        jitter=jitter, sigma=(0.1, blur), **recipe)
             for box, flip, v, order, recipe in zip(boxes, flips, u[3:], orders, recipes)]
    return [v.contiguous(memory_format=torch.channels_last) for v in views], rectangles, flips

COLUMNS = [RRC_COLUMNS, 2 * RRC_COLUMNS, 2, PHOTO_COLUMNS, PHOTO_COLUMNS]  # of the uniforms: boxes, flips, photometry

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

def argmax_at(scores, size):
    """The winning slot of each pixel: N K h w -> N size size. An image at a time: K = 2048 at 224 pixels is 0.4 GB."""
    winner = scores.new_empty(len(scores), size, size, dtype=torch.long)
    for s, w in zip(scores.split(1), winner.split(1)):  # in place: results kept between freed maps would scatter memory
        torch.argmax(F.interpolate(s, size=size, mode="bilinear"), 1, out=w)
    return winner

def draw(teacher, images, indices, path, size, show=8, carriers=5):
    """Two pictures. `path`: images, with their slots laid over, slots alone; a prototype's colour never changes. Beside
    it, *-prototypes: for the prototypes most used in `indices`, the images that carry them best by mean cosine over the
    cells (2 or more) they win, the rest faded ([release] viz_slots.py). Maps are enlarged before the argmax: smooth."""
    view, _, scores = center_views(images, indices, size, teacher, lambda out: out[1])  # N 3 H W; N K h w
    k, n = scores.shape[1], min(show, len(view))
    hue = torch.arange(k) * 0.618034 % 1 * 6  # golden ratio: neighbours in number are far apart in hue
    palette = torch.stack([((hue - n) % 6 - 3).abs().sub(1).clamp(0, 1) for n in (0, 2, 4)], 1) * 0.8 + 0.2  # K 3
    color = palette.to(view)[argmax_at(scores[:n], size)].permute(0, 3, 1, 2)
    save_image(torch.cat([view[:n], 0.45 * view[:n] + 0.55 * color, color]), path, nrow=n)
    won = F.one_hot(scores.flatten(2).argmax(1), k).transpose(1, 2).to(scores)  # N K P
    carried = ((won * scores.flatten(2)).sum(2) / won.sum(2).clamp_min(1)).masked_fill(won.sum(2) < 2, -1)  # N K
    tiles = []
    for k in won.sum((0, 2)).argsort(descending=True)[:show]:
        best = carried[:, k].argsort(descending=True)[:carriers]
        tiles.append(torch.where((argmax_at(scores[best], size) == k)[:, None], view[best], 0.25 * view[best] + 0.6))
    path = Path(path).with_name(f"{Path(path).stem}-prototypes.png")
    save_image(torch.stack(tiles).transpose(0, 1).flatten(0, 1), path, nrow=len(tiles))

def majority_miou(segment, truth, void=255):
    """mIoU in % of segments as classes: each segment number is taken for its most frequent class on the first half of
    the images and scored on the second. segment, truth: N H W of whole numbers."""
    segment, truth, half = segment.long(), truth.long(), len(truth) // 2
    known, classes = truth != void, int((truth * (truth != void)).max()) + 1
    pairs = (segment * classes + truth)[:half][known[:half]]
    pairs = pairs.bincount(minlength=(int(segment.max()) + 1) * classes).view(-1, classes)
    guess, truth = pairs.argmax(1)[segment[half:]][known[half:]], truth[half:][known[half:]]
    c = torch.bincount(guess * classes + truth, minlength=classes ** 2).view(classes, classes).double()
    union = c.sum(0) + c.sum(1) - c.diag()
    return 100 * (c.diag() / union)[union > 0].mean().item()

def slot_quality(teacher, images, indices, size):
    """How much of the slots is objects. slot_miou in % (where there are masks): each prototype taken for its most
    frequent class on one half of the images, scored on the other. position_share in %: the variance of the slots' maps
    that position alone explains (over cells, of the mean map / over images and cells). 100: the slots are a layout."""
    _, mask, scores = center_views(images, indices, size, teacher, lambda out: out[1])
    won = F.one_hot(scores.flatten(2).argmax(1), scores.shape[1]).double()  # N P K
    share = won.mean(0).var(0, correction=0).sum() / won.flatten(0, 1).var(0, correction=0).sum().clamp_min(1e-12)
    found = {"position_share": 100 * share.item()}
    return found | ({"slot_miou": majority_miou(argmax_at(scores, size), mask[:, 0])} if mask.shape[1] else {})

# ------------------------------------------------------------------------------------------------------------- the loop

def train(args):
    # data and checkpoint: what can go wrong goes wrong before one process waits for another
    images = open_images(args.data, args.canvas, "train", cache=args.cache)
    split = knn_split(images, open_images(args.data, args.canvas, "val", cache=args.cache), args.seed)
    epoch, total, stretch = run_length(args, len(images))  # in steps; --steps stretches all that is given in epochs
    warmup, knn_every = (int(x * epoch * stretch + 1e-6) for x in (args.warmup_epochs, args.knn_every))
    teacher_steps = int(len(images) / args.batch_size * args.epochs * stretch + 1e-6)  # no whole epochs, as released
    settings = settings_of(args, images)
    out, state = Path(args.out), load_checkpoint(args.out, "slotcon", settings, args.fresh)

    # processes, networks, optimiser
    device = setup_processes(args.device, args.timeout_minutes)
    dtype, half, scaler = numerics(args.precision, device, args.deterministic)
    rank, world = process()
    torch.manual_seed(args.seed)
    shape = {k: settings[k] for k in inspect.signature(Model).parameters}
    model = Model(**shape)
    if args.optimizer == "adamw":  # the same function, but AdamW's step, blind to norms, turns short vectors faster
        model.student.prototypes.data = F.normalize(model.student.prototypes.data, dim=1)
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
    log.say(f"slotcon, preset {args.preset}: {len(images)} images, {total} steps of {args.batch_size} on {world} x "
            f"{device.type}, {str(half or dtype)[6:]}, to {out}"
            + (f"; goes on from step {step}. {state['note']}" if state else ""))
    data = batches(images, batch_size=args.batch_size, seed=args.seed, start=step, stop=total, rank=rank, world=world,
                   workers=args.workers, device=device)
    if step == total and next(data, None) is None:  # its start compares what the processes found
        return log.say("this run is finished, there is nothing to do: --fresh starts over")

    def look(step):  # rank 0 looks at the teacher; the others wait for it at the next collective
        if rank:
            return {}
        where = split[1], split[2][:512]
        draw(teacher, *where, out / "pictures" / f"slots-{step:07d}.png", args.image_size)
        found = knn_probe(teacher.encoder, images, split, args.image_size, device, half, args.workers)
        return found | slot_quality(teacher, *where, args.image_size)
    at_start = {f"{k}_at_start": v for k, v in look(0).items()} if step == 0 else {}
    if args.compile:  # after the first look: its batches would make this process's graphs general ones
        model.student.compile()
        teacher.compile()
    unreadable, bad_step = {}, torch.zeros((), dtype=torch.long, device=device)
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)  # this process's rows
    log.restart()
    while step < total:
        tick = time.perf_counter()
        batch = next(data)
        log.waited += time.perf_counter() - tick
        unreadable |= dict(batch.unreadable)
        peak_lr = args.lr * args.batch_size / 256
        lr = schedule(step, total, peak_lr, args.final_lr, warmup, start=peak_lr / 100)
        momentum = schedule(step, teacher_steps, args.momentum, 1.0)
        u = uniforms(args.seed, step, args.batch_size, sum(COLUMNS))[mine]
        orders = [jitter_order(args.seed, step, view) for view in (0, 1)]
        views, overlaps, flips = make_views(batch, u, orders, args.crop_area, args.image_size, args.jitter,
                                            args.blur, device, dtype)
        ema_update(teacher, model.student, momentum)
        with torch.autocast(device.type, half, enabled=half is not None):
            with torch.no_grad():
                targets = [teacher(view) for view in views]
            losses = run(views, targets, overlaps, flips)
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
        missed = (overlaps[0][:, 2] <= overlaps[0][:, 0]) | (overlaps[0][:, 3] <= overlaps[0][:, 1])
        values = {"step": step, "epoch": step / epoch, **{k: gather(v.detach()).mean() for k, v in losses.items()},
                  "lr": lr, "momentum": momentum, "grad_norm": grad_norm, **gauges(targets, model.center, args.tau_t),
                  "no_overlap": gather(missed.to(dtype)).mean(), "unreadable": lost, **log.rates(device)}
        log.line(values | (at_start if step == 1 else {}) | ({} if not looks or stop and step < total else look(step)))
        if values["slots_per_image"] < 1.05 and args.prototypes > 1:
            log.say("warning: one prototype takes each whole view: lower --lr, raise --tau-t (or maps are too small)")
        if step > total / 4 and values["teacher_entropy"] > 0.98 * math.log(args.prototypes) > 0:
            log.say("warning: all prototypes are alike to the teacher, its entropy is near ln K: lower --tau-t")
        if rank == 0 and (saves or stop):
            state = {"method": "slotcon", "step": step, "settings": settings, "shape": shape}
            save_checkpoint(out, state | {name: part.state_dict() for name, part in parts.items()}, teacher.encoder)
        if stop:
            log.say(f"{signal.Signals(stop).name}: saved at step {step}, the same command goes on from there")
            sys.exit(128 + stop + int(gather(bad_step).sum()))  # which is 0, but waits until rank 0 has saved
    log.say(f"done: {out}/backbone.pth is the teacher's encoder, {out}/pictures shows its slots")

if __name__ == "__main__":
    run_script(train, parse_args)
