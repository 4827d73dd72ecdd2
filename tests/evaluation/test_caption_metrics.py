"""The metrics of captions without Java, and how the plain tokenizer differs from the official."""

import pytest

from lavit_jax.evaluation import caption_metrics

pytest.importorskip('pycocoevalcap', reason="no pycocoevalcap; pip install -e '.[evaluate]'")
needs_java = pytest.mark.skipif(
  caption_metrics.java_version() is None, reason='no java; apt install default-jre-headless'
)
EQUAL = (
  'A man riding a wave on top of a surfboard.',
  'Two dogs, one black and one white!',
  "The man's t-shirt isn't red",
  'a black-and-white photo of a "stop" sign',
  "they're at 3.5 - 4; o'clock",
  "it's a dog's life... (",
)
DIFFERENT = {'it cannot be': 'it can not be', '(left) side': '-lrb- left -rrb- side', '5%': '5 %'}


@needs_java
def test_the_plain_tokenizer_beside_the_official():
  texts = [*EQUAL[:-1], *DIFFERENT]
  official = caption_metrics.tokenize({'refs': texts}, {'refs': ''}).references['refs']
  plain = [caption_metrics.plain_tokens(text) for text in texts]
  assert plain[: len(EQUAL) - 1] == official[: len(EQUAL) - 1]
  for (text, expected), tokens in zip(DIFFERENT.items(), official[len(EQUAL) - 1 :], strict=True):
    assert tokens == expected != caption_metrics.plain_tokens(text)


def test_plain_tokens():
  assert caption_metrics.plain_tokens("The Man's dogs, isn't it?") == "the man 's dogs is n't it"
  assert caption_metrics.plain_tokens('') == ''
  assert caption_metrics.plain_tokens("' a -- b '") == 'a b'


def test_without_java(monkeypatch):
  monkeypatch.setenv('PATH', '')
  assert caption_metrics.java_version() is None
  references = {1: ['A dog.', 'The dog!'], 2: ['A red bus', 'a bus']}
  captions = caption_metrics.tokenize(references, {1: 'a dog', 2: 'a cat'})
  metrics, of_images = caption_metrics.measure(captions, caption_metrics.make_scorers(False))
  assert sorted(metrics) == sorted(
    f'{name} (plain tokenizer)'
    for name in ('Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4', 'ROUGE_L', 'CIDEr')
  )
  assert metrics['Bleu_1 (plain tokenizer)'] == pytest.approx(3 / 4, abs=1e-6)
  assert list(of_images) == [1, 2]
  assert 'no java' in caption_metrics.missing_metrics(captions)[0]
