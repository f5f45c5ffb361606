"""What the switch is measured on: models, optimizers, and walks through layouts. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copus_ext.core.plan import Layout, Plan, parse_plan

VOCABULARY = 8192
SEQUENCE = 64
GLOBAL_BATCH = 4
TRAINING = (
    "--train-samples 4096 --lr 1e-3 --min-lr 1e-4 --weight-decay 0.1 --clip-grad 1.0 --seed 1234 "
    f"--micro-batch-size 1 --global-batch-size {GLOBAL_BATCH} --eval-interval 100000 --eval-iters 0 --log-interval 1 "
)


@dataclass(frozen=True)
class Model:
    """A plain GPT: rotary positions, GELU, tied embeddings, biases, an MLP four times as wide as ``hidden``."""

    name: str
    layers: int
    hidden: int

    @property
    def parameters(self) -> int:
        """How many there are, embeddings counted once."""
        block = 12 * self.hidden**2 + 13 * self.hidden
        return self.layers * block + VOCABULARY * self.hidden + 2 * self.hidden

    @property
    def attributes(self) -> dict[str, Any]:
        """Of upstream's arguments before validation."""
        return {"num_layers": self.layers, "hidden_size": self.hidden, "num_attention_heads": self.hidden // 32}

    @property
    def flags(self) -> str:
        """The same as flags, with what all models have in common."""
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.hidden // 32} "
            f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --position-embedding-type rope "
            "--hidden-dropout 0 --attention-dropout 0 "
        )


@dataclass(frozen=True)
class Kind:
    """An optimizer with its precision: attributes of upstream's arguments, and words that every plan gets."""

    name: str
    attributes: dict[str, Any]
    words: str = ""


@dataclass(frozen=True)
class Walk:
    """One model with one optimizer on its way through layouts, in words of plans."""

    model: Model
    kind: Kind
    layouts: tuple[str, ...]

    def plans(self, ranks: int) -> list[Plan]:
        """The layouts as plans for so many ranks."""
        return [parse_plan(f"{words}{self.kind.words}", base_plan(ranks)) for words in self.layouts]


REFERENCE = Model("30M", 8, 512)
MODELS = {model.name: model for model in (REFERENCE, Model("2M", 4, 128))}  # the small one to try the tool with
KINDS = {
    kind.name: kind
    for kind in (
        Kind("adam-fp32", {}),
        Kind("adam-bf16", {"bf16": True}),
        Kind("adam-bf16-zero1", {"bf16": True, "dist_ckpt_optim_fully_reshardable": True}, ",zero1"),
        Kind("adam-fp32-zero1", {"dist_ckpt_optim_fully_reshardable": True}, ",zero1"),
        Kind("sgd-momentum", {"optimizer": "sgd", "sgd_momentum": 0.9}),
    )
}
LAYOUTS = ("dp4", "tp2,pp2", "pp4", "dp2,pp2", "tp4", "dp4")
QUICK_LAYOUTS = ("dp4", "tp2,pp2", "tp4", "dp4")
# Both jobs of a switch have to fit into 24 GiB together, which the plain optimizer of dp4 would not.
SIZES = {
    "120M": Walk(Model("120M", 16, 768), KINDS["adam-fp32-zero1"], ("dp4", "tp2,pp2", "tp4", "dp4")),
    "300M": Walk(Model("300M", 24, 1024), KINDS["adam-bf16-zero1"], ("tp2,pp2", "dp2,tp2", "pp4", "tp2,pp2")),
}


@dataclass(frozen=True)
class Checkpoint:
    """On disk: of a job in layout ``old``, to be gone on with in layout ``new``; it took ``save_s`` to write."""

    kind: str
    old: str
    new: str
    folder: str
    save_s: float
    iteration: int


def base_plan(ranks: int) -> Plan:
    """What plans are read against."""
    return Plan(Layout(dp=ranks), 1, GLOBAL_BATCH)
