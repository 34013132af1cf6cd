"""Schemas of every table vlrank reads or writes. They live here and nowhere else.

Ids are 1-based and dense: ``item_id`` 1..I and ``user_id`` 1..U, assigned as a pure function of the input. A reader
that wants zero-padding can therefore use 0 as "no item".
"""

import pyarrow as pa

SCHEMA_VERSION = 1
"""Written to ``manifest.json``; a dataset of another version is refused with a message."""

ITEMS = pa.schema(
    [
        ("item_id", pa.int32()),
        ("source_id", pa.string()),
        ("text", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("description", pa.string()),
        ("image_path", pa.string()),  # relative to the dataset folder; null without a picture
        ("image_url", pa.string()),
    ]
)

SEQUENCES = pa.schema(
    [
        ("user_id", pa.int32()),
        ("source_user", pa.string()),
        ("item_ids", pa.list_(pa.int32())),  # oldest first
        ("timestamps", pa.list_(pa.int64())),  # seconds since 1970, aligned with item_ids
    ]
)

FETCHED = pa.schema(
    [
        ("source", pa.string()),  # URL, or absolute path of a local picture
        ("image_path", pa.string()),  # relative to the folder of the table; null after a failure
        ("error_type", pa.string()),  # null after a success
        ("message", pa.string()),
    ]
)
"""The outcome of each requested picture."""

PICTURES = pa.schema([("item_id", pa.int32()), *FETCHED])
"""``pictures.parquet`` of a dataset: one row per item that has a picture's source, tried or not."""

GENERATED = pa.schema(
    [
        ("item_id", pa.int32()),
        ("text", pa.string()),
        ("model", pa.string()),
        ("prompt_id", pa.string()),
        ("input_hash", pa.string()),  # of model, prompt and the item's picture and text: a change means "do it again"
    ]
)
"""Captions and semantic summaries."""

CANDIDATES = pa.schema(
    [
        ("split", pa.string()),  # "val" or "test"
        ("user_id", pa.int32()),
        ("item_ids", pa.list_(pa.int32())),  # best first
        ("scores", pa.list_(pa.float32())),
    ]
)

RANKINGS = pa.schema(
    [
        ("split", pa.string()),
        ("user_id", pa.int32()),
        ("item_ids", pa.list_(pa.int32())),  # best first
        ("scores", pa.list_(pa.float32())),  # log-probabilities
        ("source", pa.string()),  # how the order was made, e.g. "qwen3vl/caption"
    ]
)

QUARANTINE = pa.schema(
    [
        ("key", pa.string()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
    ]
)

BULK_QUARANTINE = pa.schema([*QUARANTINE, pa.field("input_hash", pa.string())])
"""Quarantine of resumable stages (`vlrank.bulk`): a row whose input changed since is tried again."""
