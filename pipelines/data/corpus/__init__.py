"""Source rows in; a manifest of usable rows, a quarantine table and a table of duplicates out.

`sources/` reads the formats, `preparation` collects checked rows and writes the files of `qformer prepare`,
`manifest` reads a manifest back, `manifest_files` has its file layout, `quarantine` the table of failures.
"""
