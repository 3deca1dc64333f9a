"""SCFS: semantics-consistent feature search for self-supervised visual representation learning, in one file.

Paper: Song, Zhang, Luo, Wang, Xie, ICCV 2023 (arXiv 2212.06486). Numbers and the order of operations are those of the
authors' release (skyoux/scfs), called [release] below.

The idea. DINO makes all crops of an image agree with its two large ones; but a small crop may show the dog and a large
one mostly the lawn, and then agreement teaches nonsense. SCFS adds targets made for each crop: the crop's pooled
feature asks, cell by cell, where the teacher's map of the large crop resembles it; the map, weighted by the answer,
goes through the teacher's head and is what this very crop has to predict. It is done at three depths of the network.

  views        1, 2 large ("global") and K small ("local") ones; F^i, T^i: maps of stage i, student and teacher
  heads        g: DINO's, O prototypes on the pooled last map; h_i: a small one a stage, whose unit vector is the logits
  P_T(z) = softmax((z - c) / tau_t), P_S(z) = softmax(z / tau_s), CE(p, q) = - sum p log q, mean over the batch
  (1) views    L_d = mean of CE(P_T(g_T(a)), P_S(g_S(v))) over a in {1, 2} and all views v but a: 2 (K + 1) terms
  (2) stages   L_i^g = mean of the two CE(P_T(h_i(T^i(a))), P_S(h_i(F^i(b)))), a and b the two global views
  (3) search   q_j = F^i(local j), pooled, no gradient;  A_j(p) = cos(q_j, T^i(1)(p));  M_j(p) = A_j(p) T^i(1)(p)
  (4) targets  L_i^s = mean over j of CE(softmax(h_i(M_j) / tau_t), P_S(h_i(F^i(local j))));  no centre here
  (5) total    L = L_d + sum over i of (L_i^g + L_i^s) / 2
  (6) centres  c <- 0.9 c + 0.1 mean of the teacher's logits of both global views, after the loss; for g and each h_i
  (7) teacher  xi <- m xi + (1 - m) theta after the step; parameters only: it has its own batch norm, in train mode

Traps of the original, handled here: a checkpoint restores all centres; the stop at a loss that is not finite; one map,
in eval mode; all is seeded. Kept, as the published figures come from it: only view 1 is searched (--search-views), its
targets have no centre (--search-center), the gate A is a bare cosine (--gate), each tensor's gradient is clipped alone.
Deviations: crops come from a canvas (the whole image resized once to S x S), not the file; blur is a true Gaussian;
the four colour operations come in one order a step and view; bf16 where it is fast, the release fp16 (--precision).
Controls: --stages '' is DINO; --search off adds (2) alone; --search uniform sets A = 1.

  python scfs.py                                                       no data: embedded scenes, minutes; see runs/
  python scfs.py --data /data/imagenet                                 one GPU, the release's 200 epochs, batch 256
  torchrun --nproc_per_node=8 scfs.py --data /data/imagenet            eight GPUs: the same batch, the same numbers
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 scfs.py --data ...   two nodes
At step 1 loss_view is near 10.4 and a stage's terms 4.7 to 5.8 (no data: 6.4; 4.6 to 4.8). That the former rises to
ln O = 11.1 while the centre arrives, and all of them with tau_t, is no divergence.
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
    knn_probe, knn_split, load_backbone, normalize, numerics, open_images, parse_preset, photometry, random_boxes,
    refuse, rendezvous, run_length, run_script, save_backbone, settings_of, sync_batchnorm, training_arguments,
    uniforms)

# ------------------------------------------------------------------------------------------------------------ arguments

RELEASE = {"arch": "resnet50", "image_size": 224, "local_size": 96, "canvas": 384, "local_crops": 8, "batch_size": 256,
           "optimizer": "sgd", "lr": 0.1, "final_lr": 0.0048, "weight_decay": 1e-4, "warmup_epochs": 10.0,
           "crop_area": [0.25, 1.0], "local_area": [0.05, 0.25], "out_dim": 65536, "hidden": 2048, "dim": 256,
           "head_norm": False, "tau_t": [0.04, 0.07], "tau_t_epochs": 50, "momentum": 0.996, "freeze_epochs": 1.0,
           "save_every": 1000, "log_every": 50, "knn_every": 10.0}
PRESETS = {  # the demo ends long before the step at which the release sets the prototypes free, 5,004
    "demo": {"arch": "small", "image_size": 64, "local_size": 32, "canvas": 96, "local_crops": 2, "batch_size": 32,
             "epochs": 3.0, "optimizer": "adamw", "lr": 8e-3, "final_lr": 0.0, "weight_decay": 0.01,
             "warmup_epochs": 0.3, "crop_area": [0.3, 1.0], "local_area": [0.08, 0.3], "blur": 0.57, "out_dim": 512,
             "jitter": [0.6, 0.4, 0.2, 0.5], "hidden": 256, "dim": 64, "head_norm": True, "tau_t": [0.025, 0.025],
             "tau_t_epochs": 0, "momentum": 0.996, "freeze_epochs": 3.0, "save_every": 400, "log_every": 50,
             "knn_every": 1.0},
    "imagenet-200ep": RELEASE | {"epochs": 200.0},  # [release] README
    "imagenet-800ep": RELEASE | {"epochs": 800.0, "batch_size": 1024},  # choice: all but these and lr 0.1, as 200ep
    "coco": RELEASE | {"epochs": 200.0, "canvas": 512, "lr": 0.3},  # choice: lr, epochs, batch, canvas
}

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="SCFS pre-training", allow_abbrev=False)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="", help="nothing or scenes[:N]: embedded scenes; a folder; Name:root; a,b joins")
    g.add_argument("--cache", default="", help="pack the resized images into this file once, then read them from it")
    g.add_argument("--image-size", type=int, help="side of a global view in pixels")
    g.add_argument("--local-size", type=int, help="side of a local view")
    g.add_argument("--canvas", type=int, help="side S of the square each image is resized to; larger: sharper crops")
    g.add_argument("--crop-area", type=float, nargs=2, metavar=("MIN", "MAX"), help="a global view's share of the area")
    g.add_argument("--local-area", type=float, nargs=2, metavar=("MIN", "MAX"), help="a local view's")
    g.add_argument("--local-crops", type=int, help="K, local views an image")
    g.add_argument("--blur", type=float, default=2.0, help="largest sigma in pixels; 2 is meant for 224-pixel views")
    g.add_argument("--workers", type=int, help="decoding processes each; default a process's cores less one, at most 8")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=PRESETS, help="a recipe: demo, with data imagenet-200ep; any flag beats it")
    g.add_argument("--arch", choices=ARCHS, help="encoder")
    g.add_argument("--stages", default="2,3,4", help="which i in (2) to (5), of 1,2,3,4; '': plain DINO")
    g.add_argument("--search", choices=("on", "off", "uniform"), default="on", help="off: no (4); uniform: A = 1")
    g.add_argument("--search-views", choices=("first", "both"), default="first", help="global views searched in (3)")
    g.add_argument("--search-center", action="store_true", help="take h_i's centre off the targets of (4), too")
    g.add_argument("--gate", choices=("cosine", "softmax"), default="cosine", help="A; softmax: of cosine / 0.1")
    g.add_argument("--out-dim", type=int, help="O, prototypes of g")
    g.add_argument("--hidden", type=int, help="hidden width of the MLPs in g and h")
    g.add_argument("--dim", type=int, help="D, width before the prototypes of g, in and after the h")
    g.add_argument("--head-norm", action=argparse.BooleanOptionalAction, help="batch norm in the MLP of g")
    g.add_argument("--tau-s", type=float, default=0.1, help="student's temperature")
    g.add_argument("--tau-t", type=float, nargs=2, metavar=("START", "END"), help="teacher's; lower: sharper targets")
    g.add_argument("--tau-t-epochs", type=int, help="epochs from START to END, stepped once an epoch")
    g.add_argument("--center-momentum", type=float, default=0.9, help="in (6), so that no output takes all")
    g.add_argument("--freeze-epochs", type=float, help="epochs in which the prototypes of g stand still")
    g.add_argument("--clip", type=float, default=3.0, help="largest norm of each tensor's own gradient; 0: off")
    g.add_argument("--momentum", type=float, help="the teacher's m in (7) at the first step; a cosine takes it to 1")
    training_arguments(p)
    args = parse_preset(p, argv, PRESETS, "imagenet-200ep", "scfs")
    if min(args.local_size, args.local_crops, args.out_dim, args.hidden, args.dim, args.tau_s, *args.tau_t) <= 0:
        refuse("--local-size, --local-crops, --out-dim, --hidden, --dim, --tau-s and --tau-t must be above 0")
    fits = all(0 < least <= most <= 1 for least, most in (args.crop_area, args.local_area))
    if max(args.center_momentum, args.momentum) > 1 or not fits:
        refuse("--center-momentum and --momentum lie in 0..1, 0 < MIN <= MAX <= 1 in --crop-area and --local-area")
    if args.stages and not {*args.stages.split(",")} <= {*"1234"}:
        refuse(f"--stages {args.stages}: name some of 1,2,3,4 with commas between, as in 2,3,4")
    if not args.tau_t_epochs and args.tau_t[0] != args.tau_t[1]:
        refuse("--tau-t START has nothing to do with --tau-t-epochs 0: give END twice, or epochs to get there")
    args.stages = sorted({int(i) for i in args.stages if i != ","})
    searches = args.search if args.stages else "off"
    if searches != "on" and args.gate != "cosine":
        refuse("--gate has nothing to do: it is how a search looks, --search on with some --stages")
    if searches == "off" and (args.search_center or args.search_views == "both"):
        refuse("--search-center and --search-views have nothing to do without (4): --search on, some --stages")
    return args

# ----------------------------------------------------------------------------------------------------------- the method

class ViewHead(nn.Module):
    """g, DINO's head: pooled features N C -> logits N O, cosines with O prototypes: a layer with weight normalisation
    whose magnitudes stay 1 needs only the directions."""

    def __init__(self, channels, hidden, dim, out_dim, norm=False):
        super().__init__()
        norm = nn.BatchNorm1d if norm else nn.Identity
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), norm(hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), norm(hidden), nn.GELU(), nn.Linear(hidden, dim))
        for linear in self.mlp[::3]:
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(linear.bias)
        self.prototypes = nn.Linear(dim, out_dim, bias=False)  # the framework's own initialisation

    def forward(self, x):
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(full(x), dim=1), F.normalize(full(self.prototypes.weight), dim=1))

class StageHead(nn.Module):
    """h_i: a map N C h w of any size -> code N D of length 1. One residual bottleneck, pooling, two linear layers."""

    def __init__(self, channels, hidden, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True),
            nn.Conv2d(dim, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.mlp = nn.Sequential(  # biases before batch norm learn nothing; kept: the release has them
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, dim), nn.BatchNorm1d(dim))

    def forward(self, x):
        x = self.mlp(full(F.relu(x + self.block(x))).mean((2, 3)))
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(full(x), dim=1)

class Branch(nn.Module):
    """Encoder and heads: what student and teacher have in common.
    forward(views N 3 H W) -> logits N O of g, codes S x (N D) of the S stage heads, maps 4 x (N C_i h_i w_i)."""

    def __init__(self, arch, stages, out_dim, hidden, dim, head_norm):
        super().__init__()
        self.stages, self.encoder = stages, backbone(arch)
        channels = self.encoder.channels
        self.view_head = ViewHead(channels[-1], hidden, dim, out_dim, head_norm)
        self.stage_heads = nn.ModuleList([StageHead(channels[i - 1], hidden, dim) for i in stages])

    def forward(self, views):
        maps = self.encoder(views)
        codes = [head(maps[i - 1]) for head, i in zip(self.stage_heads, self.stages)]
        return self.view_head(full(maps[-1]).mean((2, 3))), codes, maps

def search(crops, keys, kind="cosine", tau=0.1):
    """(3): where in the teacher's maps is what a crop shows? crops: the student's maps K B C h' w' of K local views;
    keys: the teacher's V B C h w of V global views -> A: V K B h w, no gradient. cosine: in [0, 1], maps come from a
    ReLU; uniform: 1; softmax: of cosine / tau over cells, times their number: mean 1, too (choice: all of it)."""
    query = F.normalize(full(crops.detach()).mean((3, 4)), dim=2)  # K B C
    cosine = torch.einsum("kbc,vbchw->vkbhw", query, F.normalize(full(keys), dim=2))
    if kind == "softmax":
        return F.softmax(cosine.flatten(3) / tau, dim=3).view_as(cosine) * cosine[0, 0, 0].numel()
    return cosine if kind == "cosine" else torch.ones_like(cosine)

def cross_entropy(p, z, tau_s=0.1):
    """CE(p, P_S(z)): p and z ... O, p broadcast over z -> mean over all rows."""
    return -(p * F.log_softmax(z / tau_s, dim=-1)).sum(-1).mean()

def view_loss(p, z_global, z_local, tau_s=0.1):
    """(1). p: the teacher's 2B O, both global views; z: the student's logits 2B O and KB O, crop after crop. CE is
    linear in p: a local view meets the mean of both targets at once."""
    b, k = len(p) // 2, 2 * len(z_local) // len(p)
    across = cross_entropy(p.roll(b, 0), z_global, tau_s)  # mean of 2 terms, the other global view's target
    inside = cross_entropy((p[:b] + p[b:]) / 2, z_local.unflatten(0, (k, b)), tau_s)  # mean of 2K terms
    return (across + k * inside) / (1 + k)

class Model(nn.Module):
    """Student and centres. The teacher (`make_teacher`) stands outside: DDP wraps this module alone.

    model = Model("resnet50")
    teacher = model.make_teacher()
    targets = teacher(views[0])                                 # views: 2B 3 224 224 and KB 3 96 96, view after view
    losses = model(views, targets, teacher.stage_heads, tau_t=0.04)
    losses["loss"].backward()
    """

    def __init__(self, arch="resnet50", stages=(2, 3, 4), search="on", search_views="first", gate="cosine",
                 out_dim=65536, hidden=2048, dim=256, head_norm=False, tau_s=0.1, center_momentum=0.9,
                 search_center=False):
        super().__init__()
        self.stages, self.searches, self.searched = tuple(stages), search != "off", 1 + (search_views == "both")
        self.gate = "uniform" if search == "uniform" else gate
        self.tau_s, self.center_momentum, self.search_center = tau_s, center_momentum, search_center
        self.student = Branch(arch, self.stages, out_dim, hidden, dim, head_norm)
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("stage_centers", torch.zeros(len(self.stages), dim))

    def make_teacher(self):
        """A copy of the student without gradients, in train mode: it normalises with its own batch statistics."""
        return copy.deepcopy(self.student).requires_grad_(False).train()

    def forward(self, views, targets, heads, tau_t):
        """targets: the teacher's output on views[0]; heads: its stage heads -> dict of scalars: loss (5), its terms
        loss_view (1), loss_global<i> (2), loss_search<i> (4), and gauges without gradient, explained at `gauges`."""
        z_global, c_global, _ = self.student(views[0])  # two passes: batch statistics are apart for the two sizes
        z_local, c_local, f_local = self.student(views[1])
        (t_global, t_codes, t_maps), b = targets, len(views[0]) // 2
        searched = [self.search_targets(f_local[i - 1], t_maps[i - 1], head, b)
                    for i, head in zip(self.stages, heads) if self.searches]
        with torch.autocast(t_global.device.type, enabled=False):
            p = F.softmax((t_global.detach() - self.center) / tau_t, dim=1)  # 2B O
            entropy = torch.special.entr(p).sum(1).mean()
            found = {"loss_view": view_loss(p, z_global, z_local, self.tau_s)}
            for n, i in enumerate(self.stages):
                p = F.softmax((t_codes[n].detach() - self.stage_centers[n]) / tau_t, dim=1)  # 2B D
                found[f"loss_global{i}"] = cross_entropy(p.roll(b, 0), c_global[n], self.tau_s)
            for i, code, (y, gate), center in zip(self.stages, c_local, searched, self.stage_centers):
                y = y - center if self.search_center else y
                p = F.softmax(y / tau_t, dim=3).mean(0)  # K B D, the mean over the views searched
                found[f"loss_search{i}"] = cross_entropy(p, code.view_as(p), self.tau_s)
            loss = found["loss_view"] + sum(term for name, term in found.items() if name != "loss_view") / 2
            for i, (y, gate) in zip(self.stages, searched):
                found |= {f"gate_mean{i}": gate.mean(), f"gate_spread{i}": gate.flatten(3).std(3, correction=0).mean()}
        self.update_centers(t_global, t_codes)
        return {"loss": loss, **found, "teacher_entropy": entropy, "kl": found["loss_view"].detach() - entropy}

    @torch.no_grad()
    def search_targets(self, crops, keys, head, b):
        """(3) and y = h_i(M) for all crops at once -> y V K B D, gate V K B h w. M, V K B maps of C h w in the maps'
        own precision, is large: for B = 32, K = 8 and stage 2 of ResNet-50 at 224 pixels 8 x 32 x 512 x 28 x 28 x 2
        bytes = 206 MB; without a gradient, freed before the next stage."""
        keys = keys.unflatten(0, (2, b))[:self.searched]  # V B C h w
        with torch.autocast(crops.device.type, enabled=False):
            gate = search(crops.unflatten(0, (-1, b)), keys, self.gate).contiguous()  # or m.flatten would copy M
        m = gate.to(keys.dtype)[:, :, :, None] * keys[:, None]  # V K B C h w
        return head(m.flatten(0, 2)).unflatten(0, gate.shape[:3]), gate

    @torch.no_grad()
    def update_centers(self, logits, codes):
        """(6): the mean is over both global views of all processes; searched targets never enter."""
        for center, z in zip((self.center, *self.stage_centers), (logits, *codes)):
            center.lerp_(gather(z.mean(0)).mean(0).to(center), 1 - self.center_momentum)

@torch.no_grad()
def gauges(targets, center, tau_t):
    """Learning or collapse. information, in nats, at most ln 2B: what the teacher's output tells of the view, 0 when
    all get the same one (the centre is that after the step); feature_spread: of its pooled features at length 1, from 0
    (all the same) to 1; center_norm: |c|. From Model, with the centre before: teacher_entropy of P_T, at most ln O, and
    kl of P_T and P_S; gate_mean<i> and gate_spread<i>, A's mean and deviation over a map's cells (0: no search)."""
    x = gather(F.normalize(full(targets[2][-1]).mean((2, 3)), dim=1)).flatten(0, 1)  # 2B C
    p = gather(F.softmax((targets[0] - center) / tau_t, dim=1)).flatten(0, 1)  # 2B O
    return {"information": torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean(),
            "feature_spread": (x - x.mean(0)).square().sum(1).mean().sqrt(), "center_norm": center.norm()}

@torch.no_grad()
def clip_each(params, most):
    """DINO's clipping: each gradient on its own to the norm `most`, in place, without a synchronisation. 0: none."""
    grads = [p.grad for p in params if p.grad is not None]
    if most:
        factor = (most / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, list(factor.unbind()))

def make_views(batch, u, orders, args, dtype):
    """Two global and K local views of each image. batch: common.Batch; u: this process's rows of the uniforms; orders:
    of the colour operations, one a view -> [2B 3 H W, KB 3 h w], view after view, normalised"""
    kinds = [(args.image_size, args.crop_area, r) for r in ({"p_blur": 1.0}, {"p_blur": 0.1, "p_solarize": 0.2})]
    kinds += [(args.local_size, args.local_area, {"p_blur": 0.5})] * args.local_crops
    views = []
    for (size, area, recipe), order, columns in zip(kinds, orders, u.split(VIEW_COLUMNS, 1)):
        where, flip, photo = columns.split((RRC_COLUMNS, 1, PHOTO_COLUMNS), 1)
        view = crop(batch.canvas, random_boxes(where, batch.size, area), size, flip[:, 0] < 0.5, dtype=dtype)
        views.append(photometry(view, photo, order, jitter=args.jitter, sigma=(0.1, args.blur), **recipe))
    return [torch.cat(v).contiguous(memory_format=torch.channels_last) for v in (views[:2], views[2:])]

VIEW_COLUMNS = RRC_COLUMNS + 1 + PHOTO_COLUMNS  # of the uniforms: box, flip, photometry

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
def draw(model, teacher, images, indices, path, size, local_size, local_area, show=6, crops=2):
    """A column for each of some local crops: the image with the crop's outline, the crop and, a row for each stage, the
    image lit where the search looks for it (with --search off, would look); dark to light is the stage's smallest to
    largest A in this picture."""
    view, _, _ = center_views(images, indices[:show], size, teacher.encoder, lambda maps: maps[-1])
    view = view.repeat_interleave(crops, 0)  # N 3 H W
    box = random_boxes(uniforms(0, 0, len(view), RRC_COLUMNS), torch.full((len(view), 2), size), local_area)
    local, weight = crop(view, box, local_size), next(teacher.parameters())
    maps = [copy.deepcopy(net.encoder).eval()(normalize(x.to(weight)))  # copies: no batch norm learns from a picture
            for net, x in ((model.student, local), (teacher, view))]
    x0, y0, x1, y1 = box[:, :, None, None].unbind(1)
    x = (torch.arange(size) + 0.5) / size
    inside = torch.minimum(torch.minimum(x - x0, x1 - x), torch.minimum(x[:, None] - y0, y1 - x[:, None]))  # N H W
    outline = ((0 < inside) & (inside < 1.5 / size))[:, None]
    rows = [torch.where(outline, view.new_tensor([1.0, 0.1, 0.1])[:, None, None], view), F.interpolate(local, size)]
    for i in model.stages:
        gate = search(maps[0][i - 1][None], maps[1][i - 1][None], model.gate)[0, 0].cpu()  # N h w
        light = (gate - gate.min()) / (gate.max() - gate.min()).clamp_min(1e-6) if model.gate != "uniform" else gate
        rows.append(view * (0.1 + 0.9 * F.interpolate(light[:, None], size=size, mode="bilinear")))
    save_image(torch.cat(rows), path, nrow=len(view))

# ------------------------------------------------------------------------------------------------------------- the loop

def train(args):
    # data and checkpoint: what can go wrong goes wrong before one process waits for another
    images = open_images(args.data, args.canvas, "train", cache=args.cache)
    split = knn_split(images, open_images(args.data, args.canvas, "val", cache=args.cache), args.seed)
    epoch, total, stretch = run_length(args, len(images))  # in steps; --steps stretches all that is given in epochs
    warmup, knn_every = (int(x * epoch * stretch + 1e-6) for x in (args.warmup_epochs, args.knn_every))
    frozen = int(args.freeze_epochs * epoch * stretch + 1e-6)
    settings = settings_of(args, images)
    out, state = Path(args.out), load_checkpoint(args.out, "scfs", settings, args.fresh)

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
    log.say(f"scfs, preset {args.preset}: {len(images)} images, {total} steps of {args.batch_size} on {world} x "
            f"{device.type}, {str(half or dtype)[6:]}, to {out}"
            + (f"; goes on from step {step}. {state['note']}" if state else ""))
    data = batches(images, batch_size=args.batch_size, seed=args.seed, start=step, stop=total, rank=rank, world=world,
                   workers=args.workers, device=device)
    if step == total and next(data, None) is None:  # its start compares what the processes found
        return log.say("this run is finished, there is nothing to do: --fresh starts over")

    def look(step):  # rank 0 looks at the teacher; the others wait for it at the next collective
        if rank:
            return {}
        path = out / "pictures" / f"search-{step:07d}.png"
        draw(model, teacher, split[1], split[2], path, args.image_size, args.local_size, args.local_area)
        return knn_probe(teacher.encoder, images, split, args.image_size, device, half, args.workers)
    at_start = {f"{k}_at_start": v for k, v in look(0).items()} if step == 0 else {}
    if args.compile:  # after the first look: its batches would make this process's graphs general ones
        for net in (model.student, teacher, *teacher.stage_heads):
            net.compile(dynamic=False)  # two sizes of views, a graph for each
    unreadable, bad_step = {}, torch.zeros((), dtype=torch.long, device=device)
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)  # this process's rows
    log.restart()
    while step < total:
        tick = time.perf_counter()
        batch = next(data)
        log.waited += time.perf_counter() - tick
        unreadable |= dict(batch.unreadable)
        peak_lr = args.lr * args.batch_size / 256
        lr = schedule(step, total, peak_lr, args.final_lr, warmup, reach=warmup - 1)  # both ends included
        momentum = schedule(step, total, args.momentum, 1.0)
        stage, rise = int(step / (epoch * stretch) + 1e-6), args.tau_t_epochs  # stepped: constant within an epoch
        tau_t = schedule(stage, rise + 1, args.tau_t[1], args.tau_t[1], rise, args.tau_t[0], rise - 1)
        u = uniforms(args.seed, step, args.batch_size, VIEW_COLUMNS * (2 + args.local_crops))[mine]
        orders = [jitter_order(args.seed, step, view) for view in range(2 + args.local_crops)]
        views = make_views(batch, u, orders, args, dtype)
        with torch.autocast(device.type, half, enabled=half is not None):
            with torch.no_grad():
                targets = teacher(views[0])
            losses = run(views, targets, teacher.stage_heads, tau_t)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        finite = losses["loss"].isfinite() & (grad_norm.isfinite() | (scaler.scale(torch.ones_like(grad_norm)) > 1))
        bad_step = torch.where((bad_step == 0) & ~finite, step + 1, bad_step)  # fp16: a scale above 1 is halved instead
        clip_each(model.parameters(), args.clip)
        if step < frozen:  # no gradient: no weight decay and no momentum either
            model.student.view_head.prototypes.weight.grad = None
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        ema_update(teacher, model.student, momentum)
        step, log.images = step + 1, log.images + args.batch_size
        log.bar.update()
        looks, saves = (step == total or every and step % every == 0 for every in (knn_every, args.save_every))
        if not (looks or saves or step == 1 or step % args.log_every == 0):
            continue
        stop, lost = agree(signals, bad_step, unreadable, len(images))
        values = {"step": step, "epoch": step / epoch, **{k: gather(v.detach()).mean() for k, v in losses.items()},
                  "lr": lr, "momentum": momentum, "grad_norm": grad_norm, **gauges(targets, model.center, tau_t),
                  "tau_t": tau_t, "frozen": int(step <= frozen), "unreadable": lost, **log.rates(device)}
        log.line(values | (at_start if step == 1 else {}) | ({} if not looks or stop and step < total else look(step)))
        constant = [i for i in args.stages if values.get(f"gate_spread{i}", 1) < 0.02 * values.get(f"gate_mean{i}", 0)]
        if constant and args.search == "on":
            log.say(f"warning: the gate of stages {constant} is nearly constant: the search does nothing there")
        if step > total / 10 and min(values["information"], values["feature_spread"]) < 0.05:
            log.say("warning: all images get nearly the same output: lower --tau-t or --lr, or give --head-norm")
        if rank == 0 and (saves or stop):
            state = {"method": "scfs", "step": step, "settings": settings, "shape": shape}
            save_checkpoint(out, state | {name: part.state_dict() for name, part in parts.items()}, teacher.encoder)
        if stop:
            log.say(f"{signal.Signals(stop).name}: saved at step {step}, the same command goes on from there")
            sys.exit(128 + stop + int(gather(bad_step).sum()))  # which is 0, but waits until rank 0 has saved
    log.say(f"done: {out}/backbone.pth is the teacher's encoder, {out}/pictures where it looks")

if __name__ == "__main__":
    run_script(train, parse_args)
