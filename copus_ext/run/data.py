"""Datasets that outlive a plan, and the iterators that each plan reads them with."""

from __future__ import annotations

from typing import Any

from megatron.training import get_args
from megatron.training.training import build_train_valid_test_data_iterators
from megatron.training.utils import print_rank_0

from copus_ext.core.errors import UserError
from copus_ext.run import gpt

_SAMPLES_LOOKED_AT = 4


class Data:
    """The run's datasets, built once on every rank, so that any rank may read them in any later layout.

    Reading is in order of ``args.consumed_train_samples`` (upstream's ``single`` loader), which does not depend on the
    layout: no sample is lost or repeated by a switch.
    """

    def __init__(self, smallest_batch: int) -> None:
        """``smallest_batch``: the smallest global batch of any plan that may come; it has the most evaluations."""
        self._smallest_batch = smallest_batch
        self._datasets: tuple[Any, Any, Any] | None = None

    def iterators(self, model_chunks: int) -> tuple[Any, Any, Any]:
        """Training, validation and test iterators for the current global arguments.

        Args:
            model_chunks: chunks on this rank; with more than one, upstream wants a list with an iterator for each.
        """
        built = [build_train_valid_test_data_iterators(self._provide) for _ in range(model_chunks)]
        if model_chunks == 1:
            return built[0]
        train, valid, test = zip(*built, strict=True)
        return list(train), list(valid), list(test)

    def _provide(self, num_samples: tuple[int, Any, int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        if self._datasets is None:
            train, valid, test = num_samples
            if valid is not None:  # None: all of the validation set, each time
                # Not upstream's number, which follows from the plan the process starts with: a resumed run must build
                # the same set as the run it goes on from.
                args = get_args()
                evaluations = train // self._smallest_batch // args.eval_interval + 2
                valid = evaluations * args.eval_iters * args.eval_global_batch_size
            self._datasets = gpt.build_datasets([train, valid, test], on_every_rank=True)
            _check_tokens(self._datasets[0])
            print_rank_0("> datasets are kept for the whole run")
        return self._datasets

    # Upstream reads this attribute of the provider: the provider itself sees to which ranks build.
    _provide.is_distributed = True  # type: ignore[attr-defined]


def _check_tokens(dataset: Any) -> None:
    """Data of another tokenizer usually shows in its first samples; found out in training, it is an index error."""
    args = get_args()
    largest = max(int(dataset[number]["tokens"].max()) for number in range(min(_SAMPLES_LOOKED_AT, len(dataset))))
    if largest >= args.padded_vocab_size:
        raise UserError(
            f"the training data has token {largest}, and --tokenizer-type {args.tokenizer_type} has only "
            f"{args.padded_vocab_size}; use the tokenizer that the data was made with"
        )
