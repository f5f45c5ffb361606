"""The ``--copus-*`` flags, and what they say as one value that is checked in one place."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from copus_ext.core.cost.hardware_file import MEASURED, load_hardware, shipped_hardware
from copus_ext.core.cost.throughput_table import ThroughputTable, read_table
from copus_ext.core.errors import UserError
from copus_ext.core.noise.grouping import (
    ADAM,
    AUTO,
    ESTIMATORS,
    LAYERNORM,
    StepShape,
    why_unmeasurable_in_a_run,
    with_inner_products,
)
from copus_ext.core.plan import Plan
from copus_ext.core.planner.betas import BETA_RULES, KEPT, check_beta_rule
from copus_ext.core.planner.learning_rate import LR_RULES, learning_rate_factor
from copus_ext.core.planner.objective import GOODPUT, PAPER, parse_objective
from copus_ext.core.planner.policy import Policy, PolicySettings
from copus_ext.core.planner.registry import POLICIES, make_policy
from copus_ext.core.planner.space import Space, parse_space
from copus_ext.core.planner.switch_rule import AMORTISED, THRESHOLD, parse_switch_rule

TABLE_FLAG = "--copus-throughput-table"
HARDWARE_FLAG = "--copus-hardware"
ALWAYS, NEVER = "always", "never"
_REHEARSED = (AUTO, ALWAYS, NEVER)
_HALF_LIFE_STEPS = 40  # of the first plan


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``copus`` to upstream's parser."""
    group = parser.add_argument_group("copus", "batch size, micro-batch and parallel layout chosen while training")
    group.add_argument("--no-copus", action="store_true", help="plain Megatron pre-training; nothing of COPUS runs")
    group.add_argument(
        "--copus-policy",
        default="copus",
        metavar="NAME",
        help=f"who chooses the plan: {', '.join(POLICIES)}; options behind a colon, like norm-test:eta=0.2",
    )
    group.add_argument(
        "--copus-schedule",
        metavar="PLANS",
        help='samples:plan pairs for --copus-policy schedule, like "0:dp4,mbs2,gbs16 4000:tp2,pp2,mbs2,gbs32"',
    )
    group.add_argument(
        "--copus-space",
        default="",
        metavar="SPACE",
        help='plans to choose from, like "tp=1,2 pp=1,2,4 recompute=none,full zero1=any mbs=1,2 gbs=16..512" (default: '
        "every tensor and pipeline parallel size, the given micro-batch and its halves, 1/16 to 16 times the given "
        "global batch)",
    )
    group.add_argument(
        "--copus-objective",
        default=GOODPUT,
        metavar="NAME",
        help=f"what plans are chosen for: {GOODPUT}, or {PAPER}: times the learning rate's factor",
    )
    group.add_argument(
        "--copus-switch-rule",
        default=AMORTISED,
        metavar="RULE",
        help=f"when a switch is worth it: {AMORTISED}, or {THRESHOLD} with a gain like {THRESHOLD}:0.10",
    )
    group.add_argument(
        "--copus-probe-budget",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the run's time that branches may take which measure c, critical batch / noise scale; 0: none",
    )
    group.add_argument(
        HARDWARE_FLAG,
        metavar="NAME",
        help="what step times and memory are predicted for until they are measured: "
        f"{', '.join(shipped_hardware())}, a TOML file, or {MEASURED} (default: what the run is on)",
    )
    group.add_argument(
        TABLE_FLAG,
        metavar="FILE",
        help="step times that tools/profile_throughput.py measured, for the first decisions to be made by",
    )
    group.add_argument("--copus-dir", default="copus-run", metavar="DIR", help="where all outputs of the run go")
    group.add_argument("--copus-interval", type=int, default=20, metavar="STEPS", help="steps between decisions")
    group.add_argument(
        "--copus-dwell-steps",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps a plan is kept at least",
    )
    group.add_argument(
        "--copus-max-growth",
        type=float,
        default=2.0,
        metavar="X",
        help="most the batch may change in one decision",
    )
    group.add_argument(
        "--copus-lr-rule",
        default="sqrt",
        metavar="RULE",
        help=f"learning rate by batch size: {', '.join(LR_RULES)}",
    )
    group.add_argument(
        "--copus-beta-rule",
        default=KEPT,
        metavar="RULE",
        help=f"Adam's two betas by batch size: {', '.join(BETA_RULES)}",
    )
    group.add_argument(
        "--copus-rehearse",
        default=AUTO,
        metavar="WHEN",
        help=f"whether a plan is tried out by each rank alone before a switch to it is kept: {', '.join(_REHEARSED)}",
    )
    group.add_argument(
        "--copus-gns-estimator",
        default=AUTO,
        metavar="NAME",
        help=f"who reads the gradients for the noise scale: {', '.join(ESTIMATORS)}",
    )
    group.add_argument(
        "--log-gradient-noise-scale",
        action="store_true",
        help="with --no-copus: measure and log the gradient noise scale of a plain run, too",
    )
    group.add_argument(
        "--copus-noise-half-life-tokens",
        type=float,
        metavar="TOKENS",
        help="the noise scale forgets half of a step after so many tokens (default: 1/20 of the run's, and at least "
        f"{_HALF_LIFE_STEPS} steps of the first plan)",
    )
    for action in group._group_actions:
        if action.default not in (None, False, ""):
            action.help = f"{action.help} (default: {action.default})"
    return parser


@dataclass(frozen=True)
class CopusConfig:
    """What the flags say, checked."""

    settings: PolicySettings
    policy: Policy
    base: Plan  # of upstream's own flags: the learning rate is meant for its global batch
    space: Space
    directory: Path
    interval: int
    lr_rule: str
    noise_estimator: str
    noise_half_life_tokens: float
    throughput_table: ThroughputTable | None = None
    rehearse: str = AUTO
    beta_rule: str = KEPT

    @property
    def first_plan(self) -> Plan:
        """What the run starts with."""
        return self.policy.plan_at(0) or self.base

    @property
    def named_plans(self) -> tuple[Plan, ...]:
        """The plans that the flags name."""
        return self.policy.named_plans(self.base)


def check_flags(args: argparse.Namespace) -> None:
    """Check what can be checked of the flags alone.

    Raises:
        UserError: something is wrong; the message says what to do.
    """
    if args.copus_interval < 1:
        raise UserError(f"--copus-interval {args.copus_interval} is too small; give at least 1")
    if args.copus_rehearse not in _REHEARSED:
        raise UserError(f"--copus-rehearse {args.copus_rehearse} is not known; choose from {', '.join(_REHEARSED)}")
    learning_rate_factor(args.copus_lr_rule, 1, 1)
    parse_objective(args.copus_objective, args.copus_lr_rule)
    parse_switch_rule(args.copus_switch_rule)
    check_beta_rule(args.copus_beta_rule, args.optimizer)
    if args.copus_hardware is not None and args.copus_hardware.lower() != MEASURED:
        load_hardware(args.copus_hardware, flag=HARDWARE_FLAG)
    check_estimator(args)
    check_experts(args)
    _check_length(args)


def config_from_args(args: argparse.Namespace, base: Plan) -> CopusConfig:
    """Check the flags against the plan that upstream's flags describe, and make one value of them.

    Args:
        args: upstream's namespace with the copus group, after :func:`check_flags`.
        base: the plan of upstream's flags.

    Raises:
        UserError: something is wrong; the message says what to do.
    """
    settings = policy_settings(args)
    policy = make_policy(settings, base)
    config = CopusConfig(
        settings=settings,
        policy=policy,
        base=base,
        space=parse_space(args.copus_space).opened(policy.opens),
        directory=Path(args.copus_dir),
        interval=args.copus_interval,
        lr_rule=args.copus_lr_rule,
        beta_rule=args.copus_beta_rule,
        noise_estimator=_estimator(args.copus_gns_estimator, policy),
        noise_half_life_tokens=half_life_tokens(args, base.global_batch),
        throughput_table=read_table(args.copus_throughput_table, TABLE_FLAG) if args.copus_throughput_table else None,
        rehearse=args.copus_rehearse,
    )
    _check_measurable(config)
    return config


def policy_settings(args: argparse.Namespace) -> PolicySettings:
    """What the flags say of the policy.

    Raises:
        UserError: a ramp that is none.
    """
    ramp = args.rampup_batch_size
    try:
        rampup = None if ramp is None else tuple(int(number) for number in ramp)
    except ValueError:
        raise UserError(f"--rampup-batch-size {' '.join(ramp)}: give START INCREMENT SAMPLES") from None
    return PolicySettings(
        policy=args.copus_policy,
        schedule=args.copus_schedule,
        objective=args.copus_objective,
        switch_rule=args.copus_switch_rule,
        dwell_steps=args.copus_dwell_steps,
        max_growth=args.copus_max_growth,
        lr_rule=args.copus_lr_rule,
        probe_budget=args.copus_probe_budget,
        train_samples=args.train_samples,
        rampup=rampup,
        step_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )


def _estimator(name: str, policy: Policy) -> str:
    """Who reads the gradients: what the flag says, if it reads what the policy needs."""
    if policy.needs_whole_gradient and name in (LAYERNORM, ADAM):
        raise UserError(f"--copus-gns-estimator {name}: the policy holds the gradient itself to a test; use auto")
    if not policy.needs_inner_products:
        return name
    try:
        return with_inner_products(name)
    except ValueError as error:
        raise UserError(f"--copus-gns-estimator {name}: {error}, and the policy needs them; use auto") from None


def _check_measurable(config: CopusConfig) -> None:
    """An estimator that was asked for must be able to read something; ``auto`` may find nothing to be read."""
    reasons = [why_unmeasurable_in_a_run(StepShape.of(p), config.noise_estimator) for p in config.named_plans]
    if config.noise_estimator != AUTO and all(reasons):
        plan, name = config.named_plans[0], config.noise_estimator
        raise UserError(f"--copus-gns-estimator {name}: under {plan} {reasons[0]}; use auto, or another plan")


def half_life_tokens(args: argparse.Namespace, global_batch: int) -> float:
    """Of the noise scale: what the flag says, or 1/20 of the run and at least 40 steps.

    Long enough for an interval of about 20 % (some 50 steps), short enough to follow a noise scale that grows.
    """
    samples = args.train_samples or (args.train_iters or 0) * global_batch
    shortest = _HALF_LIFE_STEPS * global_batch
    half_life = args.copus_noise_half_life_tokens
    if half_life is None:
        return float(args.seq_length * max(shortest, samples / 20))
    if half_life <= 0:
        raise UserError(f"--copus-noise-half-life-tokens {half_life:g} must be positive")
    return float(half_life)


def check_estimator(args: argparse.Namespace) -> None:
    """Check ``--copus-gns-estimator`` against the other flags.

    Raises:
        UserError: there is no such estimator, or it can't read what this model or optimizer has.
    """
    name = args.copus_gns_estimator
    if name not in ESTIMATORS:
        raise UserError(f"--copus-gns-estimator {name} is not known; choose from {', '.join(ESTIMATORS)}")
    if name == LAYERNORM and args.transformer_impl == "transformer_engine":
        raise UserError(
            "--copus-gns-estimator layernorm needs norms that stand by themselves, and Transformer Engine fuses them "
            "with linear layers; use sketch"
        )
    if name == ADAM and args.optimizer != "adam":
        raise UserError(f"--copus-gns-estimator adam needs --optimizer adam, not {args.optimizer}; use auto")
    for other in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if name == ADAM and getattr(args, other):
            raise UserError(
                f"--copus-gns-estimator adam can't read the second moments of --{other.replace('_', '-')}; use auto"
            )


def check_experts(args: argparse.Namespace) -> None:
    """Experts must be spread as the noise scale can count them."""
    etp, tp = args.expert_tensor_parallel_size, args.tensor_model_parallel_size
    if args.num_experts and etp not in (None, tp):
        raise UserError(
            f"--expert-tensor-parallel-size {etp} with --tensor-model-parallel-size {tp}: the noise scale can't be "
            "measured where the two differ; make them the same, or leave it out"
        )


def _check_length(args: argparse.Namespace) -> None:
    """Runs are bounded by samples, since a number of steps says nothing when the batch changes."""
    if args.train_iters is not None:
        raise UserError(
            f"--train-iters {args.train_iters} means nothing when the batch size changes; give --train-samples "
            f"{args.train_iters * (args.global_batch_size or 1)} and the schedule of the learning rate in samples"
        )
    if not args.train_samples:
        raise UserError("--train-samples is missing; say how many sequences to train on")
    if args.lr_warmup_samples >= (args.lr_decay_samples or args.train_samples):
        raise UserError(
            f"--lr-warmup-samples {args.lr_warmup_samples} does not end before the learning rate's schedule does, "
            f"after {args.lr_decay_samples or args.train_samples} samples; warm up for fewer"
        )
    by_steps = [n for n in ("lr_decay_iters", "lr_wsd_decay_iters") if getattr(args, n)]
    by_steps += ["lr_warmup_iters"] if args.lr_warmup_iters else []
    if by_steps:
        flag = "--" + by_steps[0].replace("_", "-")
        raise UserError(f"{flag} counts steps, whose size changes; use {flag.replace('iters', 'samples')}")
    ramps = {"--rampup-batch-size": args.rampup_batch_size, "--step-batch-size-schedule": args.step_batch_size_schedule}
    for flag, given in ramps.items():
        if given is not None and args.copus_policy != "rampup":
            raise UserError(
                f"{flag} and --copus-policy {args.copus_policy} both set the batch size; use rampup with it"
            )
