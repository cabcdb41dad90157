"""The `cuda` executor: Copy rows on a GPU, one launch for each path that occurs.

Law: bytes equal to the torch executor's. The stream is the caller's current one, and nothing here waits for
it. What is prepared can run again, or be captured into a graph, with launches alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DeviceError
from ..extents import Buffer
from ..native import _C
from ..planning.copies import Table
from .tiles import Tiles, tile


def refusal(built: bool, state: Mapping[str, int | str], torch_cuda: str | None) -> str | None:
    """Why CUDA cannot run here, or None: `built` with kernels, `_C.device_state()`, torch's own CUDA version.

    Versions are 1000 * major + 10 * minor; error 35 is "driver too old" and also "no driver", 3 what a fork
    of a process that used CUDA gets."""
    if not built:
        return "this build runs on the CPU only; install again where nvcc is found (FASTCKPT_CUDA=1 insists)"
    driver, runtime = int(state["driver"]), int(state["runtime"])
    if driver == 0:
        return "no GPU here: no NVIDIA driver is installed"
    if state["error"] == 35:
        return (
            f"the driver is too old: it runs CUDA {_version(driver)}, this build needs {_version(runtime)}; "
            f"update the driver, or build with a toolkit of CUDA {_version(driver)}"
        )
    if state["error"] == 3:  # "initialization error"
        return (
            "CUDA does not start here; a process that was forked from one that used it cannot use it: "
            "start it with multiprocessing's spawn"
        )
    if state["error"] or not state["devices"]:
        return f"no GPU here: {state['why'] or 'the driver finds none'}"
    if torch_cuda is None:
        return f"torch {torch.__version__} is built for the CPU only; install one for CUDA"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def usable(device: str | torch.device) -> torch.device:
    """The device by number, "cuda" being the current one. Raises DeviceError saying why it cannot be used,
    also where a graph is being captured: nothing can be made ready there."""
    try:
        asked = torch.device(device)
    except RuntimeError as e:
        raise DeviceError(f"device {device!r}: {str(e).splitlines()[0]}") from None
    if asked.type != "cuda":
        raise DeviceError(f"device {device!r}: wanted cpu, cuda or cuda:N")
    built = _C is not None and _C.built_with_cuda
    nothing: Mapping[str, int | str] = {"devices": 0, "driver": 0, "runtime": 0, "error": 0, "why": ""}
    why = refusal(built, _C.device_state() if built else nothing, torch.version.cuda)
    if why is not None:
        raise DeviceError(f"device {device!r}: {why}")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as e:  # torch's CUDA, not ours, may want a newer driver
        told = str(e).splitlines()[0]
        raise DeviceError(f"device {device!r}: torch {torch.__version__} cannot use it: {told}") from None
    if torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            f"device {device!r}: a CUDA graph is being captured; call fastckpt.prepare before, run what it "
            "gives once, and capture its run() alone"
        )
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r}: this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


class Cuda:
    """Runs rows on one GPU. Raises DeviceError where that cannot be."""

    name = "cuda"

    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.device = usable(device)

    def bind(self, sources: Sequence[Buffer]) -> CudaRunner:
        """A runner over buffers on this GPU; what lies in main memory (constants) is brought there first."""
        return CudaRunner(self.device, sources)


class CudaRunner:
    """`Cuda` with its sources."""

    def __init__(self, device: torch.device, sources: Sequence[Buffer]) -> None:
        self.device = device
        self._sources = [_here(b, device) for b in sources]

    def run(self, rows: Table, destinations: Sequence[Buffer], threads: int = 1) -> None:
        """Starts `rows` on the current stream; `threads` says nothing here. Raises DeviceError."""
        self.prepare(rows, destinations).run()

    def prepare(self, rows: Table, destinations: Sequence[Buffer]) -> Prepared:
        """Brings the table of `rows` to the GPU, so that running it costs only launches.

        Raises DeviceError for a destination that lies elsewhere and where memory is too short."""
        for b in destinations:
            if b.device != str(self.device):
                raise DeviceError(f"executor cuda: wanted buffers on {self.device}, got one on {b.device}")
        made = tile(rows, addresses(self._sources), addresses(destinations))
        data, parts = packed(made)
        try:
            with torch.cuda.device(self.device):
                held = torch.from_numpy(data).pin_memory().to(self.device, non_blocking=True)
        except torch.OutOfMemoryError:
            raise short_of_memory(self.device, data.nbytes, "the table of copies") from None
        ready = _recorded(torch.cuda.current_stream(self.device))
        return Prepared(self.device, held, parts, made.borders, (*self._sources, *destinations), ready)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Rows ready to run on a GPU: their table there, and everything it points to.

    `parts`: where the rows, owners, sources and destinations of `tiles.Tiles` begin in `table`, in bytes.
    `used`: the streams it ran on, by their handles, and where in each its last run ended."""

    device: torch.device
    table: torch.Tensor
    parts: tuple[int, int, int, int]
    borders: tuple[int, int, int, int]
    keep: tuple[Buffer, ...]
    ready: torch.cuda.Event
    used: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = field(default_factory=dict)

    def run(self) -> None:
        """Starts the copies on the current stream and returns.

        May be captured into a graph once it has run; whoever replays that keeps this object. Else memory is
        kept until the copies are done, also when this object goes before. Raises DeviceError when a launch
        fails, and for a capture of what has not run: its table may still be on its way."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            captured = torch.cuda.is_current_stream_capturing()
            if captured and not self.used:
                raise DeviceError("executor cuda: a CUDA graph is being captured; run this once before")
            if not captured:
                stream.wait_event(self.ready)
            base = self.table.data_ptr()
            rows, owner, sources, destinations = (base + part for part in self.parts)
            for path, first in enumerate(self.borders[:-1]):
                count = self.borders[path + 1] - first
                if not count:
                    continue
                _started(_C.launch_tiles, rows, owner, sources, destinations, path, first, count)
            if not captured:
                self._ran_on(stream)

    def _ran_on(self, stream: torch.cuda.Stream) -> None:
        known = self.used.get(stream.cuda_stream)
        if known is None:
            self.used[stream.cuda_stream] = stream, _recorded(stream)
        else:
            known[1].record(stream)

    def __del__(self) -> None:
        # Torch's allocator knows nothing of kernels of ours: it is told who may still be reading. While
        # something is captured, CUDA allows no question whether they are done.
        for stream, end in self.used.values():
            if torch.cuda.is_current_stream_capturing() or not end.query():  # type: ignore[no-untyped-call]
                for owner in (self.table, *(b.owner for b in self.keep)):
                    if isinstance(owner, torch.Tensor) and owner.is_cuda:
                        owner.record_stream(stream)


def taken(leaves: NDArray[np.uint64], device: torch.device) -> NDArray[np.uint64]:
    """XXH3-64 of runs of device memory, given as (address, nbytes) pairs; waits for the current stream.

    Raises DeviceError when the launch fails."""
    usable(device)
    with torch.cuda.device(device):
        held = torch.from_numpy(leaves.view(np.int64)).to(device)
        out = torch.zeros(len(leaves), dtype=torch.int64, device=device)
        _started(_C.launch_digests, held.data_ptr(), len(leaves), out.data_ptr())
        back: NDArray[np.uint64] = out.cpu().numpy().view(np.uint64)
    return back


def quantise(table: torch.Tensor, owner: torch.Tensor, first: int, count: int) -> None:
    """Start tiles of `quantrows.tiled`, whose table and owners lie there, on the current stream.

    Raises DeviceError when the launch fails."""
    if count:
        _started(_C.launch_quantise, table.data_ptr(), owner.data_ptr(), first, count)


def _started(launch: Callable[..., None], *numbers: int) -> None:
    """Launch on the current stream. Raises DeviceError in CUDA's words."""
    try:
        launch(*numbers, torch.cuda.current_stream().cuda_stream)
    except RuntimeError as e:
        raise DeviceError(f"executor cuda: {e}") from None


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def packed(made: Tiles) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """The columns of `made` in one run of bytes, and where each begins there (multiples of 16)."""
    columns = [
        np.ascontiguousarray(c).view(np.uint8)
        for c in (made.rows, made.owner, made.sources, made.destinations)
    ]
    starts, end = [], 0
    for c in columns:
        starts.append(end)
        end += -(-c.nbytes // 16) * 16
    data = np.zeros(max(end, 16), np.uint8)
    for at, c in zip(starts, columns, strict=True):
        data[at : at + c.nbytes] = c
    return data, (starts[0], starts[1], starts[2], starts[3])


def addresses(buffers: Sequence[Buffer]) -> NDArray[np.uint64]:
    """Their addresses as a column."""
    return np.array([b.address for b in buffers], np.uint64)


def short_of_memory(device: torch.device, needed: int, what: str) -> DeviceError:
    """The error of an allocation that failed: how much was needed, how much was free."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceError(
        f"{device}: out of memory: {what} need {needed} bytes, {free} of {total} are free "
        f"and torch holds {torch.cuda.memory_reserved(device)}"
    )


def _here(buffer: Buffer, device: torch.device) -> Buffer:
    if buffer.device == str(device):
        return buffer
    if buffer.device != "cpu":
        raise DeviceError(f"executor cuda: wanted sources on {device}, got one on {buffer.device}")
    if buffer.nbytes == 0:
        return Buffer(buffer.owner, 0, 0, str(device))
    raw = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)
    try:
        moved = torch.frombuffer(raw, dtype=torch.uint8).to(device)
    except torch.OutOfMemoryError:
        raise short_of_memory(device, buffer.nbytes, "sources in main memory") from None
    return Buffer(moved, moved.data_ptr(), buffer.nbytes, str(device))
