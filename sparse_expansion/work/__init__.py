"""What workers do: stages, and what they share."""
