"""The subcommands of `emotrain`, one file each. argparse stands here and nowhere else.

A file defines `add_arguments(parser)` and `run(args) -> int`; `run` returns the exit code. The file
of a command is imported when the command is used, so that `emotrain --help` does not wait for
torch.
"""

COMMANDS = {
    "prepare": "turn documents (JSONL, Parquet, text) into token shards",
    "convert": "write tokens of other formats (Dolma, Megatron, MDS, Parquet) as token shards",
    "data": "show what a mixture of data sets reads over a run",
    "train": "train EMO, a standard MoE or a dense model",
    "inspect": "count a configuration's parameters, memory and FLOPs without building it",
    "evaluate": "loss of each domain with all experts and with its best subsets",
    "sweep": "evaluate many models, subsets and seeds, as tables and figures",
    "select": "choose the experts that some text needs, as one small file",
    "extract": "write a checkpoint with only the experts of a subset",
    "experts": "add, remove and list experts that one domain has to itself",
    "generate": "continue a prompt, with all experts or a few",
    "finetune": "tune a model or some of it on documents, on answers, or to a teacher",
    "reinsert": "put a tuned subset back into the model that it was taken from",
    "serve": "serve a checkpoint and subsets of its experts over HTTP",
    "subsets": "combine subsets: union, merge and others, what they share, what each loses",
    "report": "write a run's curves and subsets as one HTML page",
    "explore": "write documents, their tokens and the experts as one page to look at",
    "coverage": "measure which experts domains use, and when they become modules",
    "locality": "measure how few experts serve a document: hit rates of caches and pins",
    "cluster": "group documents and tokens by their experts: subjects, or words?",
    "placement": "choose which experts share a rank, so that fewer tokens travel",
    "plan": "predict memory, traffic and speed of a run on a cluster without one",
    "verify": "check a checkpoint's files against its checksums",
    "import": "read a Hugging Face folder as a checkpoint",
    "export": "write a checkpoint as a Hugging Face folder",
    "kernels": "compile the GPU kernels without a GPU and check their machine code",
    "settings": "list every setting with its default and meaning",
}
"""Name of a subcommand, which is the name of its file, and its one-line help."""
