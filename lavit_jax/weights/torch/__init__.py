"""PyTorch files: reading, writing, and the tables that map their names to parameter trees."""
