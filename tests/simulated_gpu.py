"""A GPU that is none, for machines without one: what drives the kernels, driven on the host.

`python -m pytest -p simulated_gpu tests/gpu/test_gpu_road.py` runs a file of the GPU's tests here. Tensors
"on cuda:1" lie in main memory and say otherwise; the kernels' bodies run as tiles_host.cpp runs them. It is
the second of two GPUs: the thread that installs it has made it the current one, as a rank does, and all
others begin with the first, where nothing may be made or started. Streams are as late as they may be: a
launch or an asynchronous copy happens only once somebody waits for it, so a wait, an event or a kept tensor
that is missing shows as wrong bytes. Fresh memory is poisoned; mixing devices and waiting or allocating where
CUDA forbids it raise.

What it cannot tell: anything of the hardware (coalescing, cache hints, memory order, driver, speed).
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fastckpt._C as compiled
import numpy as np
import torch
from fastckpt.planning.copies import COPY, NOTHING
from fastckpt.quantisation.quantrows import QUANT_ROWS
from torch.utils._device import _device_constructors

DEVICE = torch.device("cuda", 1)
CAPACITY = 139 << 30
LARGEST = 6 << 30  # bytes of one allocation that are played; beyond it memory is short

lock = threading.RLock()
plain = torch._C.DisableTorchFunctionSubclass
real_to, real_copy = torch.Tensor.to, torch.Tensor.copy_


# ---- streams: queues that run as late as they may ----


class Stream:
    """Work in order, not begun before somebody waits for it."""

    numbers = itertools.count()

    def __init__(self, device: Place = None) -> None:
        self.index = index_of(device)
        self.cuda_stream = next(Stream.numbers)
        self.queue: deque[Callable[[], None]] = deque()
        streams[self.cuda_stream] = self

    def push(self, act: Callable[[], None]) -> None:
        with lock:
            (state.capturing.acts if state.capturing is not None else self.queue).append(act)

    def drain(self) -> None:
        with lock:
            while self.queue:
                self.queue.popleft()()

    def synchronize(self) -> None:
        waits("a stream")
        self.drain()

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.push(event.reach)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event().recorded(other))

    def query(self) -> bool:
        return not self.queue


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.passed = True
        self.at = 0.0

    def recorded(self, stream: Stream) -> Event:
        self.record(stream)
        return self

    def record(self, stream: Stream | None = None) -> None:
        assert state.capturing is None, "an event of the host in a capture"
        self.stream, self.passed = stream or current_stream(), False
        self.stream.push(self._pass)

    def _pass(self) -> None:
        self.passed, self.at = True, time.perf_counter()

    def reach(self) -> None:
        with lock:
            while not self.passed and self.stream is not None:
                self.stream.queue.popleft()()

    def synchronize(self) -> None:
        waits("an event")
        self.reach()

    def query(self) -> bool:
        assert state.capturing is None, "a question in a capture"
        return self.passed

    def elapsed_time(self, end: Event) -> float:
        assert self.passed and end.passed
        return max(1e3 * (end.at - self.at), 1e-3)


class Graph:
    def __init__(self) -> None:
        self.acts: list[Callable[[], None]] = []

    def replay(self) -> None:
        for act in self.acts:
            current_stream().push(act)


class State(threading.local):
    capturing: Graph | None = None
    strict = False

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}  # the current one of a device, where it is not the default


Place = torch.device | str | int | None


def index_of(device: Place) -> int:
    """The number of a device; the current one's where none is said."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return state.device if index is None else index


streams: dict[int, Stream] = {}
state = State()
default = [Stream(0), Stream(1)]
allocated = 0


def current_stream(device: Place = None) -> Stream:
    index = index_of(device)
    return state.streams.get(index, default[index])


def there(device: Place) -> None:
    """Raise unless it is the GPU that is played."""
    if index_of(device) != DEVICE.index:
        raise RuntimeError(f"cuda:{index_of(device)} was asked for something, and all is on {DEVICE}")


def started(stream: int, act: Callable[[], None]) -> None:
    """Launch a kernel: CUDA wants the stream's device to be the current one of the calling thread."""
    if streams[stream].index != state.device:
        raise RuntimeError("invalid resource handle")
    there(state.device)
    streams[stream].push(act)


def waits(what: str) -> None:
    if state.strict:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if state.capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = current_stream(stream.index)
    with on_device(stream.index):
        state.streams[stream.index] = stream
        try:
            yield
        finally:
            state.streams[stream.index] = before


@contextmanager
def on_device(device: Place) -> Iterator[None]:
    before, state.device = state.device, index_of(device)
    try:
        yield
    finally:
        state.device = before


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    synchronize()
    state.capturing = graph
    try:
        yield
    finally:
        state.capturing = None


def synchronize(device: Place = None) -> None:
    waits("the device")
    mine = [s for s in list(streams.values()) if s.index == index_of(device)]
    with lock:
        while any(s.queue for s in mine):
            for s in mine:
                s.drain()


# ---- tensors that say they are there ----


class There(torch.Tensor):
    """A tensor on cuda:1. Torch's own work on it happens at once, after all that its stream had to do."""

    device = DEVICE
    is_cuda = True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in METADATA:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            if name not in ("copy_", "__setitem__", "to", "cpu", "numpy", "record_stream"):
                if any(not isinstance(t, There) and t.ndim for t in tensors):
                    raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
                if name not in VIEWS and state.capturing is None:
                    current_stream(DEVICE).drain()
        out = super().__torch_function__(func, types, args, kwargs)
        if func == torch.Tensor.grad.__get__ and out is not None:  # torch's own backward makes plain tensors
            with plain():
                return out.as_subclass(There)
        return out

    def copy_(self, source, non_blocking=False):
        return transfer(self, source, non_blocking)

    def __setitem__(self, key, value):
        current_stream(DEVICE).drain()
        into = self[key]
        with plain():
            if not isinstance(value, There):
                waits("a copy of pageable memory")
            real_copy(into, value)

    def record_stream(self, stream: Stream) -> None:
        stream.push(lambda: (self, None)[1])

    def numpy(self):
        raise TypeError("can't convert cuda:1 device type tensor to numpy")

    def item(self):
        waits("item")
        current_stream(DEVICE).drain()
        with plain():
            return self.as_subclass(torch.Tensor).item()

    def cpu(self):
        waits("cpu")
        current_stream(DEVICE).drain()
        with plain():
            return self.as_subclass(torch.Tensor).clone()

    def pin_memory(self):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")


METADATA = set(
    [
        "__get__",
        "data_ptr",
        "nbytes",
        "stride",
        "storage_offset",
        "untyped_storage",
        "is_contiguous",
        "element_size",
        "numel",
        "size",
        "dim",
        "is_floating_point",
        "__len__",
        "is_conj",
        "is_neg",
        "__repr__",
        "requires_grad_",
    ]
)
VIEWS = set(
    [
        "view",
        "reshape",
        "narrow",
        "split",
        "chunk",
        "__getitem__",
        "as_strided",
        "t",
        "detach",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "flatten",
    ]
)

pinned: list[torch.Tensor] = []


def is_pinned(tensor: torch.Tensor) -> bool:
    at = tensor.data_ptr()
    return any(p.data_ptr() <= at < p.data_ptr() + p.nbytes for p in pinned)


def transfer(into: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """copy_ between host and device, or on the device: later where CUDA would do so later."""
    stream = current_stream(DEVICE)
    sides = [isinstance(t, There) for t in (into, source)]
    host = [t for t, there in zip((into, source), sides, strict=True) if not there and t.ndim]
    assert all(sides) or into.dtype == source.dtype or not non_blocking
    if into.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")

    def act() -> None:
        with plain(), torch.inference_mode():
            real_copy(into, source)

    if all(sides) or (non_blocking and all(is_pinned(t) for t in host)):
        stream.push(act)
    else:
        waits("a copy of pageable memory")
        stream.drain()
        act()
    return into


def moved(tensor: torch.Tensor, non_blocking: bool = False) -> There:
    out = fresh(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"))
    return transfer(out, tensor, non_blocking)


def fresh(tensor: torch.Tensor) -> There:
    global allocated
    if state.capturing is not None:
        raise RuntimeError("operation not permitted when stream is capturing: an allocation")
    allocated += tensor.nbytes
    with plain():
        return tensor.as_subclass(There)


def is_there(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def maker(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A factory that knows the device."""

    def make(*args, device=None, pin_memory=False, **kwargs):
        if not is_there(device):
            made = real(*args, device=device, **kwargs)
            if pin_memory:
                pinned.append(made)
            return made
        there(device)
        shape = args[0] if args and isinstance(args[0], (tuple, torch.Size)) else ()
        if np.prod([float(n) for n in shape]) > LARGEST:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        made = real(*args, device="cpu", **kwargs)
        if real.__name__.startswith("empty"):
            made.view(-1).view(torch.uint8).fill_(0xA5)
        return fresh(made)

    return make


# ---- the compiled module's part ----


def column(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address), dtype)


def launch_tiles(
    rows: int, owner: int, sources: int, destinations: int, path: int, first: int, count: int, stream: int
):
    def act() -> None:
        mine = column(owner, first + count, np.uint32)[first:]
        table = column(rows, int(mine.max()) + 1, COPY).copy()
        assert (table["path"][mine] == path).all()
        table["first_tile"] -= np.uint64(first)
        used = table[np.unique(mine)]
        named = used["src_buffer"][used["src_buffer"] != NOTHING]
        table["src_buffer"][: int(mine.min())] = NOTHING
        table["dst_buffer"][: int(mine.min())] = used["dst_buffer"][0]
        n = int(named.max()) + 1 if len(named) else 0
        read = column(sources, n, np.uint64) if n else np.zeros(1, np.uint64)
        into = column(destinations, int(table["dst_buffer"].max()) + 1, np.uint64)
        compiled.run_tiles_on_host(table.view(np.uint8), mine.copy(), read.copy(), into.copy(), 0)

    started(stream, act)


def launch_digests(leaves: int, count: int, out: int, stream: int) -> None:
    def act() -> None:
        compiled.run_digests_on_host(
            column(leaves, 2 * count, np.uint64).copy(), column(out, count, np.uint64)
        )

    if count:
        started(stream, act)


def launch_quantise(rows: int, owner: int, first: int, count: int, stream: int) -> None:
    def act() -> None:
        mine = column(owner, first + count, np.uint32)[first:].copy()
        table = column(rows, int(mine.max()) + 1, QUANT_ROWS).copy()
        table["first_tile"] -= np.uint64(first)
        compiled.run_quantise_on_host(table.view(np.uint8), mine, 0)

    if count:
        started(stream, act)


FACTS: list[dict[str, int | str]] = [
    {"name": name, "registers": 64, "local_bytes": 0, "shared_bytes": 0, "threads": 256}
    | {"blocks_per_multiprocessor": blocks}
    for name, blocks in (("rows", 4), ("transpose", 4), ("general", 4), ("digest", 8), ("quantise", 3))
]
FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "randn",
    "rand",
    "randint",
    "arange",
    "tensor",
    "empty_strided",
]


def install() -> None:
    """Put it in the place of torch's GPU and of the kernels, for this process."""
    _device_constructors()  # kept: `with torch.device("cuda")` knows torch's own alone
    for name in FACTORIES:
        setattr(torch, name, maker(getattr(torch, name)))

    def to(self, *args, non_blocking=False, **kwargs):
        wanted = kwargs.pop("device", None)
        rest = list(args)
        if rest and isinstance(rest[0], (str, torch.device)):
            wanted = rest.pop(0)
        if isinstance(self, There) and wanted is not None and not is_there(wanted):
            self = self.cpu()
        elif not isinstance(self, There) and is_there(wanted):
            there(wanted)
            self = moved(self, non_blocking)
        return real_to(self, *rest, **kwargs) if rest or kwargs else self

    def copy_(self, source, non_blocking=False):
        if isinstance(self, There) or isinstance(source, There):
            return transfer(self, source, non_blocking)
        return real_copy(self, source, non_blocking)

    def pin_memory(self):
        held = self.clone()
        pinned.append(held)
        return held

    torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.pin_memory = to, copy_, pin_memory
    torch.Tensor.cuda = lambda self, non_blocking=False: to(self, "cuda", non_blocking=non_blocking)
    torch.Tensor.is_pinned = is_pinned
    torch.version.cuda = "13.0"
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: state.device,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a simulation",
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": on_stream,
        "device": on_device,
        "current_stream": current_stream,
        "default_stream": lambda device=None: default[index_of(device)],
        "synchronize": synchronize,
        "is_current_stream_capturing": lambda: state.capturing is not None,
        "mem_get_info": lambda device=None: (CAPACITY, CAPACITY),
        "memory_reserved": lambda device=None: allocated,
        "memory_allocated": lambda device=None: allocated,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: setattr(state, "strict", mode == "error"),
        "_sleep": lambda cycles: None,
    }.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.synchronize = synchronize
    state.device = DEVICE.index
    compiled.built_with_cuda, compiled.cuda_archs = True, "none"
    compiled.device_state = lambda: {"devices": 2, "driver": 13000, "runtime": 13000, "error": 0, "why": ""}
    compiled.launch_tiles, compiled.launch_digests = launch_tiles, launch_digests
    compiled.launch_quantise = launch_quantise
    compiled.kernel_facts = lambda: FACTS


install()
