"""Evaluation: task generators and scorers."""
