"""The `train` section of a preset: how long, how fast, on what, and what is written down meanwhile.

Lengths are in optimizer steps, `batch` in sequences per optimizer step over all devices. The learning
rate rises linearly over `warmup` steps, then follows `schedule` down to `min_lr * lr`:

    cosine         half a cosine to the last step
    linear         a straight line to the last step
    wsd            flat, then a straight line over the last `decay` of the steps (warmup-stable-decay)
    inverse-sqrt   lr * sqrt(warmup / step)
    constant       flat
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, Strict

from xtcli.registry import Config, field

Fraction = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Config):
    """Low-rank adapters on frozen weights; `*` is within a name of a module's path, `**` any number of names."""

    rank: int = field("width of an adapter", 8, gt=0)
    alpha: float = field("what an adapter adds is multiplied by alpha / rank", 16.0, gt=0)
    dropout: float = field("dropout in front of an adapter", 0.0, ge=0, lt=1)
    on: Annotated[tuple[str, ...], Strict(False)] = field(
        "paths of the linear layers that get an adapter", ("**.attn.q", "**.attn.v"), min_length=1
    )
    whole: Annotated[tuple[str, ...], Strict(False)] | None = field(
        "paths of modules that are trained as they are; null takes those that the checkpoint of `init` lacks", None
    )


class TrainConfig(Config):
    """Everything about a training run that is neither the model nor its data."""

    init: str | None = field("checkpoint or run whose weights training starts from; null draws fresh ones", None)
    lora: LoraConfig | None = field("train low-rank adapters in place of the weights", None)

    steps: int = field("optimizer steps", 1000, gt=0)
    batch: int = field("sequences per optimizer step", 32, gt=0)
    micro_batch: int | None = field("sequences per forward pass; null takes as many of the batch as fit", None, gt=0)
    context: int | None = field("tokens per sequence; null takes the model's context", None, gt=0)

    lr: float = field("peak learning rate", 3e-4, gt=0)
    min_lr: float = field("learning rate at the end, as a share of the peak", 0.1, ge=0, le=1)
    schedule: Literal["cosine", "linear", "wsd", "inverse-sqrt", "constant"] = field(
        "shape of the learning rate after the warm-up", "cosine"
    )
    warmup: int = field("steps over which the learning rate rises to its peak", 100, ge=0)
    decay: float = field("wsd only: share of the steps over which the learning rate falls", 0.2, gt=0, le=1)
    weight_decay: float = field("AdamW's decay of matrices and tables; gains and biases have none", 0.1, ge=0)
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = field("AdamW's running-mean factors", (0.9, 0.95))
    eps: float = field("AdamW's term added to the denominator", 1e-8, gt=0)
    clip: float | None = field("largest norm of all gradients together; null does not clip", 1.0, gt=0)
    on_non_finite: Literal["stop", "skip"] = field(
        "a loss or gradient that is NaN or infinite: stop before the step, or skip the step and count it", "stop"
    )

    device: Literal["auto", "cuda", "mps", "cpu"] = field("where to run; auto takes the fastest there is", "auto")
    precision: Literal["auto", "fp32", "bf16", "bf16-true", "fp16"] = field(
        "number format of the matrix products; auto takes bf16 where the device has it; bf16-true: also that of the "
        "weights and all of AdamW's, rounded by chance",
        "auto",
    )
    compile: Literal["auto"] | bool = field("torch.compile the model; auto does on a GPU", "auto")
    checkpointing: bool = field("recompute activations in the backward pass: less memory, more time", False)
    workers: int = field("processes that prepare batches; 0 prepares them in the training process", 0, ge=0)

    log_every: int = field("steps between two lines of metrics", 10, gt=0)
    validate_every: int = field("steps between two validations; 0 validates only at the end", 100, ge=0)
    validate_batches: int = field("batches of one validation, at most", 20, gt=0)
    sample_every: int = field("steps between two samples; 0 samples only at the end", 100, ge=0)
    sample_prompts: Annotated[tuple[str, ...], Strict(False)] = field(
        "texts that samples continue or fill; none takes the start of validation documents", ()
    )
    sample_tokens: int = field("new tokens of a sample", 64, gt=0, tiny=32)
    save_every: int = field("steps between two checkpoints; 0 saves only at the end", 500, ge=0)
    keep: int = field("newest checkpoints to keep", 2, gt=0)
    keep_best: bool = field("also keep the checkpoint of the lowest validation loss", True)
    tensorboard: bool = field("also write TensorBoard event files (needs the extra 'tensorboard')", False)

    seed: int = field("start of every random number: weights, order, dropout", 0, ge=0)
    deterministic: bool = field("use only kernels that give the same bits each time", False)

    def tiny(self) -> Self:
        """About a minute on two CPU cores: few short sequences, fp32, a learning rate that suits a small model."""
        steps = min(self.steps, 200)
        return self.model_copy(
            update={
                "steps": steps,
                "batch": min(self.batch, 8),
                "micro_batch": None if self.micro_batch is None else min(self.micro_batch, 8),
                "context": min(self.context or 64, 64),
                "lr": 1e-3,
                "warmup": min(self.warmup, steps // 10),
                "precision": "fp32",
                "compile": False,
                "log_every": min(self.log_every, 10),
                "validate_every": min(self.validate_every, 50),
                "validate_batches": min(self.validate_batches, 8),
                "sample_every": min(self.sample_every, 100),
                "save_every": min(self.save_every, 100),
            }
        )
