"""slotcon.py against slow, literal transcriptions of its equations, in float64."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.ops import roi_align

import slotcon
from common import sync_batchnorm

B, K, D, VIEW = 8, 6, 8, 32  # images, prototypes, width, pixels: 4 x 4 cells


def rectangles_and_flips(generator, b=B):
    lo = torch.rand(b, 2, generator=generator, dtype=torch.float64) * 0.5
    hi = lo + 0.1 + torch.rand(b, 2, generator=generator, dtype=torch.float64) * 0.4
    first = torch.cat([lo, hi], 1)
    second = torch.cat([1 - hi, 1 - lo], 1)
    flips = [torch.rand(b, generator=generator) < 0.5 for _ in range(2)]
    for r in (first, second):
        r[3, 2:] = r[3, :2]  # image 3: its views share nothing
    return [first, second], flips


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = slotcon.Model("small", prototypes=K, dim=D, hidden=16).double()
    model.student.prototypes.data = F.normalize(model.student.prototypes.data, dim=1)
    teacher = model.make_teacher()
    for p in teacher.parameters():  # a teacher that is no copy, so that a mix-up shows
        p.data += 0.05 * torch.randn_like(p)
    model.center.copy_(torch.rand(K).double() * 0.1)
    views = [torch.randn(B, 3, VIEW, VIEW).double() for _ in range(2)]
    return model, teacher, views, *rectangles_and_flips(torch.Generator().manual_seed(1))


def literal(model, teacher, views, rectangles, flips):
    """methods 1.3 to 1.6 with loops over images, prototypes and cells -> loss_group, loss_slot, new centre."""
    tau_s, tau_t, tau_c = 0.1, 0.07, 0.2
    features = []
    for net in (model.student, teacher):
        for view in views:
            x = net.projector(net.encoder(view)[-1])  # B D h w
            s = torch.zeros(B, K, *x.shape[2:], dtype=x.dtype)
            for b in range(B):
                for k in range(K):
                    for i in range(x.shape[2]):
                        for j in range(x.shape[3]):
                            s[b, k, i, j] = F.cosine_similarity(net.prototypes[k], x[b, :, i, j], dim=0, eps=1e-12)
            features.append((x, s))
    (x1, s1), (x2, s2), (y1, t1), (y2, t2) = features
    h, w = s1.shape[2:]

    def aligned(scores, v):
        out = []
        for b in range(B):
            box = (rectangles[v][b] * torch.tensor([w, h, w, h])).double()[None]
            a = roi_align(scores[b:b + 1], [box], (h, w), aligned=True)[0]
            out.append(a.flip(-1) if flips[v][b] else a)
        return torch.stack(out)

    def group(s, t):
        total = 0
        for b in range(B):
            for i in range(h):
                for j in range(w):
                    target = torch.softmax((t[b, :, i, j] - model.center) / tau_t, 0)
                    total -= (target * torch.log_softmax(s[b, :, i, j] / tau_s, 0)).sum()
        return total / (B * h * w)

    loss_group = group(aligned(s1, 0), aligned(t2, 1)) + group(aligned(s2, 1), aligned(t1, 0))

    def slot(x, scores, b, k):
        a = torch.softmax(scores[b] / tau_t, 0)[k] + 1e-6
        return (a / a.sum() * x[b]).sum((1, 2))

    def wins(scores, b):
        return set(scores[b].flatten(1).argmax(0).tolist())

    def contrast(x, s, y, t):
        keys = [(b, k) for b in range(B) for k in sorted(wins(t, b))]
        asked = [(b, k) for b, k in keys if k in wins(s, b)]
        key = torch.stack([F.normalize(slot(y, t, b, k), dim=0) for b, k in keys]).detach()
        query = model.predictor(torch.stack([slot(x, s, b, k) for b, k in asked]))
        total = 0
        for row, place in zip(query, asked):
            logits = torch.stack([F.normalize(row, dim=0) @ r for r in key]) / tau_c
            total -= torch.log_softmax(logits, 0)[keys.index(place)]
        return total / len(asked) * 2 * tau_c, len(asked)

    (c1, n1), (c2, n2) = contrast(x1, s1, y2, t2), contrast(x2, s2, y1, t1)
    center = 0.9 * model.center + 0.1 * torch.cat([t1, t2]).mean((0, 2, 3))
    return loss_group, c1 + c2, center, n1 + n2


def test_losses_gradients_and_center_equal_the_literal_equations(setting):
    model, teacher, views, rectangles, flips = setting
    slow = copy.deepcopy(model)
    with torch.no_grad():
        targets = [copy.deepcopy(teacher)(v) for v in views]
    losses = model(views, targets, rectangles, flips)
    losses["loss"].backward()
    group, slot, center, n = literal(slow, copy.deepcopy(teacher), views, rectangles, flips)
    (0.5 * group + 0.5 * slot).backward()
    assert losses["loss_group"].item() == pytest.approx(group.item(), rel=1e-12)
    assert losses["loss_slot"].item() == pytest.approx(slot.item(), rel=1e-12)
    assert losses["queries"].item() == n and n > B
    assert torch.allclose(model.center, center, atol=1e-14)
    for (name, p), q in zip(model.named_parameters(), slow.parameters()):
        if name.rsplit(".", 1)[0] in ("student.projector.0", "student.projector.3", "predictor.0", "predictor.3") and p.ndim == 1:
            continue  # biases before batch norm: exact gradient zero, only rounding
        assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-12), name


def test_teacher_is_used_and_gets_no_gradient(setting):
    model, teacher, views, rectangles, flips = setting
    targets = [teacher(v) for v in views]
    assert not any(t.requires_grad for pair in targets for t in pair) and teacher.training
    loss = model(views, targets, rectangles, flips)["loss"]
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    other = copy.deepcopy(teacher)
    other.prototypes.data += torch.randn_like(other.prototypes)
    model.center.zero_()
    a = model(views, targets, rectangles, flips)
    model.center.zero_()
    b = model(views, [other(v) for v in views], rectangles, flips)
    assert abs(a["loss_group"] - b["loss_group"]) > 1e-3 and abs(a["loss_slot"] - b["loss_slot"]) > 1e-3


def test_stop_gradient_of_keys(setting):
    model, teacher, views, rectangles, flips = setting
    targets = [tuple(t.detach().requires_grad_() for t in teacher(v)) for v in views]
    model(views, targets, rectangles, flips)["loss_slot"].backward()
    assert all(y.grad is None for y, _ in targets)  # keys: no path back to the teacher's features


def test_ema_moves_parameters_only(setting):
    model, teacher, *_ = setting
    before = copy.deepcopy(teacher)
    model.student.encoder.bn1.running_mean += 1
    slotcon.ema_update(teacher, model.student, 0.9)
    for p, old, s in zip(teacher.parameters(), before.parameters(), model.student.parameters()):
        assert torch.allclose(p, 0.9 * old + 0.1 * s, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), before.buffers()))


@pytest.mark.parametrize("k", [1, 3, 40])
def test_guards_prototypes_and_cells(k):
    """One prototype, fewer than cells, more than cells; also views with no overlap at all: finite, with a backward pass."""
    torch.manual_seed(0)
    model = slotcon.Model("small", prototypes=k, dim=D, hidden=16).double()
    views = [torch.randn(4, 3, VIEW, VIEW).double() for _ in range(2)]
    targets = [model.make_teacher()(v) for v in views]
    nothing = [torch.zeros(4, 4).double()] * 2
    losses = model(views, targets, nothing, [torch.zeros(4, dtype=torch.bool)] * 2)
    assert losses["loss_group"].item() == pytest.approx(2 * math.log(k), abs=1e-9)  # ln K a cell and direction
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rows", [0, 1])
def test_no_query_and_one_query(rows):
    """Student and teacher agree on no prototype, or on one of one image: batch norm would raise or give NaN."""
    model = slotcon.Model("small", prototypes=4, dim=D, hidden=16).double()
    student, other = (torch.full((1, 4, 2, 2), -1.0, dtype=torch.float64) for _ in range(2))
    student[:, 0], other[:, 0 if rows else 1] = 1, 1
    x = torch.randn(1, D, 2, 2, dtype=torch.float64, requires_grad=True)
    loss, queries = model.slot_loss([(x, student, x.detach(), other)] * 2)
    assert queries == 2 * rows and loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.predictor.parameters())


@pytest.mark.parametrize("other", [0, 1])
def test_predictor_is_in_float32_where_another_process_has_no_query(other, monkeypatch):
    """Of an empty input nn.SyncBatchNorm gathers the input's type, else float32: half precision would mix the two."""
    monkeypatch.setattr(slotcon, "process", lambda: (0, 2))
    monkeypatch.setattr(slotcon, "gather", lambda x: torch.stack([x, x * other]))
    model, seen = slotcon.Model("small", prototypes=4, dim=D, hidden=16), []
    model.predictor[1].register_forward_pre_hook(lambda module, x: seen.append(x[0].dtype))
    x, scores = torch.randn(3, D, 2, 2), torch.randn(3, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, queries = model.slot_loss([(x, scores, x, scores)] * 2)
    loss.backward()
    assert queries >= 6 * (1 + other) and seen == [torch.bfloat16 if other else torch.float32] * 2


def test_loss_at_initialisation_is_2_ln_k():
    torch.manual_seed(0)
    model = slotcon.Model("resnet18", prototypes=256, hidden=512)
    views = [torch.randn(8, 3, 96, 96) for _ in range(2)]
    whole = [torch.tensor([[0.0, 0, 1, 1]]).repeat(8, 1)] * 2
    with torch.no_grad():
        losses = model(views, [model.make_teacher()(v) for v in views], whole, [torch.zeros(8, dtype=torch.bool)] * 2)
    assert losses["loss_group"].item() == pytest.approx(2 * math.log(256), rel=0.02)


def three_ranks(rank, path, state, inputs, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
    model = slotcon.Model("small", prototypes=K, dim=D, hidden=16).double()
    model.load_state_dict(state)
    model = sync_batchnorm(model, "cpu")
    teacher = sync_batchnorm(model.make_teacher(), "cpu")
    views, rectangles, flips = ([x.tensor_split(3)[rank] for x in part] for part in inputs)
    losses = model(views, [teacher(v) for v in views], rectangles, flips)
    losses["loss"].backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    means = {k: slotcon.gather(v.detach()).mean().item() for k, v in losses.items()}
    if rank == 0:
        torch.save((means, [p.grad / 3 for p in model.parameters()], model.center), out)
    dist.destroy_process_group()


def test_three_processes_give_the_global_loss(setting, tmp_path):
    """Key labels, the global query mean, batch statistics and the centre across 3 processes, against one process."""
    model, _, _, _, _ = setting
    g = torch.Generator().manual_seed(5)
    views = [torch.randn(9, 3, VIEW, VIEW, generator=g).double() for _ in range(2)]
    rectangles, flips = rectangles_and_flips(g, 9)
    state = copy.deepcopy(model.state_dict())
    whole = model(views, [model.make_teacher()(v) for v in views], rectangles, flips)
    whole["loss"].backward()
    mp.spawn(three_ranks, (tmp_path / "init", state, (views, rectangles, flips), tmp_path / "out"), nprocs=3)
    means, grads, center = torch.load(tmp_path / "out", weights_only=True)
    for name, value in means.items():
        assert value == pytest.approx(whole[name].item(), rel=1e-10), name
    assert torch.allclose(center, model.center, atol=1e-13)
    for (name, p), grad in zip(model.named_parameters(), grads):
        assert torch.allclose(p.grad, grad, rtol=1e-7, atol=1e-11), name


def test_schedules_in_closed_form():
    """[methods 1.7, 1.9]: COCO 800 epochs at 512."""
    steps, teacher_steps, warmup, lr = 231 * 800, int(118_287 / 512 * 800), 231 * 5, 2.0
    assert (steps, teacher_steps) == (184_800, 184_823)
    for i in (0, 1, 600, warmup - 1):
        assert slotcon.schedule(i, steps, lr, 1e-6, warmup, start=lr / 100) == pytest.approx(lr * (1 + 99 * i / warmup) / 100, rel=1e-14)
    for i in (warmup, warmup + 1, 90_000, steps - 1):
        want = 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup))) / 2
        assert slotcon.schedule(i, steps, lr, 1e-6, warmup, start=lr / 100) == pytest.approx(want, rel=1e-14)
    for i in (0, 17, teacher_steps):
        want = 1 - 0.01 * (math.cos(math.pi * i / teacher_steps) + 1) / 2
        assert slotcon.schedule(i, teacher_steps, 0.99, 1.0) == pytest.approx(want, rel=1e-15)


def test_lars_in_closed_form():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    net[0].weight.data[:] = torch.randn(3, 4)
    frozen = torch.nn.Parameter(torch.ones(2, 2).double())
    net.frozen = frozen  # never gets a gradient
    optimizer = slotcon.make_optimizer("lars", net, weight_decay=0.01)
    want = {n: (p.detach().clone(), torch.zeros_like(p)) for n, p in net.named_parameters()}
    for step in range(5):
        for name, p in net.named_parameters():
            p.grad = None if p is frozen else torch.randn_like(p) if step < 4 or p.ndim == 1 else torch.zeros_like(p)
            if p.grad is None:
                continue
            q, mu = want[name]
            d = p.grad.clone()
            if p.ndim != 1:  # decay and trust ratio on matrices only; a zero gradient still shrinks the weight
                d = d + 0.01 * q
                d = d * (0.001 * q.norm() / d.norm() if q.norm() > 0 and d.norm() > 0 else 1)
            mu = 0.9 * mu + d
            want[name] = q - 0.3 * mu, mu
        for group in optimizer.param_groups:
            group["lr"] = 0.3
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.allclose(p, want[name][0], rtol=1e-13, atol=1e-15), name


def test_k_2048_makes_no_b_k_d_tensor():
    """The largest tensor kept for the backward pass stays far below B x K x D."""
    b, k, d = 8, 2048, 128
    model = slotcon.Model("small", prototypes=k, dim=d, hidden=16)
    views = [torch.randn(b, 3, VIEW, VIEW) for _ in range(2)]
    targets = [model.make_teacher()(v) for v in views]
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        model(views, targets, [torch.tensor([[0.0, 0, 1, 1]]).repeat(b, 1)] * 2, [torch.zeros(b, dtype=torch.bool)] * 2)
    assert max(largest) < b * k * d / 2
