"""The emoji data set: its sprites, composed images, and captions and questions about these."""
