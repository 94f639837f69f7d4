"""Text to token windows, and windows to the inputs of linear groups."""
