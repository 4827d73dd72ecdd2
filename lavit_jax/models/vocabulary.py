"""The one id space of words and codes (specification, Vocabulary).

0 ...                text: the sentencepiece vocabulary, with <unk> 0, <s> 1 and </s> 2
text_size            [IMG]
text_size + 1        [/IMG]
text_size + 2 ...    one id for each code of the codebook
"""

from typing import NamedTuple

BOS_ID = 1
EOS_ID = 2
PAD_ID = EOS_ID  # LLaMA has no padding token; masks hide the padding


class Vocabulary(NamedTuple):
  """Sizes of the two kinds of ids, and where each begins."""

  text_size: int
  codebook_size: int

  @property
  def image_start(self) -> int:
    """The id of [IMG]."""
    return self.text_size

  @property
  def image_end(self) -> int:
    """The id of [/IMG]."""
    return self.text_size + 1

  @property
  def code_offset(self) -> int:
    """The id of code 0."""
    return self.text_size + 2

  @property
  def size(self) -> int:
    """The number of all ids."""
    return self.code_offset + self.codebook_size
