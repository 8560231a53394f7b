"""Commands of the repository itself, not part of any package."""
