"""The `data` section of a preset: which text, which part of it, how much."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from xtcli.registry import Config, field

TINY_DOCUMENTS = 400


class DataConfig(Config):
    """Where documents come from. `data: FOLDER` is short for `data: {source: FOLDER}`."""

    shorthand: ClassVar[str] = "source"

    source: str = field(
        "file, folder or name of a dataset on the Hugging Face hub; 'stdlib' is the Python source on this machine",
        "stdlib",
        min_length=1,
    )
    subset: str | None = field("configuration of a hub dataset, where it has several", None)
    split: str = field("split of a hub dataset", "train", min_length=1)
    column: str = field("column or JSON key that holds the text", "text", min_length=1)
    source_column: str | None = field("for pairs: column of the text that is read", None)
    target_column: str | None = field("for pairs: column of the text that is to be written", None)
    glob: str | None = field("files of a folder to take, such as '**/*.py'; null takes every text file", None)
    streaming: bool = field("read a hub dataset over the network as it is tokenised, without a download", False)
    limit: int | None = field("documents to read at most; null reads all", None, gt=0)
    validation: Annotated[float, Field(ge=0, lt=1)] | str = field(
        "held out for validation: a fraction of the documents, or a file, folder or split of its own", 0.05
    )
    workers: int | None = field("threads that tokenise; null takes one per core", None, ge=1)
    cache: str | None = field("folder of token caches; null takes $XT_CACHE, else ~/.cache/xt", None)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {cls.shorthand: value} if isinstance(value, str) else value

    def tiny(self) -> Self:
        """At most 400 documents."""
        return self.model_copy(update={"limit": min(self.limit or TINY_DOCUMENTS, TINY_DOCUMENTS)})
