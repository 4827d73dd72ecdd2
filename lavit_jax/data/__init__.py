"""Data: what is read from stores, and the images, texts and batches that are made of it."""
