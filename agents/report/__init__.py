"""Reads the records of a run and makes pages a person can read."""
