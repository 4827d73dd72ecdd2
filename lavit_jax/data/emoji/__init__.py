"""The composed emoji: sprites, scenes, questions about them, and the data set that holds the sprites."""
