"""Evaluation: what a model's likelihood is measured against."""

from polygpt.evaluation.baselines import bigram_bits_per_byte, gzip_bits_per_byte, held_out_text, xz_bits_per_byte

__all__ = ["bigram_bits_per_byte", "gzip_bits_per_byte", "held_out_text", "xz_bits_per_byte"]
