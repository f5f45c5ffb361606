"""A plan: how many sequences a step takes, and how the model and the sequences are laid over the devices.

Field names are Megatron's. A plan is a value: it is passed, compared and logged, never fetched from somewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

RECOMPUTE_CHOICES = ("none", "selective", "full")
_SIZES = ("dp", "tp", "pp", "vpp", "cp", "ep")
_FIELD_OF_BATCH = {"mbs": "micro_batch", "gbs": "global_batch"}


@dataclass(frozen=True, order=True)
class Layout:
    """How a model lies over the devices. Sizes count ranks, except ``vpp``: model chunks per pipeline rank.

    ``sequence_parallel`` is a wish that only counts where tp > 1; Megatron itself turns it off at tp 1.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.recompute not in RECOMPUTE_CHOICES:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE_CHOICES)}, not {self.recompute!r}")

    @property
    def world_size(self) -> int:
        """Ranks this layout occupies. Experts live inside dp x cp x tp, so ``ep`` does not count."""
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        parts = [f"dp{self.dp}"]
        parts += [f"{name}{getattr(self, name)}" for name in _SIZES[1:] if getattr(self, name) > 1]
        parts += ["sp"] if self.sequence_parallel and self.tp > 1 else []
        parts += ["zero1"] if self.distributed_optimizer else []
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        return ",".join(parts)


@dataclass(frozen=True, order=True)
class Plan:
    """A layout with its batch sizes, both in sequences. ``str(plan)`` is what ``parse_plan`` reads."""

    layout: Layout
    micro_batch: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.global_batch < 1:
            raise ValueError(f"batch sizes must be at least 1, not mbs{self.micro_batch}, gbs{self.global_batch}")
        per_micro_step = self.micro_batch * self.layout.dp
        if self.global_batch % per_micro_step:
            raise ValueError(
                f"global batch {self.global_batch} is not divisible by "
                f"micro-batch {self.micro_batch} x data parallel {self.layout.dp} = {per_micro_step}"
            )

    @property
    def num_microbatches(self) -> int:
        """Micro-batches each data-parallel rank runs in a step."""
        return self.global_batch // (self.micro_batch * self.layout.dp)

    def with_batch(self, global_batch: int, micro_batch: int | None = None) -> Plan:
        """The same layout with other batch sizes."""
        return replace(self, global_batch=global_batch, micro_batch=micro_batch or self.micro_batch)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the event log; ``plan_from_json`` is the inverse."""
        return {**asdict(self.layout), "micro_batch": self.micro_batch, "global_batch": self.global_batch}

    def __str__(self) -> str:
        return f"{self.layout},mbs{self.micro_batch},gbs{self.global_batch}"


def plan_from_json(values: dict[str, Any]) -> Plan:
    """Inverse of :meth:`Plan.to_json`."""
    layout = {k: v for k, v in values.items() if k not in ("micro_batch", "global_batch")}
    return Plan(Layout(**layout), values["micro_batch"], values["global_batch"])


def parse_plan(text: str, base: Plan) -> Plan:
    """Read ``"dp2,tp2,mbs2,gbs16"`` for the ranks that ``base`` occupies.

    Sizes that are not named are 1, except dp, which takes the ranks that are left. Batch sizes, ``sp``, ``zero1`` and
    ``recompute-...`` that are not named are as in ``base``; ``no-sp`` and ``no-zero1`` turn the two flags off.

    Raises:
        ValueError: a word that is not understood, or a plan that cannot be on that many ranks.
    """
    layout: dict[str, Any] = {
        "sequence_parallel": base.layout.sequence_parallel,
        "distributed_optimizer": base.layout.distributed_optimizer,
        "recompute": base.layout.recompute,
    }
    batch = {"micro_batch": base.micro_batch, "global_batch": base.global_batch}
    for word in text.replace(" ", "").split(","):
        _read_word(word, layout, batch)
    world_size = base.layout.world_size
    if "dp" not in layout:
        model_ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
        if world_size % model_ranks:
            raise ValueError(f"plan {text!r} needs a multiple of {model_ranks} ranks, and there are {world_size}")
        layout["dp"] = world_size // model_ranks
    placed = Layout(**layout)
    if placed.world_size != world_size:
        raise ValueError(f"plan {text!r} takes {placed.world_size} ranks, and there are {world_size}")
    return Plan(placed, **batch)


def _read_word(word: str, layout: dict[str, Any], batch: dict[str, int]) -> None:
    """Put one comma-separated word of a plan where it belongs."""
    flags = {"sp": "sequence_parallel", "zero1": "distributed_optimizer"}
    plain = word.removeprefix("no-")
    if plain in flags:
        layout[flags[plain]] = not word.startswith("no-")
        return
    if word.startswith("recompute-"):
        layout["recompute"] = word.removeprefix("recompute-")
        return
    name = word.rstrip("0123456789")
    digits = word[len(name) :]
    if digits and int(digits) < 1:
        raise ValueError(f"{name} must be at least 1, not {digits}")
    if digits and name in _FIELD_OF_BATCH:
        batch[_FIELD_OF_BATCH[name]] = int(digits)
    elif digits and name in _SIZES:
        layout[name] = int(digits)
    else:
        known = ", ".join([*_SIZES, *_FIELD_OF_BATCH])
        raise ValueError(f"{word!r} is not part of a plan; a plan is like dp2,tp2,mbs2,gbs16 (sizes: {known})")
