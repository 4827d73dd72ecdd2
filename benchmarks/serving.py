"""The throughput of `lavit serve` with many clients, relative to one request after another.

python benchmarks/serving.py --clients 64 --requests 128

Starts a server with the tiny checkpoint on loopback, asks questions about images one after another,
then the same ones by all clients at once, in turn for some rounds, and checks that each has the
same answer both times. Bounded by the number of requests, and by the timeout of each.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import pathlib
import re
import statistics
import subprocess
import sys
import time

import httpx

ASSETS = pathlib.Path(__file__).parents[1] / 'lavit_jax' / 'assets'
QUESTIONS = ('What is this?', 'What colour is the background?', 'How many things are there?')
TIMEOUT = 300.0  # seconds of a request


def main() -> None:
  """Measures, and prints a line for each round."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--clients', type=int, default=64)
  parser.add_argument('--requests', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--slots', type=int, default=16)
  parser.add_argument('--folder', type=pathlib.Path, default=ASSETS / 'tiny')
  args = parser.parse_args()
  command = [sys.executable, '-m', 'lavit_jax', 'serve', '--folder', str(args.folder)]
  command += ['--port', '0', '--slots', str(args.slots), '--max-queue', str(args.requests)]
  command += ['--max-prompt-tokens', '128', '--max-new-tokens', '32']
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
      assert server.stdout is not None
      line = server.stdout.readline()
      match = re.match(r'(http://\S+)/v1 answers', line)
      if match is None:
        raise SystemExit(f'the server said {line!r}')
      measure(match[1], args)
    finally:
      server.terminate()


def measure(url: str, args: argparse.Namespace) -> None:
  """Asks in turn: one request after another, and all clients at once."""
  bodies = [make_request(number) for number in range(args.requests)]
  with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
    for count in (1, args.clients):  # compiles what the rounds need
      run(client, bodies[: 2 * count], count)
    ratios = []
    for number in range(args.rounds):
      alone, seconds_alone = run(client, bodies, 1)
      together, seconds = run(client, bodies, args.clients)
      wrong = sum(a != b for a, b in zip(alone, together, strict=True))
      ratios.append(seconds_alone / seconds)
      print(
        f'round {number}: one after another {args.requests / seconds_alone:.1f} requests/s, '
        f'{args.clients} clients {args.requests / seconds:.1f}, ratio {ratios[-1]:.2f}; '
        f'{len(together)} answered, {wrong} different',
        flush=True,
      )
    print(f'median ratio {statistics.median(ratios):.2f}')


def make_request(number: int) -> dict:
  """A question about one of the demo's images, with a seed of its own."""
  image = (ASSETS / 'demo' / f'{number % 8:02d}.png').read_bytes()
  url = 'data:image/png;base64,' + base64.b64encode(image).decode()
  content = [
    {'type': 'image_url', 'image_url': {'url': url}},
    {'type': 'text', 'text': QUESTIONS[number % len(QUESTIONS)]},
  ]
  return dict(messages=[{'role': 'user', 'content': content}], seed=number, max_tokens=16)


def run(client: httpx.Client, bodies: list[dict], clients: int) -> tuple[list[str], float]:
  """The answers to all requests, and the seconds that they took together."""

  def ask(body: dict) -> str:
    reply = client.post('/v1/chat/completions', json=body)
    reply.raise_for_status()
    return reply.json()['choices'][0]['message']['content']

  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    answers = list(pool.map(ask, bodies))
  return answers, time.perf_counter() - start


if __name__ == '__main__':
  main()
