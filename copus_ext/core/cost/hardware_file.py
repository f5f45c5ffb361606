"""The hardware that the package knows, and hardware that a user describes: one TOML file each.

A file has the fields of :class:`Hardware` as keys. ``node_flops`` is flops x devices_per_node where it is left out, as
it is where every rank has a device to itself. It may have a table ``[reached]`` with the fields of :class:`Reached`,
and latencies and overheads; what it leaves out of these is as fitted to published runs.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from copus_ext.core.cost.constants import OVERHEADS, fitted_constants
from copus_ext.core.cost.hardware import Hardware, Reached, may_be_zero
from copus_ext.core.errors import UserError

MEASURED = "cpu"  # not a file: ranks that share a machine's cores are measured when a run starts
_FOLDER = Path(__file__).parents[2] / "hardware"
_UNKNOWN_GPU = "a100"
_FILE_OF_GPU = {  # the first name that is part of what the driver reports
    "GB200": "gb200",
    "GB300": "gb200",
    "B200": "b200",
    "H200": "h200",
    "H100": "h100",
    "A100": "a100",
    "MI250": "mi250x",
    "MI210": "mi210",
}
_OPTIONAL = (*OVERHEADS, "node_flops", "fp32_flops")
_KEYS = tuple(entry.name for entry in fields(Hardware) if entry.name != "reached")
_REACHED_KEYS = tuple(entry.name for entry in fields(Reached))


def shipped_hardware() -> list[str]:
    """Names of the files that come with the package, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_hardware(name_or_path: str, devices_per_node: int | None = None, flag: str = "--hardware") -> Hardware:
    """Hardware by the name of a file of the package, whatever its case, or by the path of a TOML file.

    Args:
        name_or_path: a shipped name comes first; ``./h100`` is a path.
        devices_per_node: instead of what the file says.
        flag: what messages call the source of ``name_or_path``.

    Raises:
        UserError: there is no such file, or something in it is wrong; the message names file and key.
    """
    path = _path_of(name_or_path, flag)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is not TOML or not text is a ValueError
        raise UserError(f"{flag}: {path} can't be read as TOML: {str(error).splitlines()[0]}") from None
    where = f"{flag}: {path}"
    table = values.pop("reached", {})
    if not isinstance(table, dict):
        raise UserError(f"{where}: reached must be a table; write [reached] and its keys below it")
    figures = _numbers(values, _KEYS, where, "")
    if missing := [key for key in _KEYS if key not in figures and key not in _OPTIONAL]:
        needed = ", ".join(key for key in _KEYS if key not in _OPTIONAL)
        raise UserError(f"{where}: {missing[0]} is missing; give all of {needed}")
    reached = _numbers(table, _REACHED_KEYS, where, "reached.")
    devices = _whole(figures["devices_per_node"] if devices_per_node is None else devices_per_node, where)
    fitted = fitted_constants()
    usual = {name: getattr(fitted, name) for name in OVERHEADS} | {"node_flops": figures["flops"] * devices}
    told = {**figures, "devices_per_node": devices, "reached": replace(fitted.reached, **reached)}
    return Hardware(**usual | told)


def in_nodes_of(hardware: Hardware, devices: int) -> Hardware:
    """The same hardware, ``devices`` of it to a node; no more than it has, since its links reach no further."""
    held = min(devices, hardware.devices_per_node)
    share = held / hardware.devices_per_node  # where devices share cores, a node has less than they have alone
    return replace(hardware, devices_per_node=held, node_flops=hardware.node_flops * share)


def hardware_of_gpu(name: str, devices_per_node: int, memory_bytes: float) -> Hardware:
    """Figures for the GPU that calls itself ``name``; an A100's for one that is not known (measuring corrects them).

    Args:
        name: as the driver reports it, like ``NVIDIA H100 80GB HBM3``.
        devices_per_node: of this job, as in :func:`in_nodes_of`.
        memory_bytes: of the device, instead of the file's.
    """
    return replace(in_nodes_of(load_hardware(file_of_gpu(name)), devices_per_node), memory_bytes=memory_bytes)


def file_of_gpu(name: str) -> str:
    """The shipped file for the GPU that calls itself ``name``."""
    return next((file for kind, file in _FILE_OF_GPU.items() if kind in name), _UNKNOWN_GPU)


def _path_of(name_or_path: str, flag: str) -> Path:
    name, shipped = name_or_path.lower(), shipped_hardware()
    if name == MEASURED:
        raise UserError(
            f"{flag} {name_or_path} is not a file: what ranks on CPU cores reach is measured when a run starts; give "
            f"one of {', '.join(shipped)}, or a TOML file"
        )
    if name in shipped:
        return _FOLDER / f"{name}.toml"
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {name_or_path}; give a TOML file, or one of {', '.join(shipped)}")
    return path


def _numbers(values: dict[str, Any], known: tuple[str, ...], where: str, prefix: str) -> dict[str, Any]:
    """``values``, if every key is known and every value a number that :class:`Hardware` takes."""
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {prefix}{key} is not known; there are {', '.join(known)}")
        zero = may_be_zero(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and not zero):
            least = "not negative" if zero else "positive"
            raise UserError(f"{where}: {prefix}{key} = {value!r} is not a number that is {least}")
    return values


def _whole(devices: Any, where: str) -> int:
    if devices < 1 or devices != int(devices):
        raise UserError(f"{where}: devices_per_node = {devices} must be a whole number of devices, at least 1")
    return int(devices)
