"""saliency_cl.py against slow, literal transcriptions of its equations, in float64."""
import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.utils import save_image

import common
import saliency_cl
from common import Batch, UserError, crop, normalize, sync_batchnorm

B, K, D = 8, 3, 8  # images, pairs of crops, width


def draws(n, crops=2, candidates=50, seed=0):
    cut = saliency_cl.columns(crops, candidates)[-3:]
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, sum(cut), dtype=torch.float64, generator=g).split(cut, 1)


def blobs(n, side=7, objects=3, seed=0):
    """Maps like those of scenes: three soft discs of standard deviation 0.1 to 0.2 anywhere, over noise of 0.3."""
    g = torch.Generator().manual_seed(seed)
    v = torch.rand(n, objects, 3, 1, 1, generator=g, dtype=torch.float64)
    t = (torch.arange(side) + 0.5).double() / side
    far = (t[:, None] - v[:, :, 0]) ** 2 + (t - v[:, :, 1]) ** 2
    a = torch.exp(-far / 2 / (0.1 + 0.1 * v[:, :, 2]) ** 2).sum(1)
    a = a + 0.3 * torch.rand(a.shape, generator=g, dtype=torch.float64)
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    return (a - low) / (high - low + 1e-6)


# ---- scores, boxes, weights ------------------------------------------------------------------------------------------
def test_box_means_equal_brute_force():
    g = torch.Generator().manual_seed(0)
    s = torch.rand(3, 5, 7, generator=g, dtype=torch.float64)  # cells are not square
    lo = torch.rand(3, 6, 2, generator=g, dtype=torch.float64) * 0.7
    boxes = torch.cat([lo, lo + 0.05 + torch.rand(3, 6, 2, generator=g, dtype=torch.float64) * (0.95 - lo)], 2)
    boxes[:, 0] = torch.tensor([0.0, 0, 1, 1])
    boxes[:, 1] = torch.tensor([2 / 7, 1 / 5, 3 / 7, 2 / 5])  # one whole cell
    found = saliency_cl.box_means(s, boxes)
    for b in range(3):
        for m in range(6):
            x0, y0, x1, y1 = boxes[b, m].tolist()
            total = 0
            for i in range(5):
                for j in range(7):
                    total += s[b, i, j].item() * (max(0, min(y1, (i + 1) / 5) - max(y0, i / 5))
                                                  * max(0, min(x1, (j + 1) / 7) - max(x0, j / 7)))
            assert found[b, m].item() == pytest.approx(total / (x1 - x0) / (y1 - y0), abs=1e-12)
    assert torch.allclose(found[:, 1], s[:, 1, 2], atol=1e-12)


def test_measured_saliency_ratios_of_the_sampler():
    """methods 2.2: chosen boxes hold 1.98, 1.74, 1.44 and 1.03 times the mean saliency at T = 0.05, 0.1, 0.2, infinity.
    Tolerance 0.07, and 0.12 at infinity, where only the maps' own centring shows."""
    s, u, size = blobs(1000), draws(1000), torch.tensor([[480, 640]]).repeat(1000, 1)
    ratios = []
    for t in (0.05, 0.1, 0.2, math.inf):
        pairs, _, _ = saliency_cl.salient_pairs(s, u, size, temperature=t)
        ratios.append((saliency_cl.box_means(s, pairs[:, :2]).mean(1) / s.mean((1, 2))).mean().item())
    assert ratios[0] > ratios[1] > ratios[2] > ratios[3]
    assert ratios[:3] == pytest.approx([1.98, 1.74, 1.44], abs=0.07) and ratios[3] == pytest.approx(1.03, abs=0.12)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_flat_map_is_the_control_exactly(k):
    """Same random numbers: the same boxes as at infinite temperature, weights exactly 1."""
    u, size = draws(64, k), torch.randint(50, 900, (64, 2))
    flat = saliency_cl.salient_pairs(torch.zeros(64, 7, 7).double(), u, size, k)
    control = saliency_cl.salient_pairs(blobs(64), u, size, k, temperature=math.inf, gamma=0.0)
    for a, b in zip(flat, control):
        assert torch.equal(a, b)
    assert torch.equal(flat[1], torch.ones(64, k).double())
    pairs, weights, _ = saliency_cl.salient_pairs(blobs(64), u, size, k)
    assert torch.allclose(weights.mean(1), torch.ones(64).double(), atol=1e-14) and weights.std() > 0.05
    assert not torch.equal(pairs, flat[0])


def test_flat_map_chooses_like_the_candidates():
    pairs, _, candidates = saliency_cl.salient_pairs(torch.zeros(3000, 4, 4).double(), draws(3000), torch.full((3000, 2), 9))
    for corner in range(4):
        a, b = pairs[:, :2, corner].flatten(), candidates[..., corner].flatten()
        assert abs(a.mean() - b.mean()) < 4 * b.std() / 6000 ** 0.5
        assert abs(a.std() / b.std() - 1) < 0.04


def test_weights_and_scores_literally():
    s, size = blobs(4), torch.tensor([[300, 500]]).repeat(4, 1)
    pairs, weights, _ = saliency_cl.salient_pairs(s, draws(4, K), size, K, gamma=1.5)
    score = saliency_cl.box_means(s, pairs)
    for b in range(4):
        a = [(score[b, k] + score[b, K + k]).item() / 2 for k in range(K)]
        for k in range(K):
            assert weights[b, k].item() == pytest.approx(K * a[k] ** 1.5 / sum(x ** 1.5 for x in a), rel=1e-12)


def test_chosen_boxes_are_smaller():
    """README's figures of the share of the image that chosen boxes cover: a small one reaches a higher mean of any map."""
    canvas, masks, _, _ = common.scenes(range(2 ** 31, 2 ** 31 + 256), 96)
    torch.manual_seed(0)
    net, size = common.backbone("small"), torch.full((256, 2), 96)
    for kind, share in (("none", 0.17), ("activation", 0.16), ("shuffled", 0.16), ("inverted", 0.15), ("truth", 0.14)):
        s = saliency_cl.saliency_map(net, canvas, 64, kind, masks)
        boxes = saliency_cl.salient_pairs(s, draws(256), size)[0][:, :2]
        assert (boxes[..., 2:] - boxes[..., :2]).prod(2).mean().item() == pytest.approx(share, abs=0.006), kind

def test_choice_follows_its_law():
    """First p ~ exp(logit), second the same among the rest; a box that overlaps one drawn by more than 0.5 comes last."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).double()
    far = torch.tensor([[0, 0, 0.2, 0.2], [0.3, 0, 0.5, 0.2], [0.6, 0, 0.8, 0.2], [0, 0.5, 0.2, 0.7]]).double()
    n = 20_000
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = saliency_cl.choose(logits.expand(n, 4), u, far.expand(n, 4, 4), 2)
    p = logits.softmax(0)
    for i in range(4):
        for j in range(4):
            want = 0 if i == j else (p[i] * p[j] / (1 - p[i])).item()
            share = ((drawn[:, 0] == i) & (drawn[:, 1] == j)).double().mean().item()
            assert abs(share - want) < 4.5 * (want * (1 - want) / n) ** 0.5 + 1e-12, (i, j)
    near = far.clone()
    near[1] = near[2] + 0.01  # IoU 0.82 with box 2
    drawn = saliency_cl.choose(logits.expand(n, 4), u, near.expand(n, 4, 4), 2)
    assert not ((drawn == 1).any(1) & (drawn == 2).any(1)).any()
    drawn = saliency_cl.choose(logits.expand(n, 4), u, far[:1].expand(n, 4, 4), 3)  # nothing else is left: still distinct
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("height, width", [(300, 300), (200, 500), (900, 300)])
def test_candidates_in_original_pixels(height, width):
    u = torch.rand(500, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.tensor([[height, width]]).repeat(500, 1).double()
    x0, y0, x1, y1 = saliency_cl.candidate_boxes(u, size, (0.05, 0.3)).unbind(2)
    w, h = (x1 - x0) * width, (y1 - y0) * height
    assert min(x0.min(), y0.min()) >= 0 and max(x1.max(), y1.max()) <= 1
    share = w * h / (height * width)
    if height < 900:  # else some boxes are cut to the image's width
        log_ratio = (w / h).log() / math.log(4 / 3)
        assert log_ratio.abs().max() <= 1 + 1e-9 and abs(log_ratio.mean()) < 0.02
        assert log_ratio.std() == pytest.approx(1 / 3 ** 0.5, rel=0.02)
        assert share.mean() == pytest.approx(0.175, rel=0.01)
    assert share.min() > 0.049 and share.max() <= 0.3 + 1e-9


def test_partners_equal_the_rule_as_a_loop():
    boxes = saliency_cl.candidate_boxes(torch.rand(30, 2, 4).double(), torch.full((30, 2), 7).double(), (0.05, 0.3))
    u = torch.rand(30, 2, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[0] = 0.999  # a shift by half a side with doubled area and ratio: never above 0.5
    found = saliency_cl.partner_boxes(u, boxes)
    for b in range(30):
        for k in range(2):
            x0, y0, x1, y1 = boxes[b, k].tolist()
            w, h, want = x1 - x0, y1 - y0, (x0, y0, x1, y1)
            for t in range(50):
                dx, dy, a, r = u[b, k, t].tolist()
                cx, cy = (x0 + x1) / 2 + (dx - 0.5) * w, (y0 + y1) / 2 + (dy - 0.5) * h
                area, ratio = w * h * (0.5 + 1.5 * a), w / h * math.exp(math.log(0.5) + r * math.log(4))
                nw, nh = (area * ratio) ** 0.5, (area / ratio) ** 0.5
                n = cx - nw / 2, cy - nh / 2, cx + nw / 2, cy + nh / 2
                both = max(0, min(x1, n[2]) - max(x0, n[0])) * max(0, min(y1, n[3]) - max(y0, n[1]))
                if min(n) >= 0 and max(n) <= 1 and both / (w * h + area - both) > 0.5:
                    want = n
                    break
            assert found[b, k].tolist() == pytest.approx(want, abs=1e-12)
    assert torch.equal(found[0], boxes[0])
    assert (found[1:] == boxes[1:]).all(2).double().mean() < 0.1  # it nearly always finds one


# ---- maps ------------------------------------------------------------------------------------------------------------
class Bright(torch.nn.Module):
    """In place of an encoder: the brightness of 8 x 8 cells, twice."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return [F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 8).expand(-1, 2, -1, -1) * self.scale + 3]


def test_bright_square_in_a_known_place_of_a_wide_image():
    canvas = torch.full((40, 3, 64, 64), 30, dtype=torch.uint8)
    canvas[:, :, 8:24, 40:56] = 220  # rows 1/8 to 3/8, columns 5/8 to 7/8
    s = saliency_cl.saliency_map(Bright(), canvas, 64)
    want = torch.zeros(8, 8).double()
    want[1:3, 5:7] = 1
    assert torch.allclose(s, want.expand(40, 8, 8), atol=0.05) and not s.requires_grad
    size = torch.tensor([[200, 400]]).repeat(40, 1)
    pairs, weights, candidates = saliency_cl.salient_pairs(s, draws(40), size, temperature=0.05)
    middle = (pairs[:, :2, :2] + pairs[:, :2, 2:]) / 2
    assert ((middle - torch.tensor([0.75, 0.25])).abs() < 0.25).all(2).double().mean() > 0.9
    mask = (canvas[:, :1] == 220).to(torch.uint8)
    found = saliency_cl.gauges(s, pairs, weights, candidates, mask)
    assert found["on_object_peak"] == 100 and found["map_spread"] < 1e-6
    assert found["on_object_chosen"] > 2 * found["on_object_random"] > 0 and found["saliency_ratio"] > 2
    x, y = ((candidates[..., i] + candidates[..., i + 2]) / 2 for i in (0, 1))
    inside = (x >= 0.625) & (x < 0.875) & (y >= 0.125) & (y < 0.375)
    assert found["on_object_random"].item() == pytest.approx(100 * inside.double().mean().item(), abs=1e-9)


def test_kinds_of_maps():
    torch.manual_seed(0)
    encoder = saliency_cl.Branch("small", D, 16).encoder.double().train()
    with torch.no_grad():
        encoder(torch.randn(8, 3, 32, 32).double())  # running statistics that are not the initial ones
    before = copy.deepcopy(encoder.state_dict())
    canvas = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    mask = torch.zeros(8, 1, 48, 48, dtype=torch.uint8)
    mask[:, :, :12, 12:24], mask[:, :, 24:, 24:] = 7, 255
    maps = {kind: saliency_cl.saliency_map(encoder, canvas, 32, kind, mask) for kind in saliency_cl.SALIENCY}
    assert encoder.training and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    x = copy.deepcopy(encoder).eval()(normalize(crop(canvas, torch.tensor([[0.0, 0, 1, 1]]).repeat(8, 1), 32,
                                                     dtype=torch.float64)))[-1].detach()
    for b in range(8):
        pooled = x[b].mean((1, 2))
        raw = {"activation": [[x[b, :, i, j].sum() for j in range(4)] for i in range(4)],
               "agreement": [[F.cosine_similarity(x[b, :, i, j], pooled, 0) for j in range(4)] for i in range(4)]}
        for kind, a in raw.items():
            a = torch.tensor(a)
            assert torch.allclose(maps[kind][b], (a - a.min()) / (a.max() - a.min() + 1e-6), atol=1e-9), kind
        assert torch.equal(maps["shuffled"][b], maps["activation"][b // 4 * 4 + (b - 1) % 4])
    assert torch.equal(maps["inverted"], 1 - maps["activation"]) and not maps["none"].any()
    assert maps["truth"][:, :8, 8:16].min() > 0.99 and maps["truth"].sum() == pytest.approx(8 * 64, rel=1e-4)
    alone = saliency_cl.saliency_map(encoder, canvas[2:3], 32)  # does not hang on the other images
    assert torch.allclose(alone[0], maps["activation"][2], atol=1e-12)


# ---- losses ----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["byol", "infonce"])
def setting(request):
    torch.manual_seed(0)
    model = saliency_cl.Model("small", dim=D, hidden=16, loss=request.param, crop_weight=0.7).double()
    teacher = model.make_teacher()
    for p in teacher.parameters():  # a target that is no copy, so that a mix-up shows
        p.data += 0.05 * torch.randn_like(p)
    views = [torch.randn(B, 3, 16, 16).double() for _ in range(2)]
    crops = torch.randn(2 * K * B, 3, 8, 8).double()
    weights = torch.rand(B, K).double() + 0.2
    return model, teacher, views, crops, weights / weights.mean(1, keepdim=True)


def targets_of(teacher, views, crops):
    return [teacher(v) for v in views], teacher(crops)


def literal(model, teacher, views, crops, weights):
    """methods 2.3 with loops over images and pairs -> loss_global, loss_crops."""
    tau = 0.2
    p1, p2, q = (model.predictor(model.student(x)) for x in (*views, crops))
    with torch.no_grad():
        z1, z2, y = (teacher(x) for x in (*views, crops))

    def term(p, z, i):  # prediction of image i against the targets of all images
        if model.loss == "byol":
            return 2 - 2 * (p[i] / p[i].norm()) @ (z[i] / z[i].norm())
        logits = torch.stack([(p[i] / p[i].norm()) @ (z[j] / z[j].norm()) / tau for j in range(B)])
        return 2 * tau * (logits.exp().sum().log() - logits[i])

    loss_global = sum(term(p1, z2, i) + term(p2, z1, i) for i in range(B)) / B
    q, y = ([x[n * B:(n + 1) * B] for n in range(2 * K)] for x in (q, y))
    loss_crops = 0
    for i in range(B):
        for k in range(K):
            loss_crops += weights[i, k] * (term(q[k], y[K + k], i) + term(q[K + k], y[k], i)) / K / B
    return loss_global, loss_crops


def test_losses_and_gradients_equal_the_literal_equations(setting):
    model, teacher, views, crops, weights = setting
    slow = copy.deepcopy(model)
    losses = model(views, crops, *targets_of(copy.deepcopy(teacher), views, crops), weights)
    losses["loss"].backward()
    loss_global, loss_crops = literal(slow, teacher, views, crops, weights)
    (loss_global + 0.7 * loss_crops).backward()
    assert losses["loss_global"].item() == pytest.approx(loss_global.item(), rel=1e-12)
    assert losses["loss_crops"].item() == pytest.approx(loss_crops.item(), rel=1e-12)
    for (name, p), q in zip(model.named_parameters(), slow.parameters()):
        if name in ("student.projector.0.bias", "predictor.0.bias", "student.projector.3.bias"):
            continue  # biases before batch norm: exact gradient zero, only rounding
        assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-12), name
    even = model(views, crops, *targets_of(teacher, views, crops), torch.ones(B, K).double())
    assert abs(even["loss_crops"] - losses["loss_crops"]) > 1e-3  # weights act on each image's own loss


def test_no_gradient_reaches_target_saliency_or_weights(setting):
    model, teacher, views, crops, weights = setting
    targets, crop_targets = targets_of(teacher, views, crops)
    assert not any(t.requires_grad for t in (*targets, crop_targets)) and teacher.training
    asked = [x.detach().requires_grad_() for x in (*targets, crop_targets, weights)]
    model(views, crops, asked[:2], asked[2], asked[3])["loss"].backward()
    if model.loss == "infonce":
        assert all(x.grad is None for x in asked)
    assert asked[3].grad is None and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    s = blobs(4).requires_grad_()
    assert not any(x.requires_grad for x in saliency_cl.salient_pairs(s, draws(4), torch.full((4, 2), 9)))
    other = copy.deepcopy(teacher)
    other.projector[3].weight.data += torch.randn_like(other.projector[3].weight)
    a, b = (model(views, crops, *targets_of(t, views, crops), weights) for t in (teacher, other))
    assert all(abs(a[name] - b[name]) > 1e-3 for name in ("loss_global", "loss_crops"))


def test_only_whole_views_move_running_statistics(setting):
    model, teacher, views, crops, weights = setting
    slow, slow_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    targets = [teacher(v) for v in views]
    saliency_cl.track(teacher, False)
    crop_targets = teacher(crops)
    saliency_cl.track(teacher, True)
    model(views, crops, targets, crop_targets, weights)
    for view in views:
        slow_teacher(view), slow.predictor(slow.student(view))
    for fast, plain in ((teacher, slow_teacher), (model, slow)):
        running = {n: v for n, v in fast.state_dict().items() if "running" in n}
        assert len(running) > 10 and all(torch.equal(v, plain.state_dict()[n]) for n, v in running.items())
    assert all(m.momentum == 0.1 for m in teacher.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert torch.allclose(crop_targets, slow_teacher(crops), atol=1e-12)  # the crops' own batch statistics


def two_ranks(rank, path, state, kind, inputs, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = saliency_cl.Model("small", dim=D, hidden=16, loss=kind).double()
    model.load_state_dict(state)
    model = sync_batchnorm(model, "cpu")
    teacher = sync_batchnorm(model.make_teacher(), "cpu")
    views, crops, weights = inputs
    mine = slice(rank * B // 2, (rank + 1) * B // 2)
    views, weights = [v[mine] for v in views], weights[mine]
    crops = crops.unflatten(0, (2 * K, B))[:, mine].flatten(0, 1)
    losses = model(views, crops, *targets_of(teacher, views, crops), weights)
    losses["loss"].backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    means = {k: saliency_cl.gather(v.detach()).mean().item() for k, v in losses.items()}
    if rank == 0:
        torch.save((means, [p.grad / 2 for p in model.parameters()]), out)
    dist.destroy_process_group()


def test_two_processes_give_the_global_loss(setting, tmp_path):
    model, _, views, crops, weights = setting
    model.crop_weight = 1.0
    state = copy.deepcopy(model.state_dict())
    whole = model(views, crops, *targets_of(model.make_teacher(), views, crops), weights)
    whole["loss"].backward()
    mp.spawn(two_ranks, (tmp_path / "init", state, model.loss, (views, crops, weights), tmp_path / "out"), nprocs=2)
    means, grads = torch.load(tmp_path / "out", weights_only=True)
    for name, value in means.items():
        assert value == pytest.approx(whole[name].item(), rel=1e-10), name
    for (name, p), grad in zip(model.named_parameters(), grads):
        assert torch.allclose(p.grad, grad, rtol=1e-7, atol=1e-11), name


# ---- the step --------------------------------------------------------------------------------------------------------
def test_crops_show_their_boxes():
    """Second photometry with draws that change nothing: the crop is its box, flipped by its own draw, in its own place."""
    g = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (4, 3, 48, 48), generator=g, dtype=torch.uint8)
    size = torch.tensor([[100, 60]]).repeat(4, 1)
    batch = Batch(canvas, size, torch.zeros(4), torch.zeros(4, 0, 48, 48), torch.arange(4), [])
    cut = saliency_cl.columns(K, 20)
    u = list(torch.rand(4, sum(cut), generator=g, dtype=torch.float64).split(cut, 1))
    u[3:-3] = [torch.full_like(x, 0.9999) for x in u[3:-3]]
    pairs, _, _ = saliency_cl.salient_pairs(blobs(4), u[-3:], size, K)
    views, crops = saliency_cl.make_views(batch, u, [[0, 1, 2, 3]] * 8, pairs, (0.2, 1.0), 32, 16, [0.4, 0.4, 0.2, 0.1], 2.0, "cpu", torch.float64)
    assert [tuple(v.shape) for v in (*views, crops)] == [(4, 3, 32, 32)] * 2 + [(2 * K * 4, 3, 16, 16)]
    for k in range(K):
        for b in range(4):
            flip = u[2][b:b + 1, 2 + K + k] < 0.5
            want = normalize(crop(canvas[b:b + 1], pairs[b:b + 1, K + k], 16, flip, dtype=torch.float64))
            assert torch.allclose(crops[(K + k) * 4 + b], want[0], atol=1e-10)
    assert (crops[:K * 4] - crops[K * 4:]).abs().mean() > 0.01


@pytest.fixture
def photographs(tmp_path):
    """A folder of small images without labels or masks."""
    (tmp_path / "images").mkdir()
    for i in range(10):
        save_image(F.interpolate(torch.rand(1, 3, 4, 6), size=(40, 60), mode="bilinear"), tmp_path / "images" / f"{i}.png")
    return str(tmp_path / "images")


def run(photographs, tmp_path, name, *flags):
    out = tmp_path / name
    saliency_cl.train(saliency_cl.parse_args([
        "--data", photographs, "--preset", "demo", "--batch-size", "8", "--steps", "3", "--precision", "fp64", "--device",
        "cpu", "--image-size", "32", "--canvas", "48", "--crop-size", "16", "--dim", "16", "--hidden", "16", "--workers",
        "0", "--knn-every", "0", "--log-every", "1", "--saliency-warmup", "0", "--out", str(out), *flags]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_no_saliency_equals_both_uses_switched_off(photographs, tmp_path):
    """Run B1, in two ways, on whole steps: the same losses to the last bit; and the method's are others."""
    none, off, on = (run(photographs, tmp_path, *flags) for flags in (
        ["none", "--saliency", "none"], ["off", "--no-crop-saliency", "--no-weight-saliency"], ["on"]))
    assert [x["loss"] for x in none] == [x["loss"] for x in off] != [x["loss"] for x in on]
    assert none[0]["saliency_ratio"] == 1 and on[0]["saliency_ratio"] > 1.1 and on[0]["weight_spread"] > 0
    assert off[0]["weight_spread"] == 0 and off[0]["saliency_ratio"] != 1


@pytest.mark.parametrize("flags, remedy", [
    (["--crops", "0"], "above 0"), (["--crops", "51"], "K 1..50"), (["--gamma", "50.5"], "gamma 0..50"), (["--box-temperature", "0.01"], "0.05 or more"), (["--box-area", "0.5", "0.2"], "0..1")])
def test_refusals(flags, remedy):
    with pytest.raises(UserError, match=remedy):
        saliency_cl.parse_args(flags)


def test_truth_needs_masks(photographs, tmp_path):
    with pytest.raises(UserError, match="no masks"):
        run(photographs, tmp_path, "out", "--saliency", "truth")


def test_presets():
    """methods 3: COCO at 512 for 800 epochs; decay on every parameter."""
    args = saliency_cl.parse_args(["--data", "somewhere", "--batch-size", "512"])
    assert (args.preset, args.arch, args.lr * args.batch_size / 256, args.weight_decay) == ("coco", "resnet50", 0.4, 1e-4)
    assert (args.crops, args.crop_size, args.epochs, args.warmup_epochs, args.momentum) == (2, 96, 800, 4, 0.99)
    model = saliency_cl.Model("small", dim=D, hidden=16)
    optimizer = saliency_cl.make_optimizer("sgd", model, 1e-4, decay_all=True)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-4}
