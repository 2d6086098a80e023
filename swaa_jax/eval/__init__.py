"""Evaluation: what is asked, whether answers are right, and what they say of policies."""
