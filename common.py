"""Data and backbones: what the method scripts share.

From top to bottom: the embedded scenes; images of any source as square uint8 canvases, their order and their loading;
boxes, crops and photometry on the device; networks and batch norm over processes; weights, features and kNN; what the
command lines have in common. Functions stand alone, tensors in, tensors out. What a user can mend is a UserError.
"""
import argparse
import contextlib
import difflib
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import mmap
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm

SCENE_CLASSES, REACH = 12, 1.7              # the bank of objects spans [-REACH, REACH] object radii
# What tells images apart most easily is what is learned. So all grounds are patchworks of the same five pale materials
# (dark and light end), lit from any side, and an image's objects are of one class, each of its own size and shade.
MATERIALS = np.array([[106, 121, 101, 139, 150, 118], [152, 140, 121, 171, 163, 145], [101, 123, 135, 135, 153, 159],
                      [113, 115, 118, 149, 149, 149], [159, 152, 146, 142, 113, 107]]).reshape(5, 2, 3, 1, 1) / 255
# Base and light end. In `scenes` the first six classes have one hue, the others another; the fish have the third.
HUES = torch.tensor([[204, 66, 58, 250, 200, 176], [22, 112, 122, 156, 220, 204],
                     [214, 104, 48, 252, 216, 160]]).view(3, 2, 3, 1, 1) / 255

def hash_uniforms(indices, columns, stream):
    """Counter-based uniforms, float64 (columns, n) in [0, 1): SplitMix64's finaliser over (stream, index, column)."""
    x = np.asarray(indices, np.uint64) * np.uint64(1024) + np.arange(columns, dtype=np.uint64)[:, None]
    x = (x + np.uint64(1 + (stream << 59))) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53

def smooth_noise(stream, size, width, height):
    """White noise under a Gaussian filter, of unit deviation, (size, size); width and height in pixels."""
    white = np.fft.rfft2(hash_uniforms(np.arange(size), size, stream) - 0.5)
    fy, fx = np.fft.fftfreq(size)[:, None] * height, np.fft.rfftfreq(size) * width
    tile = np.fft.irfft2(white * np.exp(-20 * (fx ** 2 + fy ** 2)))
    return (tile - tile.mean()) / tile.std()

@functools.cache
def material_bank(size=192):
    """Five patchworks of grass, sand, water, cobbles and bricks. float32 (5, 3, size, size) in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    noise, shades = functools.partial(smooth_noise, size=size), hash_uniforms(np.arange(100), 3, 9)
    grain, cloud = noise(2, width=1, height=1), noise(3, width=24, height=24)
    stones = (np.mgrid[:9, :9].reshape(2, 81) + 0.8 * shades[:2, :81]) / 8.4
    near = np.hypot(y[..., None] - stones[0], x[..., None] - stones[1])
    (first, second), row = np.sort(near)[..., :2].transpose(2, 0, 1), np.floor(y * 10)
    along = x * 5 + row % 2 / 2
    joint = np.minimum(0.5 - np.abs(y * 10 % 1 - 0.5), 1 - 2 * np.abs(along % 1 - 0.5))
    tone = np.stack([
        0.5 + 0.2 * noise(4, width=2, height=9) + 0.12 * cloud,
        0.55 + 0.25 * np.sin(2 * np.pi * (9 * y + 0.25 * noise(5, width=20, height=14))) + 0.1 * grain,
        0.95 - 0.5 * np.abs(noise(6, width=14, height=7)) - 0.12 * cloud,
        np.clip((second - first) * 26, 0, 1) * (0.75 + 0.1 * cloud) + 0.07 * grain,
        np.clip(joint * 9 - 0.7, 0, 1) * (0.6 + 0.4 * shades[2, (row * 7 + along).astype(int)] + 0.07 * grain)])
    bank = MATERIALS[:, 0] + tone.clip(0, 1)[:, None] * (MATERIALS[:, 1] - MATERIALS[:, 0])
    hard = near.argmin(-1) * 3 % 5 == np.arange(5)[:, None, None]
    soft = sum(np.roll(hard, (i, j), (1, 2)) for i in (0, 1, 2) for j in (0, 1, 2)) / 9
    return torch.from_numpy(np.stack([sum(bank[(k + m) % 5] * soft[m] for m in range(5)) for k in range(5)])).float()

def polygon_distance(points, x, y):
    """Signed distance of (x, y) to the polygon of complex vertices `points`, negative inside."""
    p, edge = (x + 1j * y)[..., None] - points, np.roll(points, -1) - points
    nearest = p - edge * np.clip((p * edge.conj()).real / np.abs(edge) ** 2, 0, 1)
    crossed = ((p.imag < 0) != (p.imag < edge.imag)) & ((p * edge.conj()).imag * edge.imag > 0)
    return np.abs(nearest).min(-1) * (1 - 2 * (crossed.sum(-1) % 2))

@functools.cache
def object_bank(fine, size=128):
    """float32 (SCENE_CLASSES, 2, size, size): signed distance in object radii; tone, 0 base, 1 light, < 0 dark."""
    y, x = (np.mgrid[:size, :size] + 0.5) * 2 * REACH / size - REACH
    tau, circle = 2 * np.pi, np.exp(2j * np.pi * np.arange(120) / 120) * -1j           # from the top on
    if fine:                                # one fish: its marking and back fin (3) and its tail (4) make the class
        x = x - 0.3
        trunk = polygon_distance(0.8 * circle.real + 0.5j * circle.imag, x, y)
        tails, fins = ([polygon_distance(np.array(p), x, y) - 0.05 for p in part] for part in (
            ([-0.5, -1.5 - 0.9j, -1.0, -1.5 + 0.9j], [-0.5, -1.0 - 0.75j, -1.5 - 0.45j, -1.5 + 0.45j, -1.0 + 0.75j],
             [-0.5 - 0.15j, -1.6, -0.5 + 0.15j], [-0.5, -1.0 - 0.9j, -0.9, -1.0 + 0.9j]),
            ([-0.5 - 0.3j, -0.2 - 1j, 0.4 - 0.35j], [-0.6 - 0.3j, -0.5 - 0.7j, 0.3 - 0.7j, 0.5 - 0.3j],
             [-0.45 - 0.3j, -0.45 - 0.9j, -0.15 - 0.5j, -0.95j, 0.25 - 0.5j, 0.4 - 0.85j, 0.45 - 0.3j])))
        marks = np.sin(tau * 1.9 * x), np.cos(tau * 2 * x) + np.cos(tau * 2 * y) - 0.7, 2 * np.sin(tau * 2 * y)
        marked = np.clip(-trunk * 8, 0, 1) * np.clip((0.35 - x) * 8, 0, 1)
        plain = np.where(trunk < 0, 0.35 + 0.8 * y, 0) * (1 - marked)
        plain -= 6 * np.clip(2.5 - np.hypot(x - 0.45, y + 0.12) * 20, 0, 1)             # the eye
        pairs = [(np.minimum(np.minimum(trunk, tails[c % 4]), fins[c // 4]),
                  plain + marked * np.clip(0.4 + 1.2 * marks[c // 4], -0.1, 0.9)) for c in range(SCENE_CLASSES)]
    else:                                   # 6 shapes x 6 textures, paired so that each of them serves two classes
        cross = np.array([1 + 3j, 1 + 1j, 3 + 1j, 3 - 1j, 1 - 1j, 1 - 3j])
        heart = circle.real + 1j * (circle.imag - np.sqrt(np.abs(circle.real)) + 0.4)
        star = circle[::12] * np.tile([1, 0.5], 5)         # all of equal areas: sizes say nothing about the class
        shapes = [polygon_distance(p * 2 / np.sqrt(np.abs((p.conj() * np.roll(p, -1)).imag.sum())), x, y) - 0.08
                  for p in (circle, circle[15::30], circle[::40], star, np.append(cross, -cross), heart)]
        textures = [np.sin(tau * 2.2 * y), np.cos(tau * 1.5 * x) + np.cos(tau * 1.5 * y) - 0.6,
                    1.5 * np.sin(tau * 1.3 * x) * np.sin(tau * 1.3 * y), np.sin(tau * 2.2 * np.hypot(x, y)),
                    np.sin(tau * (2.2 * x + 0.25 * np.sin(tau * y))), 1.1 * y]
        pairs = [(shapes[c % 6], np.clip(0.5 + textures[(c + c // 6 * 2) % 6], 0, 1)) for c in range(SCENE_CLASSES)]
    return torch.from_numpy(np.array(pairs)).float()

def scenes(indices, size, fine=False):
    """Scenes `indices` (python ints), each decided by its index alone, the same picture at every `size` in pixels.
    `fine`: one fish, 12 classes that differ in tail, fin and marking; else one to five objects of one class.
    Returns images uint8 (n, 3, size, size); masks uint8 (n, 1, size, size), 0 background, 1 + class of the object seen
    there; labels int64 (n,), the class of the objects; boxes float32 (n, 5 or 1, 4), x0 y0 x1 y1 in fractions of the
    side, of each object's visible part, the main object first, NaN if absent or hidden."""
    if len(indices) > 16:                   # sixteen stay in the cache
        parts = [scenes(indices[i:i + 16], size, fine) for i in range(0, len(indices), 16)]
        return tuple(torch.cat(part) for part in zip(*parts))
    # Pixels see sums, products, minima and grid_sample only: bits that depend on neither batch nor threads.
    n, u = len(indices), hash_uniforms(indices, 64, int(fine))
    gx, gy = (((torch.arange(size) + 0.5) / size).view(shape) for shape in ((1, 1, 1, size), (1, 1, size, 1)))
    def per_image(values):                  # n or 3 n numbers -> n 1 1 1 or n 3 1 1
        return torch.from_numpy(np.asarray(values, np.float32)).view(n, -1, 1, 1)
    def sample(bank, cx, cy, radius, angle, mirror, padding):
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        x, y = gx - per_image(cx), gy - per_image(cy)
        grid = x * per_image(mirror * cos) + y * per_image(mirror * sin), y * per_image(cos) - x * per_image(sin)
        return F.grid_sample(bank, torch.stack(grid, -1)[:, 0], padding_mode=padding, align_corners=False)

    material, label = (u[0] * len(MATERIALS)).astype(np.int64), (u[1] * SCENE_CLASSES).astype(np.int64)
    image = sample(material_bank()[material], u[2], u[3], 0.8 + 0.4 * u[4], (u[5] - 0.5) * 1.2, 1, "reflection")
    main_radius = (0.32 if fine else 0.24) + (0.08 if fine else 0.12) * u[6]
    margin = main_radius * (0.9 if fine else 0.6)           # the border may cut an object, of a fish the ends
    main_x, main_y = margin + (1 - 2 * margin) * u[7:9]
    order = (0,) if fine else (1, 2, 3, 0, 4)               # slot 0 is the main object, 1 to 3 lie behind it
    top = torch.zeros(n, 1, size, size, dtype=torch.uint8)   # which object is seen, 0 none
    for slot in order:
        v = u[14 + slot * 10:24 + slot * 10]
        x, y, radius, present = main_x, main_y, main_radius, np.ones(n)
        if slot:
            radius, present = 0.14 + (0.03 if slot == 4 else 0.08) * v[0], v[1] < 0.85
            x, y = v[4] - main_x, v[5] - main_y             # pushed outwards: objects overlap but seldom hide
            push = np.maximum(1, (main_radius + 0.4 * radius) / np.maximum(np.hypot(x, y), 1e-3))
            x, y = np.clip(main_x + push * x, 0.07, 0.93), np.clip(main_y + push * y, 0.07, 0.93)
        mirror = 1 - 2 * (v[8] < 0.5) if fine else 1
        angle, shade = (v[6] - 0.5) * 0.8, 0.1 * v[7] - 0.05 if fine else 0.3 * v[7] - 0.2
        field = sample(object_bank(fine)[label], x, y, radius * REACH, angle, mirror, "border")
        distance, tone = field.split(1, 1)
        base, tip = HUES[np.full(n, 2) if fine else label // 6].unbind(1)
        colour = tone * (tip - base) * per_image(1 - (0.2 if fine else 0.45) * v[9]) + (base + per_image(shade))
        shadow, rim = (1 - distance * 4).clamp_(0, 1), (distance * -7).clamp_(0, 1) * 0.25 + 0.75
        cover = (0.5 - distance * per_image(radius * size)).clamp_(0, 1) * per_image(present)
        image *= 1 - shadow * shadow * per_image(0.3 * present)
        image += colour.mul_(rim).sub_(image).mul_(cover)
        top.masked_fill_(cover > 0.5, slot + 1)
    image *= per_image(0.88 + 0.24 * u[9] if fine else 0.5 + 0.8 * u[9])
    if not fine:                            # light from one side or corner
        image *= 1 + per_image(0.86 * u[10] - 0.43) * (2 * gx - 1) + per_image(0.86 * u[11] - 0.43) * (2 * gy - 1)
    masks = torch.where(top > 0, torch.from_numpy(label + 1).view(n, 1, 1, 1), 0).to(torch.uint8)
    seen = (top == torch.arange(1, len(order) + 1).view(-1, 1, 1)).to(torch.uint8)         # n M size size
    ends = [end for line in (seen.amax(2), seen.amax(3)) for end in (line.argmax(2), size - line.flip(2).argmax(2))]
    boxes = torch.stack(ends, 2)[..., [0, 2, 1, 3]] / size
    boxes[seen.amax((2, 3)) == 0] = float("nan")
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8), masks, torch.from_numpy(label), boxes

# ---- images: sources, canvases, their order and their loading --------------------------------------------------------
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SPLITS = {"train": ("train", "training", "train2017", "train2014", "train-standard", "2021_train", "2021_train_mini"),
          "val": ("val", "validation", "valid", "val2017", "val2014", "2021_valid", "test")}       # the first there
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp64")
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}         # EXIF orientation: the Image.Transpose that undoes it
TROUBLES = {"inline_container": "no room left in --out"} | dict.fromkeys(("out of memory", "can't allocate memory"),
           "out of memory: lower --batch-size or --image-size, or name a smaller --arch")  # what torch's words mean
HEADER, PATIENCE, SCENE_BYTES = 2 ** 22, 50, 2 ** 30       # of a cache; tried for an unreadable; most kept of scenes

class UserError(Exception):
    """A user's mistake: one line that says what is wrong and what to do. Scripts print it and exit with status 2."""

class Batch(NamedTuple):
    """One row an image. `batches` and `sequential` put canvas, label and mask on their device, the rest on the CPU."""
    canvas: torch.Tensor     # B 3 S S uint8: the whole image squeezed to a square
    size: torch.Tensor       # B 2 int64: height and width of the original in pixels, EXIF orientation applied
    label: torch.Tensor      # B int64, -1 where there is none
    mask: torch.Tensor       # B 1 S S uint8: 0 background, 1.. class or object, 255 void; B 0 S S without masks
    index: torch.Tensor      # B int64: which image was asked for
    unreadable: list         # [(index, "name: why"), ...] images the next readable one stands in for

def seeded(*numbers):
    """CPU generator of a tuple of non-negative integers; zeros at its end count for nothing."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

def squeeze(image, side):
    """Opened Pillow image of any mode -> canvas uint8 3 side side, (height, width) of the original, as EXIF turns it.
    What is transparent becomes white, the page that cut-outs are drawn for. 16-bit grey is divided by 256 (Pillow would
    clip it); float grey is 0..1, 0..255 or 0..65535, whichever holds its maximum. A JPEG is decoded at 1/2, 1/4 or 1/8
    (libjpeg's scaled DCT) where that is no smaller than the canvas, else by torchvision: same bits, fewer copies."""
    size, turn = (image.height, image.width), None
    scaled = image.draft(None, (side, side))     # None unless JPEG; its box is the part of the last pixels that counts
    plain = image.format == "JPEG" and image.fp and image.mode == "RGB" and image.size[::-1] == size
    if not plain:
        image.load()
        size = size if scaled else (image.height, image.width)       # Pillow 10 turns a TIFF as it loads it
    with contextlib.suppress(Exception):         # damaged metadata does not make the pixels unreadable
        turn = image.getexif().get(0x0112)
    if plain and turn not in TURNS:
        with contextlib.suppress(RuntimeError, AttributeError):      # unreadable, or a torchvision without it: Pillow's
            image.fp.seek(0)
            pixels = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8))
            pixels = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)     # strides that torch takes for NHWC
            return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)[0], size
        image.fp.seek(0)
    image.load()
    partly = scaled and scaled[1][2:] != image.size        # nextafter: side / n * n may be less than side
    if partly and turn in TURNS:
        image, partly = image.resize((side, side), Image.Resampling.BICUBIC, scaled[1]), False
    if turn in TURNS:
        image, size = image.transpose(TURNS[turn]), size[::-1] if turn >= 5 else size
    if image.mode[0] in "IF":
        grey = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = grey.max() if image.mode == "F" else 65535
        image = Image.fromarray((grey * (255 if top <= 1 else 1 if top <= 255 else 1 / 256)).clip(0, 255).astype("u1"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = torch.from_numpy(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))[None]
    fit = {"scale_factor": [math.nextafter(side / n, math.inf) for n in scaled[1][:1:-1]]} if partly else {"size": side}
    return F.interpolate(pixels.permute(0, 3, 1, 2), **fit, mode="bicubic", antialias=True)[0, :, :side, :side], size

def squeeze_mask(mask, side, trimap=False, drawing=True):
    """One-channel Pillow image -> uint8 1 side side: in each cell the value at its centre. A drawing is of 0 and 255,
    the foreground, which becomes 1; else 255 is void. In a trimap 1 is the object, 2 the ground, 3 the edge between."""
    pixels = np.asarray(mask)
    if pixels.ndim != 2 or pixels.max() > 255:
        raise ValueError(f"a mask has one channel of values up to 255, this one is of mode {mask.mode}")
    if trimap:
        pixels = np.array([0, 1, 0, 255])[pixels]
    elif drawing and not ((pixels > 0) & (pixels < 255)).any():
        pixels = pixels == 255
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in pixels.shape)
    return torch.from_numpy(pixels[rows][:, columns].astype(np.uint8))[None]

class Images(torch.utils.data.Dataset):
    """Canvases of one or several sources' images; indices -> a `Batch` (or IndexError). name, canvas (side in pixels),
    classes (names or []), has_masks, grey (by 32 masks: shades of 128..254), corners (float32 n 4: the sources' own
    boxes, x0 y0 x1 y1 in pixels; [] unless all do), fingerprint (sha256 over sorted names and sizes). Scenes are
    drawn once, into shared memory. For an unreadable image, reported, the next readable or a further one stands in."""

    def __init__(self, name, canvas, sources):
        self.name, self.canvas, self.source, self.rows, self.broken = name, canvas, sources[0], None, {}
        self.files, self.masks, labels = (np.concatenate([getattr(source, what) for source in sources])
                                          for what in ("files", "masks", "labels"))
        if not len(labels) or len(sources) > 1 and any(source.held for source in sources):
            raise UserError(f"{name} holds no image, or joins data that torchvision keeps in memory: name one data set")
        alike = len({source.trimap for source in sources}) == 1
        self.has_masks = bool(self.source.scene) or alike and len(self.masks) == len(labels)
        self.classes, self._labels = self.source.classes, torch.from_numpy(labels)
        if any(source.classes != self.classes for source in sources):
            self.classes, self._labels = [], torch.full_like(self._labels, -1)
        self.corners = np.concatenate(known) if all(map(len, known := [source.boxes for source in sources])) else []
        self.fingerprint = hashlib.sha256("".join(source.digest for source in sources).encode()).hexdigest()
        self.record = np.dtype([("canvas", "u1", (3, canvas, canvas)), ("size", "<i8", 2),
                                ("mask", "u1", (int(self.has_masks), canvas, canvas)), ("label", "<i8")])
        self.drawings, self.grey, self.named = True, False, set()    # by 32 masks: one may hold void alone or nothing
        for path in self.masks[::len(self.masks) // 32 + 1]:
            with contextlib.suppress(Exception):
                pixels = np.asarray(Image.open(os.fsdecode(path)))
                self.drawings &= bool(np.isin(pixels, (0, 255)).all())
                self.grey |= bool(((pixels > 127) & (pixels < 255)).any())
        if self.source.scene and len(self) * self.record.itemsize <= SCENE_BYTES:
            self.rows = np.frombuffer(mmap.mmap(-1, len(self) * self.record.itemsize), self.record)
            self.rows["label"] = -1              # not drawn yet

    def __len__(self):
        return len(self._labels)

    @property
    def labels(self):
        """int64 n, -1 without. Those of scenes become known by drawing them."""
        if self.source.scene and (self._labels < 0).any():
            parts = tqdm(torch.arange(len(self)).split(256), "drawing", leave=False, disable=None)
            self._labels = torch.cat([self.__getitems__(part.tolist()).label for part in parts])
        return self._labels

    def _draw(self, indices):                    # -> n rows of `record`'s fields, and boxes
        first, fine = self.source.scene
        canvases, masks, labels, boxes = scenes([first + i for i in indices], self.canvas, fine)
        return canvases, torch.full((len(indices), 2), self.canvas), masks, labels, boxes

    def _read(self, i):                          # -> one row of `record`'s fields
        if i in self.broken:
            raise OSError(self.broken[i])
        if self.rows is not None:
            return [torch.as_tensor(self.rows[field][i]) for field in self.record.names]
        image = self.source.held[i][0] if self.source.held else Image.open(os.fsdecode(self.files[i]))
        (canvas, size), mask = squeeze(image, self.canvas), torch.empty(0, self.canvas, self.canvas)
        if self.has_masks:
            mask = squeeze_mask(Image.open(os.fsdecode(self.masks[i])), self.canvas, self.source.trimap, self.drawings)
        return canvas, torch.tensor(size), mask, self._labels[i]

    def __getitems__(self, indices):
        n, side, index = len(indices), self.canvas, torch.tensor(indices := [range(len(self))[i] for i in indices])
        if self.source.scene and self.rows is None:
            return Batch(**dict(zip(self.record.names, self._draw(indices))), index=index, unreadable=[])
        new = [i for i in indices if self.rows["label"][i] < 0] if self.source.scene else []
        for field, values in zip(self.record.names, self._draw(new) if new else ()):
            self.rows[field][new] = values       # the label last: it tells the other workers that the scene is there
        canvas, mask = (torch.zeros(n, side, side, c, dtype=torch.uint8) for c in (3, int(self.has_masks)))
        canvas = canvas.permute(0, 3, 1, 2) if self.rows is None else canvas.view(n, 3, side, side)  # as it comes
        batch = Batch(canvas, torch.full((n, 2), side), torch.full((n,), -1), mask.permute(0, 3, 1, 2), index, [])
        for row, asked in enumerate(indices):
            for i in ((asked + k + max(0, k - 30) ** 3) % len(self) for k in range(min(PATIENCE, len(self)))):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        warnings.simplefilter("error", Image.DecompressionBombWarning)
                        found = self._read(i)
                    for field, value in zip(self.record.names, found):
                        getattr(batch, field)[row] = value
                    break
                except Exception as error:       # noqa: BLE001 - a damaged file leads decoders to raise anything
                    batch.unreadable.append((i, f"{os.fsdecode(self.files[i])}: {error or type(error).__name__}"))
        return batch

    def boxes(self, index):
        """True boxes of an image, float32 n 4 (x0 y0 x1 y1 in fractions of it): the data's own where all of it has them
        (scenes, CUB), else one around each value 1..254 of the mask."""
        if self.source.scene:
            found = self._draw([index])[-1][0]
            return found[~found.isnan().any(1)]
        batch = self.__getitems__([index])
        if len(self.corners) and not batch.unreadable:         # in pixels of this image, not of a stand-in
            return torch.from_numpy(self.corners[index][None]) / batch.size[0].flip(0).repeat(2)
        found = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] for value in batch.mask.unique().tolist()
                 if 0 < value < 255 for ys, xs in [(batch.mask[0, 0] == value).nonzero().T]]
        return torch.tensor(found, dtype=torch.float32).reshape(-1, 4) / self.canvas

    def pack(self, path):
        """From now on reads the file `path`: a line of JSON padded to HEADER bytes, then a `record` an image. Where
        there is none, up to 48 cores pack it, and processes that come meanwhile wait. UserError for other data's."""
        head = {"version": 2, "images": len(self), "canvas": self.canvas, "masks": self.has_masks,
                "fingerprint": self.fingerprint, "bytes": HEADER + len(self) * self.record.itemsize}
        if not os.path.exists(path):
            with open(f"{path}.tmp", "r+b", opener=lambda p, how: os.open(p, how | os.O_CREAT, 0o666)) as file:
                fcntl.flock(file, fcntl.LOCK_EX)           # the system frees it, too, when its holder dies
                if not os.path.exists(path):
                    try:
                        file.truncate(0)         # of one that was killed
                        os.posix_fallocate(file.fileno(), 0, head["bytes"])        # here, not later, a full disk shows
                        self._fill(file.name, head)
                        os.replace(file.name, path)
                    except BaseException:
                        file.truncate(0)         # not removed: others may wait for its lock
                        raise
        with open(path, "rb") as file:
            line = file.read(HEADER).rstrip(b"\0")
        found = json.loads(line) | {"bytes": os.path.getsize(path)} if re.fullmatch(rb'{"version": .+}', line) else {}
        for key, value in head.items():
            if found.get(key) != value:
                raise UserError(f"the cache {path} was packed for {key} {found.get(key)}, the data has {key} {value}: "
                                "name another file, or delete this one if it is a cache")
        self.rows, self.broken = np.memmap(path, self.record, "r", HEADER, len(self)), dict(found["unreadable"])

    def _fill(self, path, head):
        rows, broken, cores = np.memmap(path, self.record, "r+", HEADER, len(self)), {}, len(os.sched_getaffinity(0))
        with tqdm(total=len(self), desc=f"packing {self.name}", unit="image", disable=None) as bar:
            for batch in sequential(self, range(len(self)), batch_size=32, workers=cores, device="cpu"):
                for field in self.record.names:
                    rows[field][batch.index] = getattr(batch, field)
                broken |= {i: why.removeprefix(f"{os.fsdecode(self.files[i])}: ") for i, why in batch.unreadable}
                bar.update(len(batch.index))
        cut = max(0, HEADER // max(1, len(broken)) - 48) // 12  # of each reason: all fit, at up to 12 bytes a letter
        line = json.dumps(head | {"unreadable": [(i, why[:cut]) for i, why in broken.items()]}).encode()
        np.memmap(path, np.uint8, "r+")[:len(line)] = np.frombuffer(line, np.uint8)
        rows.flush()

def walk(folder, prefix=""):                     # -> [(name relative to the first folder, bytes), ...], none hidden
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir() and entry.name[0] != ".":
            found += walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != ".":
            found.append((prefix + entry.name, entry.stat().st_size if entry.is_file() else -1))
    return found

def listed(root, names, labels, classes, masks="", sizes=None, **more):
    """A source, as `Images` takes it. Sizes not given are looked up; UserError where a file is missing."""
    drawn, lines, paths = [f"{os.path.splitext(name)[0]}.png" for name in names] if masks else [], [], []
    for what, folder, files, known in (("images", root, names, sizes), ("masks", masks, drawn, None)):
        paths.append([os.path.join(folder, name) for name in files])
        known = known or [os.path.getsize(path) if os.path.isfile(path) else None for path in paths[-1]]
        if None in known:
            raise UserError(f"{known.count(None)} of {len(known)} {what} are missing, the first is "
                            f"{paths[-1][known.index(None)]}: put them there")
        lines += map("{}\t{}".format, files, known)
    lines = "\n".join([*lines, *map(str, labels)]).encode("utf-8", "surrogateescape")
    files, masks = (np.array([os.fsencode(path) for path in part], bytes) for part in paths)       # shared after a fork
    return argparse.Namespace(**{"files": files, "masks": masks, "labels": np.array(labels, np.int64), "boxes": [],
                                 "classes": classes, "scene": None, "held": None, "trimap": False,
                                 "digest": hashlib.sha256(lines).hexdigest()} | more)

def list_folder(root, split, masks):
    def inside(folder):                          # of the images, of their masks
        pair = os.path.join(folder, "images"), os.path.join(folder, "masks")
        return pair if all(map(os.path.isdir, pair)) else (folder, "")
    def at(part):                                # root/images/train, root/train/images or root/train
        images, drawn = inside(os.path.join(base, part))
        return images, os.path.join(above, part) if above else drawn
    base, above = inside(root)
    there = {n.lower(): n for n in sorted(e.name for e in os.scandir(base) if e.is_dir() and e.name[0] != ".")}
    parts = {name: there[n] for name, choices in SPLITS.items() for n in choices[::-1] if n in there}
    known = SPLITS["train"] if len(there) < 8 else SPLITS["train"][1:]   # among many, without a val, train is a class
    if split not in (parts := parts if len(parts) == 2 or parts.get("train") in known else {"train": ""}):
        return None
    folder, drawn = at(parts[split])
    drawn = next(filter(os.path.isdir, [os.path.join(masks, parts[split])]), masks) if masks else drawn  # split or not
    found = sorted(walk(folder))
    if not found:
        raise UserError(f"no images ({' '.join(EXTENSIONS)}) in {folder}, only {sorted(os.listdir(folder))[:5]}")
    names, sizes = zip(*found)
    if any("/" not in name for name in names):   # beside an image sub-folders are no classes
        return listed(folder, names, [-1] * len(names), [], drawn, sizes)
    classes = sorted({entry.name for part in parts.values() for entry in os.scandir(at(part)[0])
                      if entry.is_dir() and entry.name[0] != "."})               # of both splits: their numbers agree
    number = {name: k for k, name in enumerate(classes)}
    return listed(folder, names, [number[name.split("/")[0]] for name in names], classes, drawn, sizes)

def list_cub(root, split, masks):
    """CUB-200-2011's layout, and NABirds', whose class numbers have gaps: labels are their ranks."""
    def table(name):
        path = Path(root, f"{name}.txt")
        lines = path.read_text().split("\n") if path.is_file() else []
        return dict(line.strip().split(maxsplit=1) for line in lines if line.strip())
    try:
        files, kind, train, title = map(table, ("images", "image_class_labels", "train_test_split", "classes"))
        ids, boxes = sorted((i for i in files if int(train[i]) == (split == "train")), key=files.get), []
        kinds = sorted(set(kind.values()), key=int)
        labels = [kinds.index(kind[i]) for i in ids]
        if corners := table("bounding_boxes"):   # x y width height in pixels
            boxes = np.array([corners[i].split() for i in ids], np.float32).reshape(-1, 2, 2).cumsum(1).reshape(-1, 4)
    except (KeyError, ValueError) as error:
        raise UserError(f"the tables in {root} do not fit together ({error}): unpack the data set anew") from error
    return listed(os.path.join(root, "images"), [files[i] for i in ids], labels, [title.get(k, k) for k in kinds],
                  masks, boxes=boxes) if ids or split == "train" else None

def list_torchvision(name, root, split):
    """A data set class of torchvision whose files are on the disk: nothing is ever downloaded."""
    known, root, data, why = torchvision.datasets.__all__, os.path.abspath(root), None, None
    kind = getattr(torchvision.datasets, name) if name in known else None
    takes = inspect.signature(kind.__init__).parameters if kind else {}
    if "root" not in takes or name == "VisionDataset":
        near = difflib.get_close_matches(name, {*known} - {name}, 4, 0.4) or ["STL10", "CIFAR10", "Food101"]
        raise UserError(f"torchvision has no data set {name!r} for --data Name:root, but {', '.join(near)}")
    key = next((key for key in ("train", "split", "image_set", "version") if key in takes), None)
    values = [split == "train"] if key == "train" else SPLITS[split] if key else [None] * (split == "train")
    learns = {"FGVCAircraft": "trainval", "OxfordIIITPet": "trainval", "Flowers102": "train", "DTD": "train"}.get(name)
    values = [learns if split == "train" else "test"] if learns else values  # as published; two have no trainval
    for value in values:
        try:
            data = kind(root, **{key: value} if key else {}, **{"download": False} if "download" in takes else {})
            break
        except Exception as error:               # noqa: BLE001 - each class has its own way to say what is missing
            why = why or ("" if "Unknown value" in str(error) else " ".join(str(error).split()) or repr(error))
    if data is None and split == "train":
        raise UserError(f"{name} cannot be opened in {root} ({why or 'no such split'}): put its files there")
    if data is None:
        if why and os.environ.get("RANK", "0") == "0":
            print(f"{name}: no test images, a tenth of the training's stands in ({why})", file=sys.stderr)
        return None
    def column(types, *attributes):              # the first that has a value of these types for every image
        for items in (getattr(data, attribute, ()) for attribute in attributes):
            items = items.tolist() if hasattr(items, "tolist") else items
            flat = [v for item in items for v in (item if isinstance(item, tuple) else (item,)) if isinstance(v, types)]
            if len(flat) == len(data):
                return flat
        return None
    labels = column(int, "targets", "labels", "_labels", "_targets", "y", "_samples", "samples", "index")
    paths = column((str, os.PathLike), "_image_files", "_images", "images", "_samples", "samples")
    if name == "INaturalist":                    # listed in the file system's order
        paths = [os.path.join(data.root, data.all_categories[category], file) for category, file in data.index]
    classes = list(map(str, getattr(data, "classes", getattr(data, "all_categories", [])))) if labels else []
    classes = classes or [str(label) for label in range(1 + max(labels or [-1]))]
    labels = labels or [-1] * len(data)
    if paths is None:
        names = [f"{name} {value} {i}" for i in range(len(data))]
        return listed(root, names, labels, classes, sizes=[0] * len(data), held=data)
    drawn = data.masks if name == "VOCSegmentation" else data._segs if name == "OxfordIIITPet" else [""]
    root = os.path.dirname(paths[0]) if drawn[0] else root
    names, labels = zip(*sorted((os.path.relpath(path, root), label) for path, label in zip(paths, labels)))
    return listed(root, names, labels, classes, os.path.dirname(drawn[0]), trimap=name == "OxfordIIITPet")

def open_images(spec, canvas, split="train", masks="", cache=""):
    """Images of `--data` as canvases of `canvas` pixels; None where there is no such split ("train" or "val").
    spec: "" or "scenes[:N]" or "scenes-fine[:N]" (val: 1,000 scenes from index 2**31); a folder with class sub-folders,
    with or without train/ and val/ above them, or with images lying in it (labels -1); images/ and masks/ below any of
    these; CUB-200-2011's layout; "Name:root" for a data set class of torchvision on the disk; several joined by a comma
    (labels stay where the classes are the same). masks: a folder with a PNG for every image, of the same relative name.
    cache: a file to pack the canvases into (`Images.pack`; val goes to its own). Raises UserError."""
    sources, scene = [], None if masks else re.fullmatch(r"|(scenes|scenes-fine)(?::(\d+))?", spec)
    if scene:
        fine, (first, n) = "fine" in spec, (0, int(scene[2] or 10_000)) if split == "train" else (2 ** 31, 1000)
        sources = [listed("", [], [-1] * n, [f"scene class {k}" for k in range(SCENE_CLASSES)],
                          scene=(first, fine), digest=f"{scene[1] or 'scenes'} {first} {n} version {2 - fine}")]
    try:
        for part in [] if scene else [spec] if os.path.isdir(spec) else spec.split(","):
            tables = [os.path.join(part, f"{t}.txt") for t in ("images", "image_class_labels", "train_test_split")]
            if os.path.isdir(part):
                sources.append((list_cub if all(map(os.path.isfile, tables)) else list_folder)(part, split, masks))
            elif not masks and (named := re.fullmatch(r"([A-Za-z]\w*):(.+)", part)):
                sources.append(list_torchvision(*named.groups(), split))
            else:
                raise UserError(f"no folder {part!r}: --data takes one; without --masks scenes[-fine][:N] or Name:root")
        images = Images(spec or "scenes", canvas, found) if (found := [*filter(None, sources)]) else None
        if images and cache:
            images.pack(cache if split == "train" else "{}.val{}".format(*os.path.splitext(cache)))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{spec} {cache}: {error}; check the path, its permissions and the space left") from error
    return images

def knn_split(train, val, seed=0, bank=20_000, queries=2_000):
    """-> bank indices into `train`, the images that hold the queries, query indices into them: a seeded choice of train
    and val where their labels meet, else of 90 % and 10 % of train; of the labelled images where there are any."""
    def shuffled(images, stream):
        known = [] if images.source.scene else (images.labels >= 0).nonzero().flatten()
        known = known if len(known) else torch.arange(len(images))
        return known[torch.randperm(len(known), generator=seeded(seed, stream))].tolist()
    first = shuffled(train, 2)
    if val is None or not (val.source.scene or {*train.labels.tolist()} & {*val.labels.tolist()}):
        cut = max(1, len(first) // 10)
        val, first, second = train, first[cut:], first[:cut]
    else:
        second = shuffled(val, 3)
    return sorted(first[:bank]), val, second[:queries]   # shuffled: pictures show the first of them

def fetch(images, order, workers, device):
    """Batches of `images` for the lists of indices in `order`; on CUDA pinned, and copied one batch ahead on a stream
    of their own. Workers are forked, so that they share scenes, labels and maps, and ignore the signals that the loop
    answers; 48 at most: tensors come as open files, since names in /dev/shm would outlive a killed run."""
    cuda, handler = torch.device(device).type == "cuda", signal.getsignal(signal.SIGCHLD)
    ignored, named = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), getattr(images, "dataset", images).named
    loader = iter(torch.utils.data.DataLoader(
        images, batch_sampler=order, collate_fn=lambda batch: batch, num_workers=min(workers, 48), pin_memory=cuda,
        worker_init_fn=lambda _: [signal.signal(s, signal.SIG_IGN) for s in ignored],
        multiprocessing_context="fork" if workers else None,     # no timeout: it would hide a dead worker until its end
        generator=torch.Generator()))            # its own: the global one stays as it is, whatever the workers
    with contextlib.suppress(ValueError, TypeError):      # torch's handler would raise anywhere; `next` looks every 5 s
        signal.signal(signal.SIGCHLD, handler)   # not in a thread, where torch has set none
    def arriving():
        try:
            for batch in loader:
                for index, why in {i: why for i, why in batch.unreadable if i not in named}.items():
                    tqdm.write(f"unreadable, the next stands in: {why}", file=sys.stderr)
                    named.add(index)
                yield batch
        except (RuntimeError, EOFError, OSError) as error:           # the last two: what a dead worker sent is lost
            if isinstance(error, RuntimeError) and not re.search(r"worker \(pid|Pin memory|Too many open", str(error)):
                raise
            refuse(f"a data worker died ({' '.join(str(error).split()) or 'its batch is lost'}): start again, with "
                   "fewer --workers or more memory, also shared (/dev/shm), if it returns", local=True)
    if not cuda:
        yield from (batch._replace(canvas=batch.canvas.contiguous()) for batch in arriving())
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in itertools.chain(arriving(), [None]):
        with torch.cuda.stream(stream):
            batch = batch and batch._replace(**{field: getattr(batch, field).to(device, non_blocking=True).contiguous()
                                                for field in ("canvas", "label", "mask")})
            copied = stream.record_event()
        if ahead:
            torch.cuda.current_stream(device).wait_event(ahead[1])
            for tensor in (ahead[0].canvas, ahead[0].label, ahead[0].mask):      # not to be reused before it was read
                tensor.record_stream(torch.cuda.current_stream(device))
            yield ahead[0]
        ahead = batch and (batch, copied)

def batches(images, *, batch_size, seed, start, stop, rank=0, world=1, workers=0, device="cpu"):
    """One `Batch` a step, for the steps start..stop-1: rows rank*b .. (rank+1)*b of the global batch, b = batch_size /
    world. Epoch e: a permutation from (seed, e), len(images) // batch_size steps. UserError: bad batch, dead worker."""
    steps, rows = len(images) // batch_size, batch_size // world
    if batch_size % world or not steps:
        raise UserError(f"set a --batch-size up to the {len(images)} images and a multiple of the {world} processes")
    def order():
        for epoch, group in itertools.groupby(range(start, stop), lambda step: step // steps):
            permutation = torch.randperm(len(images), generator=seeded(seed, 1, epoch))
            for step in group:
                yield permutation[step % steps * batch_size + rank * rows:][:rows].tolist()
    if dist.is_initialized():                    # each has looked for a checkpoint on its own
        dist.all_gather_object(found := [None] * world, (start, getattr(images, "dataset", images).fingerprint))
        starts, data = map(set, zip(*found))
        len(starts) == 1 or refuse("processes found different checkpoints: put --out where all nodes see it")
        len(data) == 1 or refuse("processes found different images: make the copies of --data on the nodes the same")
    yield from fetch(images, order(), workers, device)

def sequential(images, indices, *, batch_size, workers, device):
    """Batches of `indices` in order, for evaluation; the last may be short. UserError when over 5 and over
    1 % of them (a sample: and 4 deviations), or all images, are unreadable; until then a readable one stands in."""
    order, lost = [[int(j) for j in indices[i:i + batch_size]] for i in range(0, len(indices), batch_size)], {}
    limit = max(5, min(len(images), len(indices) + 40 * len(indices) ** 0.5) / 100)
    for batch in fetch(images, order, workers, device):
        lost |= {i: why for i, why in batch.unreadable if i in batch.index}      # not those tried in their stead
        if len(lost) > limit or len(dict(batch.unreadable)) == len(images):      # all: nothing stood in
            refuse(f"{len(lost)} of {len(indices)} images cannot be read, mend them: {min(lost.values())}", local=True)
        yield batch

# ---- views: boxes, crops, flips, photometry -------------------------------------------------------------------------
def uniforms(seed, step, rows, columns, stream=0):
    """Raw draws of one step for the *global* batch: rows x columns float64 in [0, 1), CPU; `stream`s are apart."""
    return torch.rand(rows, columns, dtype=torch.float64, generator=seeded(seed, 2 + stream, step))

def upload(x, device):
    """A tensor on `device`; from the CPU to CUDA through pinned memory, so that nothing waits for the copy."""
    x = x.pin_memory() if torch.device(device).type == "cuda" and not x.is_cuda else x
    return x.to(device, non_blocking=True)

def resample(x, wy, wx):
    """x (B C H W), wy (B h H), wx (B w W) -> wy x wx^T (B C h w) in x's dtype, differentiable. Channels share their
    sample's matrices; as B H C W inside, both products are plain batched GEMMs with no copy between them."""
    (b, c, n_y, n_x), m_y, m_x, wy, wx = x.shape, wy.shape[1], wx.shape[1], wy.to(x.dtype), wx.to(x.dtype)
    x = x.transpose(1, 2)                                                                                   # B H C W
    if n_y * m_x * (n_x + m_y) <= n_x * m_y * (n_y + m_x):                               # the order with fewer products
        x = wy @ (x.reshape(b, n_y * c, n_x) @ wx.mT).view(b, n_y, c * m_x)
    else:
        x = (wy @ x.reshape(b, n_y, c * n_x)).view(b, m_y * c, n_x) @ wx.mT
    return x.view(b, m_y, c, m_x).transpose(1, 2)

def _positions(lo, hi, n_out, n_in, flip):      # B n_out 1: where output cells lie, 0 = middle of source pixel 0
    i = torch.arange(n_out, device=lo.device, dtype=lo.dtype).expand(len(lo), n_out)
    i = i if flip is None else torch.where(flip[:, None], n_out - 1 - i, i)
    return ((lo[:, None] + (i + 0.5) / n_out * (hi - lo)[:, None]) * n_in - 0.5)[..., None]

def resize_matrix(lo, hi, n_out, n_in, flip=None, kernel="bicubic", dtype=None):
    """Rows of weights (B n_out n_in) that cut [lo, hi] (B each, fractions of an axis of n_in pixels, within 0..1) and
    resize it to n_out pixels, antialiased; on lo's device, in `dtype` (None: lo's). flip (B bool): rows reversed.
    kernel: "bicubic" (a = -0.5) and "bilinear" widen when shrinking, as in Pillow's resize; "box" is the exact area
    mean. A pixel on the box's edge counts by its part inside, one outside not at all: boxes of whole pixels give
    Pillow's crop-then-resize (of two kernels: its own BOX is coarser), others lie between. Zeros where hi <= lo."""
    dtype, lo, hi = dtype or lo.dtype, lo.double(), hi.double()
    scale = (hi - lo)[:, None, None] * (n_in / n_out)                               # source pixels to an output pixel
    most = max(1, n_in / n_out)
    reach = {"bicubic": 2 * most, "bilinear": most, "box": (most + 1) / 2}[kernel]       # for the widest box there is
    taps, middle = min(n_in, math.ceil(2 * reach)), _positions(lo, hi, n_out, n_in, flip)
    pixel = ((middle - reach).floor() + 1).clamp(0, n_in - taps) + torch.arange(taps, device=lo.device)  # B n_out taps
    t = (pixel - middle).abs()
    if kernel == "box":
        weight = torch.minimum(((scale + 1) / 2 - t).clamp(0), scale.clamp(0, 1))     # length shared by pixel and cell
    else:
        weight = ((2 if kernel == "bicubic" else 1) - t / scale.clamp_min(1)).clamp(0)
        if kernel == "bicubic":                        # Keys' two cubics, as one for |t| < 2 and the rest for |t| < 1
            near = (weight - 1).clamp(0)
            weight = weight ** 2 * (weight - 1) / 2 + near ** 2 * (1 - 2 * near)
        ends = lo[:, None, None] * n_in, hi[:, None, None] * n_in
        weight = weight * (torch.minimum(pixel + 1, ends[1]) - torch.maximum(pixel, ends[0])).clamp(0)
    weight = (weight / weight.sum(2, keepdim=True).clamp_min(1e-300)).to(dtype)
    return torch.zeros(len(lo), n_out, n_in, dtype=dtype, device=lo.device).scatter_(2, pixel.long(), weight)

def point_matrix(lo, hi, n_out, n_in, flip=None):
    """Rows of weights (B n_out n_in, lo's dtype): one bilinear sample in the middle of each of n_out cells of [lo, hi],
    borders clamped, zeros where hi <= lo. This is RoIAlign(aligned=True) of regions not larger than the map."""
    middle = _positions(lo, hi, n_out, n_in, flip).clamp(0, n_in - 1)
    return (1 - (torch.arange(n_in, device=lo.device) - middle).abs()).clamp(0) * (hi > lo)[:, None, None]

def crop(x, box, size, flip=None, kernel="bicubic", dtype=torch.float32):
    """The part `box` (B 4: x0 y0 x1 y1 in fractions) of x (B C H W) at `size` (int or (h, w)), mirrored where flip (B).
    uint8 is scaled to [0, 1] in `dtype`, float keeps its own. Bicubic overshoots and is clamped to [0, 1], as Pillow's
    is to 0..255; other kernels cannot. box and flip may stay on the CPU. Strides: .contiguous() where they matter."""
    (h, w), dtype = (size, size) if isinstance(size, int) else size, x.dtype if x.is_floating_point() else dtype
    box, flip = upload(box, x.device), None if flip is None else upload(flip, x.device)
    wy = resize_matrix(box[:, 1], box[:, 3], h, x.shape[2], None, kernel, dtype)
    wx = resize_matrix(box[:, 0], box[:, 2], w, x.shape[3], flip, kernel, dtype)
    if not x.is_floating_point():                                 # converted in the memory order that resample works in
        x, wx = x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).transpose(1, 2), wx / 255
    x = resample(x, wy, wx)
    return x.clamp_(0, 1) if kernel == "bicubic" else x

RRC_COLUMNS = 40        # ten tries of [area, log ratio, top, left]

def _tries(u, size, scale, ratio):              # u B 40 -> boxes B 10 4 in pixels; target areas and what fits, B 10
    (area, log_ratio, top, left), (h, w) = u.view(-1, 10, 4).unbind(2), size.double()[:, :, None].unbind(1)
    target = h * w * (scale[0] + area * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + log_ratio * math.log(ratio[1] / ratio[0]))
    ch, cw = (target / aspect).sqrt().round(), (target * aspect).sqrt().round()
    x0, y0 = (left * (w - cw + 1)).floor(), (top * (h - ch + 1)).floor()
    return torch.stack([x0, y0, x0 + cw, y0 + ch], 2), target, (0 < ch) & (ch <= h) & (0 < cw) & (cw <= w)

def _first(boxes, good, otherwise):             # each row's first good try of B 10 4, else its `otherwise` (B 4)
    return torch.where(good.any(1, keepdim=True), boxes[torch.arange(len(boxes)), good.int().argmax(1)], otherwise)

def random_boxes(u, size, scale, ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop.get_params for a batch: u (B 40), size (B 2: original height, width), scale
    (least, most of the area) -> B 4 (x0 y0 x1 y1, fractions). Boxes are whole original pixels; where all ten tries
    stick out, the largest allowed centre. u's columns: ten tries of [area, log ratio, top, left]."""
    (boxes, _, fits), (h, w) = _tries(u, size, scale, ratio), size.double().unbind(1)
    cw = torch.where(w / h > max(ratio), (h * max(ratio)).round(), w)
    ch = torch.where(w / h < min(ratio), (w / min(ratio)).round(), h)
    x0, y0 = ((w - cw) / 2).floor(), ((h - ch) / 2).floor()
    return _first(boxes, fits, torch.stack([x0, y0, x0 + cw, y0 + ch], 1)) / torch.stack([w, h, w, h], 1)

def random_boxes_overlapping(u, size, scale, other, ratio=(3 / 4, 4 / 3), least=0.01):
    """random_boxes that share with `other` (B 4, fractions) at least `least` of the area aimed at [SlotCon's release,
    data/transforms.py]: the first of ten tries, columns 0-39 of u (B 80), else a box without the rule, of the rest."""
    (boxes, target, fits), whole = _tries(u[:, :RRC_COLUMNS], size, scale, ratio), size.double().flip(1).repeat(1, 2)
    other = (other * whole)[:, None]                                                         # whole: w h w h; pixels
    sides = (torch.minimum(boxes[..., 2:], other[..., 2:]) - torch.maximum(boxes[..., :2], other[..., :2])).clamp(0)
    return _first(boxes / whole[:, None], fits & (sides.prod(2) >= least * target),
                  random_boxes(u[:, RRC_COLUMNS:], size, scale, ratio))

def overlap_rectangles(box1, flip1, box2, flip2):
    """What two crops (B 4, fractions) of an image share, in fractions of each view as it is seen, so mirrored where it
    is: two B 4 [SlotCon's release, data/transforms.py]. Boxes that do not meet give x1 = x0 and y1 = y0."""
    lo, hi, found = torch.maximum(box1[:, :2], box2[:, :2]), torch.minimum(box1[:, 2:], box2[:, 2:]), []
    hi = torch.where((hi > lo).all(1, keepdim=True), hi, lo)
    for box, flip in ((box1, flip1), (box2, flip2)):
        (x0, y0), (x1, y1) = (((end - box[:, :2]) / (box[:, 2:] - box[:, :2])).unbind(1) for end in (lo, hi))
        found.append(torch.stack([torch.where(flip, 1 - x1, x0), y0, torch.where(flip, 1 - x0, x1), y1], 1))
    return tuple(found)

def center_boxes(size, resize=256, crop=224):
    """Evaluation's box (B 4) for images of `size` (B 2: height, width): shorter side to `resize`, then the central
    `crop` (at most `resize`) pixels, both rounded as torchvision does."""
    sides = (resize * size.double() / size.amin(1, keepdim=True)).floor().flip(1)                             # w h
    lo = ((sides - crop) / 2).round()
    return torch.cat([lo / sides, (lo + crop) / sides], 1)

def grey(x):                                # x of all these: B 3 H W in [0, 1]; factors, shifts, sigmas: B; -> B 1 H W
    return (x[:, :1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)

def adjust_brightness(x, factor):
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)

def adjust_contrast(x, factor):
    return torch.lerp(grey(x).mean((1, 2, 3), keepdim=True), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)

def adjust_saturation(x, factor):
    return torch.lerp(grey(x), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)

def adjust_hue(x, shift):
    """HSV's hue moved by `shift` turns, without HSV: a channel is max - chroma * clamp(2 - 6 away, 0, 1), `away` being
    the distance, in turns, to the hue where that channel is least."""
    (r, g, b), third = x.unbind(1), torch.arange(3, device=x.device, dtype=x.dtype).view(1, 3, 1, 1) / 3
    most, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = most - least
    turn = (g + b).sub_(r).sub_(least).div_(chroma + 1e-30).add_(1).div_(6)       # 0 red .. 1/2 cyan, either way round
    turn = turn.copysign_(g - b).add_(shift.view(-1, 1, 1))[:, None] + (1 / 2 - third)
    away = turn.sub_(turn.round()).abs_()
    return most[:, None].addcmul(chroma[:, None], away.mul_(-6).add_(2).clamp_(0, 1), value=-1)

def blur(x, sigma):
    """True Gaussian, sigma in pixels of x, reflected borders: torchvision's gaussian_blur with a wide enough kernel.
    Releases give the same number to Pillow as `radius`, whose GaussianBlur is three box blurs of that deviation."""
    def matrix(n):
        bell = torch.exp(-0.5 * (torch.arange(2 * n - 1, device=x.device) / sigma.to(x.dtype)[:, None]) ** 2)  # by lag
        bell *= bell > torch.finfo(x.dtype).eps                       # subnormal tails slow a CPU's products tenfold
        w = torch.cat([bell[:, 1:n].flip(1), bell[:, :n]], 1).unfold(1, n, 1).flip(1)
        w[..., 1:] += bell.unfold(1, n, 1)[..., 1:]                           # seen in the mirror at 0: lag i + j
        w[..., :-1] += bell.flip(1).unfold(1, n, 1)[..., :-1]                 # and at n - 1: lag 2 (n - 1) - i - j
        return w / w.sum(2, keepdim=True)
    wy = matrix(x.shape[2])
    return resample(x, wy, wy if x.shape[2] == x.shape[3] else matrix(x.shape[3]))

def solarize(x, threshold=128 / 255):
    return torch.where(x >= threshold, 1 - x, x)

def normalize(x):
    """[0, 1] -> ImageNet's mean 0 and standard deviation 1, a channel."""
    constants = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=x.dtype)
    mean, std = upload(constants, x.device).view(2, 3, 1, 1)
    return (x - mean).div_(std)

PHOTO_COLUMNS = 9       # strengths of brightness, contrast, saturation, hue; jitter?, grey?, blur?; sigma; solarise?

def jitter_order(seed, step, view):
    """The order of the four colour operations in one view of one step: a permutation of 0..3, as a list."""
    return torch.randperm(4, generator=seeded(seed, 1000 + view, step)).tolist()

@torch.no_grad()
def photometry(x, u, order, *, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_grey=0.2, p_blur=0.0, p_solarize=0.0,
               sigma=(0.1, 2.0)):
    """Colour jitter, grey, blur, solarise, normalise: the chain of BYOL, DINO and SlotCon. x: B 3 H W in [0, 1], left
    alone; u: B 9 uniforms on the CPU: the host knows whom to change and works on them only, without asking the device;
    order: of the four colour operations in this batch, while strengths are each sample's own. jitter: factors 1-s..1+s
    of brightness, contrast, saturation, hue by -s..s turns; sigma: range, pixels of the view. -> B 3 H W, x's dtype."""
    x, v = x.clone(memory_format=torch.contiguous_format), upload(u.to(x.dtype), x.device)
    def some(column, p, change):
        rows = (u[:, column] < p).nonzero()[:, 0]
        if len(rows):
            rows = upload(rows, x.device)
            x.index_copy_(0, rows, change(x[rows], v[rows]))
    def colour(x, v):
        for k in (k for k in order if jitter[k] > 0):
            low, high = (-jitter[3], jitter[3]) if k == 3 else (max(0, 1 - jitter[k]), 1 + jitter[k])
            x = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)[k](x, low + v[:, k] * (high - low))
        return x
    some(4, p_jitter, colour)
    some(5, p_grey, lambda x, v: grey(x).expand_as(x))
    some(6, p_blur, lambda x, v: blur(x, sigma[0] + v[:, 7] * (sigma[1] - sigma[0])))
    some(8, p_solarize, lambda x, v: solarize(x))
    return normalize(x)

# ---- networks --------------------------------------------------------------------------------------------------------
ARCHS = {"small": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3),
         "resnet101": (3, 4, 23, 3), "wide_resnet50_2": (3, 4, 6, 3)}  # blocks in each of the four stages

class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without average pooling and `fc`, under the same keys. Images B 3 H W -> the maps of its
    four stages, `channels` wide, at 1/4, 1/8, 1/16 and 1/32 of the side; "small" at 1/4, 1/8, 1/8 and 1/8."""

    def forward(self, x):
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(x))))]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps[1:]

def backbone(arch, zero_init_residual=False):
    """A new ResNet, `arch` one of ARCHS, initialised as torchvision's; with zero_init_residual the last batch norm of
    each residual block starts at 0. "small" has 1.23 M parameters and turns 64 pixels into 8 x 8 cells."""
    block = BasicBlock if arch in ("small", "resnet18", "resnet34") else Bottleneck
    net = ResNet(block, ARCHS[arch], 1, zero_init_residual, width_per_group=128 if arch == "wide_resnet50_2" else 64)
    del net.avgpool, net.fc
    net.channels = [c * block.expansion for c in (64, 128, 256, 512)]
    if arch == "small":
        net.inplanes, net.channels = 32, [32, 64, 128, 256]
        net.conv1, net.bn1, net.maxpool = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.Identity()
        for i, stride in enumerate((2, 2, 1, 1)):
            setattr(net, f"layer{i + 1}", net._make_layer(block, net.channels[i], 1, stride))
        for m in net.modules():  # torchvision's constructor, which initialises, did not see these layers
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, BasicBlock) and zero_init_residual:
                nn.init.zeros_(m.bn2.weight)
    return net

def full(x):
    """Half types to float32; float32 and float64 as they are. Normalisations, softmaxes and losses run in it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

class SumOverProcesses(torch.autograd.Function):
    """x -> its sum over the processes. The gradient is summed too: each process's loss depends on every summand."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x.clone()  # compiled by torch 2.11, x itself comes back from `backward` as zeros

    backward = forward

class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all processes, for the CPU, which nn.SyncBatchNorm refuses. x: N C ..., N may differ
    between processes and be 0. Gradients of weight and bias are this process's share, which DDP averages, as with
    nn.SyncBatchNorm. In eval mode, and in a single process, it is the framework's own batch norm."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # at least two dimensions

    def forward(self, x):
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        dims, shape = [0, *range(2, x.ndim)], [-1] + [1] * (x.ndim - 2)
        d = full(x) - self.running_mean.view(shape)  # squares cancel less, and every process has the same shift
        sums = SumOverProcesses.apply(torch.cat([d.sum(dims), d.square().sum(dims), d.new_full([1], d[:, 0].numel())]))
        n = sums[-1].detach().clamp(min=1)
        mean, square = (sums[:-1] / n).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            momentum = self.momentum * (n > 1).to(n.dtype)  # a single row has no variance
            self.num_batches_tracked += 1
            self.running_mean = self.running_mean + momentum * mean  # not in place: compiled, backward computes d again
            self.running_var.lerp_(var * n / (n - 1).clamp(min=1), momentum)
        scale = (var + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        offset = (0 if self.bias is None else self.bias) - mean * scale
        return torch.addcmul(offset.view(shape), d, scale.view(shape)).to(x.dtype)

def sync_batchnorm(module, device):
    """Lets batch norm in `module` (its momentum a number) see all processes' batch; keys and tensors stay. -> module"""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            m.__class__ = GlobalBatchNorm  # the fields are the same, only forward changes
    return module

# ---- weights ---------------------------------------------------------------------------------------------------------
def arch_of(state):
    """Which of ARCHS a state dict that load_backbone returned belongs to, by names and shapes, or None."""
    with torch.device("meta"):
        return next((arch for arch in ARCHS if {k: v.shape for k, v in state.items()} ==
                     {k: v.shape for k, v in backbone(arch).state_dict().items()}), None)

def find_backbone(checkpoint, source):
    """State dict, in torchvision's keys without `fc`, of the backbone in tensors and dicts nested in any way: under
    whichever prefix (state_dict, model, module., backbone., ...) a stem and a first block stand. Of several, the first:
    1 teacher (DINO, SCFS); 2 no role named (PixPro's encoder., mmselfsup's backbone.); 3 encoder_k, target, momentum,
    ema (SlotCon, BYOL); 4 encoder_q, online, student. With a queue beside it, MoCo's, encoder_q goes before encoder_k.
    Raises UserError, in which `source` names the checkpoint, where there is none or it fits no network of ARCHS."""
    def tensors(name, x):
        for k, v in x.items() if isinstance(x, dict) else ():
            yield from tensors(f"{name}{k}.", v)
        if isinstance(x, torch.Tensor):
            yield name[:-1], x

    flat = dict(tensors("", checkpoint))
    role = {"teacher": 1, "k": 3, "target": 3, "momentum": 3, "ema": 3, "online": 4, "student": 4,
            "q": 2 if any(k.split(".")[-1] == "queue" for k in flat) else 4}
    found = [(min((role[word] for word in re.split(r"[._]", k) if word in role), default=2), len(k), k[:-12])
             for k in flat if k.endswith("conv1.weight") and k[:-12] + "layer1.0.conv1.weight" in flat]
    if not found:
        raise UserError(f"{source}: no ResNet among its tensors, which begin {', '.join(list(flat)[:3]) or '(none)'}")
    prefix = min(found)[2]
    state = {k[len(prefix):]: (full(v) if v.is_floating_point() else v).detach().cpu() for k, v in flat.items()
             if re.match(r"(conv1|bn1|layer\d)\.", k[len(prefix):]) and k.startswith(prefix)}
    for k in [k[:-12] for k in state if k.endswith("running_mean")]:  # the oldest files do not count batches
        state.setdefault(k + "num_batches_tracked", torch.tensor(0))
    if not arch_of(state):
        raise UserError(f"{source}: the ResNet at '{prefix}' is none of {', '.join(ARCHS)}")
    return state

def save_backbone(path, net):
    """Writes the backbone in `net`, bare or wrapped, in torchvision's keys as contiguous float32 CPU tensors; beside
    `path` first and then renamed, so that `path` is never half a file."""
    state = {k: (v.float() if v.is_floating_point() else v).clone(memory_format=torch.contiguous_format)
             for k, v in find_backbone(net.state_dict(), type(net).__name__).items()}
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)

def load_backbone(path):
    """find_backbone of a file: ours, torchvision's, or a checkpoint of a public release. No code in it is run: one that
    asks for more than tensors, numbers, paths, containers and argparse's namespace, or is not finite: UserError."""
    harmless = [argparse.Namespace, (PurePosixPath, "pathlib.PosixPath"), np.dtype,
                *[type(np.dtype(c)) for c in "?bhilqBHILQefd"],
                *[(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]]
    try:
        with torch.serialization.safe_globals(harmless):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # noqa: BLE001 -- a damaged file can lead the reader to any of them
        why, asked = (str(e) or repr(e)).split("\n")[0].split(" In PyTorch")[0], re.search(r"GLOBAL ([\w.]+)", str(e))
        raise UserError(f"{path}: refused, nothing in it was run: it asks for the Python object {asked[1]}; save only "
                        "its state_dict()" if asked else f"{path}: no readable PyTorch checkpoint: {why}") from None
    state = find_backbone(checkpoint, path)
    return state if all(v.isfinite().all() for v in state.values()) else refuse(f"{path}: not all weights are finite")

# ---- what features are worth -----------------------------------------------------------------------------------------
@torch.no_grad()
def features(net, images, indices, *, size, device, batch_size=256, workers=0, desc=None, precision=None):
    """Pooled last map of each of images[indices], and its label: float32 N C (float64 from a float64 network) and
    int64 N, on the CPU. The shorter side is resized to size * 256 / 224 and the central size x size taken; the network
    is in eval mode, and as before afterwards. precision: autocast's dtype or None; desc: a progress bar's title."""
    modes, dtype = [(m, m.training) for m in net.modules()], next(net.parameters()).dtype
    loader = sequential(images, indices, batch_size=batch_size, workers=workers, device=device)
    loader = tqdm(loader, desc, math.ceil(len(indices) / batch_size), leave=False, disable=None if desc else True)
    pooled, labels, _ = [], [], net.eval()
    try:
        for batch in loader:
            box = center_boxes(batch.size, round(size * 256 / 224), size)
            x = normalize(crop(batch.canvas, box, size, dtype=dtype)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(torch.device(device).type, precision, enabled=precision is not None):
                pooled.append(full(net(x)[-1]).mean((2, 3)).cpu())  # B C
            labels.append(batch.label.cpu())
    finally:
        for m, training in modes:
            m.training = training
    return torch.cat(pooled), torch.cat(labels)

@torch.no_grad()
def knn(bank, bank_labels, queries, *, k=20, temperature=0.07, classes, device=None, chunk=(1024, 16384)):
    """Weighted kNN (DINO, eval_knn.py): the k rows of the bank with the highest cosine vote for their class, each with
    exp(cosine / temperature). bank M C, bank_labels M in 0..classes-1, queries N C -> classes, int64 N on the CPU, or
    len(k) N for a list of k; a k above M is M. Of cosines equal to 1e-9 (float32 rounds to 1e-7) the lower row is
    nearer, of equal votes the lower class wins. On `device` (None: the queries'), `chunk` queries x rows at a time."""
    device, ks = device or queries.device, [k] if isinstance(k, int) else list(k)
    queries = F.normalize(full(queries.to(device)), dim=1).split(chunk[0])
    best = [torch.empty(len(q), 0, dtype=torch.int64, device=device) for q in queries]
    for start in tqdm(range(0, len(bank), chunk[1]), "kNN", leave=False, disable=None):
        rows = F.normalize(full(bank[start:start + chunk[1]].to(device)), dim=1)
        number = torch.arange(start, start + len(rows), device=device)
        for i, q in enumerate(queries):  # one integer: the cosine in steps of 2^-30, below it the row; no two are equal
            key = torch.cat([best[i], (q @ rows.T * 2**30).round().long() * 2**32 - number], 1)
            best[i] = key.topk(min(max(ks), key.shape[1])).values  # nearest first
    for i, key in enumerate(best):
        row = -key % 2**32
        cosine, label = (key + row).double() / 2**62, bank_labels.to(device)[row]
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # of the nearest 1: no temperature is too low
        votes = [weight.new_zeros(len(key), classes).scatter_add_(1, label[:, :n], weight[:, :n]) for n in ks]
        best[i] = torch.stack([v.argmax(1) for v in votes]).cpu()
    return torch.cat(best, 1)[0 if isinstance(k, int) else slice(None)]

def refuse(message, local=False):
    """Raises UserError: for the end of a line of checks. local: no other process knows, this one has to speak."""
    error = UserError(message)
    error.local = local
    raise error

# ---- masks of the salient object, and the geometry of a paste (cvsa.py)
def lab(x):
    """sRGB B 3 H W in [0, 1] -> CIE Lab (D65)."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    xyz = torch.tensor([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])
    x, y, z = torch.einsum("kc,bchw->kbhw", upload((xyz / xyz.sum(1, keepdim=True)).to(x.dtype), x.device), linear)
    x, y, z = (torch.where(t > 0.008856, t.clamp_min(1e-6) ** (1 / 3), t * 7.787 + 16 / 116) for t in (x, y, z))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)

def otsu(x, bins=64):
    """The threshold that parts each row of x (B P, in 0..1) best into two classes, from a histogram -> B 1."""
    level = (x * bins).long().clamp(max=bins - 1)
    count = torch.zeros(len(x), bins, dtype=torch.long, device=x.device).scatter_add_(1, level, torch.ones_like(level))
    n, s = count.cumsum(1), (count * torch.arange(bins, device=x.device)).cumsum(1)
    between = (s[:, -1:] * n - n[:, -1:] * s).double().square() / (n * (n[:, -1:] - n)).clamp_min(1)
    return (between.argmax(1, keepdim=True) + 1) / bins

def boundary_masks(canvas, dtype=torch.float32, side=64, ridge=100.0, sigma=0.03):
    """Image-boundary contrast (Zhang et al., ICCV 2015): what differs from the border. canvas B 3 S S uint8 -> B 1 S S
    bool. For each of four border strips (10 % of the side) the pixels' Mahalanobis distances in Lab, scaled to at most
    1; their sum less the largest, as an object may touch one border; blurred, cut by Otsu. choice: 64 x 64 pixels,
    ridge 100 (Lab units squared), about a texture's variance, blur 3 % of the side."""
    b, i, strip = len(canvas), torch.arange(side, device=canvas.device), round(0.1 * side)
    all_of_it = (torch.arange(4, device=canvas.device) // 2).double().expand(b, 4)
    x = lab(crop(canvas, all_of_it, side, kernel="box", dtype=dtype)).flatten(2)[:, None]  # B 1 3 P
    ends = torch.stack([i < strip, i >= side - strip])[:, None].expand(2, side, side)
    strips = torch.cat([ends, ends.mT]).flatten(1)[:, None].to(dtype) / (strip * side)  # 4 1 P
    x = x - (x * strips).sum(3, keepdim=True)  # B 4 3 P
    cov = (x * strips) @ x.mT + ridge * torch.eye(3, dtype=dtype, device=x.device)
    far = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(cov)[0], x, upper=False).norm(dim=2)  # B 4 P
    far = far / far.amax(2, keepdim=True).clamp_min(0.01)  # less, here and below, is rounding and no contrast
    far = blur((far.sum(1) - far.amax(1)).view(b, 1, side, side), far.new_full((b,), sigma * side)).flatten(1)
    far = far - far.amin(1, keepdim=True)
    far = far / far.amax(1, keepdim=True).clamp_min(0.01)
    return crop(far.view(b, 1, side, side), all_of_it, canvas.shape[2], kernel="bilinear") > otsu(far)[..., None, None]

def find_masks(batch, source="boundary", dtype=torch.float32, grey=False):
    """-> mask B 1 S S bool, empty if under 1 % or over 90 % of the image; box B 2 2 around it, in fractions (low and
    high ends, x y), the whole without a mask; usable B bool. source: boundary, truth, a folder (grey: no numbers)."""
    mask = boundary_masks(batch.canvas, dtype) if source == "boundary" else (batch.mask > 0) & (batch.mask < 255)
    if source not in ("boundary", "truth"):  # numbers up to 127 with 255 as void; else grey, as detectors write it
        low, high = ((mask & part).amax((1, 2, 3), keepdim=True) for part in (batch.mask <= 127, batch.mask > 127))
        mask = torch.where(low & ~high & (not grey), mask, batch.mask > 127)
    share = mask.double().mean((1, 2, 3))
    usable, box = (share >= 0.01) & (share <= 0.9), []  # choice: less shows nothing to learn, more no ground
    for axis in (2, 3):
        below = mask.sum((1, axis)).cumsum(1) / mask.sum((1, 2, 3))[:, None].clamp_min(1)
        box.append(torch.stack([(below <= 0.02).sum(1), (below < 0.98).sum(1) + 1], 1).double() / mask.shape[2])
    box = torch.stack(box, 2)
    pad = 0.1 * (box[:, 1:] - box[:, :1])  # choice: percentiles 2 to 98 of columns and rows, 10 % more on each side
    box, whole = torch.cat([box[:, :1] - pad, box[:, 1:] + pad], 1), torch.arange(2, device=box.device)[:, None]
    return mask & usable[:, None, None, None], torch.where(usable[:, None, None], box.clamp(0, 1), whole), usable

def place_matrix(source, target, frame, n_out, n_in, dtype):
    """One axis of a paste, intervals B 2: rows (B n_out n_in) that show, in a view of the host's `frame` (high to low:
    mirrored), another image's `source` resized to lie at `target` (bicubic, antialiased, nothing from beyond), zeros
    elsewhere; and which of the view's pixels lie there, B n_out bool."""
    i, pixel = (torch.arange(n, device=frame.device, dtype=frame.dtype) + 0.5 for n in (n_out, n_in))
    (s0, s1), (t0, t1), (f0, f1) = (x[:, :, None].unbind(1) for x in (source * n_in, target, frame))  # B 1
    at, rate = f0 + i / n_out * (f1 - f0), (s1 - s0) / (t1 - t0)
    there, middle, scale = (at >= t0) & (at < t1), s0 + (at - t0) * rate, (rate * (f1 - f0).abs() / n_out).clamp_min(1)
    weight = (2 - (pixel.to(dtype) - middle.to(dtype)[..., None]).abs() / scale.to(dtype)[..., None]).clamp(0)
    near = (weight - 1).clamp(0)  # Keys' cubic, a = -0.5, by the distance to its end
    weight = weight ** 2 * (weight - 1) / 2 + near ** 2 * (1 - 2 * near)
    weight *= (torch.minimum(pixel + 0.5, s1) - torch.maximum(pixel - 0.5, s0)).clamp(0).to(dtype)[:, None]
    return weight / weight.sum(2, keepdim=True).clamp_min(1e-12) * there[..., None], there

@torch.no_grad()
def center_views(images, indices, size, net, pick=lambda out: out, batch_size=128):
    """Evaluation's views of some images and what `net`, in eval mode (restored), makes of them: for pictures and dense
    measures. -> views N 3 size size in [0, 1]; masks N 1 size size uint8 (N 0 .. where there are none), the nearest
    pixel, no mixing of classes; pick(net(normalised views)), a tensor; all on the CPU."""
    weight, modes, found, _ = next(net.parameters()), [(m, m.training) for m in net.modules()], [], net.eval()
    for batch in sequential(images, indices, batch_size=batch_size, workers=0, device="cpu"):
        box, side = center_boxes(batch.size, round(size * 256 / 224), size), batch.mask.shape[-1]
        view, step = crop(batch.canvas, box, size, dtype=weight.dtype), (torch.arange(size) + 0.5) / size
        x, y = ((box[:, i, None] + step * (box[:, i + 2] - box[:, i])[:, None]).mul(side).long() for i in (0, 1))
        mask = batch.mask[torch.arange(len(view))[:, None, None], :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)
        found.append((view, mask, pick(net(normalize(view.to(weight.device)))).cpu()))
    for m, training in modes:
        m.training = training
    return [torch.cat(part) for part in zip(*found)]

def knn_probe(net, images, split, size, device, half, workers=0):
    """{"knn": accuracy in %}, weighted kNN (k = 20, T = 0.07) on the pooled last map; {} where no two labels differ."""
    bank, queries, asked = split
    if len(images.classes) < 2 or not images.source.scene and len(images.labels.unique()) < 2:
        return {}
    (x, y), (q, truth) = (features(net, source, rows, size=size, device=device, precision=half, workers=workers)
                          for source, rows in ((images, bank), (queries, asked)))
    return {"knn": 100 * (knn(x, y, q, k=20, classes=len(images.classes)) == truth).double().mean().item()}

def check_args(args):
    """Refuses, with the remedy, what can be told wrong before anything starts. Sets workers and what "auto" is here."""
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    above = ("image_size", "canvas", "batch_size", "epochs", "steps", "lr", "blur", "save_every", "log_every",
             "timeout_minutes")
    for name, value in vars(args).items():
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
        if not all(0 < v < 1e18 if name in above else 0 <= v < 1e18 for v in numbers):
            refuse(f"--{name.replace('_', '-')} {value} must be {'above 0' if name in above else '0 or more'} (< 1e18)")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.precision == "auto":                 # settled before it is compared: a run goes on in the one it began with
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        args.precision = "bf16" if fast else "fp32"
    if args.workers is None:
        args.workers = max(0, min(8, len(os.sched_getaffinity(0)) // local - 1))
    if args.batch_size % (4 * world):
        fit = max(1, round(args.batch_size / (4 * world))) * 4 * world
        refuse(f"--batch-size {args.batch_size} must be a multiple of 4 x {world} process(es): try {fit}")
    if not args.image_size <= args.canvas <= 16384:
        refuse(f"--canvas {args.canvas} is below --image-size or above 16384: try {args.image_size * 3 // 2}")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch sees no CUDA GPU; leave the flag out to train on the CPU")
    if cuda and local > torch.cuda.device_count():
        refuse(f"{local} processes for {torch.cuda.device_count()} GPU(s): lower --nproc_per_node")
    if args.init and (arch := arch_of(load_backbone(args.init))) != args.arch:
        refuse(f"--init {args.init} holds a {arch}: give --arch {arch}, not {args.arch}")
    if args.fresh and local < world and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        refuse("--fresh with --max-restarts on several nodes would start over each time: remove the .pt files instead")
    folder = next(f for f in (Path(args.out).absolute(), *Path(args.out).absolute().parents) if f.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        refuse(f"--out {args.out}: {folder} is no folder that can be written to; name another")

def numerics(precision, device, deterministic):
    """-> dtype of weights and views, of autocast (None: off), gradient scaler (fp16 only). fp32: no TF32. No "auto"."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = not deterministic, precision != "fp32"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "fp64": None}[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return torch.float64 if precision == "fp64" else torch.float32, half, scaler

def training_arguments(parser):
    """The flags of the loop, the same in all method scripts."""
    g = parser.add_argument_group("training")
    g.add_argument("--batch-size", type=int, help="images a step over ALL processes; a multiple of 4 x processes")
    g.add_argument("--epochs", type=float, help="length of the run")
    g.add_argument("--steps", type=int, help="length in steps instead; all that is given in epochs stretches with it")
    g.add_argument("--optimizer", choices=("lars", "sgd", "adamw"))
    g.add_argument("--lr", type=float, help="for 256 images: the rate in use is lr x batch / 256")
    g.add_argument("--final-lr", type=float, default=0.0, help="where the cosine ends; not scaled by the batch")
    g.add_argument("--weight-decay", type=float, help="on all weights or not on biases and norms, by recipe")
    g.add_argument("--warmup-epochs", type=float, help="linear rise of the rate at the start")
    g.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 if fast, else fp32")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks: a slow start; no gain on 2 CPUs")
    g.add_argument("--deterministic", action="store_true", help="the same bits again on a GPU, too; slower")
    g.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--jitter", type=float, nargs=4, metavar=("B", "C", "S", "H"), default=[0.4, 0.4, 0.2, 0.1],
                   help="strengths in brightness, contrast, saturation, hue (0.5: any hue); default 0.4 0.4 0.2 0.1")
    g.add_argument("--init", default="", help="start the encoder from these weights")
    g.add_argument("--out", default="", help="folder of the run, default runs/SCRIPT-PRESET; a run there goes on")
    g.add_argument("--fresh", action="store_true", help="start over instead")
    g.add_argument("--save-every", type=int, help="steps between checkpoints")
    g.add_argument("--log-every", type=int, help="steps between log lines; only there signals are heeded")
    g.add_argument("--knn-every", type=float, help="epochs between kNN figures and pictures; 0: at start and end only")
    g.add_argument("--timeout-minutes", type=float, default=30, help="how long a process waits for another")

def parse_preset(parser, argv, presets, default, method):
    """Flags over preset over defaults -> checked arguments. Without --preset: "demo" on scenes, else `default`."""
    parser.error = lambda message: refuse(f"{message}: see --help")  # one line instead of argparse's usage and a line
    args = parser.parse_args(argv)
    scenes = args.data.split(":")[0] in ("", "scenes", "scenes-fine")
    args.preset = args.preset or ("demo" if scenes else default)
    parser.set_defaults(**presets[args.preset])
    args = parser.parse_args(argv, argparse.Namespace(preset=args.preset))
    args.out = args.out or f"runs/{method}-{args.preset}"
    check_args(args)
    return args

def rendezvous(minutes):
    """Arguments of `init_process_group` under torchrun, which keeps one store over its --max-restarts: addresses of the
    dead in it mislead (pytorch's issues 135712 and 167288). So each process leaves a fresh token there, rank 0 answers
    it with this attempt's name, and the group's keys begin with that. Raises TimeoutError."""
    limit, rank, world = timedelta(minutes=minutes), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"timeout": limit}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    name, end = os.urandom(8).hex(), time.monotonic() + 60 * minutes
    store.set(f"token of rank {rank}", name)
    while not store.check([f"answer to {name}"]) if rank else store.add(f"ranks in {name}", 0) < world - 1:
        if time.monotonic() > end:
            raise TimeoutError(f"not all {world} processes came together in --timeout-minutes {minutes}")
        for token in (f"token of rank {r}" for r in range(1, 1 if rank else world)):
            if store.check([token]):                        # of an earlier attempt as well: nobody waits for its answer
                store.set(f"answer to {store.get(token).decode()}", name)
        time.sleep(0.1 if rank else 0.02)
    name = store.get(f"answer to {name}").decode() if rank else name
    store.add(f"ranks in {name}", int(rank > 0))
    return {"timeout": limit, "store": dist.PrefixStore(name, store), "rank": rank, "world_size": world}

def run_script(train, parse_args):
    """train(parse_args()); a user's mistake becomes one line on stderr, a node, and exit status 2."""
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # DDP's new name for it is unknown to torch 2.11
    try:
        train(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()         # not after an error: NCCL would wait for the others
    except (UserError, OSError, ImportError, RuntimeError) as error:
        torchs, why = isinstance(error, RuntimeError), [TROUBLES[words] for words in TROUBLES if words in str(error)]
        if torchs and not why:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "local", torchs or isinstance(error, OSError)):
            print(f"{Path(sys.argv[0]).name}: {why[0] if torchs else error}", file=sys.stderr)
        sys.exit(2)
    finally:
        for worker in torch.multiprocessing.active_children():       # they ignore SIGTERM, with which the interpreter
            worker.kill()                                            # ends them; then it waits: after a crash, for ever

def settings_of(args, images):
    """What a run's numbers hang on, beyond rounding, files by content: a checkpoint with other values is refused."""
    free = {"data", "cache", "workers", "out", "fresh", "save_every", "log_every", "knn_every", "timeout_minutes",
            "device", "compile", "deterministic", "preset"}
    init = f"sha256 {hashlib.sha256(Path(args.init).read_bytes()).hexdigest()[:16]}" if args.init else ""
    return {k: v for k, v in vars(args).items() if k not in free} | {"images": images.fingerprint, "init": init}

def run_length(args, n):
    """Steps an epoch of n images, steps in all, stretch of epochs by --steps (else 1): int(epochs * both + 1e-6)."""
    epoch = n // args.batch_size or refuse(f"{n} images do not fill a batch of {args.batch_size}: lower --batch-size")
    total = args.steps or max(1, int(args.epochs * epoch + 1e-6))
    return epoch, total, total / (args.epochs * epoch) if args.steps else 1.0

def heed_signals():
    """-> the list to which SIGTERM, SIGINT and SIGUSR1 append their numbers from now on; they end nothing."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught

def agree(signals, bad_step, unreadable, n):
    """What any process saw, told to all: signals caught; the first step that was not finite, a tensor, or 0; unreadable
    images of n, {index: "name: why"}. -> a signal's number or 0, how many images were lost. Ends the run, with a
    UserError, after a step that was not finite or when over 5 and over 1 % of the images, or all, are lost."""
    seen = [[max(signals, default=0), int(bad_step), unreadable]]
    if dist.is_initialized():
        mine, seen = seen[0], [None] * dist.get_world_size()
        dist.all_gather_object(seen, mine)
    signals, bad_steps, names = zip(*seen)
    bad, names = min((s for s in bad_steps if s), default=0), {i: why for some in names for i, why in some.items()}
    if bad:
        refuse(f"loss or gradient not finite at step {bad}, nothing saved since: lower --lr or try --precision fp32")
    if len(names) > min(n - 1, max(5, n // 100)):
        refuse(f"{len(names)} of {n} images could not be read, such as {next(iter(names.values()))}: mend the data")
    return max(signals), len(names)
