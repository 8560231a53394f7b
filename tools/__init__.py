"""Commands of the repository itself, which no package carries."""
