"""JAX's persistent compilation cache: the programs that one process compiles, the next one reads.

    ~/.cache/lavit_jax/compiled/jit_read-<key>-cache     a program
    ~/.cache/lavit_jax/compiled/.whole.json              which of them are known to be complete

The key of a program (JAX 0.10.2) is a hash of the program, the versions of JAX and XLA, the
compiler options and XLA_FLAGS, and the fingerprint of the devices. That of a CPU covers its
instruction sets, so that machines of different CPUs can share a folder.

JAX's own bound, `jax_compilation_cache_max_size`, is not used: each access takes a lock that gives
up after ten seconds, each write reads a file for every other program, and a program that was
written without the bound makes all later writes with it fail. Here the folder is cut to its size
when a process starts. JAX writes a program in place and never again, so one that a killed process
left incomplete would be compiled at every start; it is removed, too. In a store, such as gs://, no
program is incomplete, and of those that are there the oldest ones are removed.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import tempfile
import warnings
import zlib
from typing import Any, NamedTuple

import jax

from lavit_jax.local_paths import expand_home

VARIABLE = 'LAVIT_COMPILATION_CACHE'
OFF = 'off'
MAX_BYTES = 2 << 30
MAX_PROGRAMS = 10_000
SUFFIX = '-cache'  # of JAX's files
INDEX = '.whole.json'
ZSTD = b'\x28\xb5\x2f\xfd'  # the first bytes of a zstd frame; JAX uses zlib where it has no zstd
FAILURE = re.compile(r'Error (?:reading|writing) persistent compilation cache entry for .*?: (.*)')


class _Program(NamedTuple):
  """A file of the cache."""

  used: float  # when it was last read or written, as far as the file system tells
  size: int
  name: str


def default_folder() -> pathlib.Path:
  """The folder of this user: in $XDG_CACHE_HOME or ~/.cache.

  Raises:
    RuntimeError: the user has no home.
  """
  parent = os.environ.get('XDG_CACHE_HOME', '')
  root = pathlib.Path(parent) if os.path.isabs(parent) else pathlib.Path.home() / '.cache'
  return root / 'lavit_jax' / 'compiled'


def enable(
  place: str | None = None, default: os.PathLike[str] | None = None, writes: bool = True
) -> None:
  """Makes this process read compiled programs from a folder, and write those that are not there.

  To be called before the first program is compiled. The first of these decides: `place`, the
  variable LAVIT_COMPILATION_CACHE, JAX's own settings (JAX_COMPILATION_CACHE_DIR), `default`. If
  it is JAX's settings, nothing is changed. A folder that cannot be written is one line on stderr,
  and no cache.

  Args:
    place: a folder, or 'off'.
    default: the folder if nothing else names one, on a disk or in a store; None is
      `default_folder()`.
    writes: whether this process writes and bounds the folder. In a job of several processes only
      process 0 does (JAX lets no other one write).
  """
  place = place or os.environ.get(VARIABLE)
  max_bytes = jax.config.jax_compilation_cache_max_size  # pyright: ignore[reportAttributeAccessIssue]
  if place == OFF or max_bytes == 0:
    jax.config.update('jax_enable_compilation_cache', False)
    return
  if not place and jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    return
  try:
    folder = expand_home(place or default or default_folder())
    max_bytes = max_bytes if max_bytes > 0 else MAX_BYTES
    if '://' in folder:
      if writes:
        tidy_store(folder, max_bytes)
    else:
      folder = _prepare(pathlib.Path(folder).absolute(), max_bytes, writes)
  except (OSError, RuntimeError) as error:
    if writes:
      where = getattr(error, 'filename', None) or place or default or '~/.cache'
      _warn(f'{where}: {getattr(error, "strerror", None) or error}')
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_compilation_cache_max_size', -1)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Most programs of a command are small, and compiling them takes longer than reading.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  _show_one_failure()


def _prepare(folder: pathlib.Path, max_bytes: int, writes: bool) -> str:
  """Makes the folder, and tidies it where this process `writes`; returns its path."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes there can run code here
  if writes:
    _check_writable(folder)
    tidy(folder, max_bytes)
  return str(folder)


def tidy_store(url: str, max_bytes: int, max_programs: int = MAX_PROGRAMS) -> None:
  """Removes the programs of a store that were written first, as `tidy` does on a disk.

  Args:
    url: of the cache.
    max_bytes: of all programs that stay.
    max_programs: that stay.

  Raises:
    OSError: the store does not answer.
  """
  from fsspec.core import url_to_fs

  filesystem, root = url_to_fs(url)
  files = filesystem.find(root, detail=True)
  programs = [about for name, about in files.items() if name.endswith(SUFFIX)]
  programs.sort(key=lambda about: about['mtime'], reverse=True)
  total = 0
  for count, about in enumerate(programs):
    total += about['size']
    if total > max_bytes or count >= max_programs:
      filesystem.rm_file(about['name'])


def tidy(folder: pathlib.Path, max_bytes: int, max_programs: int = MAX_PROGRAMS) -> None:
  """Removes incomplete programs, and of the others those that were not used for longest.

  Another process may use the folder meanwhile: a program that it loses is compiled again.

  Args:
    folder: of the cache.
    max_bytes: of all programs that stay.
    max_programs: that stay.

  Raises:
    OSError: the folder cannot be read or written.
  """
  known = _read_index(folder)
  programs = []
  for entry in os.scandir(folder):
    if not entry.name.endswith(SUFFIX):
      continue
    try:
      stat = entry.stat()
      whole = known.get(entry.name) == stat.st_size or _is_whole(folder / entry.name)
    except FileNotFoundError:  # another process has removed it
      continue
    if whole:
      programs.append(_Program(max(stat.st_atime, stat.st_mtime), stat.st_size, entry.name))
    else:
      (folder / entry.name).unlink(missing_ok=True)
  programs.sort(reverse=True)
  kept = {}
  total = 0
  for program in programs:
    total += program.size
    if total <= max_bytes and len(kept) < max_programs:
      kept[program.name] = program.size
    else:
      (folder / program.name).unlink(missing_ok=True)
  if kept != known:
    _write_index(folder, kept)


def _check_writable(folder: pathlib.Path) -> None:
  """Raises OSError if a file cannot be written to the folder, which may be full."""
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(bytes(4096))


def _is_whole(path: pathlib.Path) -> bool:
  """Whether a compressed program can be decompressed; True if this Python cannot tell."""
  data = path.read_bytes()
  if data.startswith(ZSTD):
    return _is_whole_zstd(data)
  try:
    zlib.decompress(data)
  except zlib.error:
    return False
  return True


def _is_whole_zstd(data: bytes) -> bool:
  """The same for a zstd frame, by the first library that JAX would take."""
  try:
    from compression import zstd  # pyright: ignore[reportMissingImports]  # Python 3.14

    decompress = zstd.decompress
  except ImportError:
    try:
      import zstandard as zstd  # pyright: ignore[reportMissingImports]
    except ImportError:  # a program of an environment that has it: not to be removed
      return True
    decompress = zstd.ZstdDecompressor().decompress
  try:
    decompress(data)
  except (zstd.ZstdError, EOFError):
    return False
  return True


def _read_index(folder: pathlib.Path) -> dict[str, int]:
  """The size of each program that is known to be complete."""
  try:
    index = json.loads((folder / INDEX).read_text())
  except (OSError, ValueError):  # the first start, or a damaged file
    return {}
  return index if isinstance(index, dict) else {}


def _write_index(folder: pathlib.Path, index: dict[str, int]) -> None:
  handle, scratch = tempfile.mkstemp(prefix=f'{INDEX}.', dir=folder)
  with os.fdopen(handle, 'w') as file:
    json.dump(index, file)
  os.replace(scratch, folder / INDEX)


def _show_one_failure() -> None:
  """Shows the first of JAX's warnings about the cache as one line, and hides the others.

  JAX warns for each program, such as when the disk becomes full.
  """
  show = warnings.showwarning
  failures = []

  def show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    failure = FAILURE.match(str(message))
    if failure is None:
      show(message, *args, **kwargs)
      return
    if not failures:
      _warn(failure[1])
    failures.append(failure[1])

  warnings.showwarning = show_warning


def _warn(reason: str) -> None:
  line = ' '.join(reason.split())
  print(
    f'lavit: warning: compiled programs are not kept for the next start ({line}); '
    f'--compilation-cache names another folder, or {OFF!r}',
    file=sys.stderr,
  )
