"""Experiments: data, training, evaluation and the `dynamoe` command line."""
