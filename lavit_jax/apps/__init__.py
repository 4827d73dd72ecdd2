"""Programs for users: batches of inputs, the demo, the web page, conversion."""
