"""Learned controllers against all controls: training, tuning, evaluation, and what it comes to."""
