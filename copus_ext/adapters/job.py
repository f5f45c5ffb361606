"""A model with its optimizer, built by upstream for one plan.

A plan's layout may be on part of the world (:mod:`copus_ext.adapters.world`). Ranks that it leaves idle have a
:class:`Job` as well, of the same plan and arguments and with nothing in it: what goes through a job's parts finds none.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import set_args
from megatron.training.training import setup_model_and_optimizer

from copus_ext.adapters.hollow import WithoutMemory, empty
from copus_ext.adapters.world import has_part
from copus_ext.core.plan import Plan


class NoOptimizer:
    """In an optimizer's place on a rank that has no part in the job."""

    chained_optimizers: tuple[Any, ...] = ()
    param_groups: tuple[Any, ...] = ()


class NoScheduler(SimpleNamespace):
    """In the scheduler's place there. It only knows the job's place in the schedule, when that has been told."""

    def __init__(self) -> None:
        super().__init__(num_steps=0)

    def step(self, increment: int) -> None:
        """As upstream's, without learning rates to set."""
        self.num_steps += increment


@dataclass
class Job:
    """What trains: upstream's objects for one plan on this rank.

    ``model`` holds the DDP-wrapped chunks (one, or ``vpp`` of them; none where the rank has no part in the job);
    ``args`` are upstream's arguments for the plan.
    """

    plan: Plan
    args: argparse.Namespace
    groups: ProcessGroupCollection
    model: list[Any]
    optimizer: Any
    scheduler: Any
    config: Any
    memory: dict[bool, Any] = field(default_factory=dict, repr=False)

    @property
    def has_part(self) -> bool:
        """Whether anything of it is on this rank. If not, the rank has no step to make."""
        return has_part(self.plan.layout.world_size)

    def ready(self) -> None:
        """Put what ``train()`` sets and takes away back to where a job that was just built has it."""
        for chunk in self.model:
            if getattr(chunk, "use_forward_hook", False) and not chunk.remove_forward_pre_hook_handles:
                chunk.enable_forward_pre_hook()
        self._unset_functions()

    def release(self) -> None:
        """Drop every reference that upstream's globals and hooks keep to the model, so that its memory is freed."""
        for chunk in self.model:
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                chunk.disable_forward_pre_hook(param_sync=False)
        self._unset_functions()
        for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
            embedding.forward.cache_clear()  # the cache of a method keeps its object, and that keeps its model
        self.model, self.optimizer, self.scheduler = [], None, None
        self.memory.clear()

    def _unset_functions(self) -> None:
        """``train()`` puts bound methods of the model into its configuration, and asserts that it finds none there."""
        for name in (
            "finalize_model_grads_func",
            "grad_scale_func",
            "no_sync_func",
            "grad_sync_func",
            "param_sync_func",
        ):
            setattr(self.config, name, None)


def build_job(
    plan: Plan,
    args: argparse.Namespace,
    groups: ProcessGroupCollection,
    *,
    initialise_weights: bool = True,
    when_models_are_built: Callable[[], None] | None = None,
) -> Job:
    """Build model, optimizer and learning-rate scheduler; ``args`` become upstream's global arguments.

    Args:
        plan: the plan that ``args`` are for.
        args: validated arguments. ``args.load`` is obeyed: a checkpoint is loaded where it names one.
        groups: the layout's process groups, which must be the active ones. On ranks that it leaves idle a job with
            nothing in it comes out.
        initialise_weights: False builds a hollow job (:mod:`copus_ext.adapters.hollow`), for a reshard to fill.
            Models are then built by every rank for itself.
        when_models_are_built: called between the models and the optimizer, which is built by all ranks together.
            Ranks that have no part in the job call it, too.
    """
    set_args(args)
    if not has_part(plan.layout.world_size):
        return _without_part(plan, args, groups, when_models_are_built or (lambda: None))
    model_config = gpt_config_from_args(args)
    if when_models_are_built is not None:
        model_config.post_wrap_hooks.append(partial(_call_and_pass_on, when_models_are_built))
    if not initialise_weights:
        # Not perform_initialization=False: that also leaves out the tensor-parallel attributes of parameters.
        model_config.transformer.init_method = _leave_as_is
        model_config.transformer.output_layer_init_method = _leave_as_is
        model_config.transformer.embedding_init_method = _leave_as_is
    container = pretrain_cfg_container_from_args(args, model_config)
    if not initialise_weights:
        container.rng.data_parallel_random_init = False  # upstream would broadcast weights that are not there
    with contextlib.nullcontext() if initialise_weights else _hollow(model_config):
        model, optimizer, scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups, checkpointing_context={}
        )
    return Job(plan, args, groups, model, optimizer, scheduler, unwrap_model(model[0]).config)


def _without_part(
    plan: Plan, args: argparse.Namespace, groups: ProcessGroupCollection, when_models_are_built: Callable[[], None]
) -> Job:
    when_models_are_built()
    args.iteration = args.num_floating_point_operations_so_far = 0  # as upstream does where it builds one
    return Job(plan, args, groups, [], NoOptimizer(), NoScheduler(), SimpleNamespace())


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _call_and_pass_on(call: Callable[[], None], model: list[Any]) -> list[Any]:
    call()
    return model


@contextlib.contextmanager
def _hollow(model_config: Any) -> Iterator[None]:
    """Empty the weights of models once they are built, and build what comes behind them without memory.

    The all-reduce that makes tied embeddings of the first and the last stage equal is left out.
    """
    takes_part = LanguageModule._is_in_embd_group
    LanguageModule._is_in_embd_group = lambda _: False
    with contextlib.ExitStack() as without_memory:

        def empty_weights(models: list[Any]) -> list[Any]:
            for parameter in (p for model in models for p in model.parameters()):
                empty(parameter)
            without_memory.enter_context(WithoutMemory())
            return models

        model_config.pre_wrap_hooks.append(empty_weights)
        try:
            yield
        finally:
            LanguageModule._is_in_embd_group = takes_part
