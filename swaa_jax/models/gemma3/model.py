"""Gemma 3: the common decoder with a norm after each block too."""

from typing import ClassVar

from swaa_jax.models._blocks import DecoderLayer
from swaa_jax.models._causal_lm import CausalLM
from swaa_jax.models._gemma import GemmaLayer


class Gemma3ForCausalLM(CausalLM):
    """See `swaa_jax.models.CausalLM`."""

    layer_class: ClassVar[type[DecoderLayer]] = GemmaLayer
