"""COPUS for Megatron: batch size, micro-batch and parallel layout chosen while a language model trains."""

__version__ = "0.1.0"
