"""A dozen made-up records of each benchmark in its official form, with images of 8 x 8 pixels.

An image is gray, of the level `10 * index`, so that a stub can tell which record it is asked about.
"""

import json

from PIL import Image

# (question, what the stub answers, the answers of annotators)
QUESTIONS = (
  ('How many dogs are there?', 'two', ['2'] * 7 + ['3'] * 3),
  ('What are these?', 'dogs', ['dog'] * 8 + ['dogs'] * 2),
  ('What sits there?', 'the cat', ['cat'] * 3 + ['kitten'] * 7),
  ('What color is it?', "it's red", ['red'] * 10),
  ('How many {people}?', 'one', ['1'] * 10),
  ('What is said?', 'dont', ["don't"] * 4 + ['stop'] * 6),
  ('Is it new?', 'yes', ['yes'] * 10),
  ('Is it old?', 'no', ['yes'] * 10),
  ('What does he do?', 'skateboarding', ['skateboard'] * 9 + ['skateboarding']),
  ('Where is it?', 'in kitchen', ['kitchen'] * 9 + ['in kitchen']),
  ('What is it?', '', ['unanswerable'] * 10),
  ('Which scan?', 'x ray', ['x-ray'] * 9 + ['scan']),
)
# The accuracy of each, worked out by hand: n annotators give min(1, n / 3), averaged over the
# annotators that are left out.
STANDARD = (1, 0.6, 0.9, 0, 1, 1, 1, 0, 0.3, 0.3, 0, 1)
LAVIT = (1, 1, 0.9, 1, 1, 0, 1, 0, 1, 1, 1, 1)  # 'dont' has the lemma 'do', and "don't" none


def draw(folder, index, name):
  """Draws the image of a record."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (8, 8), (10 * index,) * 3).save(path, 'PNG')


def write(folder, files):
  """Writes the official files: name -> content."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content))


def vqa(folder, questions_name, annotations_name):
  """The two files of VQAv2 or OK-VQA, and images in val2014."""
  questions = []
  annotations = []
  for index, (question, _, answers) in enumerate(QUESTIONS):
    ids = {'image_id': 100 + index, 'question_id': 100001 + index}
    questions.append({**ids, 'question': question})
    annotations.append(
      {
        **ids,
        'question_type': 'how many' if 'How many' in question else 'none of the above',
        'answer_type': 'number' if 'How many' in question else 'other',
        'multiple_choice_answer': answers[0],
        'answers': [
          {'answer': answer, 'answer_confidence': 'yes', 'answer_id': number}
          for number, answer in enumerate(answers, 1)
        ],
      }
    )
    draw(folder / 'images', index, f'val2014/COCO_val2014_{100 + index:012d}.jpg')
  annotations.reverse()  # an order of their own
  head = {'info': {}, 'license': {}, 'data_type': 'mscoco', 'data_subtype': 'val2014'}
  write(
    folder,
    {
      questions_name: head | {'task_type': 'Open-Ended', 'questions': questions},
      annotations_name: head | {'annotations': annotations},
    },
  )


def vqav2(folder):
  vqa(folder, 'v2_OpenEnded_mscoco_val2014_questions.json', 'v2_mscoco_val2014_annotations.json')


def okvqa(folder):
  """OK-VQA's answers are those of annotators, `raw_answer`, brought into a common form."""
  vqa(folder, 'OpenEnded_mscoco_val2014_questions.json', 'mscoco_val2014_annotations.json')
  path = folder / 'mscoco_val2014_annotations.json'
  content = json.loads(path.read_text())
  for annotation in content['annotations']:
    for answer in annotation['answers']:
      answer['raw_answer'] = f'The {answer["answer"]}s'
  path.write_text(json.dumps(content))


def gqa(folder):
  questions = {}
  for index, (question, _, answers) in enumerate(QUESTIONS):
    questions[f'{2 * 10**7 + index}'] = {
      'semantic': [],
      'imageId': f'n{index}',
      'question': question,
      'answer': answers[0],
      'fullAnswer': f'It is {answers[0]}.',
      'types': {'structural': 'verify' if question.startswith('Is') else 'query'},
      'isBalanced': True,
    }
    draw(folder / 'images', index, f'n{index}.jpg')
  write(folder, {'testdev_balanced_questions.json': questions})


def vizwiz(folder):
  items = []
  for index, (question, _, answers) in enumerate(QUESTIONS):
    name = f'VizWiz_val_{index:08d}.jpg'
    items.append(
      {
        'image': name,
        'question': question,
        'answers': [{'answer': answer, 'answer_confidence': 'yes'} for answer in answers],
        'answer_type': answers[0] if answers[0] == 'unanswerable' else 'other',
        'answerable': int(answers[0] != 'unanswerable'),
      }
    )
    draw(folder / 'images', index, f'val/{name}')
  write(folder, {'val.json': items})


# (what the stub says, the captions of annotators)
CAPTIONS = (
  ('a man riding a wave on a surfboard', ['A man rides a wave.', 'A surfer on a large wave']),
  ('two dogs', ['Two dogs play with a ball.', 'A black dog and a white dog.']),
  ('a red bus on the street', ['A red double-decker bus.', 'The bus drives down the street!']),
  ("a man's t-shirt", ["The man's t-shirt isn't clean.", 'A shirt, worn by a man']),
  ('', ['A plate of food on a table.', 'Some pasta and broccoli.']),
  ('a cat on a chair', ['A cat sits on a chair.', 'A small cat.', 'The cat is asleep.']),
  ('a kitchen with white cabinets', ['A kitchen with a stove.', 'White cabinets in a kitchen']),
  ('people at the beach', ['People at the beach, at noon.', 'A crowded beach.']),
  ('a sign that says stop', ['A "stop" sign.', 'The red sign says stop.']),
  ('a train', ['A train at the station.', 'A long train is waiting.']),
  ('a girl eating a slice of pizza', ['A girl eats pizza.', 'The girl has a slice of pizza.']),
  ('three elephants', ['Three elephants walk.', 'A herd of three elephants in dust.']),
)


def karpathy(folder, name, place, file_name):
  """Karpathy's file: the test split, between images of other splits."""
  images = []
  for index, (_, captions) in enumerate(CAPTIONS):
    for split in ('train', 'test', 'restval'):
      number = 500 + index + 100 * ('train', 'test', 'restval').index(split)
      images.append(
        {
          'filepath': 'val2014',
          'filename': file_name.format(number),
          'cocoid': number,
          'imgid': len(images),
          'split': split,
          'sentids': [],
          'sentences': [{'raw': text, 'tokens': text.lower().split()} for text in captions],
        }
      )
    draw(folder / 'images', index, f'{place}{file_name.format(600 + index)}')
  write(folder, {name: {'dataset': 'made up', 'images': images}})


def coco(folder):
  karpathy(folder, 'dataset_coco.json', 'val2014/', 'COCO_val2014_{:012d}.jpg')


def flickr30k(folder):
  karpathy(folder, 'dataset_flickr30k.json', '', '{}.jpg')


def coco_form(images):
  """COCO's form of captions, for images with an 'id'."""
  annotations = []
  for image, (_, captions) in zip(images, CAPTIONS, strict=True):
    for text in captions:
      annotations.append({'image_id': image['id'], 'id': len(annotations), 'caption': text})
  return {'info': {}, 'licenses': [], 'images': images, 'annotations': annotations}


def coco_of_blip(folder):
  items = []
  for index, (_, captions) in enumerate(CAPTIONS):
    name = f'val2014/COCO_val2014_{600 + index:012d}.jpg'
    items.append({'image': name, 'caption': captions})
    draw(folder / 'images', index, name)
  truth = coco_form([{'id': 600 + index} for index in range(12)])
  write(folder, {'coco_karpathy_test.json': items, 'coco_karpathy_test_gt.json': truth})


def nocaps(folder):
  images = []
  for index in range(12):
    name = f'{index:016x}.jpg'
    domain = ('in-domain', 'near-domain', 'out-domain')[index // 4]
    images.append({'id': index, 'file_name': name, 'domain': domain, 'height': 8, 'width': 8})
    draw(folder / 'images', index, name)
  write(folder, {'nocaps_val_4500_captions.json': coco_form(images)})


def coco_fid(folder):
  """COCO's captions of val2014; the first caption of an image does not come first."""
  content = coco_form([{'id': 700 + index} for index in range(12)])
  content['annotations'].reverse()
  for index in range(12):
    draw(folder / 'images', index, f'val2014/COCO_val2014_{700 + index:012d}.jpg')
  write(folder, {'captions_val2014.json': content})


PROMPTS = ('a photo of a bench', 'a photo of two clocks', 'a red dog and a green cat')


def geneval(folder):
  tags = ('single_object', 'counting', 'color_attr')
  lines = []
  for tag, prompt in zip(tags, PROMPTS, strict=True):
    lines.append(json.dumps({'tag': tag, 'include': [], 'prompt': prompt}))
  folder.mkdir()
  (folder / 'evaluation_metadata.jsonl').write_text('\n'.join(lines) + '\n')
