"""Helpers that several tests share. None of them calls the code that it helps to check."""
