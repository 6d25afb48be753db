"""A GPU that is not there: tensors stay on the CPU but report `cuda`, and what CUDA would refuse raises.

`simulated_gpu()` rewrites devices in Python calls (`device=`, `.to`, `.cuda`, `.device`, `.numpy`, generators) and checks each
aten operation, backward passes included. Devices are kept per storage, so that views and `.data = …` follow. Host-device
synchronizations are counted. Compilation is the identity. What it cannot show: speed, memory, and the GPU's own rounding.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
# Operations that wait for the device when an input is there: their result, or its size, is needed by the host.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten._unique2, aten.unique_dim,
           aten.is_nonzero, aten.allclose}
# Operations whose CUDA kernels are not deterministic: they raise under torch.use_deterministic_algorithms.
NONDETERMINISTIC = {aten.adaptive_max_pool2d_backward, aten._adaptive_avg_pool2d_backward, aten.upsample_bilinear2d_backward,
                    aten.upsample_bicubic2d_backward, aten.max_unpool2d, aten.nll_loss2d_forward, aten.cumsum,
                    aten.bincount, aten.grid_sampler_2d_backward, aten.histc}
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv}
ACROSS = {aten.copy_, aten._to_copy, aten._foreach_copy_, aten.set_, aten.set_data, aten.is_same_size}  # may mix devices
NO_STORAGE = NotImplementedError, RuntimeError, ValueError  # sparse, functional, or lazy
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._unsafe_index}  # a CPU index into a GPU tensor is copied


class Devices:
    """The device that each storage reports; storages that no longer exist are forgotten."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[StorageWeakRef, torch.device | None]] = {}

    def get(self, tensor: torch.Tensor) -> torch.device | None:
        """Return the device of a tensor; None if it fits any (made inside a backward pass)."""
        with contextlib.suppress(*NO_STORAGE):
            return self.known.get(tensor.untyped_storage()._cdata, (None, CPU))[1]
        return CPU

    def set(self, tensor: torch.Tensor, device: torch.device | None) -> None:
        with contextlib.suppress(*NO_STORAGE):
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = StorageWeakRef(storage), device
        if len(self.known) > 20_000:
            self.known = {key: pair for key, pair in self.known.items() if not pair[0].expired()}

    def knows(self, tensor: torch.Tensor) -> bool:
        with contextlib.suppress(*NO_STORAGE):
            return tensor.untyped_storage()._cdata in self.known
        return False


class SimulatedGPU:
    """State of a simulation: devices, counters, generators, and the wishes of the Python call under way."""

    def __init__(self, capability: tuple[int, int]):
        self.capability, self.devices = capability, Devices()
        self.synchronizations: Counter[str] = Counter()
        self.generators: dict[int, torch.Generator] = {}  # kept alive: those that were made for the GPU
        self.wanted: list[torch.device] = []  # device of the factory call under way; empty outside Python calls
        self.workspace: str | None | bool = False  # cuBLAS reads its variable once, at its first call
        self.pinned: dict[int, StorageWeakRef] = {}  # storages that a copy need not wait for

    def waits(self, why: str) -> None:
        self.synchronizations[why] += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy in pinned memory."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self.pinned[storage._cdata] = StorageWeakRef(storage)
        return copy

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Tell whether a copy of a tensor to the GPU need not wait."""
        reference = self.pinned.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def on_gpu(self, thing: Any) -> bool:
        return isinstance(thing, torch.Tensor) and self.devices.get(thing) == GPU


def is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, torch.dtype | torch.Tensor) and (
        isinstance(device, int) and not isinstance(device, bool) or torch.device(device).type == "cuda")


class Functions(TorchFunctionMode):
    """Rewrites devices in calls from Python."""

    def __init__(self, gpu: SimulatedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, gpu = dict(kwargs or {}), self.gpu
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "__get__" and tensor is not None:
            owner = getattr(func, "__self__", None)
            if owner is torch.Tensor.device:
                return gpu.devices.get(tensor) or CPU
            if owner is torch.Tensor.is_cuda:
                return gpu.on_gpu(tensor)
            if owner is torch.Tensor.is_cpu:
                return not gpu.on_gpu(tensor)
        if tensor is not None and name in ("to", "cuda", "cpu"):
            return self.move(name, tensor, args[1:], kwargs)
        if tensor is not None and name in ("numpy", "__array__") and gpu.on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                            "memory first.")
        if tensor is not None and name in ("pin_memory", "is_pinned"):
            if name == "pin_memory" and gpu.on_gpu(tensor):
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            return gpu.is_pinned(tensor) if name == "is_pinned" else tensor if gpu.is_pinned(tensor) else gpu.pin(tensor)
        if tensor is not None and name == "get_device":
            return 0 if gpu.on_gpu(tensor) else -1
        if tensor is not None and name == "tolist" and gpu.on_gpu(tensor):
            gpu.waits("tolist")
        self.check_generator(kwargs, tensor)
        device = kwargs.get("device")
        if is_gpu(device):
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor") and not (args and gpu.on_gpu(args[0])):
                gpu.waits(f"torch.{name}(…, device=cuda)")
        like = tensor is not None and device is None
        gpu.wanted.append(GPU if is_gpu(device) or (like and gpu.on_gpu(tensor)) else CPU)
        try:
            result = func(*args, **kwargs)
        finally:
            gpu.wanted.pop()
        if name == "__deepcopy__" and isinstance(result, torch.Tensor) and tensor is not None:  # its storage is copied as bytes
            gpu.devices.set(result, gpu.devices.get(tensor))
        if device is not None:  # also where no operation ran, as in as_tensor of a tensor
            for one in tree_flatten(result)[0]:
                if isinstance(one, torch.Tensor) and gpu.devices.get(one) != (GPU if is_gpu(device) else CPU):
                    if gpu.devices.knows(one) or any(one is other for other in args):
                        with torch.no_grad():
                            one.data = one.data.clone()
                    gpu.devices.set(one, GPU if is_gpu(device) else CPU)
        return result

    def check_generator(self, kwargs: dict, tensor: torch.Tensor | None) -> None:
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator):
            here = GPU if is_gpu(kwargs.get("device")) or self.gpu.on_gpu(tensor) else CPU
            made_for = GPU if id(generator) in self.gpu.generators else CPU
            if here != made_for:
                raise RuntimeError(f"Expected a '{here.type}' device type for generator but found '{made_for.type}'")

    def move(self, name: str, tensor: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Do what `.to`, `.cuda` and `.cpu` do: return the tensor itself if nothing changes, else a copy on the other device."""
        gpu, here = self.gpu, self.gpu.devices.get(tensor) or CPU
        target, non_blocking = here, bool(kwargs.pop("non_blocking", False))
        if name != "to":
            target = GPU if name == "cuda" else CPU
            kwargs.pop("device", None)
            args = ()
        else:
            if "device" in kwargs:
                device = kwargs.pop("device")
                target = here if device is None else GPU if is_gpu(device) else CPU
            rest = []
            for place, argument in enumerate(args):
                if isinstance(argument, torch.Tensor):
                    target = gpu.devices.get(argument) or CPU
                    rest.append(argument.dtype)
                elif isinstance(argument, str | torch.device) or (place == 0 and isinstance(argument, int)):
                    target = GPU if is_gpu(argument) else CPU
                elif isinstance(argument, bool):
                    non_blocking = non_blocking or argument
                elif argument is not None:
                    rest.append(argument)
            args = tuple(rest)
        gpu.wanted.append(target)
        try:
            if args or kwargs:
                result = torch.Tensor.to(tensor, *args, **kwargs)
            else:
                result = tensor
            if target != here:
                if not non_blocking or target == CPU:
                    gpu.waits(f"copy to {target.type}")
                elif tensor.numel() and not gpu.is_pinned(tensor):
                    gpu.waits("copy to cuda of memory that is not pinned")
                result = result.clone() if result is tensor else result
                gpu.devices.set(result, target)
        finally:
            gpu.wanted.pop()
        return result


class Operations(TorchDispatchMode):
    """Checks every operation, whoever calls it, and hands devices on to the results."""

    def __init__(self, gpu: SimulatedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, gpu, packet = dict(kwargs or {}), self.gpu, func.overloadpacket
        inputs = [thing for thing in tree_flatten((args, kwargs))[0] if isinstance(thing, torch.Tensor)]
        devices = [gpu.devices.get(tensor) for tensor in inputs]
        there = GPU in devices
        if there:
            self.check(packet, args, inputs, devices)
        args = self.tf32(packet, args, there)
        if is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        device: torch.device | None = GPU if there else CPU
        if packet in ACROSS and devices:
            device = devices[0]
        if not inputs or packet in (aten.empty_like, aten.zeros_like, aten.new_empty_strided):
            device = gpu.wanted[-1] if gpu.wanted else (GPU if there else None)
        seen = {id(tensor) for tensor in inputs}

        def mark(thing: Any) -> Any:
            if isinstance(thing, torch.Tensor) and id(thing) not in seen and not gpu.devices.knows(thing):
                gpu.devices.set(thing, device)
            return thing

        return tree_map(mark, result)

    def tf32(self, packet: Any, args: tuple, there: bool) -> tuple:
        """Round the factors of a convolution as the tensor cores of an A100 do."""
        rounds = there and self.gpu.capability >= (8, 0) and torch.backends.cudnn.allow_tf32
        if not rounds or packet not in (aten.convolution, aten.convolution_backward):
            return args

        def shorten(thing: Any) -> Any:
            if isinstance(thing, torch.Tensor) and thing.dtype == torch.float32:
                return ((thing.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
            return thing

        return tuple(map(shorten, args))

    def check(self, packet: Any, args: tuple, inputs: list[torch.Tensor], devices: list[torch.device | None]) -> None:
        """Raise what CUDA would raise, and count what waits."""
        gpu = self.gpu
        if packet in INDEXING and devices[0] == GPU:
            if any(device == CPU and tensor.dim() for tensor, device in zip(inputs[1:], devices[1:], strict=True)):
                gpu.waits("an index on the CPU")
            if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:2]):
                gpu.waits("a mask as index")
        elif packet not in ACROSS and any(device == CPU and tensor.dim() for tensor, device in zip(inputs, devices, strict=True)):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                               f"({packet})")
        elif packet == aten.copy_ and devices[0] != devices[1] and not (len(args) > 2 and args[2]):
            gpu.waits("copy_ across devices")
        if packet in WAITING:
            gpu.waits(str(packet))
        if torch.are_deterministic_algorithms_enabled():
            if packet in NONDETERMINISTIC:
                raise RuntimeError(f"{packet} does not have a deterministic implementation, but you set "
                                   "'torch.use_deterministic_algorithms(True)'")
            if packet in MATRIX_PRODUCTS and self.workspace() not in (":4096:8", ":16:8"):
                raise RuntimeError("Deterministic behavior was enabled, but this operation is not deterministic because it uses "
                                   "CuBLAS: set CUBLAS_WORKSPACE_CONFIG=:4096:8")
        if packet in MATRIX_PRODUCTS:
            self.workspace()

    def workspace(self) -> str | None | bool:
        if self.gpu.workspace is False:
            self.gpu.workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return self.gpu.workspace


def patches(gpu: SimulatedGPU) -> Iterator[Any]:
    """Return what has to be replaced in PyTorch's modules while the simulation runs."""
    generator, autocast, parse = torch.Generator, torch.amp.autocast, torch.device

    class Kind(type):
        def __instancecheck__(cls, thing: Any) -> bool:
            return isinstance(thing, generator)

    class Generator(metaclass=Kind):
        def __new__(cls, device: Any = "cpu") -> Any:
            made = generator()
            if parse(device).type == "cuda":
                gpu.generators[id(made)] = made
            return made

    class Autocast(autocast):
        def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None):
            if device_type == "cuda":
                device_type, dtype = "cpu", dtype or torch.float16
            super().__init__(device_type, dtype, enabled, cache_enabled)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        if device is not None and not isinstance(device, int) and parse(device).index is None:  # as PyTorch 2.4
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")
        return 14 * 2**30, 15 * 2**30

    def outside(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return function(*args, **kwargs)
        return call

    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": lambda *_: None,
            "get_device_name": lambda *_: "Simulated GPU", "get_device_capability": lambda *_: gpu.capability,
            "is_bf16_supported": lambda *_, **__: gpu.capability >= (8, 0), "mem_get_info": mem_get_info,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None,
            "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)], "set_rng_state_all": lambda *_: None,
            "manual_seed": lambda *_: None, "manual_seed_all": lambda *_: None, "empty_cache": lambda: None,
            "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None, "is_initialized": lambda: True,
            "_lazy_init": lambda: None, "is_current_stream_capturing": lambda: False}
    yield mock.patch.multiple(torch.cuda, **cuda)
    yield mock.patch.object(torch, "Generator", Generator)
    if hasattr(torch, "accelerator"):  # the optimizers of newer versions ask it whether a graph is being captured
        yield mock.patch.object(torch.accelerator, "is_available", lambda: False)
    optimizer = sys.modules["torch.optim.optimizer"]  # no attribute of torch.optim
    group = optimizer._group_tensors_by_device_and_dtype  # asks for devices in C++

    def grouped(lists: Any, *arguments: Any) -> Any:
        return {(GPU if gpu.on_gpu(found[0][0][0]) else device, dtype): found
                for (device, dtype), found in group(lists, *arguments).items()}

    yield mock.patch.object(optimizer, "_group_tensors_by_device_and_dtype", grouped)
    profile, only_cpu = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    yield mock.patch.object(torch.profiler, "profile", lambda activities=None, **options: profile(activities=only_cpu, **options))
    yield mock.patch.object(torch.jit, "trace", outside(torch.jit.trace))  # it records operations by itself
    yield mock.patch.object(torch, "autocast", Autocast)
    yield mock.patch.object(torch.amp, "autocast", Autocast)
    yield mock.patch.object(torch, "compile", lambda model=None, **_: model if model is not None else (lambda inner: inner))


@contextlib.contextmanager
def simulated_gpu(capability: tuple[int, int] = (8, 0)) -> Iterator[SimulatedGPU]:
    """Run what is inside as if there were one GPU of this compute capability (T4: 7.5, A100: 8.0)."""
    gpu = SimulatedGPU(capability)
    with contextlib.ExitStack() as stack:
        for patch in patches(gpu):
            stack.enter_context(patch)
        stack.enter_context(Functions(gpu))
        stack.enter_context(Operations(gpu))
        yield gpu
