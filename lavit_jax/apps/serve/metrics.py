"""What /metrics shows, for Prometheus."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lavit_jax.apps.serve.engine import Engine


class Metrics:
  """The metrics of an application, in a registry of its own.

  Args:
    engine: whose queue and slots are shown.
  """

  def __init__(self, engine: Engine):
    self.registry = CollectorRegistry()
    self._responses = Counter(
      'lavit_responses', 'Responses', ['route', 'status'], registry=self.registry
    )
    self._seconds = Histogram(
      'lavit_response_seconds',
      'Seconds until a response begins',
      ['route'],
      registry=self.registry,
    )
    waiting = Gauge('lavit_waiting_requests', 'Requests in the queue', registry=self.registry)
    waiting.set_function(lambda: engine.num_waiting)
    active = Gauge('lavit_active_texts', 'Texts being generated', registry=self.registry)
    active.set_function(lambda: engine.num_active)

  def count_response(self, route: Any, status: int, start: float) -> None:
    """Counts a response.

    Args:
      route: of the application; None where there is none.
      status: of HTTP.
      start: of the request, as `time.monotonic()` gives it.
    """
    path = getattr(route, 'path', 'unknown')
    self._responses.labels(path, str(status)).inc()
    self._seconds.labels(path).observe(time.monotonic() - start)
