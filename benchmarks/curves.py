"""Plots training curves from the metrics.jsonl of runs: lines for training, dots for held-out data.

python benchmarks/curves.py runs --out docs/assets/curves.svg

A line shows means of 2% of the steps.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

BLUE = '#1f77b4'
RED = '#d62728'
PANELS = (  # stage, title, (metric, color) of each line
  ('encoder', 'pictures matched to their caption', (('accuracy', BLUE),)),
  ('autoencoder', 'PSNR, dB', (('psnr', BLUE),)),
  ('tokenizer', '1 - cosine of rebuilt features', (('cosine', BLUE),)),
  ('tokenizer', 'perplexity of the codes', (('perplexity', BLUE),)),
  ('detokenizer', 'noise prediction error', (('loss', BLUE),)),
  (
    'lm',
    'loss: image to text (blue), text to image (red)',
    (('loss_image_to_text', BLUE), ('loss_text_to_image', RED)),
  ),
)
WIDTH = 320  # of a panel
HEIGHT = 200
LEFT = 44  # margins of the plot
RIGHT = 10
TOP = 26
BOTTOM = 24

Points = list[tuple[float, float]]


def series(records: list[dict], key: str) -> Points:
  """(step, value) wherever the metric was measured."""
  return [(record['step'], record[key]) for record in records if record.get(key) is not None]


def smooth(points: Points, num_chunks: int = 50) -> Points:
  """Means of consecutive points."""
  size = max(1, len(points) // num_chunks)
  means = []
  for start in range(0, len(points), size):
    chunk = points[start : start + size]
    x = sum(x for x, _ in chunk) / len(chunk)
    y = sum(y for _, y in chunk) / len(chunk)
    means.append((x, y))
  return means


def panel(title: str, lines: list[tuple[str, Points, Points]], unit: str = 'steps') -> str:
  """One plot as SVG; `lines` are (color, training points, held-out points), x in `unit`s."""
  points = []
  for _, training, heldout in lines:
    points += training + heldout
  last_step = max(x for x, _ in points)
  low = min(y for _, y in points)
  high = max(y for _, y in points)
  span = (high - low) or 1

  def position(x, y):
    left = LEFT + (WIDTH - LEFT - RIGHT) * x / last_step
    top = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / span
    return left, top

  out = [f'<text x="{LEFT}" y="16">{title}</text>']
  right = WIDTH - RIGHT
  for y in (low, (low + high) / 2, high):
    _, level = position(0, y)
    out.append(f'<path d="M{LEFT} {level:.1f}H{right}" stroke="#ddd"/>')
    out.append(f'<text x="{LEFT - 4}" y="{level + 4:.1f}" text-anchor="end">{y:.3g}</text>')
  baseline = HEIGHT - 8
  out.append(
    f'<text x="{LEFT}" y="{baseline}">0</text>'
    f'<text x="{right}" y="{baseline}" text-anchor="end">{last_step:.0f} {unit}</text>'
  )
  for color, training, heldout in lines:
    positions = [position(*point) for point in training]
    path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in positions)
    out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for point in heldout:
      x, y = position(*point)
      out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
  return '\n'.join(out)


def chart(runs: pathlib.Path) -> str:
  """The panels of all runs in a folder as one SVG, two side by side."""
  panels = []
  for stage, title, metrics in PANELS:
    path = runs / stage / 'metrics.jsonl'
    if not path.is_file():
      continue
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = []
    for key, color in metrics:
      lines.append((color, smooth(series(records, key)), series(records, f'heldout/{key}')))
    panels.append(panel(f'{stage}: {title}', lines))
  return grid(panels)


def grid(cells: Sequence[str]) -> str:
  """Cells as one SVG, two side by side."""
  groups = []
  for i, content in enumerate(cells):
    groups.append(f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">{content}</g>')
  width = 2 * WIDTH
  height = -(-len(groups) // 2) * HEIGHT
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    'font-family="sans-serif" font-size="11">'
    f'<rect width="{width}" height="{height}" fill="white"/>\n' + '\n'.join(groups) + '\n</svg>\n'
  )


def legend(colors: Mapping[str, str]) -> str:
  """A cell with the name of each color."""
  out = []
  for i, (name, color) in enumerate(colors.items()):
    y = TOP + 14 * i
    out.append(f'<path d="M{LEFT} {y}h24" stroke="{color}" stroke-width="1.5"/>')
    out.append(f'<text x="{LEFT + 30}" y="{y + 4}">{name}</text>')
  return '\n'.join(out)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    'runs', type=pathlib.Path, help='folder with a run of each stage, named like the stage'
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.write_text(chart(args.runs))
