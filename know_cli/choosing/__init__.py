"""Which start is best for a task: candidates, a search among them, and its confirmation."""
