"""What a family of checkpoints is: data, and a little Python where data will not do.

    Family   the config template, the name rules, and everything else that a file of the family may hold
    Form     one class of the reference: which heads it has, and what its trunk is called

Names of the trunk are written without the prefix that the forms give it (`transformer.`, `bert.`, none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xtcli.convert.rules import Rule
from xtcli.registry import Config

Shapes = Mapping[str, tuple[int, ...]]


class AnyLength(int):
    """The usual length of a side of a tensor that nothing reads, whose length no part of our config says: it equals
    every length, so that such a tensor is kept as it is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    __hash__ = int.__hash__


def _nothing(config: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Drop:
    """A buffer that old files hold and every build computes anew; `check` says whether it holds what it must."""

    template: str
    holds: str
    check: Callable[[Tensor, Config], bool]


@dataclass(frozen=True)
class Form:
    """One class of the reference.

    name: the class. prefix: what precedes the trunk's names. heads, more: templates of `model.heads` and of
    further keys of `model`. spare: groups of tensors (whole name -> shape) that files of this form may hold
    though it does not use them; a group is there wholly or not at all. fits: whether a config.json may be of this form,
    where its `architectures` name several. trunk, ties, dead: those of the family unless said.
    """

    name: str
    prefix: str
    heads: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)
    spare: Callable[[Config], Sequence[Shapes]] = lambda config: ()
    fits: Callable[[Mapping[str, Any]], bool] = lambda values: True
    trunk: Callable[[Config], Sequence[Rule]] | None = None
    ties: Callable[[Any, str], Mapping[str, str]] | None = None
    dead: Callable[[Config], Shapes] | None = None


@dataclass(frozen=True)
class Family:
    """A family. `trunk`, `drops` and `dead` hold names without the form's prefix.

    template: form -> the template of `model`. trunk, heads: name rules for a model's config. ties: (config, prefix) ->
    whole names that stand for the tensor of another whole name. dead: tensors that a file must hold and no network
    uses. aliases: endings of older names and what they are now. fixed: keys that must have one of these values where
    they appear. neutral: keys that do not touch the network. mixed: endings of the names that may be float32 where all
    others are narrower. whole: endings of those that hold int64. kernel: the reference's attention that obeys every
    option. objectives: kind of graph -> objective of its language models, or head -> its objective, where it is not the
    usual one. known: what some of the dead tensors hold, where that follows from the config. rescaled: endings of our
    modules whose weights the reference multiplies while it runs, or whose outputs it lays out otherwise, so that their
    own outputs are not compared. time_first: the reference's modules work on (T, B, D). runnable: within it the
    reference runs, where it does not by itself.
    """

    name: str
    types: tuple[str, ...]
    title: str
    template: Callable[[Form], Mapping[str, Any]]
    forms: tuple[Form, ...]
    trunk: Callable[[Config], Sequence[Rule]]
    heads: Sequence[Rule]
    ties: Callable[[Any, str], Mapping[str, str]] = lambda config, prefix: {}
    dead: Callable[[Config], Shapes] = _nothing
    drops: tuple[Drop, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    mixed: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    kernel: str = "eager"
    objectives: Mapping[str, str] = field(default_factory=dict)
    known: Callable[[Config], Mapping[str, Tensor]] = _nothing
    time_first: bool = False
    runnable: Callable[[], AbstractContextManager[None]] = nullcontext
    rescaled: tuple[str, ...] = ()


COMMON_NEUTRAL = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path _commit_hash return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss finetuning_task label2id
    task_specific_params tokenizer_class prefix bos_token_id eos_token_id sep_token_id decoder_start_token_id
    pad_token_id problem_type id2label num_labels use_cache gradient_checkpointing chunk_size_feed_forward
    attn_implementation _attn_implementation _attn_implementation_autoset
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens output_past _num_labels xla_device transformers.js_config
    """.split()
)
"""Keys that every config.json may have and that do not touch the network."""

COMMON_FIXED: Mapping[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
}
"""Keys that every config.json may have and that must have one of these values."""
