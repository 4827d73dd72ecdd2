"""README and docs/: links lead somewhere, citations name headings, and the commands of README and guides run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
GUIDES = [
  ROOT / 'README.md',
  ROOT / 'docs' / 'index.md',
  *sorted((ROOT / 'docs/guides').glob('*.md')),
]
# What needs weights, data, machines or a network that a test does not have.
ELSEWHERE = re.compile(
  r'BUCKET|POD|/mnt/|LaVIT-7B|LaVIT-again|Llama-2|llama-with|ZONE|pip install|data build|lavit app|'
  r'bash launch|lavit_7b|activate|inproceedings|runs/(encoder|autoencoder|tokenizer|detokenizer|lm)|'
  r'lavit bundle|--folder trained|lavit inspect model$|data pack'
)


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, as mkdocs makes them."""
  headings = re.findall(r'^#+ (.*)$', page.read_text(), re.M)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings
  }


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if target.startswith(('http://', 'https://')):
      continue
    path, _, anchor = target.partition('#')
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f'{page.name} links to {target}'
    if anchor:
      assert anchor in anchors(file), f'{page.name} links to {target}'


def test_citations_name_headings():
  specification = (ROOT / 'docs' / 'specification.md').read_text()
  headings = set(re.findall(r'^## (.*)$', specification, re.M))
  cited = 0
  for folder in ('lavit_jax', 'configs', 'tests'):
    for file in (ROOT / folder).rglob('*.py'):
      if file == pathlib.Path(__file__):
        continue
      for name in re.findall(r'specification, ([A-Z]\w+(?: [a-z]\w+)?)', file.read_text()):
        assert name in headings or name.split(' ')[0] in headings, f'{file.name} cites {name}'
        cited += 1
  assert cited > 30


def snippets(page: pathlib.Path) -> list[str]:
  """The indented blocks of a page, without what can only run elsewhere."""
  blocks = re.findall(r'(?:^    .*\n(?:\n(?=    ))?)+', page.read_text(), re.M)
  kept = []
  for block in blocks:
    block = re.sub(r'^    ', '', block, flags=re.M)
    block = block.replace('\\\n', ' ')
    block = re.sub(r'="\(\n\s*', '="(', block)
    lines = [line for line in block.splitlines() if line.strip() and not ELSEWHERE.search(line)]
    kept.append('\n'.join(lines))
  return [block for block in kept if block]


@pytest.mark.slow
@pytest.mark.parametrize('page', GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run(page, tmp_path):
  """All of a page in one folder, in order, as a reader would."""
  for name in ('lavit_jax', 'configs'):
    (tmp_path / name).symlink_to(ROOT / name)
  environment = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT))
  environment['PATH'] = f'{pathlib.Path(sys.executable).parent}:{environment["PATH"]}'
  for block in snippets(page):
    if block.startswith(('from ', 'import ')):
      command = [sys.executable, '-c', block]
    elif re.match(r'(lavit|cp|mkdir|for) ', block):
      command = ['bash', '-ec', block]
    else:  # a listing of files
      continue
    done = subprocess.run(
      command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f'{block}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}'
