"""Measurements, one script a claim; see README.md here."""
