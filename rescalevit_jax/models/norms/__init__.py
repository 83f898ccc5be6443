"""Every norm by name.

A norm prepares the input of a branch (attention or MLP) or of the head. To add
one, write a class and add it to `NORMS`. `residuals` has the functions that
add a branch's output to the residual stream.
"""

from rescalevit_jax.models.norms import base
from rescalevit_jax.models.norms import batch_norm
from rescalevit_jax.models.norms import bhyt
from rescalevit_jax.models.norms import center_norm
from rescalevit_jax.models.norms import fade
from rescalevit_jax.models.norms import group_norm
from rescalevit_jax.models.norms import identity
from rescalevit_jax.models.norms import layer_norm
from rescalevit_jax.models.norms import pointwise
from rescalevit_jax.models.norms import prepbn
from rescalevit_jax.models.norms import rescale
from rescalevit_jax.models.norms import rms_norm
from rescalevit_jax.models.norms import taper

NORMS: dict[str, type[base.Norm]] = {
  "LN": layer_norm.LayerNorm,
  "BN": batch_norm.BatchNorm,
  "GN": group_norm.GroupNorm,
  "Rescale": rescale.Rescale,
  "RMS": rms_norm.RMSNorm,
  "DyT": pointwise.DyT,
  **pointwise.SHIFTED,
  "Cal": pointwise.Cal,
  "BN2": batch_norm.BatchNorm2,
  "Fade": fade.Fade,
  "DyISRU": pointwise.DyISRU,
  "Linear": pointwise.Linear,
  "TaperLN": taper.TaperLN,
  "TaperRMS": taper.TaperRMS,
  "PRepBN": prepbn.PRepBN,
  "BHyT": bhyt.BHyT,
  "Center": center_norm.CenterNorm,
  "Identity": identity.Identity,
}
