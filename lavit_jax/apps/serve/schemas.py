"""The bodies of requests.

Fields that the server does not know are ignored, unless they change what is asked for: then the
request is refused.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_SAMPLES = 8  # of a prompt
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Fields of the client that the model cannot follow, and the values that ask for nothing.
_UNSUPPORTED = {
  'tools': (None, []),
  'functions': (None, []),
  'logprobs': (None, False),
  'logit_bias': (None, {}),
  'frequency_penalty': (None, 0),
  'presence_penalty': (None, 0),
  'response_format': (None, {'type': 'text'}),
  'audio': (None,),
}


def random_seed() -> int:
  """A seed for a request without one."""
  return secrets.randbits(32)


class StreamOptions(BaseModel):
  """What a stream has besides its text."""

  include_usage: bool = False


class ChatRequest(BaseModel):
  """The body of /v1/chat/completions."""

  model_config = ConfigDict(extra='allow')

  messages: list[dict[str, Any]] = Field(min_length=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  max_tokens: int | None = Field(None, ge=1)
  temperature: float = Field(1.0, ge=0, le=10)
  top_p: float = Field(1.0, gt=0, le=1)
  n: int = Field(1, ge=1, le=MAX_SAMPLES)
  seed: Seed = Field(default_factory=random_seed)
  stop: list[str] = Field(default_factory=list, max_length=4)
  stream: bool = False
  stream_options: StreamOptions | None = None

  @field_validator('stop', mode='before')
  @classmethod
  def _as_list(cls, value: Any) -> Any:
    if value is None:
      return []
    return [value] if isinstance(value, str) else value

  @field_validator('temperature', 'top_p', 'n', 'seed', mode='wrap')
  @classmethod
  def _null_is_default(cls, value: Any, handler: Any, info: Any) -> Any:
    if value is None:
      return cls.model_fields[info.field_name].get_default(call_default_factory=True)
    return handler(value)

  @model_validator(mode='after')
  def _refuse_unsupported(self) -> ChatRequest:
    for name, neutral in _UNSUPPORTED.items():
      if (self.model_extra or {}).get(name) not in neutral:
        raise ValueError(f'{name} is not supported; leave it out')
    return self


class ImageRequest(BaseModel):
  """The body of /v1/images/generations, and the form of /v1/images/edits without its images."""

  prompt: str = Field(min_length=1)
  n: int = Field(1, ge=1, le=MAX_SAMPLES)
  size: str | None = None
  response_format: Literal['b64_json'] | None = None
  seed: Seed = Field(default_factory=random_seed)
  num_inference_steps: int | None = Field(None, ge=1, le=1000)

  def height_width(self) -> tuple[int, int] | None:
    """The size in pixels; OpenAI writes WIDTHxHEIGHT.

    Raises:
      ValueError: it is not of that form.
    """
    if self.size in (None, 'auto'):
      return None
    width, _, height = self.size.partition('x')
    if not (width.isdecimal() and height.isdecimal()):
      raise ValueError(f'size={self.size!r} is not WIDTHxHEIGHT')
    return int(height), int(width)
