"""Speed, memory and their limits."""
