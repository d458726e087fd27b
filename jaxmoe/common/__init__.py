"""Leaves: dimension letters, errors, timing. Imports nothing of ours."""
