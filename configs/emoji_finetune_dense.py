"""The dense counterpart of emoji_finetune.py; starts from a run of emoji_pretrain_dense.py.

    vmoe train --config emoji_finetune_dense --workdir runs/emoji_finetune_dense \
        --init runs/emoji_pretrain_dense
"""

from pathlib import Path

from vmoe.config import load, replace

config = replace(load(Path(__file__).with_name("emoji_finetune.py")), model=dict(sparse_blocks=()))
