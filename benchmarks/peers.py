"""Models as other libraries make them, each at the best of its documented settings, by the row of `train_step.py`."""

from typing import Any

import torch

RANK, SEQ_LEN = 16, 2048


def floor(base: str) -> Any:
    """The frozen base with Liger's kernels, whose activations alone get gradients."""
    model = liger(base)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def liger(base: str) -> Any:
    """The base with all of Liger's kernels, in bf16."""
    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    return AutoLigerKernelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).cuda()


def with_lora(model: Any) -> Any:
    """PEFT's LoRA with weights in bf16, as its input casts cost most where they are fp32."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(torch.bfloat16)


def peft_liger(base: str) -> Any:
    """PEFT over Liger's kernels, without compilation."""
    return with_lora(liger(base))


def peft_compile(base: str) -> Any:
    """PEFT over transformers' own model, compiled as a whole."""
    from transformers import AutoModelForCausalLM

    model = with_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).cuda())
    model.compile()
    return model


def adamw_liger_compile(base: str) -> Any:
    """All weights in fp32, for a forward pass in bf16, over Liger's kernels, its layers compiled.

    Liger's loss cannot be traced where weights are in fp32, so the whole cannot be compiled.
    """
    return with_layers_compiled(liger(base).float())


def adamw_bf16_liger_compile(base: str) -> Any:
    """All weights in bf16, without copies in fp32, over Liger's kernels, its layers compiled."""
    return with_layers_compiled(liger(base))


def with_layers_compiled(model: Any) -> Any:
    """A model whose layers are each compiled."""
    for layer in model.model.layers:
        layer.compile()
    return model


def unsloth(base: str) -> Any:
    """Unsloth's LoRA without its checkpointing, which is slower where memory suffices."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        base, max_seq_length=SEQ_LEN, dtype=torch.bfloat16, load_in_4bit=False
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, target_modules=targets, use_gradient_checkpointing=False
    )


PEERS = {
    "floor": floor,
    "peft-liger": peft_liger,
    "peft-compile": peft_compile,
    "unsloth": unsloth,
    "adamw-liger-compile": adamw_liger_compile,
    "adamw-bf16-liger-compile": adamw_bf16_liger_compile,
}
# What a row trains; others LoRA.
TRAINED = {"floor": "", "adamw-liger-compile": "full", "adamw-bf16-liger-compile": "full"}
