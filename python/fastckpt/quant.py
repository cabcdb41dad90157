"""The door to quantised outputs: the schemes by name, and dynamically quantised modules from a file, in
torch.ao's form or torchao's.

Law: a loaded module holds the very values, scales and zero points of the output; torch only packs them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from .errors import DeviceError, LayoutError
from .quantisation.schemes import SCHEMES as SCHEMES
from .quantisation.schemes import Quant as Quant
from .quantisation.schemes import Scheme as Scheme
from .road import reshard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    State = dict[str, Tensor]

__all__ = ["SCHEMES", "Quant", "Scheme", "dynamic_state", "load_dynamic"]


Backend = Literal["torch.ao", "torchao"]


def load_dynamic(
    model: torch.nn.Module, path: str | os.PathLike[str], *, backend: Backend | None = None
) -> torch.nn.Module:
    """Fill a float model from an `int8-dynamic` output and return it, its quantised matrices in the form of
    a package; the rest is loaded as it is.

    `path`: what `reshard(layout="same", quant="int8-dynamic")` wrote, or `-channel`. `backend` "torch.ao":
    nn.Linear, nn.LSTM and nn.GRU become its dynamically quantised modules; "torchao": nn.Linear get its
    Int8Tensor as their weight, with activations quantised by row, or for a scale a matrix by tensor (what its
    `quantize_` makes with Int8DynamicActivationInt8WeightConfig); None: torch.ao where this torch has it. The
    output must hold every tensor of the model and no other. Raises LayoutError naming what does not fit,
    DeviceError where the package is not there."""
    import torch

    state = reshard(path, layout="same", rank=0)
    make = _torch_ao if backend == "torch.ao" or (backend is None and _has_torch_ao()) else _torchao
    done: list[str] = []
    for name, module in list(model.named_modules()):
        chosen = [n for n in _own(state, name) if n.endswith("_zero_point")]
        if not chosen:
            continue
        made = make(name, module, {n: state.pop(n) for n in _own(state, name)})
        owner, _, leaf = name.rpartition(".")
        done.append(f"{name}." if name else "")
        if not name:
            model = made
        else:
            setattr(model.get_submodule(owner), leaf, made)
    wanted = {
        n: t
        for n, t in model.state_dict().items()
        if isinstance(t, torch.Tensor) and not n.startswith(tuple(done))
    }
    missing = [n for n in wanted if n not in state]
    extra = [n for n in state if n not in wanted]
    if missing or extra:
        raise LayoutError(
            f"{os.fspath(path)}: {len(missing)} tensors of the model are not in it"
            f" ({', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} of it are not in the model ({', '.join(extra[:3]) or 'none'})"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if wanted[name].shape != tensor.shape:
                raise LayoutError(
                    f"{name}: got {tuple(tensor.shape)}, the model has {tuple(wanted[name].shape)}"
                )
            wanted[name].copy_(tensor)
    return model


def dynamic_state(model: torch.nn.Module, path: str | os.PathLike[str]) -> dict[str, object]:
    """The state dict that torch's own dynamically quantised model would save, from an `int8-dynamic` output:
    for nn.Linear `scale`, `zero_point` and `_packed_params` (dtype, and the quantised weight with its bias).

    `model` is the float model, left as it is; what `quantize_dynamic` makes of it loads the result. Raises
    what `load_dynamic` raises."""
    import copy

    made = load_dynamic(copy.deepcopy(model), path, backend="torch.ao")
    return made.state_dict()  # with torch's versions of its modules


def _own(state: State, module: str) -> list[str]:
    """The names of a module's own tensors."""
    prefix = f"{module}." if module else ""
    return [n for n in state if n.startswith(prefix) and "." not in n[len(prefix) :]]


def _has_torch_ao() -> bool:
    return importlib.util.find_spec("torch.ao.nn.quantized") is not None


def _torchao(name: str, module: torch.nn.Module, state: State) -> torch.nn.Module:
    """An nn.Linear whose weight is torchao's Int8Tensor; the module is filled and given back."""
    import torch

    try:
        from torchao import quantization as q  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        what = name or "the model"
        raise DeviceError(f"{what}: torchao is not installed, which makes it quantised") from None
    if type(module) is not torch.nn.Linear:
        raise LayoutError(
            f"{name or 'the model'}: torchao has no quantised {type(module).__name__}, only nn.Linear"
        )
    own = {n.rpartition(".")[2]: t for n, t in state.items()}
    scale, zero = own.pop("weight_scale", None), own.pop("weight_zero_point")
    _same_shapes(name, module, own)
    values = own["weight"]
    if scale is None or values.dtype is not torch.int8:
        raise LayoutError(f"{name}.weight: wanted int8 values with a scale, got {values.dtype}")
    one = scale.numel() == 1 and scale.ndim == 0
    # torchao says itself how activations are quantised: asked of the smallest matrix there is.
    told = torch.nn.Linear(1, 1, bias=False)
    config = q.Int8DynamicActivationInt8WeightConfig(granularity=q.PerTensor() if one else q.PerRow())
    q.quantize_(told, config)
    weight = q.Int8Tensor(
        values,
        scale.reshape(-1, 1),
        [values.shape[0] if one else 1, values.shape[1]],
        module.weight.dtype,
        zero_point=zero.reshape(-1, 1).to(torch.int8),
        act_quant_kwargs=told.weight.act_quant_kwargs,  # type: ignore[attr-defined]
    )
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        with torch.no_grad():
            module.bias.copy_(own["bias"])
    return module


def _torch_ao(name: str, module: torch.nn.Module, state: State) -> torch.nn.Module:
    """The quantised module that takes the place of a float one."""
    import torch

    try:
        from torch.ao.nn.quantized import dynamic
    except ImportError:
        raise DeviceError(f"this torch ({torch.__version__}) has no torch.ao.nn.quantized.dynamic") from None
    own = {n.rpartition(".")[2]: t for n, t in state.items()}
    values = dict(_values(name, own))
    if type(module) is torch.nn.Linear:
        _same_shapes(name, module, values)
        linear = dynamic.Linear(  # type: ignore[no-untyped-call]
            module.in_features, module.out_features, bias_=module.bias is not None
        )
        linear.set_weight_bias(values["weight"], values.get("bias"))
        return linear.train(module.training)
    if type(module) in (torch.nn.LSTM, torch.nn.GRU):
        if not module.bias or module.proj_size:
            raise LayoutError(f"{name}: torch does not quantise it without bias, or with proj_size")
        _same_shapes(name, module, values)
        kind = dynamic.LSTM if type(module) is torch.nn.LSTM else dynamic.GRU
        made = kind(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
        )
        made.set_weight_bias(values)  # type: ignore[no-untyped-call]
        return made.train(module.training)
    raise LayoutError(
        f"{name or 'the model'}: no quantised {type(module).__name__}; wanted nn.Linear, LSTM or GRU"
    )


def _same_shapes(name: str, module: torch.nn.Module, got: State) -> None:
    """Raises LayoutError unless these are the module's parameters, each in its shape."""
    wanted = dict(module.named_parameters())
    for key in {**wanted, **got}:
        have, want = (tuple(of[key].shape) if key in of else "none" for of in (got, wanted))
        if have != want:
            raise LayoutError(f"{name and f'{name}.'}{key}: got {have}, the model has {want}")


def _values(name: str, own: State) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors with the quantised ones put together again."""
    import torch

    parts = {n + suffix for n in own for suffix in ("_scale", "_zero_point") if f"{n}_zero_point" in own}
    for key, tensor in own.items():
        if key in parts:
            continue
        if f"{key}_zero_point" not in own:
            yield key, tensor
            continue
        scale, zero = own.get(f"{key}_scale"), own[f"{key}_zero_point"]
        if scale is None or tensor.dtype is not torch.int8:
            raise LayoutError(f"{name}.{key}: wanted int8 values with a scale, got {tensor.dtype}")
        if scale.ndim == 0:
            yield key, torch._make_per_tensor_quantized_tensor(tensor, float(scale), int(zero))
        else:
            yield key, torch._make_per_channel_quantized_tensor(tensor, scale.double(), zero, 0)
