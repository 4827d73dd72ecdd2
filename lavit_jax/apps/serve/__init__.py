"""An HTTP server in the shapes of OpenAI's client: chat with images, images from texts, edits.

    lavit serve --folder DIR

engine.py computes in a thread of its own: text by continuous batching (inference/slot_decoder.py),
images in batches. api.py has the routes, and server.py starts and ends it all.
"""

from lavit_jax.apps.serve.server import serve

__all__ = ['serve']
