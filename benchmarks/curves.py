"""Draws the training curves of the README from the runs' metrics.jsonl: lines for training (means of 2% of the steps), dots for held-out.

python benchmarks/curves.py runs --out lavit_jax/assets/curves.svg
"""

import argparse
import json
import pathlib

PANELS = (  # stage, what is shown, its keys and their colours
  ('encoder', 'pictures matched to their caption', (('accuracy', '#1f77b4'),)),
  ('autoencoder', 'PSNR, dB', (('psnr', '#1f77b4'),)),
  ('tokenizer', '1 - cosine of rebuilt features', (('cosine', '#1f77b4'),)),
  ('tokenizer', 'perplexity of the codes', (('perplexity', '#1f77b4'),)),
  ('detokenizer', 'noise prediction error', (('loss', '#1f77b4'),)),
  (
    'lm',
    'loss: image to text (blue), text to image (red)',
    (('loss_image_to_text', '#1f77b4'), ('loss_text_to_image', '#d62728')),
  ),
)
WIDTH, HEIGHT, LEFT, TOP = 320, 200, 44, 26


def series(rows: list[dict], key: str) -> list[tuple[int, float]]:
  """(step, value) wherever the key was measured."""
  return [(row['step'], row[key]) for row in rows if row.get(key) is not None]


def smooth(points: list[tuple[int, float]], parts: int = 50) -> list[tuple[float, float]]:
  size = max(1, len(points) // parts)
  chunks = [points[i : i + size] for i in range(0, len(points), size)]
  return [
    (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
    for chunk in chunks
  ]


def panel(title: str, lines: list[tuple[str, list, list]]) -> str:
  """One chart; `lines` are (colour, training points, held-out points)."""
  every = [point for _, training, heldout in lines for point in training + heldout]
  right, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)

  def place(x, y):
    return LEFT + (WIDTH - LEFT - 10) * x / right, HEIGHT - 24 - (HEIGHT - 24 - TOP) * (y - low) / (
      high - low
    )

  out = [f'<text x="{LEFT}" y="16">{title}</text>']
  for y in (low, (low + high) / 2, high):
    level = place(0, y)[1]
    out.append(f'<path d="M{LEFT} {level:.1f}H{WIDTH - 10}" stroke="#ddd"/>')
    out.append(f'<text x="{LEFT - 4}" y="{level + 4:.1f}" text-anchor="end">{y:.3g}</text>')
  out += [
    f'<text x="{LEFT}" y="{HEIGHT - 8}">0</text><text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">{right:.0f} steps</text>'
  ]
  for colour, training, heldout in lines:
    path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (place(*point) for point in training))
    out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    out += [
      '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'.format(*place(*point), colour)
      for point in heldout
    ]
  return '\n'.join(out)


def chart(runs: pathlib.Path) -> str:
  """The panels of the runs that are there as one SVG, two side by side."""
  cells = []
  there = [each for each in PANELS if (runs / each[0] / 'metrics.jsonl').is_file()]
  for i, (stage, title, keys) in enumerate(there):
    rows = [json.loads(line) for line in (runs / stage / 'metrics.jsonl').read_text().splitlines()]
    lines = [
      (colour, smooth(series(rows, key)), series(rows, f'heldout/{key}')) for key, colour in keys
    ]
    cells.append(
      f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">{panel(f"{stage}: {title}", lines)}</g>'
    )
  width, height = 2 * WIDTH, -(-len(cells) // 2) * HEIGHT
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    f'<rect width="{width}" height="{height}" fill="white"/>\n' + '\n'.join(cells) + '\n</svg>\n'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    'runs', type=pathlib.Path, help='the folder that holds a run of each stage under its name'
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.write_text(chart(args.runs))
