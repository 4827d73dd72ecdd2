"""Files that are written whole or not at all, and their names."""

import pytest

from lavit_jax import output


def test_output_is_complete_and_readable(tmp_path):
  path = output.write_atomic(tmp_path / 'a' / 'b.txt', 'words')
  assert path.read_text() == 'words'
  assert path.stat().st_mode & 0o777 == 0o644
  assert output.slug('Two owls, on a RED background!.png') == 'two-owls-on-a-red-background'
  assert output.slug('???') == 'picture'
  assert output.slug('00.png and on a red background') == '00-and-on-a-red-background'
  assert output.slug('St. Lucia / a flag') == 'st-lucia-a-flag'
  with pytest.raises(output.UserError, match='cannot write .*b.txt/c'):
    output.write_atomic(path / 'c', 'words')
