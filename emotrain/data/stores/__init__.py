"""Tokens and texts as others write them, read where they lie: a `TokenStore` for each format.

    plain      arrays of tokens that EOS separates, without a header: Dolma, OLMo
    megatron   `.bin` with its `.idx`: Megatron and what came of it
    mds        MosaicML's shards of samples
    columns    token ids, or text, in Parquet, Arrow and JSONL
    listing    which files a path means: a file, a folder, a pattern, a list, a mix
    content    bytes of a file by place, and what is said where they are not there
    remote     the same of object stores and web servers
    prepared   our own data sets there
    vocabulary the tokens of files that do not say which they hold

`convert` writes any of them as a data set (`shuffle`). `emotrain.data.opening` chooses among them.
"""
