"""Whole runs on a CUDA GPU that is not there (pretend.py): no tensors of two devices meet, the numbers are the CPU's, and
the host waits for the device only where it has to. Skipped where the tests are shown a GPU (TEST_GPUS)."""
import shutil

import pretend
import pytest
import torch
import torch.nn.functional as F
from launch import SCRIPTS, assert_same_losses, flags, load, read_log, reference, server

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
EACH_STEP = {"slotcon": 1}  # SlotCon reads how many slots there are: the shape of its logits hangs on it


def look():
    def loss(w, a, b):
        return ((w @ a).tanh().sum() + (w * b).square().mean() + F.linear(w, w[:2], b[:2]).exp().sum()) * 2

    w, b = torch.randn(3, 4, requires_grad=True), torch.ones(4)
    wanted, = torch.autograd.grad(loss(w, torch.arange(4.0), b), w)
    pretend.start()
    a = torch.arange(4.0, device="cuda")
    assert a.device == pretend.CUDA and b.to("cuda").device == pretend.CUDA and a.cpu().device.type == "cpu"
    assert (a * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
    c = a.clone()
    c[1:3].mul_(10)
    assert c.tolist() == [0, 10, 20, 3]
    for wrong in (lambda: a + b, lambda: torch.cat([a, b]), lambda: torch.stack([a[0], b[0]]), lambda: b[a.long()]):
        with pytest.raises(RuntimeError):
            wrong()
    for waits, call in ((1, lambda: a.sum().item()), (1, lambda: a[a > 1]), (1, lambda: a.nonzero()), (1, lambda: a.cpu()),
                        (1, lambda: bool(a[0])), (1, lambda: a[torch.tensor([1, 2])]), (1, lambda: b.to("cuda")),
                        (0, lambda: b.pin_memory().to("cuda")), (0, lambda: a.where(a > 1, 0).softmax(0)),
                        (0, lambda: a[a.long().clamp(0, 3)])):
        pretend.waits.clear()
        call()
        assert len(pretend.waits) == waits
    far = w.detach().to("cuda").requires_grad_()
    between = far + 0
    whole = loss(between, a, b.to("cuda"))
    found, = torch.autograd.grad(whole, [between], retain_graph=True)
    whole.backward()
    torch.testing.assert_close([found.cpu(), far.grad.cpu()], [wanted, wanted])


def test_the_pretended_gpu_refuses_and_waits_as_a_real_one():
    process = server().Process(target=look)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(script, tmp_path):
    argv = flags(script, tmp_path / "whole", "--log-every", "100", "--save-every", "100")
    waits = pretend.run(script, argv, tmp_path / "whole")
    assert_same_losses(tmp_path / "whole", reference(script), steps=[1, 10])  # with gradients, gauges, looks at the end
    for step in range(2, 10):  # no log line, no checkpoint
        assert waits[step] == EACH_STEP.get(script, 0), f"step {step}"
    found, wanted = (load(out / "backbone.pth") for out in (tmp_path / "whole", reference(script)))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_on_a_gpu(script, tmp_path):
    shutil.copy(reference(script) / "checkpoint.previous.pt", tmp_path / "checkpoint.pt")
    pretend.run(script, flags(script, tmp_path), tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [10]
    assert_same_losses(tmp_path, reference(script), steps=[10])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_half_precision_of_a_gpu(script, precision, tmp_path):
    argv = flags(script, tmp_path, "--precision", precision, "--steps", "4", "--log-every", "4", "--save-every", "4")
    waits = pretend.run(script, argv, tmp_path)
    assert_same_losses(tmp_path, reference(script), rel=0.1, steps=[1])
    once = EACH_STEP.get(script, 0) + (precision == "fp16")  # the scaler asks whether to take the step
    assert (waits[2], waits[3]) == (once, once)
