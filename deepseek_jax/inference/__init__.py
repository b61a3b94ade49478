"""A loaded model: generation, evaluation, lm-evaluation-harness."""
