"""What a checkpoint can do, by its interface and its modules."""

from __future__ import annotations

from lavit_jax.errors import UserError
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.settings import CODES
from lavit_jax.weights.loader import LazyParams


class Capabilities:
  """Checks that a task can be done, before anything is computed.

  Attributes:
    modules: the Flax modules.
    params: of the modules that the checkpoint has.
  """

  modules: LavitModules
  params: LazyParams

  def require_codes(self) -> None:
    """Checks that the language model has learned codes.

    Raises:
      UserError: it sees images by another interface than LaVIT's.
    """
    if self.modules.interface is not None:
      raise UserError(
        f'{self._interface_limit()}; to draw codes, open a checkpoint of LaVIT itself'
      )

  def require_image_alone(self) -> None:
    """Checks that the interface reads images without a text.

    Raises:
      UserError: it is that of InstructBLIP.
    """
    interface = self.modules.interface
    if isinstance(interface, QFormerInterface) and interface.vocab_size:
      raise UserError(
        'the Q-Former of this model reads the instruction, too (InstructBLIP), in the vocabulary '
        'of BERT, which is not read here; open a checkpoint of BLIP-2'
      )

  def require_vectors(self) -> None:
    """Checks that the language model has learned to regress the vectors of images.

    Raises:
      UserError: its interface is not Emu's.
    """
    if self.modules.regressing_interface is None:
      raise UserError(
        f'this model sees images by the interface {self.modules.interface_name!r}, whose vectors '
        "are not regressed; open a checkpoint with the interface 'emu'"
      )

  def require_drawing(self) -> None:
    """Checks that the language model can draw, and that the U-Net reads what it draws.

    Raises:
      UserError: the interface is for reading alone, or the U-Net has another condition.
    """
    if self.modules.regressing_interface is None:
      self.require_codes()
    elif self.modules.condition_name != self.modules.interface_name or 'unet' not in self.params:
      name = self.modules.interface_name
      raise UserError(
        f'this model draws images as vectors of the interface {name!r}, and this checkpoint has no '
        f'U-Net that reads them; train one (configs/detokenizer.py, '
        f'--config.detokenizer.condition={name}) and bundle it too'
      )

  def require_unet_of_codes(self) -> None:
    """Checks that the U-Net, if there is one, reads codes.

    Raises:
      UserError: it reads the vectors of an interface.
    """
    if self.modules.condition_name != CODES:
      raise UserError(
        f'the U-Net of this checkpoint reads vectors of the interface '
        f'{self.modules.condition_name!r}, not codes; to decode codes, bundle a U-Net of stage '
        'detokenizer that reads them'
      )

  def require_tokenizer(self) -> None:
    """Checks that images can become codes.

    Raises:
      UserError: there is no visual tokenizer, for another interface than LaVIT's needs none.
    """
    if self.modules.interface is not None and 'tokenizer' not in self.params:
      raise UserError(f'{self._interface_limit()}; to tokenize, open a checkpoint of LaVIT itself')

  def _interface_limit(self) -> str:
    does = 'captions and answers, and draws nothing'
    if self.modules.regressing_interface is not None:
      does = 'captions and answers, and draws vectors'
    return (
      f'this model sees images by the interface {self.modules.interface_name!r}, which has no '
      f'codes: it {does}'
    )
