"""A CUDA GPU that is not there. Tensors say they are on cuda:0 and are computed on the CPU, so a whole run takes the way
that it takes on a GPU, with real numbers, and what a GPU would refuse or wait for comes to light:

- an operation on tensors of the GPU and of the CPU together is refused, as there;
- places where the host waits for the device are listed: a number or a mask that is read, a shape that depends on values,
  a copy from memory that is not pinned, an index that lies on the CPU.

What it cannot show: kernels that CUDA does not have, rounding, speed, streams, NCCL. `start()` is for a process of its
own, before a script is started there with --device cuda; the process stays like that. `start(numbers=False)`: tensors
have shapes only, gradients are not worked out, and a step of any size takes seconds: to count the memory they need."""
import collections
import contextlib
import json
import multiprocessing.util
import sys
import weakref
from pathlib import Path
from unittest import mock

import launch
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
         "equal", "is_nonzero"}  # operations whose result's value or shape the host has to know
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
DENSE = {"cat", "stack", "mm", "bmm", "addmm", "baddbmm", "convolution", "gather", "index_select", "index_copy_"}
waits = []  # [step of the loop, "file:line"]
place = {"step": 0, "holds": "cpu", "listed": 0}  # holds: where the numbers are, cpu or meta (there are none)
alive, sizes = collections.Counter(), {}  # of storages on the device: tensors that use them, bytes
memory = {"now": 0, "largest": (0, "")}  # bytes; of a single tensor, and where it came from


class Pretended(torch.Tensor):
    """A tensor whose numbers are in `held`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                   storage_offset=inner.storage_offset(), device=CUDA)

    def __init__(self, inner):
        self.held, storage = inner, inner.untyped_storage()
        if not alive[storage._cdata]:
            sizes[storage._cdata] = n = storage.nbytes()
            memory["now"] += n
            if n > memory["largest"][0]:
                memory["largest"] = n, line()
        alive[storage._cdata] += 1
        weakref.finalize(inner, forget, storage._cdata)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Sees operations that have no tensor of the device among their arguments, too, such as torch.zeros(device=...)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def forget(storage):
    alive[storage] -= 1
    if not alive[storage]:
        memory["now"] -= sizes[storage]


def line():
    """The line of the project that is being run."""
    frame = sys._getframe(1)
    while frame and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"


def waited():
    waits.append([place["step"], line()])


def call(func, args, kwargs):
    """One operation of torch, on tensors of the device, of the CPU, or both. RuntimeError where CUDA refuses it."""
    name = func._schema.name.split("::")[1]
    if name in ("pin_memory", "_pin_memory"):
        assert not isinstance(args[0], Pretended), "only memory of the CPU can be pinned"
        args[0].pinned = True
        return args[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there, here = ([x for x in tensors if isinstance(x, Pretended) == on] for on in (True, False))
    device, kwargs = kwargs.get("device"), {k: v for k, v in kwargs.items() if k != "pin_memory"}
    goes = bool(there) if device is None else torch.device(device).type == "cuda"  # where the result will be
    if name == "copy_":
        goes = isinstance(args[0], Pretended)
    if name in ("copy_", "_to_copy"):
        source = args[name == "copy_"]
        if isinstance(source, Pretended) != goes and (isinstance(source, Pretended) or not hasattr(source, "pinned")):
            waited()
    elif there and here:
        if name in INDEXING and isinstance(args[0], Pretended):
            waited()  # CUDA takes indices from the CPU, by a copy
        elif name in DENSE or any(x.ndim for x in here):
            raise RuntimeError(f"{func} of tensors on cuda:0 and on the cpu: {[(x.device, *x.shape) for x in tensors]}")
    if there and (name in READS or name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])):
        waited()
    shapes = place["holds"] == "meta"
    if shapes and name == "_local_scalar_dense" and there:
        return 0
    if shapes and there and not goes:
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    def plain(x):
        return x.held if isinstance(x, Pretended) else x.to("meta") if shapes and goes else x
    plain_args, plain_kwargs = tree_map_only(torch.Tensor, plain, (args, kwargs))
    if device is not None:
        plain_kwargs["device"] = torch.device(place["holds"] if goes else "cpu")
    out = func(*plain_args, **plain_kwargs)
    if not goes:
        return args[0] if name == "copy_" else out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Pretended, out))


def gradients(loss):
    """Reverse mode, as torch's engine does it; that one would ask a driver. -> {node: {number of its output: gradient}}"""
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((n, False) for n, _ in node.next_functions if n is not None)]
    found = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            if hasattr(node, "variable") or node not in found:
                continue
            out = node(*[found[node].get(i) for i in range(len(node._input_metadata))])
            for g, (follower, i) in zip(out if isinstance(out, tuple) else (out,), node.next_functions):
                if follower is not None and g is not None:
                    g = g.sum_to_size(follower._input_metadata[i].shape).to(follower._input_metadata[i].dtype)
                    known = found.setdefault(follower, {})
                    known[i] = known[i] + g if i in known else g
    return found


def leaves(loss):
    """The tensors whose gradients a loss has."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def backward(loss):
    """Tensor.backward. Without numbers: gradients of the right shapes, and `memory` notes what was alive before them."""
    if place["holds"] == "meta":
        memory["kept"], found = memory["now"], leaves(loss)  # weights and all that stays, and what this pass needs
        for x in found:
            x.grad = torch.empty_like(x)
        memory["gradients"] = sum(x.nbytes for x in found)
        return
    for node, found in gradients(loss).items():
        if hasattr(node, "variable"):
            x, g = node.variable, found[0]
            x.grad = g.detach() if x.grad is None else x.grad + g


def grad(loss, inputs, retain_graph=None):
    """torch.autograd.grad, for tensors that are no leaves."""
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    if place["holds"] == "meta":
        return [torch.empty_like(x) for x in inputs]
    found = gradients(loss)
    return [found[x.grad_fn][x.output_nr] for x in inputs]


def start(numbers=True):
    """From here on this process has one GPU. At its end `waits` are in waits.json, in the folder of --out. Without
    numbers what is read is 0, and where a list is read each of its entries is place["listed"]."""
    import common
    place["holds"] = "cpu" if numbers else "meta"
    torch._C._ensureCUDADeviceGuardSet()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.backends.cudnn.enabled = False  # its batch norm is an operation that CPUs do not have
    plain, loader, save = torch.Tensor.tolist, torch.utils.data.DataLoader, torch.save
    uniforms = common.uniforms

    class Loader:
        """torch pins in a thread that asks the driver."""

        def __init__(self, *args, pin_memory, **kwargs):
            self.batches, self.pins = loader(*args, **kwargs), pin_memory

        def __iter__(self):
            return map(torch.utils.data._utils.pin_memory.pin_memory, self.batches) if self.pins else iter(self.batches)

    def tolist(x):
        if isinstance(x, Pretended):
            waited()
            if x.held.is_meta:
                x = torch.full(x.shape, place["listed"])
        return plain(getattr(x, "held", x))

    def marked(seed, step, *args, **kwargs):
        place["step"] = step + 1
        return uniforms(seed, step, *args, **kwargs)

    for name, instead in {
            "torch.cuda._lazy_init": lambda: None, "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1, "torch.cuda.set_device": lambda device: None,
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
            "torch.cuda.is_current_stream_capturing": lambda: False,  # torch 2.11's optimizers ask
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.max_memory_allocated": lambda device=None: 0,
            "torch.cuda.Stream": lambda device: mock.MagicMock(), "torch.cuda.stream": contextlib.nullcontext,
            "torch.cuda.current_stream": lambda device: mock.MagicMock(),
            "torch.Tensor.record_stream": lambda x, stream: None,
            "torch.Tensor.tolist": tolist, "torch.Tensor.backward": backward, "torch.autograd.grad": grad,
            "torch.utils.data.DataLoader": Loader,
            "torch.save": lambda x, file: save(tree_map_only(Pretended, lambda x: x.held.detach(), x), file),
    }.items():
        mock.patch(name, instead).start()
    for module in list(sys.modules.values()):
        if getattr(module, "uniforms", None) is uniforms:
            module.uniforms = marked
    Device().__enter__()
    if "--out" in sys.argv:
        told = Path(sys.argv[sys.argv.index("--out") + 1]) / "waits.json"
        multiprocessing.util.Finalize(None, lambda: told.write_text(json.dumps(waits)), exitpriority=0)


def run(script, argv, out):
    """Waits for the end of a script on such a GPU. -> how often the host waited for it in each step (0: before them)"""
    launch.Run(script, [*argv, "--device", "cuda", "--out", out], before=start).wait()
    return collections.Counter(step for step, _ in json.loads((Path(out) / "waits.json").read_text()))
