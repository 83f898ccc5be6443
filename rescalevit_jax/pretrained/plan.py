"""Plan the loading of a file: copy, convert, initialize or ignore arrays."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import transfer


@dataclasses.dataclass(frozen=True)
class Plan:
  """The treatment of each array, by keys as in `param_keys`.

  Attributes:
    copy: model keys to copy, with the file's key.
    zero: model keys to set to zeros.
    derive: model keys to compute from copied kernels, for sigma_reparam.
    initial: model keys to leave at their initial values.
    ignored: file keys that are not used.
    unexpected: file keys that are neither used nor ignored, which is an error.
    notes: reasons, one sentence each.
  """

  copy: dict[str, str]
  zero: set[str]
  derive: set[str]
  initial: set[str]
  ignored: set[str]
  unexpected: list[str]
  notes: list[str]

  @property
  def unsupported(self) -> set[str]:
    """File keys whose effect the model cannot reproduce."""
    return {key for key in self.ignored if not _is_sigma(key)}

  @property
  def sigma_to_plain(self) -> bool:
    """True if layers with sigma_reparam in the file become plain layers."""
    return any(map(_is_sigma, self.ignored))


def make(
  file: Mapping[str, Any], model: Mapping[str, Any], reinit_head: bool
) -> Plan:
  """Plan the loading of a file into a model.

  Only keys and shapes of the model are used. If `reinit_head`, the head starts
  at zeros even if the file's head fits.
  """
  our_names = transfer.renamed_affine(file, model)
  file_keys = {our_names.get(key, key): key for key in file}
  renamed = {key: file[file_key] for key, file_key in file_keys.items()}
  initial: set[str] = set()
  ignored: set[str] = set()
  notes = []
  for ours, theirs, note in transfer.differences(
    renamed, model, affine_only=bool(our_names)
  ):
    initial |= ours
    ignored |= theirs
    if note:
      notes.append(note)
  zero: set[str] = set()
  if reason := transfer.why_new_head(renamed, model, reinit_head):
    zero.update(param_keys.HEAD)
    notes.append(f"the head starts at zeros: {reason}")
  derive = set(filter(_is_sigma, initial))
  plan = Plan(
    copy={
      key: file_keys.get(key, key)
      for key in model
      if key not in initial and key not in zero
    },
    zero=zero,
    derive=derive,
    initial=initial - derive,
    ignored={file_keys[key] for key in ignored},
    unexpected=[
      file_key
      for key, file_key in file_keys.items()
      if key not in model and key not in ignored
    ],
    notes=notes,
  )
  if plan.sigma_to_plain:
    notes.append("the file's layers with sigma_reparam become plain ones")
  return plan


def _is_sigma(key: str) -> bool:
  return detect.option(key) == "sigma_reparam"
