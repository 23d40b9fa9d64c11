"""Row numbers in, Arrow tables of decoded rows and `SampleBatch` out.

`plan` makes the tables that say what is decoded when, `decode_rows` decodes them, `batch` and `audio_rows` carry
pixels, tokens and sound through Arrow. `token_codec` stores encoder tokens in fp16, bf16 or int8; `stage_report` shows
the time of each stage.
"""
