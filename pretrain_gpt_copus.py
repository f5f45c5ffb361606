"""Pre-train a GPT with Megatron while COPUS chooses batch size and parallel layout.

    torchrun --nproc-per-node 8 pretrain_gpt_copus.py <flags of Megatron-LM's pretrain_gpt.py> --copus-dir runs/gpt

``--no-copus`` makes it plain Megatron pre-training.
"""

import sys

if __name__ == "__main__":  # checkpointing and data loading start processes that import this file again
    from copus_ext.run.start import main

    sys.exit(main())
