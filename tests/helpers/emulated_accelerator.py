"""An accelerator in pure Python, for machines that have none: a backend of torch 2.14 under the name `npu`.

Its tensors hold a tensor of the CPU, which computes, so results are the CPU's to the bit. As on a GPU, they never meet
tensors of the CPU. It has streams, events, pinned memory and a limit of memory. `Race` is raised where a stream uses
memory before it has waited for the stream that wrote it, and where memory is freed while another stream may use it.
helpers/host_waits.py counts where the host waits.
"""

import contextlib
import gc
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers.host_waits import READS, place

NAME = "npu"  # a device type that Accelerate supports
IS_SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICE: torch.device
aten = torch.ops.aten


class Race(AssertionError):
    """Use of memory that another stream may still write or read."""


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _state.pinned


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    _state.pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that its address is not used again
    return tensor


class Stream:
    """A queue with a clock. `seen` has the time that it has waited for, by stream."""

    def __init__(self, device: object = None):
        self.device, self.time, self.seen = DEVICE, 0, Counter()
        _state.streams.append(self)

    def snapshot(self) -> Counter:
        return self.seen | Counter({self: self.time})  # the union of Counters has the maxima

    def wait_stream(self, other: "Stream") -> None:
        self.seen |= other.snapshot()

    def __enter__(self) -> "Stream":
        self._before, _state.stream = _state.stream, self
        return self

    def __exit__(self, *_: object) -> None:
        _state.stream = self._before

    def synchronize(self) -> None:
        _state.host_seen |= self.snapshot()


class Event:
    def __init__(self, device: object = None, enable_timing: bool = False):
        self.seen = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.seen, self.seconds = (stream or _state.stream).snapshot(), time.perf_counter()

    def synchronize(self) -> None:
        _state.host_seen |= self.seen

    def elapsed_time(self, end: "Event") -> float:
        return (end.seconds - self.seconds) * 1000


class Block:
    """Memory of the device, shared by a tensor and its views."""

    def __init__(self, num_bytes: int):
        self.num_bytes, self.stream, self.uses, self.recorded = num_bytes, _state.stream, Counter(), set()
        self.written_by = self.stream, self.stream.time
        _state.allocated += num_bytes
        _state.peak = max(_state.peak, _state.allocated)

    def use(self, stream: Stream, writes: bool, function: object) -> None:
        """Check an access by an operator that is launched now."""
        before = dict([self.written_by]) if not writes else self.uses | Counter(dict([self.written_by]))
        for other, moment in before.items():
            if other is not stream and (stream.seen | _state.host_seen)[other] < moment:
                _fail(Race(f"{function} uses memory of a stream that it has not waited for, at {place()}"))
        self.uses[stream] = stream.time
        if writes:
            self.written_by = stream, stream.time

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing():
            return
        _state.allocated -= self.num_bytes
        for stream, moment in self.uses.items():  # an allocator gives the memory to the next tensor of self.stream
            waited = (self.stream.seen | _state.host_seen)[stream] >= moment
            if stream is not self.stream and stream not in self.recorded and not waited:
                _state.pending.append(Race(f"{self.num_bytes} bytes were freed without record_stream, at {place()}"))


class _State:
    def __init__(self) -> None:
        self.is_active, self.libraries, self.limit, self.allocated, self.peak = False, (), float("inf"), 0, 0
        self.host_seen = Counter()  # the time that the host has waited for, by stream
        self.streams: list[Stream] = []
        self.blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()  # by storage
        self.pinned: dict[int, torch.Tensor] = {}  # by address
        self.pending: list[BaseException] = []  # found where nothing can be raised


_state = _State()


class Accelerated(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        how = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.size(), **how)
        tensor.raw, storage = raw, raw.untyped_storage()
        tensor.block = _state.blocks.get(storage._cdata) or Block(storage.nbytes())
        _state.blocks[storage._cdata] = tensor.block
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _raw(value: object) -> object:
    return value.raw if isinstance(value, Accelerated) else value


def _wrapped(value: object) -> object:
    return Accelerated(value) if isinstance(value, torch.Tensor) and not isinstance(value, Accelerated) else value


def _compute(function, args: tuple, kwargs: dict) -> object:
    packet, target = function.overloadpacket, kwargs.get("device")
    if packet is aten.to:  # inference mode does not divide it
        with _Dispatch():
            return function.decompose(*args, **kwargs)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    own = [each for each in tensors if isinstance(each, Accelerated)]
    on_device = bool(own) if target is None else torch.device(target).type == NAME
    if not own and not on_device:
        return function(*args, **kwargs)
    # torch lets numbers and indices of the CPU take part.
    strangers = [each for each in tensors if not isinstance(each, Accelerated) and each.dim()]
    if own and strangers and packet not in (aten.copy_, aten._to_copy, aten.index, aten.index_put_):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {packet} got {NAME} and cpu")
    is_read = packet is aten.copy_ and not isinstance(args[0], Accelerated)
    _launch(function, args, own, waits=is_read or packet.__name__ in READS or not on_device)
    dropped = {"device", "pin_memory", "non_blocking"}
    kwargs = {name: _raw(value) for name, value in kwargs.items() if name not in dropped}
    result = function(*tree_map(_raw, args), **kwargs)
    if is_read or not on_device:
        return result
    known = {id(each.raw): each for each in own}  # in place: the tensor that was given
    before = _state.allocated
    result = tree_map(lambda value: known[id(value)] if id(value) in known else _wrapped(value), result)
    if _state.allocated > max(before, _state.limit):
        _fail(torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {_state.allocated - before} bytes."))
    return result


def _fail(error: BaseException) -> None:
    """Raise an error, in the main thread: torch's backward ends the process if the device's own thread raises one."""
    if threading.current_thread() is threading.main_thread():
        raise error
    _state.pending.append(error)


def _launch(function, args: tuple, own: list, waits: bool) -> None:
    """Put an operator into the queue of the current stream, and check its memory."""
    if _state.pending and threading.current_thread() is threading.main_thread():
        error, _state.pending = _state.pending[0], []
        raise error
    stream = _state.stream
    stream.time += 1
    written = set()
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {id(each) for each in tree_leaves(value)}
    for each in own:
        each.block.use(stream, id(each) in written, function)
    if waits:
        stream.synchronize()


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Pinned memory, and what copies below the dispatcher."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.numpy and isinstance(args[0], Accelerated):
            raise TypeError(f"can't convert {NAME} device type tensor to numpy")
        if function is torch.Tensor.tolist and isinstance(args[0], Accelerated):
            return args[0].cpu().tolist()
        if kwargs.pop("pin_memory", False):
            return _pin(function(*args, **kwargs))
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            kwargs.pop("device")
            return function(*args, **kwargs).to(DEVICE)
        return function(*args, **kwargs)


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):
    def is_available(self) -> bool:
        return _state.is_active

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _synchronize(device: object = None) -> None:
    for stream in _state.streams:
        stream.synchronize()


def _in_low_precision(operation):
    def kernel(*args):
        dtype = torch.get_autocast_dtype(NAME)
        args = [each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each for each in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*args)

    return kernel


def register() -> None:
    """Register the backend, before the first backward: autograd's threads are then those of the devices that there are.

    Outside of `emulated` it is not available. A machine with a real accelerator keeps that one.
    """
    global DEVICE
    if not IS_SUPPORTED or _state.libraries or torch.accelerator.is_available():
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    DEVICE = torch.device(NAME, 0)
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("conv2d", "linear"):
        some.impl(name, _in_low_precision(getattr(aten, name).default), "AutocastPrivateUse1")
    _state.libraries, _state.stream = (every, some), Stream()


@contextlib.contextmanager
def emulated(limit: float = float("inf")) -> Iterator[None]:
    """Let this process have the device, with that many bytes of memory, in the body."""
    register()
    replaced = {
        "torch.Stream": Stream,
        "torch.Event": Event,
        "torch.Tensor.is_pinned": _is_pinned,
        "torch.Tensor.pin_memory": lambda tensor, device=None: _pin(tensor.clone()),
        "torch.Tensor.record_stream": lambda tensor, stream: tensor.block.recorded.add(stream),
        "torch.accelerator.current_stream": lambda device=None: _state.stream,
        "torch.accelerator.synchronize": _synchronize,
        # Accelerate has one for each type of device that it supports; this one's is torch_npu's.
        "accelerate.accelerator.get_grad_scaler": lambda kind=None, **how: torch.amp.GradScaler(NAME, **how),
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": f"{NAME}:0"}))
        if limit < float("inf"):
            gc.collect()  # frees what earlier tests have left
        _state.is_active, _state.limit, _state.peak, _state.pending = True, limit, _state.allocated, []
        stack.callback(setattr, _state, "is_active", False)
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield
    if _state.pending:
        raise _state.pending.pop(0)


def peak_bytes() -> int:
    """Return the largest number of bytes that were allocated at once in this `emulated`."""
    return _state.peak
