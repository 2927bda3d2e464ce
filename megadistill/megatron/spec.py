"""The layer specification: plain torch modules on a CPU, Transformer Engine's on a GPU.

Both have Transformer Engine's parameter names (a linear layer owns the norm before it), so that
one conversion table and one set of checkpoint keys serve both.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from megadistill.megatron.attention import CoreAttention

HAVE_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm that may run on a sequence-parallel shard.

    Megatron's torch norm refuses sequence parallelism; all that it takes is the mark by which
    Megatron finds the gradients to sum over the tensor-parallel group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Norm and column-parallel linear in one module: twin of TELayerNormColumnParallelLinear."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **linear: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **linear)
        self.eps = config.layernorm_epsilon
        weight = torch.ones(input_size, dtype=config.params_dtype)
        self.layer_norm_weight = torch.nn.Parameter(weight)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Output and, if it is not added yet, the bias; arguments as in the parent.

        The norm sees plain rows: a batch dimension of one may have any stride, and with an unusual
        one torch multiplies token by token where the weight is frozen, slower and rounded otherwise.
        """
        rows = x.reshape(-1, x.size(-1))
        normed = functional.rms_norm(rows, rows.shape[1:], self.layer_norm_weight, self.eps)
        result: tuple[Tensor, Tensor | None] = super().forward(
            normed.view(x.shape), *args, **kwargs
        )
        return result

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The linear is cut along its output, the norm is the same on every rank."""
        return make_sharded_tensors_for_checkpoint(  # type: ignore[no-any-return]
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `ValueError` if `precision` cannot be had on `device` with what is installed."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found 'cuda', but torch sees no GPU here; use 'cpu' or 'auto'")
    if device.type == "cuda" and not HAVE_TRANSFORMER_ENGINE:
        raise ValueError(
            "device: found 'cuda', but Transformer Engine is not installed; "
            "install the 'gpu' extra of megadistill"
        )
    if precision.startswith("fp8") and device.type != "cuda":
        raise ValueError(
            f"precision: found {precision!r}, which needs a GPU and Transformer Engine; "
            "expected 'bf16' or 'fp32' on a CPU"
        )


def block_spec(
    config: TransformerConfig, device: torch.device
) -> TransformerBlockSubmodules | ModuleSpec:
    """What a decoder is made of on `device`: all layers of this stage and the final norm."""
    if device.type == "cuda":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layers = [_torch_layer(config.qk_layernorm)] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _torch_layer(qk_norm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=RMSNormColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=RMSNormColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
