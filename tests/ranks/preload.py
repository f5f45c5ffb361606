"""Imported once by the fork server, so that a rank starts in a fraction of a second instead of ten."""

import warnings

import torch

warnings.simplefilter("ignore")  # upstream tells of every GPU library that is not there
torch.set_num_threads(1)

import megatron.core.distributed  # noqa: E402
import megatron.training.training  # noqa: E402,F401

from megatron.patches import apply_all  # noqa: E402

apply_all()
