"""The one place that constructs models, and fills them from Hugging Face weights.

A model's last stage returns hidden states: log-probabilities come from the vocabulary head alone,
which never holds a whole row of logits for every token.
"""

import math
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megadistill.config.schema import ParallelConfig, Precision
from megadistill.convert.families import ModelSpec, RopeScaling, check_tp, padded_vocab
from megadistill.convert.hf_files import SafetensorsReader
from megadistill.convert.mapping import load_shard
from megadistill.megatron.megatron_call import calls_megatron
from megadistill.megatron.spec import block_spec, check_precision
from megadistill.megatron.world import World

FP8_RECIPES = {"fp8_current": "tensorwise", "fp8_blockwise": "blockwise"}


class OutputWeight(ColumnParallelLinear):  # type: ignore[misc]
    """Holds the output layer's weight and passes hidden states through."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """The hidden states as they came, and no bias."""
        return hidden, None


def check_model(
    spec: ModelSpec, parallel: ParallelConfig, precision: Precision, device: torch.device
) -> None:
    """Raise `ValueError` if the layout does not divide the model, or it cannot have `precision`."""
    check_precision(precision, device)
    check_tp(spec, parallel.tp)
    if spec.num_layers % parallel.pp:
        raise ValueError(
            f"parallel.pp: found {parallel.pp}, expected a divisor of {spec.num_layers} layers"
        )


@calls_megatron
def build_model(
    spec: ModelSpec, parallel: ParallelConfig, precision: Precision, world: World
) -> GPTModel:
    """This rank's part of the model, its parameters not yet filled.

    Parameters are bf16, or fp32 with `precision: fp32`; fp8 keeps bf16 parameters and multiplies in
    fp8. The last stage's output is `[1, T, hidden_size]` (T / tp with sequence parallelism).
    Raises `ValueError` as `check_model` does.
    """
    check_model(spec, parallel, precision, world.device)
    config = transformer_config(spec, parallel, precision, world.device)
    model = GPTModel(
        config,
        block_spec(config, world.device),
        vocab_size=padded_vocab(spec, parallel.tp),
        max_sequence_length=spec.max_positions,
        pre_process=world.is_first_stage,
        post_process=world.is_last_stage,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        pg_collection=world.groups,
    )
    if world.is_last_stage:
        _return_hidden_states(model)
    if spec.rope_scaling is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, spec.rope_scaling)
    return model


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, precision: Precision, device: torch.device
) -> TransformerConfig:
    """Megatron's configuration of the model's shape, its layout and its arithmetic."""
    on_gpu = device.type == "cuda"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        **_shape(spec),
        **_layout(parallel),
        **_recompute(parallel.recompute),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8="hybrid" if precision in FP8_RECIPES else None,
        fp8_recipe=FP8_RECIPES.get(precision, "delayed"),
        # Every parameter is read from a checkpoint, so nothing is drawn at random first. Switching
        # initialisation off would also skip the marks by which Megatron tells shards from copies.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Gradients stay sums: a sample's weights already hold its normaliser.
        calculate_per_token_loss=True,
        # Fused kernels are CUDA kernels; gradient accumulation would also need apex.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=on_gpu,
        apply_rope_fusion=on_gpu,
        batch_p2p_sync=on_gpu,
    )


@torch.no_grad()
def load_hf(
    model: GPTModel, spec: ModelSpec, model_dir: Path, parallel: ParallelConfig, world: World
) -> None:
    """Fill this rank's parameters from the safetensors files of `model_dir`, one at a time."""
    missing = dict(model.named_parameters())
    shards = load_shard(
        spec,
        SafetensorsReader(model_dir),
        tp=parallel.tp,
        tp_rank=world.groups.tp.rank(),
        layers=stage_layers(spec, world),
        first=world.is_first_stage,
        last=world.is_last_stage,
    )
    for name, tensor in shards:
        parameter = missing.pop(name)
        assert parameter.shape == tensor.shape, (name, parameter.shape, tensor.shape)
        parameter.copy_(tensor)
    assert not missing, f"parameters that the conversion table does not fill: {sorted(missing)}"


def stage_layers(spec: ModelSpec, world: World) -> range:
    """Global numbers of the layers that this pipeline stage holds."""
    per_stage = spec.num_layers // world.groups.pp.size()
    first = world.groups.pp.rank() * per_stage
    return range(first, first + per_stage)


def output_weight(model: GPTModel) -> torch.nn.Parameter:
    """The last stage's `[V / tp, hidden_size]` output projection, tied or not."""
    tied = model.share_embeddings_and_output_weights
    weight: torch.nn.Parameter = (
        model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    )
    return weight


def scaled_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rotary frequencies: low ones divided by `factor`, middle ones interpolated.

    Megatron has the formula with only `factor` free; fp32 in the order of Hugging Face's.
    """
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    slow = torch.where(wavelength > longest, inv_freq / scaling.factor, inv_freq)
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * slow / scaling.factor + smooth * slow
    is_between = ~(wavelength < shortest) * ~(wavelength > longest)
    return torch.where(is_between, between, slow)


def _leave(weight: Tensor) -> Tensor:
    """Initialise a weight by leaving it as it is."""
    return weight


def _shape(spec: ModelSpec) -> dict[str, Any]:
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": spec.ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.rms_norm_eps,
        "qk_layernorm": spec.qk_norm,
        "add_qkv_bias": spec.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sequence_parallel,
        "variable_seq_lengths": parallel.pp > 1,
        # Variable lengths are refused with the default dispatcher, even without experts.
        "moe_token_dispatcher_type": "alltoall",
    }


def _recompute(what: str) -> dict[str, Any]:
    if what == "none":
        return {}
    if what == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _return_hidden_states(model: GPTModel) -> None:
    """Swap the output layer for one that holds the same weight and multiplies nothing."""
    stock = model.output_layer
    output = OutputWeight(
        stock.input_size,
        stock.output_size,
        config=model.config,
        init_method=model.config.init_method,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=stock.tp_group,
    )
    if stock.weight is not None:
        # The same Parameter: it carries Megatron's marks for sharding, tying and gradient norms.
        del output.weight
        output.weight = stock.weight
    model.output_layer = output
