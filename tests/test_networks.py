"""Networks, batch norm over processes, weights of other projects, features and kNN."""

import argparse
import collections
import copy
import math
import os
import pathlib

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
import torchvision
from torch import nn

import common

torch.set_num_threads(2)


def test_backbone_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.pth"
    for arch in common.ARCHS:
        with torch.device("meta"):
            net = common.backbone(arch)
            maps = net(torch.empty(2, 3, 64, 64))
        assert [m.shape[1] for m in maps] == net.channels
        assert [m.shape[-1] for m in maps] == ([16, 8, 8, 8] if arch == "small" else [16, 8, 4, 2])
        assert common.arch_of(net.state_dict()) == arch
        if arch == "small":
            assert 1.22e6 < sum(p.numel() for p in net.parameters()) < 1.24e6
            continue
        with torch.device("meta"):
            theirs = getattr(torchvision.models, arch)().eval()
        del theirs.fc
        theirs.load_state_dict(net.state_dict(), strict=True)
        if arch in ("resnet18", "resnet50"):
            net = common.backbone(arch).eval().to(memory_format=torch.channels_last)
            common.save_backbone(path, nn.Sequential(collections.OrderedDict(module=net)))
            state = torch.load(path, weights_only=True)
            assert list(tmp_path.iterdir()) == [path]
            assert all(v.is_contiguous() and v.dtype in (torch.float32, torch.int64) for v in state.values())
            theirs.load_state_dict(state, strict=True, assign=True)
            theirs.fc = nn.Identity()
            x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
            torch.testing.assert_close(theirs.double()(x), net.double()(x)[-1].mean((2, 3)), rtol=1e-9, atol=1e-9)


def test_initialisation():
    torch.manual_seed(0)
    for arch in ("small", "resnet50"):
        net = common.backbone(arch, zero_init_residual=True)
        for name, m in net.named_modules():
            if isinstance(m, nn.Conv2d):  # He, fan-out
                expected = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
                assert abs(m.weight.std() / expected - 1) < 0.1, (arch, name)
        last = [m.bn3 if hasattr(m, "bn3") else m.bn2 for m in net.modules() if hasattr(m, "bn2")]
        assert len(last) == sum(common.ARCHS[arch]) and all((m.weight == 0).all() for m in last)
        assert not any((m.bn2.weight == 0).any() for m in common.backbone(arch).modules() if hasattr(m, "bn2"))


# ------------------------------------------------------------------------------------------- global batch norm

def bn_cases(world):
    """Rows of each process, shape of a row."""
    rows = {2: [(3, 5), (0, 4), (4, 0), (1, 1)], 3: [(2, 5, 3), (0, 4, 1), (0, 0, 6)]}[world]
    return [(r, tail) for r in rows for tail in ((7,), (7, 3, 5))]


def bn_processes(rank, folder, results):
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            bn_process(rank, world, folder, results)


def bn_process(rank, world, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank,
                                         world_size=world)
    error = 0.0

    def close(a, b, scale=1.0):
        nonlocal error
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.numel():
            error = max(error, (a - b).abs().max().item() / scale)

    for number, (rows, tail) in enumerate(bn_cases(world)):
        g = torch.Generator().manual_seed(number)
        whole, mine = nn.BatchNorm2d(7) if len(tail) == 3 else nn.BatchNorm1d(7), nn.Sequential(nn.BatchNorm1d(7))
        if len(tail) == 3:
            mine = nn.Sequential(nn.BatchNorm2d(7))
        with torch.no_grad():
            whole.weight.copy_(torch.randn(7, generator=g))
            whole.bias.copy_(torch.randn(7, generator=g))
        mine[0].load_state_dict(whole.state_dict())
        before = list(mine.state_dict())
        mine = common.sync_batchnorm(mine.double(), "cpu")
        assert isinstance(mine[0], common.GlobalBatchNorm) and list(mine.state_dict()) == before
        whole = whole.double()
        lo, hi = sum(rows[:rank]), sum(rows[:rank + 1])
        for _ in range(3):
            x = torch.randn(sum(rows), *tail, generator=g, dtype=torch.float64) * 3 + 5
            weight = torch.randn(x.shape, generator=g, dtype=torch.float64)
            a, b = x.clone().requires_grad_(), x[lo:hi].clone()
            if x.ndim == 4:
                b = b.contiguous(memory_format=torch.channels_last)
            b.requires_grad_()
            whole.zero_grad(), mine.zero_grad()
            out, part = whole(a), mine(b)
            (out * weight).sum().backward()
            (part * weight[lo:hi]).sum().backward()
            if x.ndim == 4 and hi > lo:
                assert part.is_contiguous(memory_format=torch.channels_last)
            close(part, out[lo:hi])
            close(b.grad, a.grad[lo:hi])
            for p, q in zip(mine.parameters(), whole.parameters()):
                total = p.grad.clone()
                torch.distributed.all_reduce(total)
                close(total, q.grad)
        for (_, p), (_, q) in zip(mine[0].named_buffers(), whole.named_buffers()):
            close(p.double(), q.double())
        x = torch.randn(4, *tail, generator=g, dtype=torch.float64)
        close(mine.eval()(x), whole.eval()(x))

    # A single row in all has no variance: finite, and it leaves the running statistics alone.
    bn = common.sync_batchnorm(nn.BatchNorm1d(7), "cpu")
    out = bn(torch.randn(int(rank == 0), 7))
    assert out.isfinite().all() and torch.equal(bn.running_var, torch.ones(7))
    # Without weights; half types: statistics in float32, output in the input's type.
    bn = common.sync_batchnorm(nn.BatchNorm1d(7, affine=False), "cpu")
    x = torch.randn(world * 8, 7, generator=torch.Generator().manual_seed(5)) + 100
    part = bn(x[rank * 8:][:8].bfloat16())
    out = nn.functional.batch_norm(x.bfloat16().double(), None, None, training=True)[rank * 8:][:8]
    assert part.dtype == torch.bfloat16 and (part.double() - out).abs().max() < 0.02
    # A network under DDP takes the same step as one process on the whole batch.
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    whole = nn.Sequential(*layers).double()
    mine = copy.deepcopy(whole)
    mine = nn.parallel.DistributedDataParallel(common.sync_batchnorm(mine, "cpu"))
    x = torch.randn(2 * world, 3, 9, 9, dtype=torch.float64)
    whole(x).square().mul(torch.arange(5)).mean().backward()
    mine(x[2 * rank:2 * rank + 2]).square().mul(torch.arange(5)).mean().backward()
    for p, q in zip(mine.parameters(), whole.parameters()):
        close(p.grad, q.grad)
    # Compiled, the backward pass computes some of the forward one again: two views, as a method sees them.
    torch.manual_seed(0)
    eager = common.sync_batchnorm(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double(), "cpu")
    traced = copy.deepcopy(eager)
    traced.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    views = torch.randn(2, 4, 6, dtype=torch.float64)
    for net in (eager, traced):
        sum(net(view).pow(3).mean() for view in views).backward()
    for p, q in zip((*traced.parameters(), *traced.buffers()), (*eager.parameters(), *eager.buffers())):
        close(p.detach().double(), q.detach().double())
        close(p.grad, q.grad) if p.requires_grad else None
    results.put((world, rank, error))
    torch.distributed.destroy_process_group()


def test_global_batch_norm_equals_batch_norm_on_the_whole_batch(tmp_path):
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(bn_processes, (str(tmp_path), results), nprocs=3)
    errors = [results.get() for _ in range(5)]
    print(errors)
    assert max(error for *_, error in errors) < 1e-10


def test_one_process_keeps_the_frameworks_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert common.sync_batchnorm(net, "cpu") is net and type(net[1]) is nn.BatchNorm2d
    mine, theirs = common.GlobalBatchNorm(4), nn.BatchNorm1d(4)
    x = torch.randn(6, 4)
    assert torch.equal(mine(x), theirs(x)) and torch.equal(mine.running_var, theirs.running_var)
    with pytest.raises(ValueError):
        mine(torch.randn(4))


# ----------------------------------------------------------------------------------------------------- weights

def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def layouts(right, wrong):
    """Public layouts. `right`: the backbone that find_backbone says it takes; `wrong`: another in the file."""
    fc = {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    args = argparse.Namespace(arch="resnet18", lr=np.float64(0.1), out=pathlib.Path("runs/a"), n=np.int64(3))
    head = {"projector.0.weight": torch.zeros(2, 2)}
    return {
        "ours, VICReg, Barlow Twins": right,
        "torchvision": {**right, **fc},
        "torchvision before 0.4.1": {k: v for k, v in right.items() if not k.endswith("tracked")},
        "SlotCon": {"opt": args, "optimizer": momentum, "epoch": 3, "model": {
            **prefixed("module.encoder_q.", wrong), **prefixed("module.encoder_k.", right),
            "module.center": torch.zeros(1, 4)}},
        "MoCo": {"arch": "resnet18", "epoch": 200, "optimizer": momentum, "state_dict": {
            **prefixed("module.encoder_k.", {**wrong, **fc}), **prefixed("module.encoder_q.", {**right, **fc}),
            "module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)}},
        "MoCo, query encoder alone": {"state_dict": prefixed("module.encoder_q.", right)},
        "PixPro": {"opt": args, "model": {
            **prefixed("module.encoder_k.", wrong), **prefixed("module.encoder.", right)}},
        "DINO": {"student": prefixed("module.backbone.", wrong), "teacher": prefixed("backbone.", right), "args": args,
                 "epoch": 5, "dino_loss": {"center": torch.zeros(1, 4)}, "fp16_scaler": None},
        "SCFS": {"student": prefixed("module.backbone.model.", wrong), "args": args,
                 "teacher": prefixed("module.backbone.model.", right)},
        "BYOL": {"online_network": prefixed("module.", wrong), "target_network": prefixed("module.", right)},
        "BYOL, flat": {**prefixed("online_network.encoder.", wrong), **prefixed("target_network.encoder.", right)},
        "mmselfsup": {"meta": {"epoch": 3}, "state_dict": {**prefixed("backbone.", right), **head,
                                                           **prefixed("encoder_k.0.", wrong)}},
        "solo-learn": {"state_dict": {**prefixed("momentum_backbone.", wrong), **prefixed("backbone.", right)}},
        "VISSL": {"classy_state_dict": {"base_model": {"model": {"trunk": prefixed("_feature_blocks.", right)}}}},
        "model wrapper, compiled, half": {"model": {f"_orig_mod.{k}": v.half() if v.is_floating_point() else v
                                                    for k, v in right.items()}},
    }


def test_weights_of_public_releases(tmp_path):
    torch.manual_seed(0)
    right, wrong = ({k: v.half().float() if v.is_floating_point() else v
                     for k, v in common.backbone("small").state_dict().items()} for _ in range(2))
    for name, checkpoint in layouts(right, wrong).items():
        for zipped in (True, False):  # False: the format before PyTorch 1.6
            torch.save(checkpoint, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
            state = common.load_backbone(tmp_path / "w.pth")
            assert state.keys() == right.keys(), name
            assert all(torch.equal(state[k], right[k]) and state[k].dtype == right[k].dtype for k in right), name
        common.backbone(common.arch_of(state)).load_state_dict(state, strict=True)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = common.backbone("small").state_dict()
    state["layer2.0.bn1.running_var"][3] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(common.UserError, match="w.pth: not all weights are finite"):
        common.load_backbone(tmp_path / "w.pth")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_weights_that_are_refused(tmp_path, monkeypatch):
    path, ran = tmp_path / "w.pth", tmp_path / "ran"
    monkeypatch.setenv("EVIL_FOLDER", str(ran))

    def message():
        with pytest.raises(common.UserError) as e:
            common.load_backbone(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value) and "weights_only" not in str(e.value)
        return str(e.value)

    message()  # no such file
    for zipped in (True, False):
        torch.save({"state_dict": common.backbone("small").state_dict(), "hook": Evil()}, path,
                   _use_new_zipfile_serialization=zipped)
        assert "refused" in message() and "mkdir" in message() and not ran.exists()
    torch.save(nn.Linear(2, 2), path)
    assert "refused" in message() and "Linear" in message()
    torch.save(collections.OrderedDict(blocks=torch.zeros(2), cls_token=torch.zeros(2), z=torch.zeros(1)), path)
    assert "blocks, cls_token, z" in message()
    torch.save(torchvision.models.resnet152(num_classes=1).state_dict(), path)
    assert "resnet101" in message()
    torch.save([1, 2], path)
    message()
    whole = path.read_bytes()
    for rubbish in (b"", b"hello\n", b"\x80\x02", bytes(range(256)), whole[:len(whole) // 2]):
        path.write_bytes(rubbish)
        message()
    path.unlink(), path.mkdir()
    message()


# --------------------------------------------------------------------------------------------- features and kNN

def brute_knn(bank, labels, queries, k, temperature, classes):
    predictions = []
    for q in queries.double():
        cosine = [float(q @ b / q.norm() / b.norm()) for b in bank.double()]
        votes = [0.0] * classes
        for i in sorted(range(len(bank)), key=lambda i: (-cosine[i], i))[:k]:
            votes[int(labels[i])] += math.exp(cosine[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return torch.tensor(predictions)


def test_knn_equals_a_loop_whatever_the_chunks():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(151, 6, generator=g), torch.randn(43, 6, generator=g)
    labels = torch.randint(5, (151,), generator=g)
    ks = [1, 10, 20, 151, 200]
    expected = torch.stack([brute_knn(bank, labels, queries, k, 0.07, 5) for k in ks])
    assert len(expected.unique(dim=0)) >= 3  # the ks differ, or the test says little
    for chunk in ((1024, 16384), (7, 13), (43, 1), (1, 150)):
        assert torch.equal(common.knn(bank, labels, queries, k=ks, classes=5, chunk=chunk), expected)
    assert torch.equal(common.knn(bank.double(), labels, queries.double(), k=ks, classes=5), expected)
    assert torch.equal(common.knn(bank, labels, queries, k=10, classes=5), expected[1])
    warm = common.knn(bank, labels, queries, k=20, classes=5, temperature=5.0)
    assert torch.equal(warm, brute_knn(bank, labels, queries, 20, 5.0, 5)) and not torch.equal(warm, expected[2])


def test_knn_at_a_low_temperature_is_the_nearest():
    g = torch.Generator().manual_seed(3)
    bank, queries, labels = torch.randn(50, 8, generator=g), torch.randn(9, 8, generator=g), torch.arange(50) % 5
    nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)
    assert torch.equal(common.knn(bank, labels, queries, k=20, classes=5, temperature=1e-4), labels[nearest])


def test_knn_ties():
    bank = torch.tensor([[0.0, 1], [1, 0], [2, 0], [3, 0], [0, 1]])  # rows 1, 2 and 3 point the same way
    query = torch.tensor([[1.0, 0]])
    for chunk in ((1, 1), (1, 2), (1, 5)):
        assert common.knn(bank, torch.tensor([0, 3, 2, 2, 0]), query, k=[1, 2, 3], classes=4, chunk=chunk).tolist() == \
            [[3], [2], [2]]  # the lower row; the lower class on equal votes; the majority


def test_features_are_the_pooled_last_map_of_the_evaluation_crop():
    net = common.backbone("small").train()
    net.bn1.eval()  # a frozen layer stays frozen
    images = common.open_images("scenes:40", 96)
    buffers = [b.clone() for b in net.buffers()]
    found, labels = common.features(net, images, range(5, 40), size=64, device="cpu", batch_size=16)
    assert found.shape == (35, 256) and found.dtype == torch.float32 and not found.requires_grad
    assert net.training and net.layer1.training and not net.bn1.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))
    assert torch.equal(labels, torch.as_tensor(images.labels)[5:40])
    canvas = images.__getitems__([7]).canvas
    x = torchvision.transforms.functional.resize(canvas, 73, torchvision.transforms.InterpolationMode.BICUBIC)
    x = torchvision.transforms.functional.center_crop(x, 64).float() / 255
    x = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = net.eval()(x)[-1].mean((2, 3))[0]
    assert nn.functional.cosine_similarity(found[2], expected, 0) > 0.999
    again, _ = common.features(net.double(), images, [7], size=64, device="cpu", batch_size=1)
    assert again.dtype == torch.float64
    torch.testing.assert_close(again[0].float(), found[2], rtol=1e-3, atol=1e-4)
    half, _ = common.features(net.float(), images, [7], size=64, device="cpu", precision=torch.bfloat16)
    assert half.dtype == torch.float32 and nn.functional.cosine_similarity(half[0], found[2], 0) > 0.999


def test_features_run_in_the_precision_asked_for():
    net, seen = common.backbone("small"), []
    net.conv1.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    images = common.open_images("scenes:2", 32)
    for precision in (None, torch.bfloat16):
        assert common.features(net, images, [0, 1], size=32, device="cpu", precision=precision)[0].dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]
