"""Measurements, one script per claim; see README.md in this folder."""
