"""Imported once by the fork server, so that a rank starts in a fraction of a second instead of ten.

All that ranks would import for themselves belongs here: each of them pays for what is missing.
"""

import functools
import gc
import importlib
import pkgutil
import warnings

import torch

warnings.simplefilter("ignore")  # upstream tells of every GPU library that is not there
torch.set_num_threads(1)

import megatron.core.datasets.gpt_dataset  # noqa: E402
import megatron.core.datasets.helpers  # noqa: E402
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.mimo  # noqa: E402
import megatron.core.tokenizers.text.models  # noqa: E402
import megatron.training.training  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402

import copus_ext  # noqa: E402
from megatron.patches import apply_all  # noqa: E402
from tests.ranks.tiny import raw_arguments  # noqa: E402

apply_all()
for module in pkgutil.walk_packages(copus_ext.__path__, "copus_ext."):
    importlib.import_module(module.name)
for name in ("faults", "gathering", "harness", "moving", "stepping", "steps"):
    importlib.import_module(f"tests.ranks.{name}")
importlib.import_module("tests.end_to_end.launch")

# A checkpoint's writer has a process of its own for a queue. Upstream spawns it, an interpreter that loads torch again,
# on every rank of every run; forked, as its persistent writer has it, it is the same queue.
filesystem_async.get_write_results_queue = functools.partial(filesystem_async.get_write_results_queue, mp_mode="fork")

# Upstream's mock data are six million samples, which every run would shuffle for half a second.
megatron.core.datasets.gpt_dataset.MockGPTLowLevelDataset.size = 2000

# Upstream's parser reads what its flags mean from the source of classes, for a tenth of a second, in every process.
# It only keeps what it is given.
_described = functools.cache(object.__new__(ArgumentGroupFactory)._get_field_docstrings)
ArgumentGroupFactory._get_field_docstrings = lambda self, config: _described(config)
raw_arguments()

gc.collect()
gc.freeze()  # a collection in a rank would touch, and so copy, all of this
