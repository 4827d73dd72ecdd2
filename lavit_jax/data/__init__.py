"""From stored records to the batches of a training step.

    formats.py      tars and Parquet files (tars.py, archives.py, sparse.py, parquets.py)
    stores.py       ArrayRecord, tensorflow-datasets, folders of images (folders.py)
    sources.py      the list of sources in a config: opened, and dealt to shards
    shards.py       the order of records (streams.py, open_units.py), whatever the processes
    row_workers.py  threads that make rows (transforms.py, text_fields.py); skips.py counts
    loader.py       batches, of sources or of composed examples (composed.py, emoji/)

record.py has the record, or the reason for its absence, that every format yields.
"""
