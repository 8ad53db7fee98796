"""Where the tensors of an adapter lie in PEFT's layers: moved to another device, to none, and filled from a file."""

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mswift.tuners.adapter import open_adapter

META = torch.device("meta")
Places = dict[str, tuple[Any, str, str]]
"""Name in a file -> (dictionary of PEFT's layer, adapter in it, name inside of a module or "")."""


def layers_of(peft: nn.Module) -> Iterator[Any]:
    """PEFT's layers of a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in peft.modules() if isinstance(module, BaseTunerLayer))


def stored_tensors(peft: Any, name: str) -> dict[str, Tensor]:
    """Name in a file -> tensor of the model."""
    from peft import get_peft_model_state_dict

    state = peft.state_dict(keep_vars=True)
    found: dict[str, Tensor] = get_peft_model_state_dict(
        peft, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    return found


def places_of(peft: Any, name: str) -> Places:
    """Of an adapter's tensors that a file holds."""
    by_id = {id(tensor): key for key, tensor in stored_tensors(peft, name).items()}
    found: Places = {}
    for layer in layers_of(peft):
        for part in layer.adapter_layer_names:
            owner = getattr(layer, part, None)
            entry = owner[name] if owner is not None and name in owner else None
            inner = dict(entry.named_parameters()) if isinstance(entry, nn.Module) else {"": entry}
            for leaf, tensor in inner.items():
                if tensor is not None and id(tensor) in by_id:
                    found[by_id[id(tensor)]] = (owner, name, leaf)
    return found


def move(places: Places, device: torch.device) -> None:
    """To a device; to META: values are lost, and their memory is the system's again."""
    for owner, key, inner in places.values():
        tensor = _get(owner, key, inner)
        _put(owner, key, inner, torch.empty_like(tensor, device=META) if device == META else tensor.to(device))
    if device == META:
        _give_back_freed_memory()


def read_back(places: Places, folder: Path, device: torch.device) -> None:
    """Values from a PEFT directory, onto a device."""
    file, _ = open_adapter(folder)
    for stored, (owner, key, inner) in places.items():
        _put(owner, key, inner, file.get_tensor(stored).to(device))


def bytes_by_device(places: Places) -> Mapping[str, int]:
    """Type of device -> bytes there; what has no memory is not counted."""
    found: dict[str, int] = {}
    for owner, key, inner in places.values():
        tensor = _get(owner, key, inner)
        if tensor.device != META:
            where = tensor.device.type
            found[where] = found.get(where, 0) + tensor.numel() * tensor.element_size()
    return found


def _give_back_freed_memory() -> None:
    """To the system, where the C library keeps it for itself (glibc)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _get(owner: Any, key: str, inner: str) -> Tensor:
    tensor: Tensor = owner[key].get_parameter(inner) if inner else owner[key]
    return tensor


def _put(owner: Any, key: str, inner: str, value: Tensor) -> None:
    """In place of a parameter of PEFT's layer, trained as it was."""
    made = nn.Parameter(value.detach(), requires_grad=_get(owner, key, inner).requires_grad)
    if not inner:
        owner[key] = made
        return
    path, _, leaf = inner.rpartition(".")
    owner[key].get_submodule(path)._parameters[leaf] = made
