"""Plan the loading of a file: copy, convert, initialize or ignore arrays."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rescalevit_jax.pretrained import detect
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.pretrained import transfer

_SIGMA = "sigma_reparam"


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
    sigma_to_plain: whether the file's layers with sigma_reparam become plain.
    notes: reasons, one sentence each.
  """

  copy: Mapping[str, str]
  zero: frozenset[str]
  derive: frozenset[str]
  initial: frozenset[str]
  ignored: frozenset[str]
  unexpected: tuple[str, ...]
  sigma_to_plain: bool
  notes: tuple[str, ...]

  @property
  def unsupported(self) -> frozenset[str]:
    """File keys whose effect the model cannot reproduce."""
    return frozenset(key for key in self.ignored if not _is_sigma(key))


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
  difference = transfer.find(renamed, model, affine_only=bool(our_names))
  initial, ignored = difference.initial, difference.ignored
  notes = difference.notes

  zero: set[str] = set()
  if reason := transfer.why_new_head(renamed, model, reinit_head):
    zero.update(param_keys.HEAD)
    notes.append(f"the head starts at zeros: {reason}")
  sigma_to_plain = any(map(_is_sigma, ignored))
  if sigma_to_plain:
    notes.append("the file's layers with sigma_reparam become plain ones")
  derive = {key for key in initial if _is_sigma(key)}
  return Plan(
    copy={
      key: file_keys.get(key, key)
      for key in model
      if key not in initial and key not in zero
    },
    zero=frozenset(zero),
    derive=frozenset(derive),
    initial=frozenset(initial - derive),
    ignored=frozenset(file_keys[key] for key in ignored),
    unexpected=tuple(
      file_key
      for key, file_key in file_keys.items()
      if key not in model and key not in ignored
    ),
    sigma_to_plain=sigma_to_plain,
    notes=tuple(notes),
  )


def _is_sigma(key: str) -> bool:
  return detect.option(key) == _SIGMA
