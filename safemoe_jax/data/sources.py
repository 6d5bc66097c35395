"""A data source of the configuration: which file, which records, in which format -> samples."""

from __future__ import annotations

from dataclasses import dataclass

from safemoe_jax.data.files import Row, read_rows
from safemoe_jax.data.filters import keep, parse_where
from safemoe_jax.data.formats import FORMATS, Sample, detect_format, to_sample
from safemoe_jax.errors import InputError

__all__ = ["FORMATS", "Sample", "SourceConfig", "read_prompts", "read_source"]


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples. The fields act in this order: path, where, skip, take, share.

    Attributes:
        path: a JSON, JSON Lines, CSV, parquet or text file; a hub id `owner/name[:config]` when no such file
            exists.
        format: a name in `FORMATS`; `auto` decides by the fields of the first record.
        take: use at most this many records, the first ones after `where` and `skip`.
        where: keep records that pass, for example `is_safe == False`; see `data/filters.py`.
        share: this source's share of the samples of the final mixture, between 0 and 1; see
            `data/mixture.py`.
        split: the split of a hub data set; default `train`, or the only one.
        skip: leave out this many records, the first ones after `where`.
    """

    path: str
    format: str = "auto"
    take: int | None = None
    where: str | None = None
    share: float | None = None
    split: str | None = None
    skip: int = 0


def read_source(config: SourceConfig) -> list[Sample]:
    """Reads the samples of one source, in file order.

    Raises:
        InputError: naming file, line and field: unreadable or empty file, malformed JSON, a sample without
            its field, no record left by `where` and `skip`, an unknown format, a nonsensical `take`, `skip`
            or `share`.
    """
    _check(config)
    rows = _select(read_rows(config.path, config.split), config)
    format_name = detect_format(rows[0]) if config.format == "auto" else config.format
    return [to_sample(row, format_name, config.path) for row in rows]


def read_prompts(config: SourceConfig) -> list[Sample]:
    """`read_source` for prompt sets (D_h, benign prompts, test instructions): the answers are dropped."""
    return [
        Sample(
            system=sample.system, user=sample.user, source=sample.source, index=sample.index,
            messages=sample.messages[:-1] if sample.answer is not None else sample.messages,
            extra=sample.extra, place=sample.place,
        )
        for sample in read_source(config)
    ]  # fmt: skip


def _check(config: SourceConfig) -> None:
    if config.format != "auto" and config.format not in FORMATS:
        raise InputError(
            f"unknown data format '{config.format}'",
            where=config.path,
            expected=f"auto, {', '.join(FORMATS)}",
        )
    if config.take is not None and config.take < 1:
        raise InputError(
            f"take is {config.take}", where=config.path, expected="a positive number, or none for all"
        )
    if config.skip < 0:
        raise InputError(f"skip is {config.skip}", where=config.path, expected="0 or more")
    if config.share is not None and not 0 < config.share <= 1:
        raise InputError(
            f"share is {config.share}", where=config.path, expected="a number above 0 and at most 1"
        )


def _select(rows: list[Row], config: SourceConfig) -> list[Row]:
    given = len(rows)
    if config.where is not None:
        clauses = parse_where(config.where)
        rows = [row for row in rows if keep(row, clauses)]
    end = None if config.take is None else config.skip + config.take
    chosen = rows[config.skip : end]
    if not chosen:
        raise InputError(
            f"no record is left of {given} after where and skip",
            where=f"{config.path}, where: {config.where}, skip: {config.skip}",
            expected="a filter that keeps at least one record",
        )
    return chosen
