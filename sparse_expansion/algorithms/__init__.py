"""Pure tensor mathematics: no files, no models, no device choice, no logging."""
