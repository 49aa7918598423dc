"""What a decoder looks like: the frozen, validated configuration stored in a checkpoint's manifest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dimension = Annotated[int, Field(ge=1, le=2**24)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

WeightDtype = Literal["float32", "bfloat16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RopeScaling(_Frozen):
    """How rotary frequencies are stretched past the context a model was trained on.

    Kinds and formulas are those of Hugging Face ``transformers`` (``modeling_rope_utils``): ``linear`` divides
    every frequency; ``llama3`` divides the low ones and blends the middle; ``yarn`` (arXiv:2309.00071) blends by
    wavelength between ``beta_fast`` and ``beta_slow`` and scales attention by ``attention_factor``.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_context: Dimension | None = None
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _context_is_known(self) -> RopeScaling:
        if self.kind != "linear" and self.original_context is None:
            raise ValueError(f"rope scaling {self.kind} needs original_context")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope scaling llama3 needs high_freq_factor > low_freq_factor")
        return self


class LlamaConfig(_Frozen):
    """A Llama-style decoder: RMSNorm, rotary positions, grouped KV heads, SwiGLU.

    ``head_dim`` is given, never derived: several families have one that differs from hidden_size / num_heads.
    """

    architecture: Literal["llama"] = "llama"
    vocab_size: Dimension
    hidden_size: Dimension
    num_layers: Dimension
    num_heads: Dimension
    num_kv_heads: Dimension
    head_dim: Dimension
    mlp_size: Dimension
    norm_eps: PositiveFloat
    rope_theta: Annotated[float, Field(gt=1, allow_inf_nan=False)]  # its logarithm divides
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    context_max: Dimension
    dtype: WeightDtype

    @model_validator(mode="after")
    def _shapes_agree(self) -> LlamaConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        return self

    @property
    def query_heads_per_kv(self) -> int:
        """How many query heads share one KV head."""
        return self.num_heads // self.num_kv_heads
