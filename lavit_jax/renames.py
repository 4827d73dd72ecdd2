"""Old names that go on to work: modules that have moved, and what has another name in them.

`lavit_jax/__init__.py` installs the finder. An old module is a view of the new one, imported when
first asked for; a warning says where it is now. docs/renames.md lists all of them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings

PACKAGE = 'lavit_jax.'
MODULES = {
  'aot': 'compile',
  'aot.decode': 'compile.generate',
  'aot.hlo': 'compile.hlo',
  'aot.pods': 'compile.topology',
  'aot.train': 'compile.train_step',
  'chips': 'accelerators',
  'data.colours': 'data.emoji.colors',
  'data.drawing': 'data.emoji.rendering',
  'data.grammar': 'data.emoji.grammar',
  'data.mixtures': 'data.loader',
  'data.packing': 'data.array_record',
  'data.pairs': 'data.transforms',
  'data.questions': 'data.emoji.questions',
  'data.records': 'data.emoji.dataset',
  'data.rows': 'data.row_workers',
  'data.scenes': 'data.emoji.scenes',
  'data.splits': 'data.emoji.splits',
  'data.sprites': 'data.emoji.sprites',
  'evaluation.captioning': 'evaluation.captions',
  'inference.app': 'apps.web',
  'inference.batch': 'apps.batch',
  'inference.demo': 'apps.demo',
  'inference.diffusion': 'models.diffusion',
  'inference.drawing': 'inference.image_generation',
  'inference.fetching': 'inference.batching',
  'inference.output': 'output',
  'inference.parameters': 'weights.loader',
  'inference.parts': 'weights.loader',
  'inference.programs': 'inference.compiled',
  'inference.settings': 'inference.generation_config',
  'models.initial': 'models.initialization',
  'models.noise': 'models.noise_schedule',
  'models.rows': 'models.row_random',
  'models.safety': 'models.safety_checker',
  'models.splash': 'models.attention_kernels',
  'porting': 'weights.torch.api',
  'porting.api': 'weights.torch.api',
  'porting.configs': 'weights.torch.configs',
  'porting.configs.llama': 'weights.torch.configs.llama',
  'porting.configs.pipeline': 'weights.torch.configs.pipeline',
  'porting.configs.rules': 'weights.torch.configs.rules',
  'porting.configs.safety': 'weights.torch.configs.safety',
  'porting.configs.scheduler': 'weights.torch.configs.scheduler',
  'porting.configs.unet': 'weights.torch.configs.unet',
  'porting.configs.vae': 'weights.torch.configs.vae',
  'porting.convert': 'weights.torch.convert',
  'porting.disk': 'weights.store.disk',
  'porting.engine': 'weights.torch.mapping',
  'porting.folder': 'weights.store.folder',
  'porting.growth': 'weights.torch.vocabulary_growth',
  'porting.layouts': 'weights.torch.formats',
  'porting.leaves': 'weights.store.arrays',
  'porting.leftovers': 'weights.torch.conversion_notes',
  'porting.names': 'weights.torch.state_dict_names',
  'porting.numbers': 'weights.torch.finite',
  'porting.show': 'apps.conversion',
  'porting.tables_language': 'weights.torch.names_llama',
  'porting.tables_pixels': 'weights.torch.names_diffusion',
  'porting.tables_visual': 'weights.torch.names_visual',
  'porting.torch_files': 'weights.torch.files',
  'porting.weight_files': 'weights.torch.weight_files',
  'training.checks': 'training.run',
  'training.foundations': 'training.stages.autoencoder',
  'training.optim': 'training.optimizer',
  'training.processes': 'training.distributed',
  'training.settings': 'training.parameters',
  'training.stage': 'training.stages.base',
  'training.validation': 'training.run',
  'weights.torch.leftovers': 'weights.torch.conversion_notes',
}
# Module as it is called now -> old name -> new name, or 'module:name' if it moved to another one.
NAMES = {
  'apps.batch': {
    'Results': 'ResultsFile',
    'example': 'example_row',
    'find_pictures': 'find_images',
    'find_rows': 'resolve_inputs',
    'is_picture': 'is_image_path',
    'load': 'load_inputs',
    'resolve_rows': 'resolve_inputs',
    'run': 'run_batch',
  },
  'apps.demo': {
    'STEPS': 'NUM_STEPS',
    'make': 'make_inputs',
    'show_kept': 'show_kept_patches',
  },
  'apps.web': {
    'told': 'report_errors',
  },
  'compile.hlo': {
    'Array': 'compile.hlo_parser:Array',
    'NOTHING': 'ZERO',
    'costs': 'analyze',
  },
  'compile.topology': {
    'GIB': 'compile.program:GIB',
    'Program': 'compile.program:Program',
    'SPARE': 'compile.program:SPARE_MEMORY',
    'bytes_a_chip': 'compile.program:bytes_per_device',
    'bytes_per_chip': 'compile.program:bytes_per_device',
    'compile_on': 'compile.program:compile_for',
    'count': 'format_device_count',
    'pod': 'pod_devices',
  },
  'compile.train_step': {
    'rows': 'table_rows',
  },
  'data.archives': {
    'what_else': 'identify_other',
  },
  'data.array_record': {
    'Packed': 'WriteSummary',
    'pack': 'write_array_records',
  },
  'data.emoji.colors': {
    'dominant': 'dominant_color',
  },
  'data.emoji.questions': {
    'ask': 'make_questions',
  },
  'data.emoji.rendering': {
    'draw': 'render',
  },
  'data.emoji.scenes': {
    'Thing': 'SceneObject',
  },
  'data.emoji.splits': {
    'parse': 'heldout_reasons',
  },
  'data.emoji.sprites': {
    'find': 'find_dataset',
  },
  'data.formats': {
    'DEFAULTS': 'DEFAULT_FIELDS',
    'some': 'format_names',
  },
  'data.images': {
    'SUFFIXES': 'IMAGE_SUFFIXES',
    'as_list': 'as_image_list',
    'is_one': 'is_single_image',
  },
  'data.loader': {
    'check': 'validate_options',
    'kind_shares': 'task_shares',
    'shapes': 'batch_shapes',
  },
  'data.long_text': {
    'piece_of': 'select_piece',
  },
  'data.parquets': {
    'cost': 'unit_cost',
    'rows': 'read_rows',
    'units': 'list_units',
  },
  'data.paths': {
    'NO_FILE': 'NO_FILE_ERRORS',
    'ahead_of': 'read_ahead_size',
    'names_below': 'list_files',
    'store': 'filesystem_of',
  },
  'data.row_workers': {
    'Made': 'RowDataset',
    'changed': 'list_changes',
  },
  'data.skips': {
    'About': 'SourceInfo',
    'Skipped': 'SkipCounter',
  },
  'data.sources': {
    'mix': 'mix_sources',
  },
  'data.streams': {
    'Windows': 'StreamShard',
    'turned': 'rotate_index',
  },
  'data.text': {
    'save': 'save_tokenizer',
    'train': 'train_tokenizer',
  },
  'data.transforms': {
    'LEAST_AREA': 'MIN_AREA',
    'choose': 'choose_caption',
    'make_row': 'row_builder',
  },
  'evaluation.captions': {
    'background': 'parse_background',
    'score': 'score_captions',
    'spoken': 'spoken_name',
    'subject': 'parse_subject',
  },
  'evaluation.images': {
    'SIDE': 'CLASSIFIER_SIZE',
    'background': 'background_color',
  },
  'evaluation.report': {
    'KINDS': 'GROUPS',
    'kinds': 'group_indices',
    'measure_drawings': 'measure_images',
    'pixels': 'stack_images',
    'tables': 'report_tables',
  },
  'evaluation.vqa': {
    'Asked': 'VQAExample',
    'Usual': 'MajorityBaseline',
    'ask': 'collect_questions',
    'majority': 'fit_majority',
    'normalise': 'normalize_answer',
    'score': 'score_answers',
  },
  'inference.batching': {
    'batches': 'batch_ranges',
    'fetch': 'fetch_batches',
    'one_behind': 'double_buffer',
  },
  'inference.faults': {
    'first': 'first_fault',
  },
  'inference.generation_config': {
    'RowSeed': 'IndexedSeed',
    'SETTINGS': 'VARIANT_DEFAULTS',
    'Settings': 'VariantDefaults',
    'Writing': 'GenerationConfig',
    'check': 'check_value',
    'fit': 'check_prompt_lengths',
    'for_all': 'shared_argument',
    'keys_for': 'purpose_keys',
    'row_keys': 'example_keys',
    'settle': 'resolve_generation_config',
    'texts': 'as_texts',
  },
  'inference.image_generation': {
    'Drawn': 'DecodedImages',
    'Request': 'ImageRequest',
    'Way': 'ImageDecoderConfig',
    'checker': 'safety_checker_part',
    'draw': 'decode_images',
    'settle': 'resolve_image_request',
  },
  'inference.pipeline': {
    'EOS': 'models.vocabulary:EOS_ID',
    'Generated': 'ImageOutput',
    'Sampled': 'CodesOutput',
    'Tokens': 'VisualTokens',
    'Told': 'TextOutput',
  },
  'inference.sampling': {
    'guide': 'guided_log_probs',
    'penalise': 'penalize',
  },
  'models.attention_kernels': {
    'cudnn_takes': 'cudnn_supports',
    'picture_attention': 'image_attention',
  },
  'models.decoder': {
    'Decoder': 'FeatureDecoder',
  },
  'models.diffusion': {
    'Plan': 'SamplerPlan',
    'guided': 'guided_denoiser',
    'plan': 'make_plan',
    'sample': 'sample_latents',
  },
  'models.initialization': {
    'initial_parts': 'init_params',
  },
  'models.lavit': {
    'Lavit': 'LavitModules',
    'row': 'variant_config',
  },
  'models.layers': {
    'BATCH_AXES': 'sharding:BATCH_AXES',
    'CrossAttention': 'models.attention:CrossAttention',
    'QKV': 'models.attention:QKV',
    'QUERY_BLOCK': 'models.attention:QUERY_BLOCK',
    'REMAT_POLICIES': 'models.remat:REMAT_POLICIES',
    'SelfAttention': 'models.attention:SelfAttention',
    'TENSOR_AXIS': 'sharding:TENSOR_AXIS',
    'attend_and_project': 'models.attention:attend_and_project',
    'attention': 'models.attention:attention',
    'constrain_batch': 'sharding:constrain_batch',
    'merge_heads': 'models.attention:merge_heads',
    'per_shard': 'sharding:per_shard',
    'policy_attention': 'models.attention:policy_attention',
    'rotary': 'models.rope:rotary',
    'scan_blocks': 'models.remat:scan_blocks',
    'split_batch': 'sharding:constrain_batch',
    'split_heads': 'models.attention:split_heads',
  },
  'models.llama': {
    'unroll': 'unroll_layers',
    'unstack': 'unstack_layers',
  },
  'models.sequence': {
    'Packed': 'PackedBatch',
    'assemble': 'embed_prompts',
    'first_fit': 'assign_rows',
    'lay_out_prompts': 'layout_prompts',
    'pack': 'pack_pairs',
  },
  'models.settings': {
    'Field': 'Setting',
    'PARTS': 'GROUPS',
    'Part': 'SettingsGroup',
    'checked': 'validate_field',
    'computes': 'affects_outputs',
    'count': 'positive_integer',
    'differing': 'validate',
    'frozen': 'freeze',
    'listed': 'list_of',
    'number': 'finite_number',
    'of_parts': 'for_modules',
    'own': 'variant_settings',
    'positive': 'positive_number',
    'switch': 'boolean',
    'told': 'format_setting',
    'whole': 'integer_between',
    'within': 'number_between',
  },
  'models.tokenizer': {
    'l2_normalise': 'l2_normalize',
  },
  'models.vae': {
    'Decoder': 'VAEDecoder',
    'Encoder': 'VAEEncoder',
    'Middle': 'MidBlock',
  },
  'output': {
    'png': 'encode_png',
    'write': 'write_atomic',
  },
  'sharding': {
    'Share': 'ProcessShare',
    'share': 'process_share',
  },
  'training.codebook': {
    'LIVE': 'DEAD_AFTER',
    'create': 'init_codebook',
    'draw': 'draw_vectors',
    'is_offered': 'has_codebook',
    'moved_away': 'revived_codes',
    'settle': 'restart_average',
    'start': 'start_from_kmeans',
    'tally': 'count_assignments',
    'update': 'update_codebook',
    'usage': 'usage_metrics',
  },
  'training.config': {
    'WORDS': 'LITERALS',
    'leaves': 'config_leaves',
  },
  'training.distributed': {
    'Interrupt': 'InterruptHandler',
    'LOST': 'CONNECTION_LOST',
    'PATIENCE': 'SHARED_FOLDER_TIMEOUT',
    'ROOM': 'MESSAGE_BYTES',
    'TIMEOUT': 'HEARTBEAT_TIMEOUT',
    'together': 'exit_together',
  },
  'training.flops': {
    'Pair': 'PairFlops',
    'of_pair': 'pair_flops',
    'of_step': 'step_flops',
    'traced': 'trace_step',
  },
  'training.integrity': {
    'unite': 'merge_positions',
  },
  'training.lock': {
    'BEAT': 'BEAT_INTERVAL',
    'LOOK': 'POLL_INTERVAL',
    'Watched': 'OtherLock',
  },
  'training.metrics': {
    'Log': 'MetricLogger',
    'SHOWN': 'SHOWN_RATES',
    'mean': 'mean_metrics',
  },
  'training.optimizer': {
    'held': 'hold_from',
    'make': 'make_optimizer',
    'scaled': 'scale_leaves',
    'stop_frozen': 'stop_frozen_gradients',
  },
  'training.parameters': {
    'of_run': 'resolve_settings',
    'run_settings': 'resolve_settings',
  },
  'training.run': {
    'name_data_option': 'name_data_errors',
    'told_of_data': 'name_data_errors',
  },
  'training.schedule': {
    'tell_schedule': 'warn_of_schedule',
  },
  'training.stages': {
    'build': 'build_stage',
  },
  'training.stages.autoencoder': {
    'autoencoder': 'build',
    'standardise': 'standardize_latents',
  },
  'training.stages.base': {
    'apply': 'apply_module',
    'begin': 'initialize_params',
    'features': 'image_features',
  },
  'training.train_step': {
    'in_pieces': 'scan_pieces',
    'initialiser': 'make_init',
  },
  'training.watch': {
    'WORTH_A_WARNING': 'WARNING_SHARE',
    'Watch': 'MetricWatch',
  },
  'weights.loader': {
    'Checkpoint': 'CheckpointInfo',
    'Parts': 'LazyParams',
  },
  'weights.store.arrays': {
    'Source': 'ParameterSource',
    'ahead': 'prefetch',
    'place': 'read_sharded',
  },
  'weights.store.folder': {
    'Building': 'FolderWriter',
    'WORDS': 'TOKENIZER_FILES',
    'building': 'open_writer',
    'check_place': 'weights.store.replacement:check_destination',
    'copy_words': 'copy_tokenizer_files',
    'load_parts': 'load_params',
    'open_part': 'open_params',
    'reading': 'reading_errors',
    'replacing': 'weights.store.replacement:replace_folder',
    'save_parts': 'save_params',
    'swap': 'weights.store.replacement:swap_folders',
  },
  'weights.torch.conversion_notes': {
    'notes': 'source_notes',
    'taken_files': 'converted_files',
  },
  'weights.torch.convert': {
    'Job': 'Conversion',
    'prepare': 'plan_conversion',
  },
  'weights.torch.files': {
    'files': 'find_files',
  },
  'weights.torch.finite': {
    'Ledger': 'FiniteLedger',
    'nonfinite': 'count_nonfinite',
  },
  'weights.torch.formats': {
    'ABOUT': 'EXPORT_INFO',
    'Found': 'SourceModule',
    'Place': 'ModuleLocation',
    'found_in': 'source_module',
    'kind_of': 'detect_kind',
    'places': 'locations',
    'recognise': 'detect',
  },
  'weights.torch.mapping': {
    'Plan': 'MappingPlan',
    'Row': 'NameRule',
    'plan': 'make_plan',
    'shortened': 'shorten',
    'slots_of': 'slots_for',
  },
  'weights.torch.names_diffusion': {
    'NAMES': 'SUBSTITUTIONS',
    'unet_rows': 'unet_rules',
    'vae_rows': 'vae_rules',
  },
  'weights.torch.names_llama': {
    'llama_rows': 'llama_rules',
  },
  'weights.torch.names_visual': {
    'codes_rows': 'codes_rules',
    'decoder_rows': 'decoder_rules',
    'merger_rows': 'merger_rules',
    'safety_rows': 'safety_rules',
    'tokenizer_rows': 'tokenizer_rules',
    'understanding_rows': 'understanding_rules',
    'vit_rows': 'vit_rules',
  },
  'weights.torch.state_dict_names': {
    'Named': 'NormalizedState',
    'normalise': 'normalize',
    'tie': 'tie_head',
  },
  'weights.torch.vocabulary_growth': {
    'grow': 'grow_rows',
    'grown': 'grown_struct',
  },
  'weights.torch.weight_files': {
    'Name': 'FileName',
    'WEIGHTS': 'WEIGHT_SUFFIXES',
  },
}

MOVED_NAMES = {  # module -> name that it had -> where it is now
  'data.captions_file': {
    'IMAGE_SUFFIXES': 'data.images.IMAGE_SUFFIXES',
    'choose_fields': 'data.captions_fields.choose_fields',
  },
  'data.emoji.questions': {
    'answerable': 'data.prompts.answerable_question',
    'prompt': 'data.prompts.question_prompt',
  },
  'data.formats': {
    'ARRAY_RECORD': 'data.stores.ARRAY_RECORD',
    'pack_record': 'data.stores.pack_record',
    'unpack_record': 'data.stores.unpack_record',
  },
  'data.loader': {
    'corpus': 'data.emoji.corpus.training_texts',
    'examples': 'data.emoji.corpus.examples',
    'sentences': 'data.emoji.corpus.describe_sprite',
  },
  'data.streams': {
    'Shard': 'data.shards.Shard',
    'Stored': 'data.shards.StoreShard',
    'open_stored': 'data.shards.open_stored',
    'shards_of': 'data.shards.shards_of',
    'store': 'data.shards.open_stored',
  },
  'data.transforms': {
    'clean': 'data.cleaning.clean_caption',
  },
  'evaluation.images': {
    'cosine': 'evaluation.tokens.mean_cosine',
    'features': 'evaluation.tokens.features',
    'mean_direction': 'evaluation.tokens.mean_direction',
    'rebuilt_features': 'evaluation.tokens.rebuilt_features',
    'usage': 'evaluation.tokens.codebook_usage',
  },
  'training.loop': {
    'Look': 'training.evaluator.Evaluator',
    'load_parts': 'training.parameters.load_params',
    'open_data': 'training.batches.open_batches',
    'skips': 'training.batches.count_skipped',
    'split_folders': 'training.parameters.split_folders',
  },
  'training.metrics': {
    'ProfilerTrace': 'training.profiler.ProfilerTrace',
    'Trace': 'training.profiler.ProfilerTrace',
    'image_grid': 'visualization.image_grid',
    'sheet': 'visualization.image_grid',
  },
  'training.stages': {
    'abstract_inputs': 'training.train_step.abstract_inputs',
  },
  'training.stages.base': {
    'feature_colors': 'visualization.feature_colors',
    'feature_colours': 'visualization.feature_colors',
    'shade_dropped': 'visualization.shade_dropped_patches',
  },
  'weights.store.arrays': {
    'SMALL_BYTES': 'weights.store.writer.SMALL_BYTES',
    'Writer': 'weights.store.writer.ModuleWriter',
    'checksum': 'weights.store.checksums.checksum',
    'checksums': 'weights.store.checksums.checksums',
    'disk_full': 'weights.store.disk.disk_full',
  },
  'weights.store.folder': {
    'FORMAT': 'weights.store.metadata.FORMAT',
    'bundle': 'weights.store.bundle.bundle',
    'check_codebook': 'weights.store.metadata.check_codebook',
    'check_destination': 'weights.store.replacement.check_destination',
    'has_codebook': 'weights.store.metadata.has_codebook',
    'read_checksums': 'weights.store.metadata.read_checksums',
    'replace_folder': 'weights.store.replacement.replace_folder',
    'swap_folders': 'weights.store.replacement.swap_folders',
  },
  'weights.torch.convert': {
    'ConversionItem': 'weights.torch.conversion_plan.ConversionItem',
    'Item': 'weights.torch.conversion_plan.ConversionItem',
    'VERSION': 'weights.torch.name_tables.VERSION',
  },
  'weights.torch.files': {
    'DTYPES': 'weights.torch.safetensors_files.DTYPES',
    'Digests': 'weights.torch.digests.FileDigests',
    'Tensor': 'weights.torch.tensors.LazyTensor',
    'Writer': 'weights.torch.safetensors_files.SafetensorsWriter',
    'nbytes': 'weights.torch.tensors.nbytes',
    'sha256': 'weights.torch.digests.sha256',
    'to_pickle': 'weights.torch.pickle_files.write_pickle',
    'to_pickles': 'weights.torch.pickle_files.replace_by_pickles',
  },
  'weights.torch.formats': {
    'Fit': 'weights.torch.matching.MappedModule',
    'MappedModule': 'weights.torch.matching.MappedModule',
    'TABLES': 'weights.torch.name_tables.TABLES',
    'blank': 'weights.torch.name_rules.zeros_view',
    'choose_rules': 'weights.torch.name_tables.choose_table',
    'description': 'weights.torch.descriptions.description',
    'descriptions': 'weights.torch.descriptions.descriptions',
    'extractor_config': 'weights.torch.descriptions.extractor_config',
    'find_variant': 'weights.torch.matching.find_variant',
    'fit': 'weights.torch.matching.map_modules',
    'like_of': 'weights.torch.name_tables.as_tree',
    'llama_config': 'weights.torch.descriptions.llama_config',
    'map_modules': 'weights.torch.matching.map_modules',
    'name_rules': 'weights.torch.name_tables.name_rules',
    'safety_config': 'weights.torch.descriptions.safety_config',
    'scheduler_config': 'weights.torch.descriptions.scheduler_config',
    'shapes': 'weights.torch.name_tables.module_shapes',
    'table_of': 'weights.torch.name_tables.choose_table',
    'tables': 'weights.torch.name_tables.name_rules',
    'unet_config': 'weights.torch.descriptions.unet_config',
    'vae_config': 'weights.torch.descriptions.vae_config',
    'zeros_view': 'weights.torch.name_rules.zeros_view',
  },
  'weights.torch.mapping': {
    'TRANSFORMS': 'weights.torch.name_rules.TRANSFORMS',
    'Transform': 'weights.torch.name_rules.Transform',
  },
}


def current(module: types.ModuleType, name: str):
  """What a module has, or had, under an old name.

  Raises:
    AttributeError: it never had that name.
  """
  short = module.__name__.removeprefix(PACKAGE)
  new = NAMES.get(short, {}).get(name)
  elsewhere = MOVED_NAMES.get(short, {}).get(name)
  if elsewhere is not None:
    target, _, attribute = elsewhere.rpartition('.')
    return getattr(importlib.import_module(PACKAGE + target), attribute)
  if new is None:
    raise AttributeError(f'module {module.__name__!r} has no attribute {name!r}')
  owner, _, new = new.rpartition(':')
  return getattr(importlib.import_module(PACKAGE + owner) if owner else module, new)


class Moved(types.ModuleType):
  """An old module: reads and writes go to the new one."""

  def __init__(self, name: str, target: types.ModuleType):
    super().__init__(name, f'Moved to {target.__name__}.')
    self.__dict__['_target'] = target

  def __getattr__(self, name: str):
    target = self.__dict__['_target']
    if not hasattr(target, name):  # it may have come from a third module, under its new name
      for names in NAMES.values():
        if hasattr(target, names.get(name, '')):
          return getattr(target, names[name])
    return getattr(target, name)

  def __setattr__(self, name: str, value) -> None:
    target = self.__dict__.get('_target')
    own = name.startswith('__') or isinstance(value, Moved)  # what the import system sets
    if target is None or own:
      super().__setattr__(name, value)
    else:
      short = target.__name__.removeprefix(PACKAGE)
      setattr(target, NAMES.get(short, {}).get(name, name), value)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds old modules, and gives those with renamed functions their old names too."""

  def find_spec(self, fullname, path=None, target=None):
    """A spec for an old module; for a module with renames, its own spec with a loader that adds them."""
    if not fullname.startswith(PACKAGE):
      return None
    short = fullname[len(PACKAGE) :]  # not removeprefix: the command line runs on any Python 3
    if short in MODULES:
      package = any(name.startswith(f'{short}.') for name in MODULES)
      return importlib.machinery.ModuleSpec(fullname, self, is_package=package)
    if short not in NAMES and short not in MOVED_NAMES:
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
      spec.loader = WithOldNames(spec.loader)
    return spec

  def create_module(self, spec):
    """The view of the new module."""
    short = spec.name.removeprefix(PACKAGE)
    new = PACKAGE + MODULES[short]
    warnings.warn(f'{spec.name} is {new} now', DeprecationWarning, stacklevel=2)
    return Moved(spec.name, importlib.import_module(new))

  def exec_module(self, module):
    """Nothing: the new module has been executed."""


class WithOldNames:
  """A loader that gives its module the old names as well."""

  def __init__(self, loader):
    self.loader = loader

  def __getattr__(self, name: str):
    return getattr(self.__dict__['loader'], name)

  def create_module(self, spec):
    """As the module's own loader does."""
    return self.loader.create_module(spec)

  def exec_module(self, module):
    """As the module's own loader does; then old names are looked up by `current`."""
    self.loader.exec_module(module)
    if '__getattr__' not in module.__dict__:
      module.__getattr__ = lambda name: current(module, name)


def install() -> None:
  """Puts the finder before the usual ones, once."""
  if not any(isinstance(finder, Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())
