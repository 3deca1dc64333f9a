"""Views against Pillow, torchvision and brute force."""
import colorsys
import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms import ColorJitter, RandomResizedCrop

import common as c

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def boxes_of_pixels(n, h, w, seed, smallest=1):
    """n random boxes of whole pixels, as pixels (x0 y0 x1 y1)."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(smallest, (w + 1, h + 1), (n, 2))
    corner = (rng.random((n, 2)) * (np.array([w, h]) - sides + 1)).astype(int)
    return torch.from_numpy(np.concatenate([corner, corner + sides], 1))


def test_uniforms_depend_on_the_numbers_alone():
    a = c.uniforms(3, 17, 8, 5)
    assert a.shape == (8, 5) and a.dtype == torch.float64 and 0 <= a.min() and a.max() < 1
    assert torch.equal(a, c.uniforms(3, 17, 8, 5))
    others = [c.uniforms(4, 17, 8, 5), c.uniforms(3, 18, 8, 5), c.uniforms(3, 17, 8, 5, stream=1)]
    assert not any(torch.equal(a, b) for b in others)
    orders = [tuple(c.jitter_order(0, step, view)) for step in range(200) for view in (0, 1)]
    assert set(map(tuple, map(sorted, orders))) == {(0, 1, 2, 3)} and len(set(orders)) == 24
    assert orders[::2] != orders[1::2]


# ---- resize --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 2e-6)])   # Pillow's F is float32
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_crops_of_whole_pixels_are_pillows(kernel, dtype, tolerance, device):
    h, w, n = 61, 83, 24
    x = rand(n, 2, h, w, seed=1)
    for seed, size in ((0, (16, 24)), (1, (64, 64)), (2, (7, 1)), (3, (200, 90))):               # down, both, up
        pixels, flip = boxes_of_pixels(n, h, w, seed), torch.arange(n) % 2 == 1
        ours = c.crop(x.to(device, dtype), pixels / torch.tensor([w, h, w, h]).double(), size, flip, kernel).cpu()
        assert ours.dtype == dtype
        for i, box in enumerate(pixels.tolist()):
            for k in range(2):
                picture = Image.fromarray(x[i, k].float().numpy()).crop(box).resize(size[::-1], PILLOW[kernel])
                theirs = torch.from_numpy(np.array(picture)).clamp(0, 1)
                theirs = theirs.flip(1) if flip[i] else theirs
                assert (ours[i, k] - theirs).abs().max() < tolerance


def test_whole_image_is_interpolates_antialias():
    x = rand(2, 3, 50, 70)
    box = torch.tensor([[0.0, 0, 1, 1]] * 2, dtype=torch.float64)
    theirs = F.interpolate(x, (20, 33), mode="bilinear", antialias=True)
    assert torch.allclose(c.crop(x, box, (20, 33), kernel="bilinear"), theirs, atol=1e-12)
    theirs = F.interpolate(x, (20, 33), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(c.crop(x, box, (20, 33)), theirs, atol=1e-12)


def test_box_kernel_is_the_exact_area_average():
    """Against an integral image, at fractional boxes, shrinking and stretching; and Pillow's BOX at whole factors."""
    n, side = 40, 23
    x, ends = rand(n, 1, side, side), rand(n, 2, seed=5).sort(1).values
    for size in (3, 8, 60):
        wx = c.resize_matrix(ends[:, 0], ends[:, 1], size, side, kernel="box")
        for i in range(n):
            integral = np.concatenate([[0], x[i, 0, 0].cumsum(0).numpy()])
            edges = np.interp(np.linspace(*(ends[i] * side).tolist(), size + 1), np.arange(side + 1), integral)
            average = np.diff(edges) / (float(ends[i, 1] - ends[i, 0]) * side / size)
            assert np.abs((wx[i] @ x[i, 0, 0]).numpy() - average).max() < 1e-9
    picture = Image.fromarray(x[0, 0].float().numpy()).crop((2, 5, 18, 21)).resize((4, 8), PILLOW["box"])
    ours = c.crop(x[:1], torch.tensor([[2, 5, 18, 21]]).double() / side, (8, 4), kernel="box")[0, 0]
    assert np.abs(ours.numpy() - np.array(picture)).max() < 1e-6


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "box"])
def test_resize_rows_sum_to_one_flip_reverses_and_boxes_move_continuously(kernel):
    lo, hi = rand(64, 2, seed=2).sort(1).values.unbind(1)
    for n_out, n_in in ((8, 40), (30, 11), (5, 5), (4, 1)):
        w = c.resize_matrix(lo, hi, n_out, n_in, kernel=kernel)
        assert w.shape == (64, n_out, n_in) and torch.allclose(w.sum(2), torch.ones(64, n_out, dtype=w.dtype))
        flip = torch.arange(64) % 2 == 0
        flipped = c.resize_matrix(lo, hi, n_out, n_in, flip, kernel)
        assert torch.equal(flipped, torch.where(flip[:, None, None], w.flip(1), w))
        nudged = c.resize_matrix(lo, (hi + 1e-9).clamp(max=1), n_out, n_in, kernel=kernel)
        wide = hi - lo > 0.01
        assert (nudged - w)[wide].abs().max() < 1e-5
    assert c.resize_matrix(hi, lo, 4, 9, kernel=kernel).abs().max() == 0                       # an empty box


def test_resample_is_the_formula_in_both_orders_and_differentiable():
    for h, w, hh, ww in ((5, 9, 3, 4), (9, 5, 4, 12), (6, 6, 8, 2)):
        x, wy, wx = rand(2, 2, h, w), rand(2, hh, h, seed=1), rand(2, ww, w, seed=2)
        assert torch.allclose(c.resample(x, wy, wx), torch.einsum("bchw,bih,bjw->bcij", x, wy, wx), atol=1e-13)
        leaves = [t.requires_grad_() for t in (x, wy, wx)]
        assert torch.autograd.gradcheck(c.resample, leaves, fast_mode=True)
    assert c.resample(x.float(), wy, wx).dtype == torch.float32


def test_uint8_and_float_agree_and_bicubic_is_clamped():
    x = (rand(3, 3, 40, 40) > 0.5).to(torch.uint8) * 255                              # hard edges: bicubic overshoots
    box = torch.tensor([[0.1, 0.2, 0.9, 0.7]] * 3, dtype=torch.float64)
    a, b = c.crop(x, box, 32, dtype=torch.float64), c.crop(x.double() / 255, box, 32)
    assert a.dtype == torch.float64 and torch.allclose(a, b, atol=1e-12) and c.crop(x, box, 32).dtype == torch.float32
    assert a.min() == 0 and a.max() == 1
    assert c.crop(b * 100, box, 8, kernel="bilinear").max() > 1                           # a map is not an image


def test_a_mask_in_a_spare_channel_moves_with_its_pixels():
    """Each channel of [image, mask] is what it would be alone, and the mask's edge follows the image's."""
    x = torch.zeros(8, 4, 60, 80, dtype=torch.float64)
    x[:, :, 20:41, 33:57] = 1
    u, flip = rand(8, 40), torch.arange(8) % 2 == 0
    box = c.random_boxes(u, torch.tensor([[60, 80]] * 8), (0.4, 1.0))
    both = c.crop(x, box, 48, flip, kernel="bilinear")
    assert torch.equal(both[:, 0], both[:, 3])
    mask = c.crop(x[:, 3:], box, 48, flip, kernel="box")[:, 0] > 0.5
    for i, (x0, y0, x1, y1) in enumerate(box.tolist()):                              # where the rectangle must land
        at_x, at_y = ([a + (j + 0.5) / 48 * (b - a) for j in range(48)] for a, b in ((x0, x1), (y0, y1)))
        at_x = at_x[::-1] if flip[i] else at_x
        inside = torch.tensor([[33 <= 80 * a < 57 and 20 <= 60 * b < 41 for a in at_x] for b in at_y])
        assert (inside != mask[i]).double().mean() < 0.02 and inside.any()


# ---- inverse augmentation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cells", [2, 5, 7, 14])
def test_point_matrix_is_roi_align_and_grid_sample(cells, device):
    n = 64
    x = rand(n, 6, cells, cells, seed=cells)
    box = rand(n, 2, 2, seed=1).sort(1).values.flatten(1)                                                 # x0 y0 x1 y1
    box[:8] = torch.tensor([0.0, 0, 1, 1])                                                           # full
    box[8:16, 2] = box[8:16, 0] + 1e-4                                                               # thin
    box[16:20, 2] = box[16:20, 0]                                                                    # empty in x
    box[20:24, 3] = box[20:24, 1]                                                                    # empty in y
    flip = torch.arange(n) % 3 == 0
    x, box, flip = x.to(device), box.to(device), flip.to(device)
    ours = c.resample(x, c.point_matrix(box[:, 1], box[:, 3], cells, cells),
                      c.point_matrix(box[:, 0], box[:, 2], cells, cells, flip))
    rois = torch.cat([torch.arange(n, device=device, dtype=x.dtype)[:, None], box * cells], 1)
    theirs = roi_align(x, rois, cells, spatial_scale=1.0, sampling_ratio=-1, aligned=True)
    theirs = torch.where(flip[:, None, None, None], theirs.flip(3), theirs)
    assert (ours - theirs).abs().max() < 1e-9
    assert ours[16:24].abs().max() == 0
    i = (torch.arange(cells, device=device, dtype=x.dtype) + 0.5) / cells
    at_x, at_y = (box[:, k, None] + i * (box[:, k + 2] - box[:, k])[:, None] for k in (0, 1))
    at_x = torch.where(flip[:, None], at_x.flip(1), at_x)
    grid = torch.stack([at_x[:, None].expand(n, cells, cells), at_y[:, :, None].expand(n, cells, cells)], 3) * 2 - 1
    sampled = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
    meets = (box[:, 2:] > box[:, :2]).all(1)
    assert (ours - sampled)[meets].abs().max() < 1e-12


def test_point_matrix_is_differentiable():
    x, flip = rand(3, 2, 4, 4).requires_grad_(), torch.tensor([True, False, True])
    box = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.3, 0.3, 0.6, 1.0], [0.5, 0.5, 0.4, 0.9]], dtype=torch.float64)
    box.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, box: c.resample(
        x, c.point_matrix(box[:, 1], box[:, 3], 4, 4), c.point_matrix(box[:, 0], box[:, 2], 4, 4, flip)), (x, box))


# ---- boxes ---------------------------------------------------------------------------------------------------------
def distance(a, b):
    """Kolmogorov-Smirnov statistic of two samples."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


@pytest.mark.parametrize("h, w, scale", [(480, 640, (0.08, 1.0)), (375, 210, (0.2, 1.0)), (40, 30, (0.05, 0.14)),
                                         (30, 400, (0.05, 1.0))])
def test_boxes_have_torchvisions_law(h, w, scale):
    n = 4000
    ours = c.random_boxes(c.uniforms(0, h, n, c.RRC_COLUMNS), torch.tensor([[h, w]] * n), scale)
    pixels = ours * torch.tensor([w, h, w, h]).double()
    assert torch.allclose(pixels, pixels.round(), atol=1e-9)                                       # whole pixels
    assert ours.min() >= 0 and ours.max() <= 1 and (ours[:, 2:] > ours[:, :2]).all()
    torch.manual_seed(1)
    blank, x = torch.empty(1, h, w), []
    for _ in range(n):
        x.append(RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]))                    # top left h w
    top, left, ch, cw = np.array(x, float).T
    x0, y0, x1, y1 = pixels.round().numpy().T
    for name, a, b in (("area", (x1 - x0) * (y1 - y0), ch * cw), ("ratio", (x1 - x0) / (y1 - y0), cw / ch),
                       ("left", x0, left), ("top", y0, top), ("right", x1, left + cw), ("centre", x0 + y0, left + top)):
        assert distance(a, b) < 1.95 * math.sqrt(2 / n), name                    # p = 0.001; the draws are fixed


def test_very_thin_images_fall_back_to_torchvisions_centre():
    for h, w in ((4, 900), (900, 4), (7, 100), (301, 3)):
        ours = c.random_boxes(rand(3, 40), torch.tensor([[h, w]] * 3), (0.9, 1.0))
        top, left, ch, cw = RandomResizedCrop.get_params(torch.empty(1, h, w), [0.9, 1.0], [3 / 4, 4 / 3])
        expected = torch.tensor([left / w, top / h, (left + cw) / w, (top + ch) / h], dtype=torch.float64)
        assert torch.allclose(ours, expected.expand(3, 4), atol=1e-12)


def try_boxes(u, h, w, scale, other=None, least=0.0):
    """Ten tries, one after the other; None when all fail. The plain reading of slotcon.md 1.8."""
    for area, log_ratio, top, left in u.view(10, 4).tolist():
        target = h * w * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(math.log(3 / 4) + log_ratio * (math.log(4 / 3) - math.log(3 / 4)))
        cw, ch = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if not (0 < cw <= w and 0 < ch <= h):
            continue
        y0, x0 = int(top * (h - ch + 1)), int(left * (w - cw + 1))
        if other is not None:
            wide, tall = min(x0 + cw, other[2]) - max(x0, other[0]), min(y0 + ch, other[3]) - max(y0, other[1])
            if max(wide, 0) * max(tall, 0) < least * target:
                continue
        return [x0, y0, x0 + cw, y0 + ch]


def test_overlapping_boxes_are_the_plain_loops():
    rng, n = random.Random(0), 400
    sizes = [(rng.randint(30, 640), rng.randint(30, 640)) for _ in range(n)]
    u, scale, freed = c.uniforms(0, 0, n, 120), (0.02, 0.5), 0
    size = torch.tensor(sizes)
    first = c.random_boxes(u[:, :40], size, scale)
    for least in (0.01, 0.5, 0.98):
        ours = c.random_boxes_overlapping(u[:, 40:], size, scale, first, least=least)
        for i, (h, w) in enumerate(sizes):
            side = torch.tensor([w, h, w, h]).double()
            box = try_boxes(u[i, 40:80], h, w, scale, (first[i] * side).round().tolist(), least)
            freed += box is None
            box = box or try_boxes(u[i, 80:], h, w, scale)
            if box is not None:
                assert torch.allclose(ours[i] * side, torch.tensor(box).double(), atol=1e-8)
    assert 50 < freed < 3 * n - 50                                                  # both ways were taken


def test_overlap_rectangles_show_the_same_place():
    """Paint every pixel with its coordinates, crop, flip and align: both views must then read the same coordinates."""
    n, cells = 100, 9
    at = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    paint = torch.stack([at.expand(300, 300), at[:, None].expand(300, 300)]).expand(n, 2, 300, 300)      # x, y
    size = torch.tensor([[300, 300]] * n)
    boxes = [c.random_boxes(rand(n, 40, seed=s), size, (0.05, 0.4)) for s in (0, 1)]
    flips = [rand(n, seed=s) < 0.5 for s in (2, 3)]
    rectangles = c.overlap_rectangles(boxes[0], flips[0], boxes[1], flips[1])
    aligned = []
    for box, flip, rect in zip(boxes, flips, rectangles):
        view = c.crop(paint, box, 100, flip, kernel="bilinear")
        aligned.append(c.resample(view, c.point_matrix(rect[:, 1], rect[:, 3], cells, 100),
                                  c.point_matrix(rect[:, 0], rect[:, 2], cells, 100, flip)))
    lo, hi = torch.maximum(boxes[0][:, :2], boxes[1][:, :2]), torch.minimum(boxes[0][:, 2:], boxes[1][:, 2:])
    meets = (hi > lo).all(1)
    assert 20 < meets.sum() < n - 10
    for rect, view in zip(rectangles, aligned):
        assert torch.equal((rect[:, 2:] > rect[:, :2]).all(1), meets) and (rect[~meets, 2:] <= rect[~meets, :2]).all()
        assert view[~meets].abs().max() == 0
    i = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    truth = (lo[..., None] + i * (hi - lo)[..., None])[meets]                                    # m 2 cells
    pixel = 1 / 300                               # at a view's border the outermost half pixel of 100 repeats
    for view in aligned:
        assert (view[meets][:, 0] - truth[:, 0][:, None]).abs().max() < 1.5 * pixel
        assert (view[meets][:, 1] - truth[:, 1][:, :, None]).abs().max() < 1.5 * pixel


def test_center_boxes_are_torchvisions_resize_and_centre_crop():
    for h, w in ((480, 640), (333, 500), (500, 333), (256, 256), (57, 301)):
        at = torch.stack(torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")).double()
        theirs = tvf.center_crop(tvf.resize(at[None], 256, antialias=True), 224)[0]
        box = c.center_boxes(torch.tensor([[h, w]]))
        ours = c.crop(at[None], box, 224, kernel="bilinear")[0]
        inner = slice(30, -30)                                        # away from borders, where the filters are cut
        assert (ours - theirs)[:, inner, inner].abs().max() < 2e-3 * max(h, w) / 224


# ---- photometry ----------------------------------------------------------------------------------------------------
def photo(n=6, side=40, seed=0):
    """Images with flat, grey, black, white and saturated patches among noise: hue's special cases."""
    x = rand(n, 3, side, side, seed=seed)
    x[:, :, :5], x[:, :, 5:8], x[:, :, 8:10] = x[:, :1, :5], 0, 1
    x[:, 0, 10:13], x[:, 1, 13:16], x[:, 2, 16:19] = 1, 1, 0
    x[:, 1:, 19:22], x[:, :2, 22:24] = x[:, 1:2, 19:22], x[:, :1, 22:24]
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 2e-6)])
def test_single_operations_are_torchvisions(dtype, tolerance, device):
    x = photo().to(device, dtype)
    factors = torch.tensor([0.0, 0.6, 0.93, 1.0, 1.4, 2.0], dtype=dtype, device=device)
    shifts = torch.tensor([-0.5, -0.1, 0.0, 0.037, 0.1, 0.5], dtype=dtype, device=device)
    for name in ("brightness", "contrast", "saturation", "hue"):
        ours, theirs = getattr(c, f"adjust_{name}"), getattr(tvf, f"adjust_{name}")
        values = shifts if name == "hue" else factors
        before, out = x.clone(), ours(x, values)
        expected = torch.stack([theirs(a, v) for a, v in zip(x, values.tolist())])
        assert out.dtype == dtype and (out - expected).abs().max() < tolerance, name
        assert torch.equal(x, before)
    assert (c.grey(x) - tvf.rgb_to_grayscale(x)).abs().max() < tolerance
    assert torch.equal(c.solarize(x), tvf.solarize(x, 128 / 255))
    levels = torch.arange(256, dtype=dtype, device=device) / 255                       # Pillow keeps 127, inverts 128
    assert torch.equal(c.solarize(levels) != levels, torch.arange(256, device=device) >= 128)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert (c.normalize(x) - tvf.normalize(x, mean, std)).abs().max() < tolerance


def test_hue_is_colorsys_in_float64():
    """torchvision's own float64 hue is good to 7e-7 only."""
    x = photo(2, 26)
    ours = c.adjust_hue(x, torch.tensor([0.037, -0.4], dtype=x.dtype))
    for i, shift in enumerate((0.037, -0.4)):
        for before, after in zip(x[i].flatten(1).T.tolist(), ours[i].flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert np.abs(np.subtract(after, colorsys.hsv_to_rgb((h + shift) % 1, s, v))).max() < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_blur_is_torchvisions_with_a_wide_kernel(dtype, tolerance, device):
    x, sigma = rand(4, 3, 32, 45).to(device, dtype), [0.1, 0.7, 1.3, 2.0]
    ours = c.blur(x, torch.tensor(sigma, dtype=dtype, device=device))
    theirs = torch.stack([tvf.gaussian_blur(a, 2 * math.ceil(7 * s) + 1, s) for a, s in zip(x, sigma)])
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_photometry_is_the_chain_of_single_operations(device):
    """A plain loop over images with torchvision's functions, the same draws; whom no draw meets is untouched."""
    n, order, jitter = 48, [3, 1, 0, 2], (0.4, 0.3, 0.2, 0.1)
    x, u = photo(n, 36).to(device), c.uniforms(0, 0, n, c.PHOTO_COLUMNS)
    kept, p = x.clone(), {"p_jitter": 0.6, "p_grey": 0.3, "p_blur": 0.5, "p_solarize": 0.4}
    ours = c.photometry(x, u, order, jitter=jitter, **p)
    assert torch.equal(x, kept)
    counts = np.zeros(4)
    for i, draw in enumerate(u.tolist()):
        y, does = x[i], [draw[4] < 0.6, draw[5] < 0.3, draw[6] < 0.5, draw[8] < 0.4]
        counts += does
        for k in order if does[0] else ():
            change = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)[k]
            y = change(y, (k != 3) + jitter[k] * (2 * draw[k] - 1))
        y = tvf.rgb_to_grayscale(y, 3) if does[1] else y
        y = tvf.gaussian_blur(y, 29, 0.1 + 1.9 * draw[7]) if does[2] else y
        y = tvf.solarize(y, 128 / 255) if does[3] else y
        y = tvf.normalize(y, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert (ours[i] - y).abs().max() < 1e-5 or does[3]
        assert ((ours[i] - y).abs() < 1e-5).double().mean() > 0.999         # at solarise's threshold one ulp decides
        if not any(does):
            assert torch.equal(ours[i], c.normalize(x[i:i + 1])[0])
    assert counts.min() > 5 and counts.max() < n - 5


def test_photometry_leaves_out_what_has_no_chance_and_works_in_any_precision():
    x, u = photo(5), c.uniforms(1, 2, 5, c.PHOTO_COLUMNS)
    nothing = c.photometry(x, u, [0, 1, 2, 3], p_jitter=0, p_grey=0)
    assert torch.equal(nothing, c.normalize(x))
    half = c.photometry(x.float(), u, [0, 1, 2, 3], p_jitter=1, p_blur=1)
    full = c.photometry(x, u, [0, 1, 2, 3], p_jitter=1, p_blur=1)
    assert half.dtype == torch.float32 and full.dtype == torch.float64 and (half - full).abs().max() < 1e-4
    assert torch.equal(full, c.photometry(x, u, [0, 1, 2, 3], p_jitter=1, p_blur=1))
    still = c.photometry(x, u, [0, 1, 2, 3], jitter=(0, 0, 0, 0), p_jitter=1, p_grey=0)
    assert torch.equal(still, nothing)
    rows = torch.cat([c.photometry(x[i:i + 1], u[i:i + 1], [2, 3, 1, 0]) for i in range(5)])     # rows do not mix
    assert torch.allclose(rows, c.photometry(x, u, [2, 3, 1, 0]), atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_never_wait_for_the_device():
    canvas = (rand(8, 3, 64, 64) * 255).to(torch.uint8).cuda()
    u, size = c.uniforms(0, 0, 8, 40 + c.PHOTO_COLUMNS), torch.tensor([[48, 64]] * 8)
    box, flip = c.random_boxes(u[:, :40], size, (0.2, 1)), u[:, 0] < 0.5
    c.photometry(c.crop(canvas, box, 32, flip), u[:, 40:], [0, 1, 2, 3], p_blur=0.5, p_solarize=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        c.photometry(c.crop(canvas, box, 32, flip), u[:, 40:], [0, 1, 2, 3], p_blur=0.5, p_solarize=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_box_has_at_least_a_pixel():
    found = c.random_boxes(c.uniforms(0, 0, 50, 40), torch.tensor([[1, 1]] * 50), (0.05, 0.2))
    assert torch.equal(found, torch.tensor([[0.0, 0, 1, 1]]).double().expand(50, 4))


def test_factors_end_at_zero():
    x, u = torch.rand(1, 3, 8, 8).double(), torch.zeros(1, 9).double()
    flat = c.photometry(x, u, [1], jitter=(0, 1.5, 0, 0), p_jitter=1, p_grey=0)  # 0 and not 1 - 1.5
    assert ColorJitter(contrast=1.5).contrast == (0, 2.5)
    assert torch.allclose(flat, c.normalize(c.grey(x).mean().expand(1, 3, 8, 8)))
