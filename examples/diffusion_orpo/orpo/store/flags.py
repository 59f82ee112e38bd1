"""The flags that name shards and say how to read them."""

from ..runtime.flags import Flag, FlagGroup


SHARDS = FlagGroup(
    "shards",
    (
        Flag(
            "dataset_path",
            "Folders of shards, paths with braces or wildcards, s3:// or https:// URLs with braces, or `pipe:` commands. "
            "Commands run in a shell: name only those you trust. WDS_SECURE=1 in the environment refuses them.",
            nargs="+",
            required=True,
        ),
        Flag(
            "num_train_examples",
            "Samples in all shards, checked against the manifest. Without a manifest, they are counted at the start.",
            int,
        ),
        Flag(
            "shuffle_buffer_size",
            "Samples, undecoded, that all processes together shuffle among; 1 keeps the order within shards. A resumed run "
            "must keep it.",
            int,
            1024,
            range=(1,),
        ),
        Flag(
            "max_bad_samples",
            "Share of a process's samples that may be bad before the run stops, from 0 to 1.",
            float,
            0.01,
            range=(0, 1),
        ),
    ),
)
