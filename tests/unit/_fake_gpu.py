"""A GPU that is not there: tensors that say they are on one, computed on the CPU, held to a GPU's rules.

Placement: an operation on tensors of both devices fails, and so does what reads a tensor of the card as the computer's.
Recording: what a CUDA graph cannot hold fails (a number asked of the device, a copy from or to the computer, a size
that depends on what a tensor holds); a replay does what was recorded and nothing else, on the tensors it was recorded
with, which hold no numbers before. Triton's kernels run in its interpreter. Not shown: time, memory, what streams and
threads do side by side, how failed recordings are left, autograd's own engine (its nodes are called one by one), and a
GPU's own random numbers and last bits.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scvi_core.kernels import gpu
from scvi_core.train import recorded

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}  # between devices
WAITS = {  # for the device, to know a number or a size
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten.equal.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.masked_scatter.default, aten.multinomial.default, aten.histc.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
"""


class OnCard(torch.Tensor):
    """A tensor of the card; `held` is the tensor of the computer that has its numbers."""

    @staticmethod
    def __new__(cls, held):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device="cuda:0", **how)

    def __init__(self, held):
        self.held = held

    def record_stream(self, stream):  # as streams take turns here
        pass

    data = property(lambda self: self.detach(), lambda self, other: setattr(self, "held", other.held))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: the card is no longer there")


def held(tree):
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, OnCard) else leaf, tree)


def in_tf32():
    """Whether a GPU would multiply float32 matrices as TF32."""
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


def tensors(tree, kind=torch.Tensor):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, kind)]


class Card(TorchDispatchMode):
    """The card, which is there while this is entered.

    Attributes
    ----------
    free : bytes that it says it has. waits, replays, launches : of the device, of graphs, of Triton's kernels.
    tape : what is being recorded, if anything. precisions : of float32 products, at each recording's matrix products.
    """

    def __init__(self):
        super().__init__()
        self.free, self.tape, self.waits, self.replays, self.launches = 2**34, None, 0, 0, 0
        self.precisions = set()

    def __enter__(self):
        self.named = Named()
        self.named.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.named.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not torch.is_inference_mode_enabled():
            return self.compute(func, args, dict(kwargs or {}))
        with torch.inference_mode(False), torch.no_grad():  # views of tensors of a class of its own do not bear it
            return self.compute(func, args, dict(kwargs or {}))

    def compute(self, func, args, kwargs):
        ours = tensors((args, kwargs), OnCard)
        others = [t for t in tensors((args, kwargs)) if not isinstance(t, OnCard)]
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_card = wanted.type == "cuda" if wanted else bool(ours)
        if func is aten.copy_.default:
            to_card = isinstance(args[0], OnCard)
        if wanted and to_card:
            kwargs["device"] = torch.device("cpu")
        if func is aten._pin_memory.default:
            return args[0]
        if func in MOVES:
            if to_card != bool(ours) or (ours and others):
                self.wait(func)
        elif func in INDEXED and ours:  # by positions of the computer, which are copied; or by a mask
            if others or any(t.dtype == torch.bool for t in ours[1:]):
                self.wait(func)
        elif ours and any(t.dim() for t in others):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if func in WAITS and ours:
            self.wait(func)
        out = func(*held(args), **held(kwargs))
        if not to_card:
            return out
        known = {id(t.held): t for t in ours}  # what is changed in place stays the tensor it is
        wrap = lambda t: known[id(t)] if id(t) in known else OnCard(t)  # noqa: E731
        out = tree_map(lambda leaf: wrap(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
        if self.tape is not None:
            assert not others, f"{func}: a number of the computer's would stay as it is at every replay"
            if func in (aten.mm.default, aten.addmm.default, aten.mm.out):
                self.precisions.add((ours[-1].dtype, in_tf32()))
            self.tape.append((func, args, kwargs, out))
        return out

    def wait(self, func):
        assert self.tape is None, f"{func}: not within a recorded step"
        self.waits += 1

    def launcher(self, kernel):
        """A Triton kernel, which takes tensors of the card and is interpreted."""

        def launch(grid, *args, **kwargs):
            assert all(isinstance(t, OnCard) for t in tensors(args)), "a pointer into the computer's memory"
            assert all(t.is_contiguous() for t in tensors(args)), "a kernel goes through memory without gaps"
            self.launches += 1
            run = lambda *args, **kwargs: kernel[grid](*args, **kwargs) and None  # noqa: E731
            run(*held(args), **kwargs)
            if self.tape is not None:
                self.tape.append((run, args, kwargs, None))

        class Launcher:
            def __getitem__(self, grid):
                return functools.partial(launch, grid)

        return Launcher()


class Named(TorchFunctionMode):
    """Gives the card its number where it is named without, as PyTorch built without CUDA cannot ask which it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        plain = lambda leaf: isinstance(leaf, str | torch.device) and leaf in ("cuda", torch.device("cuda"))  # noqa: E731
        number = lambda leaf: torch.device("cuda:0") if plain(leaf) else leaf  # noqa: E731
        args, kwargs = tree_map(number, (args, kwargs or {}))
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):  # is one, and would lose its class
            return args[0]
        return func(*args, **kwargs)


class Graph:
    """In the place of :class:`torch.cuda.CUDAGraph`."""

    card: Card

    def __init__(self):
        self.tape, self.seeded = [], False

    def register_generator_state(self, generator):
        self.seeded = True

    def pool(self):
        return (0, 1)

    @contextlib.contextmanager
    def record(self):
        assert self.seeded, "the noise would be the same at every replay"
        self.card.tape = self.tape
        try:
            yield
        finally:
            self.card.tape = None
        made = set()
        for _, args, kwargs, out in self.tape:
            before = {t.held.untyped_storage().data_ptr() for t in tensors((args, kwargs), OnCard)}
            for t in tensors(out, OnCard):
                if t.held.untyped_storage().data_ptr() not in before:
                    made.add(t.held)
        for t in made:
            if t.is_floating_point():
                t.fill_(torch.nan)

    def replay(self):
        self.card.replays += 1
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for func, args, kwargs, out in self.tape:
                again = tensors(func(*held(args), **held(kwargs)))
                for old, new in zip(tensors(held(out)), again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                        old.copy_(new)


def backward(root):
    """In the place of :meth:`torch.Tensor.backward`, whose engine asks the driver for streams: node by node, each once
    all that depends on it has been.
    """
    waiting, found, ready = {}, [root.grad_fn], []
    for node in found:
        for later, _ in node.next_functions:
            if later is not None:
                if later not in waiting:
                    found.append(later)
                waiting[later] = waiting.get(later, 0) + 1
    gradients = {root.grad_fn: {0: torch.ones_like(root)}}
    ready.append(root.grad_fn)
    with torch.no_grad():
        for node in ready:
            given = gradients.pop(node)
            if hasattr(node, "variable"):
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
                continue
            n_outputs = max(given) + 1
            by_hand = isinstance(node, torch.autograd.function.BackwardCFunction)
            answers = (node.apply if by_hand else node)(*(given.get(i) for i in range(n_outputs)))
            answers, places = answers if isinstance(answers, tuple) else (answers,), node.next_functions
            if by_hand:  # answers for what is no tensor, too
                answers, places = [a for a in answers if a is not None], [p for p in places if p[0] is not None]
            for (later, at), answer in zip(places, answers, strict=True):
                if later is None:
                    continue
                if answer is not None:
                    shape = later._input_metadata[at].shape  # an operand that was expanded gets the sum
                    answer = answer if answer.shape == shape else answer.sum_to_size(shape)
                    slots = gradients.setdefault(later, {})
                    slots[at] = answer if at not in slots else slots[at] + answer
                waiting[later] -= 1
                if not waiting[later]:
                    ready.append(later)


class Worker:
    """In the place of a thread, where the card would not be there."""

    def __init__(self, threads):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@functools.cache
def _guard():
    """Have PyTorch built without CUDA bear tensors of it: before each operation it asks such an object which device."""
    torch._C._ensureCUDADeviceGuardSet()  # enough for one built with CUDA
    if torch.version.cuda is not None:
        return
    compiler, here = shutil.which("g++") or shutil.which("c++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{here / 'include'}", f"-L{here / 'lib'}", "-lc10"]
        subprocess.run([compiler, source, "-o", built, *options], check=True, capture_output=True)
        ctypes.CDLL(str(built))


def interpret(monkeypatch):
    """Triton's interpreter for a test, which is skipped where there is none; TRITON_INTERPRET has to be set before."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; it comes with PyTorch's builds for CUDA")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported before its interpreter could be chosen")
    monkeypatch.setattr(gpu, "BLOCK", 32)  # so that small tiles have several blocks
    monkeypatch.setattr(gpu, "SOME", 32)


def insert(monkeypatch):
    """Put the card in, for a test, which enters it."""
    interpret(monkeypatch)
    from scvi_core.kernels import triton_kernels

    _guard()
    card = Card()
    monkeypatch.setattr(Graph, "card", card, raising=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    no = lambda *_, **__: None  # noqa: E731
    outside = lambda *_: card.tape is None or card.wait("waiting for the device")  # noqa: E731
    fakes = {
        "is_available": lambda: True, "_lazy_init": no, "current_device": lambda: 0, "empty_cache": outside,
        "get_device_name": lambda *_: "a fake GPU", "is_bf16_supported": lambda **_: True,
        "mem_get_info": lambda *_: (card.free, card.free), "synchronize": outside, "device_count": lambda: 1,
        "current_stream": lambda *_: stream, "Stream": lambda *_, **__: stream, "set_stream": no,
        "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": lambda graph, **_: graph.record(),
        "reset_peak_memory_stats": no, "max_memory_allocated": lambda: 0,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    move = torch.nn.Module._apply

    def swapping(*args, **kwargs):  # a module's weights cannot become of another class in place
        with monkeypatch.context() as within:
            within.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
            return move(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "_apply", swapping)
    monkeypatch.setattr(recorded, "ThreadPoolExecutor", Worker)
    recorded._side.cache_clear()
    names = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    launchers = {name: card.launcher(getattr(triton_kernels, name)) for name in names}
    monkeypatch.setattr(gpu, "_triton", lambda: (SimpleNamespace(**launchers), ""))
    return card
