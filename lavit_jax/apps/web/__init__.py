"""`lavit app`: a web page for trying the model. Each task shows the visual tokens that it used.

tasks.py has what the buttons do, page.py the page, server.py serves it.

One computation runs at a time, and the others queue. The size of an upload is checked by its header
before it is decoded. An error in the input is shown on the page as a sentence; any other error goes
to the log of the server, and the page goes on. Nothing is fetched from other servers, which a
Content-Security-Policy enforces in the browser.
"""

import os

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # Gradio reads it when it is imported

from lavit_jax.apps.web.page import build, report_errors  # noqa: E402
from lavit_jax.apps.web.server import launch, serve  # noqa: E402
from lavit_jax.apps.web.tasks import MAX_BYTES, Tasks, open_upload  # noqa: E402

__all__ = ['MAX_BYTES', 'Tasks', 'build', 'launch', 'open_upload', 'report_errors', 'serve']
