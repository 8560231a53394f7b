"""What the trainers of both tasks share: configuration, run folders, random states, commands."""
