"""README and docs/ against the code: links, file paths, citations, quoted errors, commands."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
SERVE = ROOT / 'docs/guides/serve.md'  # tests/apps/test_serve_command.py runs its blocks
GUIDES = [
  ROOT / 'README.md',
  ROOT / 'docs' / 'index.md',
  *sorted(set((ROOT / 'docs/guides').glob('*.md')) - {SERVE}),
]
# A fragment of an error on docs/troubleshooting.md: the first column of a table, in backticks.
QUOTED_ERROR = re.compile(r'^\| `([^`]+)` \|', re.M)
# Lines that need weights, data, machines or a network that a test does not have.
ELSEWHERE = re.compile(
  r'BUCKET|POD|/mnt/|LaVIT-7B|LaVIT-again|Llama-2|llama-with|ZONE|(pip|npm) install|data build|'
  r'lavit app|bash launch|lavit_7b|activate|inproceedings|'
  r'runs/(encoder|autoencoder|tokenizer|detokenizer|lm)'
  r'|lavit bundle|--folder trained|lavit inspect model$|data pack'
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


def test_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 180


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page):
  """A path in backticks starts at the repository or at lavit_jax/; `*` stands for several files."""
  pattern = r'`((?:[\w.*-]+/)+[\w.*-]+\.(?:py|sh|sbatch|md|ipynb))`'
  for path in re.findall(pattern, page.read_text()):
    assert exists(path), f'{page.name} names {path}'


@pytest.mark.parametrize('name', ['docs/architecture.md', 'CONTRIBUTING.md'])
def test_named_folders_exist(name):
  """On these pages, a Python file without a folder is a path too."""
  paths = re.findall(r'`((?:[\w-]+/)+|\w+\.py)`', (ROOT / name).read_text())
  assert len(paths) > 4
  for path in paths:
    assert exists(path), f'{name} names {path}'


def test_imports_point_one_way():
  """As docs/architecture.md says, from right to left of the line with `<`."""
  line = re.search(r'^    (sharding <.*)$', (ROOT / 'docs/architecture.md').read_text(), re.M)[1]
  levels = {}
  for level, folders in enumerate(line.split(' < ')):
    levels |= dict.fromkeys(folders.split(', '), level)
  for folder, level in levels.items():
    path = ROOT / 'lavit_jax' / folder
    for file in path.rglob('*.py') if path.is_dir() else [path.with_suffix('.py')]:
      for other in re.findall(r'^ *from lavit_jax[.](\w+)', file.read_text(), re.M):
        same_or_lower = other == folder or levels.get(other, -1) < level
        assert same_or_lower, f'{file.relative_to(ROOT)} imports {other}'


def exists(path: str) -> bool:
  for base in (ROOT, ROOT / 'lavit_jax'):
    if any(base.glob(path.rstrip('/'))):
      return True
  return False


def test_api_page_names_modules():
  modules = re.findall(r'^::: (\S+)$', (ROOT / 'docs/api.md').read_text(), re.M)
  assert len(modules) > 10
  for module in modules:
    path = ROOT / module.replace('.', '/')
    assert path.with_suffix('.py').exists() or (path / '__init__.py').exists(), module


@functools.cache
def message_templates() -> list[str]:
  """The string literals of the package and the lines of the launch scripts.

  A value that is formatted into a literal is the character NUL. Docstrings are left out.
  """
  templates = []
  for file in (ROOT / 'lavit_jax').rglob('*.py'):
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
      if id(node) in docstrings:
        continue
      if isinstance(node, ast.JoinedStr):
        values = [part.value if isinstance(part, ast.Constant) else '\0' for part in node.values]
        templates.append(''.join(values))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        templates.append(node.value)
  for file in (ROOT / 'launch').iterdir():
    templates += file.read_text().splitlines()
  return templates


def is_raised(quoted: str) -> bool:
  """Whether the fragments between `...` are in one message, in this order."""
  pattern = re.compile('.*'.join(map(re.escape, quoted.strip('. ').split(' ... '))), re.S)
  return any(pattern.search(template) for template in message_templates())


def test_quoted_errors_exist():
  quoted = QUOTED_ERROR.findall((ROOT / 'docs/troubleshooting.md').read_text())
  assert len(quoted) > 60
  assert [fragment for fragment in quoted if not is_raised(fragment)] == []


def test_a_wrong_quotation_is_found():
  assert is_raised('checkpoint and variant ... do not fit')
  assert not is_raised('checkpoint and variant do not fit')
  assert not is_raised('do not fit ... checkpoint and variant')


def snippets(page: pathlib.Path) -> list[str]:
  """The indented blocks of a page, without the lines that a test cannot run."""
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
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('page', GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run(page, tmp_path):
  """All blocks of a page run in one folder, in the order of the page."""
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
    result = subprocess.run(
      command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, f'{block}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}'
