"""A server that answers like Google Cloud Storage, as far as training asks it.

It has what an object store has and no more: whole objects with a generation, conditions on that,
lists by prefix. No object can be renamed or extended, and there are no folders. gcsfs,
TensorStore and google-cloud-storage speak to it by the variables of `environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

OBJECT = re.compile(r'(?:/download|/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?$')
REWRITE = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)$')


class Object(NamedTuple):
  """What is stored under a name."""

  content: bytes
  generation: int


class FakeGcs:
  """The server, on loopback, while its block runs; its buckets need not be made.

  Attributes:
    objects: 'BUCKET/NAME' -> object.
    log: (method, 'BUCKET/NAME') of what was written and removed, in order.
  """

  def __init__(self):
    self.objects: dict[str, Object] = {}
    self.log: list[tuple[str, str]] = []
    self.lock = threading.RLock()
    self.generation = 0
    self.sessions: dict[str, tuple[str, dict[str, str], bytes]] = {}
    self.server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'gcs': self}))
    self.url = 'http://127.0.0.1:%d' % self.server.server_address[1]

  def __enter__(self) -> FakeGcs:
    threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self.server.shutdown()
    self.server.server_close()

  @property
  def environment(self) -> dict[str, str]:
    """Variables by which clients find the server, and look for no other."""
    return dict(
      STORAGE_EMULATOR_HOST=self.url,
      TENSORSTORE_GCS_HTTP_URL=self.url,
      GOOGLE_AUTH_TOKEN_FOR_TESTING='token',
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',  # asks Google for the kind of the bucket
    )

  def names(self, prefix: str) -> list[str]:
    """The names that begin with a prefix, without it, sorted."""
    with self.lock:
      return sorted(name[len(prefix) :] for name in self.objects if name.startswith(prefix))

  def text(self, name: str) -> str:
    """The content of an object; '' if there is none."""
    with self.lock:
      return self.objects[name].content.decode() if name in self.objects else ''

  def put(self, name: str, content: bytes) -> Object:
    """Writes an object."""
    with self.lock:
      self.generation += 1
      self.objects[name] = Object(content, self.generation)
      self.log.append(('put', name))
      return self.objects[name]

  def remove(self, name: str) -> bool:
    """Removes an object; False if there is none."""
    with self.lock:
      self.log.append(('remove', name))
      return self.objects.pop(name, None) is not None


class _Server(ThreadingHTTPServer):
  daemon_threads = True

  def handle_error(self, *_) -> None:
    pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
  gcs: FakeGcs
  protocol_version = 'HTTP/1.1'
  wbufsize = 1 << 16  # an answer in one packet

  def log_message(self, *_) -> None:
    pass

  def do_GET(self) -> None:  # noqa: N802
    path, query = self._target()
    bucket, name = self._object(path)
    if bucket is None:
      self._answer(200, {'kind': 'storage#bucket', 'name': path.rpartition('/')[2]})
    elif name is None:
      self._list(bucket, query)
    else:
      self._read(f'{bucket}/{name}', query)

  def do_POST(self) -> None:  # noqa: N802
    path, query = self._target()
    body = self._body()
    if path.startswith('/batch/'):
      self._batch(body)
    elif path.startswith('/upload/'):
      self._upload(path, query, body)
    elif match := REWRITE.match(path):
      source, target = (
        '/'.join(map(urllib.parse.unquote, pair))
        for pair in (match.groups()[:2], match.groups()[2:])
      )
      with self.gcs.lock:
        if source not in self.gcs.objects:
          self._answer(404)
        else:
          stored = self.gcs.put(target, self.gcs.objects[source].content)
          self._answer(200, {'done': True, 'resource': _resource(target, stored)})
    else:
      self._answer(400, {'error': {'message': f'no such method: POST {path}'}})

  do_PUT = do_POST

  def do_DELETE(self) -> None:  # noqa: N802
    path, query = self._target()
    bucket, name = self._object(path)
    self._answer(self._delete(f'{bucket}/{name}', query))

  # --- What it does ---

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    prefix = query.get('prefix', '')
    delimiter = query.get('delimiter', '')
    items, prefixes = [], set()
    with self.gcs.lock:
      for name in self.gcs.names(f'{bucket}/'):
        if not name.startswith(prefix) or name < query.get('startOffset', ''):
          continue
        if 'endOffset' in query and name >= query['endOffset']:
          continue
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ('', '', '')
        if found:
          prefixes.add(prefix + head + delimiter)
        else:
          items.append(_resource(f'{bucket}/{name}', self.gcs.objects[f'{bucket}/{name}']))
    self._answer(200, {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)})

  def _read(self, name: str, query: dict[str, str]) -> None:
    stored = self.gcs.objects.get(name)
    if stored is None:
      self._answer(404)
    elif query.get('ifGenerationNotMatch') == str(stored.generation):
      self._answer(304)
    elif query.get('ifGenerationMatch', str(stored.generation)) != str(stored.generation):
      self._answer(412)
    elif query.get('alt') != 'media':
      self._answer(200, _resource(name, stored))
    else:
      self._send(stored)

  def _send(self, stored: Object) -> None:
    size = len(stored.content)
    headers = {
      'x-goog-generation': str(stored.generation),
      'x-goog-stored-content-length': str(size),
    }
    match = re.match(r'bytes=(\d*)-(\d*)$', self.headers.get('Range', ''))
    if match is None:
      self._answer(200, stored.content, headers)
      return
    start = int(match[1]) if match[1] else size - int(match[2])
    stop = int(match[2]) + 1 if match[1] and match[2] else size
    if start >= size:
      self._answer(416)
      return
    part = stored.content[start:stop]
    headers['Content-Range'] = f'bytes {start}-{start + len(part) - 1}/{size}'
    self._answer(206, part, headers)

  def _upload(self, path: str, query: dict[str, str], body: bytes) -> None:
    bucket, _ = self._object(path)
    if 'upload_id' in query:
      self._resume(query['upload_id'], body)
      return
    kind = query['uploadType']
    if kind == 'media':
      self._write(f'{bucket}/{query["name"]}', query, body)
    elif kind == 'multipart':
      metadata, content = self._parts(body)
      self._write(f'{bucket}/{json.loads(metadata)["name"]}', query, content)
    else:
      name = query.get('name') or json.loads(body)['name']
      session = str(len(self.gcs.sessions))
      self.gcs.sessions[session] = (f'{bucket}/{name}', query, b'')
      location = f'{self.gcs.url}/upload/storage/v1/b/{bucket}/o?upload_id={session}'
      self._answer(200, b'', {'Location': location})

  def _resume(self, session: str, body: bytes) -> None:
    name, query, before = self.gcs.sessions[session]
    content = before + body
    self.gcs.sessions[session] = (name, query, content)
    total = self.headers.get('Content-Range', f'/{len(content)}').rpartition('/')[2]
    if total == str(len(content)):
      self._write(name, query, content)
    else:
      self._answer(308, b'', {'Range': f'bytes=0-{len(content) - 1}'})

  def _write(self, name: str, query: dict[str, str], content: bytes) -> None:
    with self.gcs.lock:
      if self._fails(name, query):
        self._answer(412)
      else:
        self._answer(200, _resource(name, self.gcs.put(name, content)))

  def _delete(self, name: str, query: dict[str, str]) -> int:
    with self.gcs.lock:
      if self._fails(name, query):
        return 412
      return 204 if self.gcs.remove(name) else 404

  def _fails(self, name: str, query: dict[str, str]) -> bool:
    """Whether the object has another generation than the request asks for; 0 is none."""
    wanted = query.get('ifGenerationMatch')
    stored = self.gcs.objects.get(name)
    return wanted is not None and int(wanted) != (stored.generation if stored else 0)

  def _batch(self, body: bytes) -> None:
    answers = []
    for text in re.findall(rb'DELETE (\S+) HTTP', body):
      bucket, name = self._object(text.decode())
      answers.append(f'HTTP/1.1 {self._delete(f"{bucket}/{name}", {})} Done')
    parts = [
      f'--b\r\nContent-Type: application/http\r\nContent-ID: <response-id+{i + 1}>\r\n\r\n'
      f'{answer}\r\nContent-Length: 0\r\n\r\n\r\n'
      for i, answer in enumerate(answers)
    ]
    headers = {'Content-Type': 'multipart/mixed; boundary=b'}
    self._answer(200, (''.join(parts) + '--b--').encode(), headers)

  # --- Requests and answers ---

  def _target(self) -> tuple[str, dict[str, str]]:
    path, _, query = self.path.partition('?')
    return path, dict(urllib.parse.parse_qsl(query))

  def _object(self, path: str) -> tuple[str | None, str | None]:
    match = OBJECT.match(path)
    if match is None:
      return None, None
    return match[1], urllib.parse.unquote(match[2]) if match[2] else None

  def _body(self) -> bytes:
    if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    chunks = []
    while size := int(self.rfile.readline(), 16):
      chunks.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(chunks)

  def _parts(self, body: bytes) -> tuple[bytes, bytes]:
    """The two parts of an upload: metadata, and content."""
    boundary = b'--' + str(self.headers.get_boundary()).encode()
    _, metadata, content, _ = body.split(boundary)
    return _content(metadata), _content(content)

  def _answer(
    self, status: int, content: bytes | dict[str, Any] = b'', headers: dict[str, str] | None = None
  ) -> None:
    body = json.dumps(content).encode() if isinstance(content, dict) else content
    headers = dict(headers or {})
    if isinstance(content, dict):
      headers['Content-Type'] = 'application/json'
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body if status not in (204, 304) else b'')
    self.wfile.flush()


def _content(part: bytes) -> bytes:
  """A part of a multipart body without its headers and the line end before the next boundary."""
  end = b'\r\n' if part.startswith(b'\r\n') else b'\n'
  return part.removeprefix(end).partition(end + end)[2].removesuffix(end)


def _resource(name: str, stored: Object) -> dict[str, Any]:
  bucket, _, key = name.partition('/')
  return {
    'kind': 'storage#object',
    'bucket': bucket,
    'name': key,
    'generation': str(stored.generation),
    'metageneration': '1',
    'size': str(len(stored.content)),
    'md5Hash': base64.b64encode(hashlib.md5(stored.content).digest()).decode(),
    'timeCreated': '2026-01-01T00:00:00.000Z',
    'updated': time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(stored.generation)),
  }
