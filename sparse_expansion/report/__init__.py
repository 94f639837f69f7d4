"""What a run came to, for people: its facts, read once, as text, page, card, figures and tables."""
