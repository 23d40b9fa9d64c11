"""A file or folder of any supported format in, checked manifest rows and failures out.

`source.read_source` is the entry. Each format has one reader that yields `raw.RawRow` and `raw.BadRow`; `rows` checks
them. A new format is one module with a reader, its name in `detect.FORMATS`, and a case in `source`.
"""
