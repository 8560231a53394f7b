"""Code shared by both tasks' trainers: configuration, run folders, random states, commands."""
